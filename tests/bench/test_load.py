"""`mosel bench load`: arrivals, steps, and reports in the shape of ghz's."""

import json
import math
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bench.load.report import About, report
from bench.load.run import table
from bench.load.steps import Plan, Step
from bench.outcomes import Ending, Outcome
from bench.serving import Gateway
from bench.workload import Arrival
from mosel.errors import DeadlineExceeded, InternalError, JobCancelled, MoselError, Overloaded
from mosel.launcher import Launcher

BEGAN = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
# What ghz writes, https://ghz.sh/docs/output and runner/reporter.go.
GHZ_KEYS = {
    *("name", "endReason", "options", "date", "count", "total", "average", "fastest", "slowest", "rps"),
    *("errorDistribution", "statusCodeDistribution", "latencyDistribution", "histogram", "details", "tags"),
}


def answered(ms: float, at_s: float = 0.0, accuracy: float = 0.9, slo: float = 100.0) -> Outcome:
    arrival = Arrival(at_s, 2, slo, 0.8)
    return Outcome(arrival, Ending.ANSWERED, at_s + ms / 1000, (("audio", 2),), accuracy, lag_s=0.001)


def ended(ending: Ending, error: MoselError, ms: float = 5.0) -> Outcome:
    return Outcome(Arrival(0.0, 2, 100.0, 0.8), ending, ms / 1000, error=error)


def step(*outcomes: Outcome, rate: float = 10.0, seconds: float = 2.0) -> Step:
    return Step(rate, seconds, outcomes, BEGAN)


def reported(*steps: Step, **plan: object) -> dict[str, object]:
    about = About(Gateway("127.0.0.1:1"), "fruit", "made up", Plan(tuple(s.rate for s in steps), **plan))  # type: ignore[arg-type]
    # As it is after a file.
    parsed: dict[str, object] = json.loads(json.dumps(report(about, steps), allow_nan=False))
    return parsed


def test_a_report_has_what_ghz_writes() -> None:
    made = reported(step(*(answered(ms) for ms in range(1, 101))))
    assert made.keys() - GHZ_KEYS == {"mosel"}
    assert made.keys() >= GHZ_KEYS
    assert (made["count"], made["total"], made["rps"]) == (100, 2_000_000_000, 50.0)
    assert (made["fastest"], made["slowest"], made["average"]) == (1_000_000, 100_000_000, 50_500_000)
    assert made["date"] == "2024-05-06T07:08:09+00:00"
    assert made["latencyDistribution"] == [
        {"percentage": percent, "latency": percent * 1_000_000} for percent in (10, 25, 50, 75, 90, 95, 99)
    ]


def test_statuses_and_errors_are_counted_as_go_writes_them() -> None:
    made = reported(
        step(
            answered(10),
            ended(Ending.REFUSED, Overloaded("full")),
            ended(Ending.REFUSED, Overloaded("full")),
            ended(Ending.EXPIRED, DeadlineExceeded("late")),
            ended(Ending.FAILED, JobCancelled("gone")),
            ended(Ending.FAILED, InternalError("a bug")),
        )
    )
    assert made["statusCodeDistribution"] == {
        "OK": 1,
        "ResourceExhausted": 2,
        "DeadlineExceeded": 1,
        "Canceled": 1,
        "Internal": 1,
    }
    assert made["errorDistribution"] == {
        "rpc error: code = ResourceExhausted desc = full": 2,
        "rpc error: code = DeadlineExceeded desc = late": 1,
        "rpc error: code = Canceled desc = gone": 1,
        "rpc error: code = Internal desc = a bug": 1,
    }
    details = made["details"]
    assert isinstance(details, list)
    assert [detail["status"] for detail in details[:2]] == ["OK", "ResourceExhausted"]
    assert details[0] == {"timestamp": "2024-05-06T07:08:09+00:00", "latency": 10_000_000, "error": "", "status": "OK"}
    # Refusals are fast: they would make the answers look fast.
    assert (made["average"], made["slowest"]) == (10_000_000, 10_000_000)


def test_without_answers_there_is_no_distribution() -> None:
    made = reported(step(ended(Ending.REFUSED, Overloaded("full"))))
    assert made["latencyDistribution"] is None
    assert made["histogram"] is None
    assert (made["fastest"], made["average"], made["count"]) == (0, 0, 1)


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=200))
def test_every_answer_is_in_one_bucket(times: list[float]) -> None:
    made = reported(step(*map(answered, times)))
    buckets = made["histogram"]
    assert isinstance(buckets, list)
    assert len(buckets) == 11
    assert sum(bucket["count"] for bucket in buckets) == len(times)
    assert sum(bucket["frequency"] for bucket in buckets) == pytest.approx(1)
    marks = [bucket["mark"] for bucket in buckets]
    assert marks == sorted(marks)
    assert marks[-1] * 1000 == pytest.approx(max(times), abs=1e-6)


