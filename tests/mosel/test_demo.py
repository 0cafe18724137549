"""The demo: how it chooses floors and deadline, how it counts, and one run on real recordings."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mosel.client import ModelInfo, Prediction, SetInfo
from mosel.config import reference_models
from mosel.data import datasets
from mosel.demo.plan import (
    PREFERRED_FLOORS,
    Sets,
    cheapest,
    choose_floors,
    frontier,
    full_set,
    tight_deadline_ms,
    without_slowest,
)
from mosel.demo.plot import write_plot
from mosel.demo.tables import deadline_table, floors_table, share, size
from mosel.errors import DatasetError, DeadlineExceeded, DeadlineUnreachable
from mosel.packages.model_package import load_package
from mosel.profiles.labelled_run import JobAnswer, Setting, percentile, summarise

SETTING = Setting(0.85, 4, 2)


def profile(alone_ms: dict[str, float], accuracy: dict[str, float]) -> Sets:
    """Sets whose encoders run in parallel."""
    return {name: SetInfo(value, max(alone_ms[m] for m in name.split("+")), True) for name, value in accuracy.items()}


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
EASY = profile({"a": 1.0, "b": 2.0}, {"a": 0.96, "b": 0.98, "a+b": 0.99})
SINGLE = profile({"a": 1.0}, {"a": 0.7})


def answer(name: str, items: int, right: int, ms: float, expected: float = 0.9) -> JobAnswer:
    prediction = Prediction("0" * 32, np.zeros((items, 2)), (), (name,) * items, expected, 0.0, ms, 0.0)
    return JobAnswer(items, right, ms, prediction)


def refused(message: str) -> JobAnswer:
    return JobAnswer(4, 0, 1.0, None, DeadlineUnreachable(message))


def test_a_set_costs_the_sum_of_its_modalities() -> None:
    # All sets with audio have the same latency; the one with less computation is the cheaper.
    assert cheapest(DIGITS, 0.86) == "image+pen"
    assert cheapest(DIGITS, 0.92) == "audio+pen"
    assert cheapest(DIGITS, 0.99) is None


def test_the_frontier_has_no_set_that_another_beats() -> None:
    names = frontier(DIGITS)
    assert names == ["pen", "image", "image+pen", "audio+pen", "audio+image", "audio+image+pen"]
    assert full_set(DIGITS) == names[-1]


def test_the_preferred_floors_are_used_where_they_lead_to_different_sets() -> None:
    assert choose_floors(DIGITS) == PREFERRED_FLOORS
    assert [cheapest(DIGITS, floor) for floor in PREFERRED_FLOORS] == ["pen", "image+pen", "audio+image"]


@pytest.mark.parametrize("sets", [WEAK, EASY])
def test_floors_come_from_the_profile_where_the_preferred_ones_say_nothing(sets: Sets) -> None:
    floors = choose_floors(sets)
    chosen = [cheapest(sets, floor) for floor in floors]
    assert floors != PREFERRED_FLOORS
    assert None not in chosen
    assert len({*chosen, full_set(sets)}) == min(4, len(frontier(sets)))


def test_derived_floors_are_rounded_down_to_what_the_set_meets() -> None:
    assert choose_floors(WEAK) == (0.3, 0.49, 0.7)
    assert choose_floors(SINGLE) == ()


def test_the_reference_models_lead_to_at_least_three_sets() -> None:
    alone_ms = {"pen": 0.2, "image": 0.9, "audio": 2.1, "motion": 0.15, "gyro": 0.35, "acc": 0.8}
    for name in ("digits", "har"):
        accuracy = load_package(reference_models() / name).accuracy
        assert accuracy is not None
        sets = profile(alone_ms, {"+".join(sorted(key)): value for key, value in accuracy.sets.items()})
        chosen = {cheapest(sets, floor) for floor in choose_floors(sets)} | {full_set(sets)}
        assert len(chosen - {None}) >= 3


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
    row = summarise(SETTING, answers, bytes_read=30, bytes_per_item=10)
    assert (row.in_time, row.refused, row.missed, row.items) == (2, 1, 1, 5)
    assert row.shares == {"pen": 0.8, "audio+pen": 0.2}
    assert row.accuracy == pytest.approx(0.8)
    assert row.expected == pytest.approx((4 * 0.7 + 0.9) / 5)
    assert (row.p50_ms, row.p99_ms) == (2.0, 8.0)
    assert row.saved == pytest.approx(0.4)
    assert row.refusal == "too slow"


def test_an_answer_after_the_deadline_is_missed() -> None:
    answers = [answer("pen", 4, 3, 5.0), answer("pen", 4, 3, 20.5)]
    row = summarise(Setting(None, 4, 1, deadline_ms=20.0), answers, 0, 1)
    assert (row.in_time, row.refused, row.missed) == (1, 0, 1)


def test_the_tables_fit_into_80_columns() -> None:
    rows = [
        summarise(SETTING, [answer("acc+gyro+motion", 4, 3, 123.4)], 832_000, 208_000),
        summarise(SETTING, [refused("no")], 0, 10),
    ]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(floors_table(rows))
        console.print(deadline_table(rows))
    text = capture.get()
    assert "…" not in text
    assert text.split().count("acc+gyro+motion") == 2
    assert "832 kB" in text
    assert "nan" not in text


def test_numbers_are_written_with_units() -> None:
    assert [size(n) for n in (12, 1500, 832_000, 18_300_000)] == ["12 B", "1.5 kB", "832 kB", "18.3 MB"]
    assert [share(part) for part in (0.0, 0.5, 0.99996, 1.0, math.nan)] == ["0.0%", "50.0%", "99.9%", "100.0%", "-"]


def test_the_picture_is_written_also_without_any_answer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'demo'")
    model = ModelInfo("m", "1", "", True, {}, dict(DIGITS), ())
    rows = [summarise(SETTING, [answer("pen", 4, 3, 9.0)], 1, 1), summarise(SETTING, [refused("no")], 0, 1)]
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
    table = [line.split() for line in lines if line.strip().startswith(("none ", "0."))]
    assert [row[0] for row in table] == ["none", "0.60", "0.85", "0.95"] * 2
    floors = table[:4]
    assert floors[0][1] == "acc+gyro+motion"
    assert len({row[1] for row in floors}) >= 3
    # Motion alone: 64 of 3136 bytes are read.
    assert floors[1][1] == "motion"
    assert floors[1][-1] == "98.0%"
    # From the right: after the sets, their shares follow where the measured costs make a mix the cheapest.
    assert all(0.5 < float(row[-8]) <= 1 for row in floors)
    assert "stopped" in lines[-1]
