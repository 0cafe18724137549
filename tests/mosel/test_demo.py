"""The demo: how it chooses floors and deadline, how it counts, and one run on real recordings."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mosel.client import Assurance, ModelInfo, Prediction, SetInfo
from mosel.config import reference_models
from mosel.data import datasets
from mosel.demo.plan import (
    LOSSES,
    Sets,
    choose_floors,
    choose_settings,
    expected,
    frontier,
    full_set,
    tight_deadline_ms,
    without_slowest,
)
from mosel.demo.plot import write_plot
from mosel.demo.tables import deadline_table, floor, floors_table, guaranteed, remarks, share
from mosel.errors import DatasetError, DeadlineExceeded, DeadlineUnreachable
from mosel.packages.model_package import load_package
from mosel.profiles.labelled_run import JobAnswer, Setting, percentile, summarise

SETTING, SETTING_WITHOUT = Setting(0.85, 4, 2), Setting(None, 4, 2)


def profile(alone_ms: dict[str, float], accuracy: dict[str, float]) -> Sets:
    """Sets whose encoders run in parallel."""
    return {name: SetInfo(value, max(alone_ms[m] for m in name.split("+")), True) for name, value in accuracy.items()}


def calibrated(sets: Sets, bounds: dict[str, float]) -> Sets:
    """The same with what calibration rows guarantee of each."""
    return {name: replace(info, guaranteed_accuracy=bounds[name]) for name, info in sets.items()}


DIGITS = profile(
    {"pen": 0.2, "image": 0.9, "audio": 2.1},
    {
        "pen": 0.66,
        "image": 0.71,
        "audio": 0.86,
        "image+pen": 0.91,
        "audio+pen": 0.94,
        "audio+image": 0.96,
        "audio+image+pen": 0.98,
    },
)
WEAK = profile(
    {"a": 1.0, "b": 2.0, "c": 4.0},
    {"a": 0.3, "b": 0.4567, "c": 0.5, "a+b": 0.49, "a+c": 0.6, "b+c": 0.7, "a+b+c": 0.8},
)
CALIBRATED = calibrated(
    DIGITS,
    {
        "pen": 0.6172,
        "image": 0.6811,
        "audio": 0.7938,
        "image+pen": 0.8711,
        "audio+pen": 0.8978,
        "audio+image": 0.9338,
        "audio+image+pen": 0.9622,
    },
)
SINGLE = profile({"a": 1.0}, {"a": 0.7})


def answer(
    name: str, items: int, right: int, ms: float, expected: float = 0.9, assurance: Assurance | None = None
) -> JobAnswer:
    said = assurance or Assurance()
    prediction = Prediction("0" * 32, np.zeros((items, 2)), (), (name,) * items, expected, 0.0, ms, 0.0, (), said)
    return JobAnswer(items, right, ms, prediction)


def at_least(bound: float, saved: float = 0.0) -> Assurance:
    return Assurance("calibrated", guaranteed_accuracy=bound, confidence=0.95, saved=saved)


def at_most(loss: float) -> Assurance:
    return Assurance("calibrated", guaranteed_loss=loss, confidence=0.95)


def refused(message: str) -> JobAnswer:
    return JobAnswer(4, 0, 1.0, None, DeadlineUnreachable(message))


def test_the_frontier_has_no_set_that_another_beats() -> None:
    # All sets with audio have the same latency; the one with less computation is the cheaper.
    names = frontier(DIGITS, expected(DIGITS))
    assert names == ["pen", "image", "image+pen", "audio+pen", "audio+image", "audio+image+pen"]
    assert full_set(DIGITS) == names[-1]


def test_floors_are_what_can_be_guaranteed_rounded_down_and_one_that_is_only_expected() -> None:
    assert choose_floors(CALIBRATED) == [0.61, 0.87, 0.93, 0.97]
    best = max(info.guaranteed_accuracy or 0.0 for info in CALIBRATED.values())
    assert best < 0.97 < max(info.accuracy for info in CALIBRATED.values())


def test_a_floor_between_close_numbers_has_more_digits() -> None:
    close = {name: replace(info, guaranteed_accuracy=info.accuracy - 0.006) for name, info in DIGITS.items()}
    assert choose_floors(close)[-1] == 0.977


def test_floors_without_calibration_rows_are_what_is_expected() -> None:
    assert choose_floors(WEAK) == [0.3, 0.49, 0.7]
    assert choose_floors(SINGLE) == []


def test_settings_are_no_floor_losses_and_floors() -> None:
    settings = choose_settings(CALIBRATED, SETTING_WITHOUT)
    assert settings[0] == SETTING_WITHOUT
    assert [(s.max_loss, s.floor) for s in settings[1:4]] == [(loss, None) for loss in LOSSES]
    assert [(s.max_loss, s.floor) for s in settings[4:]] == [(None, f) for f in choose_floors(CALIBRATED)]


def test_the_deadline_lies_between_the_fast_set_and_the_full_one() -> None:
    assert without_slowest(DIGITS) == "image+pen"
    assert without_slowest(SINGLE) is None
    assert tight_deadline_ms(10.0, 40.0) == pytest.approx(20.0)


def test_percentiles_are_measured_times() -> None:
    times = [float(ms) for ms in range(100, 0, -1)]
    assert (percentile(times, 50), percentile(times, 99)) == (50.0, 99.0)
    assert percentile([7.0], 99) == 7.0
    assert math.isnan(percentile([], 50))


def test_a_row_counts_items_and_jobs() -> None:
    late = JobAnswer(4, 0, 9.0, None, DeadlineExceeded("late"))
    answers = [answer("pen", 4, 3, 2.0, 0.7), answer("audio+pen", 1, 1, 8.0, 0.9), refused("too slow"), late]
    row = summarise(SETTING, answers)
    assert (row.in_time, row.refused, row.missed, row.items) == (2, 1, 1, 5)
    assert row.shares == {"pen": 0.8, "audio+pen": 0.2}
    assert row.accuracy == pytest.approx(0.8)
    assert row.expected == pytest.approx((4 * 0.7 + 0.9) / 5)
    assert (row.p50_ms, row.p99_ms) == (2.0, 8.0)
    assert row.standard_error == pytest.approx(math.sqrt(0.8 * 0.2 / 5))
    assert row.refusal == "too slow"


def test_an_answer_after_the_deadline_is_missed() -> None:
    answers = [answer("pen", 4, 3, 5.0), answer("pen", 4, 3, 20.5)]
    row = summarise(Setting(None, 4, 1, deadline_ms=20.0), answers)
    assert (row.in_time, row.refused, row.missed) == (1, 0, 1)


def test_a_row_guarantees_what_its_weakest_answer_does_and_saves_their_mean() -> None:
    answers = [answer("pen", 3, 3, 1.0, assurance=at_least(0.9, 0.8)), answer("a", 1, 1, 1.0, assurance=at_least(0.95))]
    row = summarise(SETTING, answers)
    assert row.assurance.guaranteed_accuracy == 0.9
    assert row.assurance.saved == pytest.approx(0.6)
    assert guaranteed(row) == "at least 0.900"
    unsure = summarise(SETTING, [*answers, answer("pen", 1, 1, 1.0)])
    assert guaranteed(unsure) == "expected only"
    losses = summarise(SETTING, [answer("a", 1, 1, 1.0, assurance=at_most(loss)) for loss in (0.0291, 0.02)])
    assert guaranteed(losses) == "at most 0.030 worse"


def test_floors_are_in_words() -> None:
    asked = [SETTING, SETTING_WITHOUT, *(replace(SETTING_WITHOUT, max_loss=loss) for loss in (0.01, 0.03, 0.005))]
    assert [floor(summarise(setting, [])) for setting in (*asked, replace(SETTING, floor=0.9))] == [
        "at least 0.85",
        "no floor",
        "at most 1 point worse",
        "at most 3 points worse",
        "at most 0.5 points worse",
        "at least 0.90",
    ]


@pytest.mark.parametrize(
    ("right", "said", "missed"),
    [
        # Measured 0.900, everything 0.960; two standard errors are 0.019.
        (900, at_least(0.93), True),
        (900, at_least(0.91), False),
        (900, at_most(0.03), True),
        (900, at_most(0.06), False),
        (900, replace(at_least(0.93), guarantee="none"), True),
        (900, Assurance(), False),
    ],
)
def test_a_missed_guarantee_is_marked_and_told(right: int, said: Assurance, missed: bool) -> None:
    row = summarise(SETTING, [answer("pen", 1000, right, 1.0, assurance=said)])
    console = Console(width=100)
    for table in (floors_table, deadline_table):
        with console.capture() as capture:
            console.print(table([row], 0.96))
        assert ("0.900 ± 0.009*" in capture.get()) == missed
    assert [line.startswith("0.900 ± 0.009* MISSES") for line in remarks([row], 0.96)] == [True] * missed


def test_what_answers_say_of_their_guarantees_is_told_once() -> None:
    said = replace(at_least(0.8), note="approximate: calibrated on few groups")
    rows = [summarise(SETTING, [answer("pen", 4, 4, 1.0, assurance=said)])] * 2
    assert list(remarks(rows, 1.0)) == [said.note]


@pytest.mark.parametrize("columns", [80, 100])
def test_the_tables_fit(columns: int) -> None:
    missed = [answer(name, 50, 30, 1234.5, assurance=at_most(0.03)) for name in ("acc+gyro+motion", "acc+gyro")]
    none = Assurance("none", guaranteed_accuracy=0.9, confidence=0.95)
    rows = [
        summarise(replace(SETTING_WITHOUT, max_loss=0.03), missed),
        summarise(SETTING, [answer("acc+gyro+motion", 4, 3, 123.4, assurance=none)]),
        summarise(SETTING, [refused("no")]),
    ]
    console = Console(width=columns)
    with console.capture() as capture:
        console.print(floors_table(rows, 0.96))
        console.print(deadline_table(rows, 0.96))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text
    assert "nan" not in text
    assert text.count("0.600 ± 0.049*") == 2
    if columns == 100:
        assert text.split().count("acc+gyro+motion") == 4


def test_shares_are_all_or_nothing_only_where_they_are() -> None:
    assert [share(part) for part in (0.0, 0.001, 0.5, 0.999, 1.0, math.nan)] == ["0%", "1%", "50%", "99%", "100%", "-"]


def test_the_picture_is_written_also_without_any_answer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'demo'")
    model = ModelInfo("m", "1", "", True, {}, dict(DIGITS), ())
    rows = [summarise(SETTING, [answer("pen", 4, 3, 9.0)]), summarise(SETTING, [refused("no")])]
    for name, measured in (("some.png", rows), ("none.png", rows[1:])):
        write_plot(tmp_path / "new" / name, model, measured)
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the services need Linux")
def test_a_run_on_real_recordings(tmp_path: Path) -> None:
    try:
        found = datasets.find(load_package(reference_models() / "har"))
    except DatasetError as error:
        pytest.skip(str(error))
    main = "from mosel.cli import main; main()"
    command = [sys.executable, "-P", "-c", main, "demo", "--model", "har", "--items", "60"]
    run = subprocess.run(
        [*command, "--data", str(found.folder)], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith("model har")
    # Rows of the tables: the floor in words, then the largest share of the inputs that were run.
    row_of = re.compile(r"(no floor|at most \d points?|at least 0\.\d+)(?: worse)? +(\S+) ")
    table = [(matched[1], matched[2]) for line in lines if (matched := row_of.match(line))]
    asked = [text for text, _ in table[: len(table) // 2]]
    assert asked[:4] == ["no floor", "at most 1 point", "at most 3 points", "at most 6 points"]
    assert all(text.startswith("at least 0.") for text in asked[4:])
    assert [text for text, _ in table] == [text for text, _ in table[: len(table) // 2]] * 2
    inputs = dict(table[: len(table) // 2])
    assert inputs["no floor"] == "acc+gyro+motion"
    assert len(set(inputs.values())) >= 3
    assert inputs[asked[4]] == "motion"
    # The last floor is not guaranteed, and the table and the line below say so.
    assert any("not guaranteed;" in line for line in lines)
    assert any(f"min_accuracy {asked[-1].split()[-1]} cannot be guaranteed" in line for line in lines)
    assert "stopped" in lines[-1]
