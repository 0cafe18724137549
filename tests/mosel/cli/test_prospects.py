"""What a loss would bring, by rows whose truth is known."""

from datetime import UTC, datetime
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from mosel.cli.losses import LOSSES
from mosel.cli.observe import _Observed, _show
from mosel.cli.prospects import Prospect, prospects, rows_of
from mosel.client import ObservedItems, ObserveEvent
from mosel.packages.calibration import Calibration
from mosel.packages.model_package import ModelPackage
from mosel.profiles.files import CallCost, Point, Profile, wilson
from mosel.profiles.hardware import Hardware, this_software

SETS = ("photo", "photo+scent", "scent")


def drawn(jobs: int, size: int, disagree: dict[str, float], alike: bool = False) -> list[ObservedItems]:
    """Jobs whose items a set answers otherwise than everything does with some chance; all alike, or each by itself."""
    rng = np.random.default_rng(jobs)
    found = []
    for number in range(jobs):
        answers = np.repeat(rng.integers(0, 3, (size, 1)), 3, axis=1)
        for column, name in enumerate(SETS):
            other = rng.random(1 if alike else size) < disagree.get(name, 0.0)
            answers[:, column] = np.where(other, (answers[:, 1] + 1) % 3, answers[:, 1])
        found.append(ObservedItems(number, size, answers.astype(np.int32), np.ones((size, 3), np.float32)))
    return found


def rows(fruit: ModelPackage, observed: list[ObservedItems]) -> Calibration:
    return rows_of(fruit, SETS, observed, "drawn")


@pytest.fixture
def profile(fruit: ModelPackage) -> Profile:
    """Photo takes 8 ms an item, scent 1, fusion 1; two calls at the same time."""

    def points(ms: float) -> tuple[Point, ...]:
        return tuple(Point(batch_size=size, p50_ms=ms * size, p95_ms=ms * size) for size in (1, 2, 4, 8))

    return Profile(
        model="fruit", version="1", content_hash=fruit.content_hash,
        hardware=Hardware(cpu="some", cores=2, device="cpu", workers=2, torch_threads={}), versions=this_software(),
        measured_on=datetime.now(UTC).date(), quick=True, concurrency=2, accuracy_source="drawn",
        accuracy_measured=False, accuracy={name: wilson(0.9, 1000) for name in SETS},
        encoders={"photo": points(8.0), "scent": points(1.0)}, fusion=dict.fromkeys(SETS, points(1.0)),
        calls={lane: CallCost(overhead_ms=0.0) for lane in ("photo", "scent", "fusion")}, edge_ms=1.0,
    )  # fmt: skip


def test_rows_are_in_groups_by_job_and_a_quarter_of_the_jobs_is_for_design(fruit: ModelPackage) -> None:
    observed = drawn(40, 3, {"photo": 0.5})
    made = rows(fruit, observed)
    assert (made.content_hash, made.is_labelled, made.group_names) == (fruit.content_hash, False, ["job"])
    np.testing.assert_array_equal(made.groups[:, 0], np.repeat(np.arange(40), 3))
    np.testing.assert_array_equal(made.answers, np.concatenate([items.answers for items in observed]))
    by_job = made.certify.reshape(40, 3)
    assert (by_job.all(1) | ~by_job.any(1)).all()
    assert by_job.all(1).sum() == 30
    np.testing.assert_array_equal(rows(fruit, observed).certify, made.certify)


def test_a_set_that_always_agrees_saves_what_the_profile_says(fruit: ModelPackage, profile: Profile) -> None:
    found = prospects(rows(fruit, drawn(3000, 1, {"photo": 0.5})), profile, [1] * 3000)
    assert [prospect.loss for prospect in found] == list(LOSSES)
    for prospect in found:
        # Everything costs 8 + 1 + 1 ms, scent 1 + 1; both encoders run at the same time; each call holds one of two.
        assert (prospect.before.cost_ms, prospect.after.cost_ms) == (160, 32)
        assert prospect.saved == prospect.most_saved == 0.8
        assert (prospect.before.p50_ms, prospect.after.p50_ms) == pytest.approx((10, 3))
        assert prospect.before.items_per_s == pytest.approx(200)
        assert prospect.after.items_per_s == pytest.approx(1000)
        assert prospect.items_for_most == 3000


def test_few_items_save_less_and_it_is_said_how_many_it_takes(fruit: ModelPackage, profile: Profile) -> None:
    # What loses 1 point may be run for all items at 3 points, which few items cannot guarantee.
    observed = [drawn(jobs, 1, {"photo": 0.5, "scent": 0.01}) for jobs in (100, 6400)]
    few, many = ({e.loss: e for e in prospects(rows(fruit, jobs), profile, [1])} for jobs in observed)
    assert 0.3 < few[0.03].saved < 0.7
    assert few[0.03].most_saved == 0.8
    assert 100 < few[0.03].items_for_most <= 3200
    assert many[0.03].saved == 0.8
    assert many[0.03].items_for_most == 6400


def test_jobs_of_items_that_are_alike_guarantee_less(fruit: ModelPackage, profile: Profile) -> None:
    apart, alike = ({e.loss: e for e in prospects(rows(fruit, drawn(100, 20, {"scent": 0.03}, alike)), profile, [1])}
                    for alike in (False, True))  # fmt: skip
    # Photo always agrees, and saves the tenth that scent takes.
    assert apart[0.06].saved == pytest.approx(0.8)
    assert 0.1 <= alike[0.06].saved < 0.8


def test_one_job_guarantees_nothing(fruit: ModelPackage, profile: Profile) -> None:
    assert prospects(rows(fruit, drawn(1, 50, {})), profile, [50]) == []


def shown(fruit: ModelPackage, found: list[Prospect], monkeypatch: pytest.MonkeyPatch) -> str:
    seen = _Observed()
    seen.jobs = drawn(100, 1, {})
    seen.last = ObserveEvent("r", SETS, (), 10.0, 110, 110, 10, 900.0, 100.0)
    out = StringIO()
    monkeypatch.setattr("mosel.cli.starting.console", Console(file=out, width=160))
    _show(found, seen, fruit)
    return out.getvalue()


def test_the_table_says_what_is_saved_and_how_to_switch_it_on(
    fruit: ModelPackage, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = prospects(rows(fruit, drawn(100, 1, {"photo": 0.5, "scent": 0.01})), profile, [1])
    text = shown(fruit, found, monkeypatch)
    assert "guaranteed by 100 items" in text
    assert "not observed: 10 items of jobs that fixed their modalities" in text
    first = next(prospect.loss for prospect in found if prospect.saved >= found[-1].saved / 2)
    assert f"max_accuracy_loss = {first:g} in {fruit.folder / 'model.toml'}" in text
    assert f"MOSEL_GATEWAY__MAX_ACCURACY_LOSS={first:g}" in text
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if "│" in line}
    assert "80%" in lines["6 points"]
    assert "10.0 -> 3.0" in lines["6 points"]
    assert "these" in lines["6 points"]
    # 10 items a second were observed.
    needed = next(prospect.items_for_most for prospect in found if prospect.loss == 0.03)
    assert f"{needed} items, 0:0{needed // 600}:{needed // 10 % 60:02}" in lines["3 points"]


def test_without_rows_enough_no_line_is_shown(fruit: ModelPackage, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(fruit, [], monkeypatch)
    assert "observe longer" in text
    assert "max_accuracy_loss" not in text