def test_rising_steps_are_one_run_with_each_step_inside() -> None:
    made = reported(step(answered(10), answered(20)), step(answered(30), rate=30.0), latency_slo_ms=25.0)
    assert (made["count"], made["total"]) == (3, 4_000_000_000)
    options = made["options"]
    assert isinstance(options, dict)
    assert [options[f"load-{key}"] for key in ("schedule", "start", "end", "step")] == ["step", 10, 30, 20]
    inner = made["mosel"]
    assert isinstance(inner, dict)
    assert [(s["rate"], s["count"], s["slowest"]) for s in inner["steps"]] == [
        (10.0, 2, 20_000_000),
        (30.0, 1, 30_000_000),
    ]


def test_goodput_is_in_time_and_accurate_enough() -> None:
    of_four = step(answered(99), answered(101), answered(50, accuracy=0.79), ended(Ending.REFUSED, Overloaded("full")))
    assert of_four.goodput == 0.5
    assert of_four.count(Ending.REFUSED) == 1
    assert of_four.ms(50, Ending.REFUSED) == 5.0
    assert math.isnan(of_four.ms(50, Ending.EXPIRED))
    assert of_four.lag_ms(99) == pytest.approx(1.0)


def test_the_table_shows_a_line_per_step() -> None:
    console = Console(width=200)
    with console.capture() as shown:
        console.print(table(Plan((10.0, 20.0)), [step(answered(10)), step(rate=20.0)]))
    lines = shown.get().splitlines()
    assert len([line for line in lines if re.match(r"\s*[12]0 ", line)]) == 2


@pytest.mark.parametrize("seed", range(3))
def test_arrivals_are_poisson(seed: int) -> None:
    times = [arrival.at_s for arrival in Plan((1,)).arrivals(100.0, 200.0, seed)]
    gaps = np.diff([0.0, *times])
    assert len(times) == pytest.approx(20_000, rel=0.05)
    assert all(gap > 0 for gap in gaps)
    # An exponential distribution's deviation is its mean; that of regular arrivals would be 0.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert times == [arrival.at_s for arrival in Plan((1,)).arrivals(100.0, 200.0, seed)]


def test_arrivals_follow_a_trace(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("second,requests\n0,10\n1,30\n")
    plan = Plan((1,), items=3, min_accuracy=0.7, latency_slo_ms=50.0, trace=tmp_path / "trace.csv")
    arrivals = [*plan.arrivals(100.0, 2.0, 0)]
    assert len([arrival for arrival in arrivals if arrival.at_s < 1]) == pytest.approx(50, abs=1)
    assert len(arrivals) == pytest.approx(200, abs=1)
    assert {(a.size, a.deadline_ms, a.min_accuracy) for a in arrivals} == {(3, 50.0, 0.7)}


def test_the_command_loads_a_running_gateway(
    services: Launcher, run_mosel: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    file = tmp_path / "report.json"
    done = run_mosel(
        *("bench", "load", "--address", services.address, "--rates", "20,40", "--seconds", "1", "--warm-up-s", "0.5"),
        *("--items", "3", "--min-accuracy", "0.7", "--latency-slo-ms", "20000", "--json", str(file)),
    )
    assert done.returncode == 0, done.stderr
    assert "no package of 'fruit'" in done.stdout
    assert "floor 0.7, SLO 20000 ms" in done.stdout
    made = json.loads(file.read_text())
    steps = made["mosel"]["steps"]
    assert [s["rate"] for s in steps] == [20.0, 40.0]
    assert made["count"] == sum(s["count"] for s in steps) > 20
    assert made["statusCodeDistribution"] == {"OK": made["count"]}
    assert all(s["goodputItemsPerSecond"] == pytest.approx(3 * s["goodputJobsPerSecond"]) for s in steps)
    assert all(s["expectedAccuracy"] >= 0.7 for s in steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", "0,5"], "--rates is '0,5'; expected jobs per second above 0"),
        (["--rates", ""], "--rates is ''; expected jobs per second above 0"),
        (["--rates", "many"], "--rates is 'many'; expected numbers separated by commas"),
        (["--address", "127.0.0.1:1"], "service gateway at 127.0.0.1:1 is not reachable"),
        (["--model", "pear"], "models folder"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    run_mosel: Callable[..., CompletedProcess[str]], arguments: list[str], message: str
) -> None:
    refused = run_mosel("bench", "load", *arguments)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"error: {message}")
    assert refused.stderr.count("\n") == 1
