import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bench.example import example
from bench.items import Items, items_of
from bench.outcomes import Ending, Outcome, Summary, summarise
from bench.policies.gains import Knees, gains, speedups_over_all
from bench.policies.plots import write_plot
from bench.policies.runs import Row, Served, Setting, Simulated, at_limit
from bench.policies.tables import gains_table, runs_table, speedups_table, write_results
from bench.serving import serve
from bench.workload import Arrival, Demands, poisson
from mosel.launcher import Launcher
from mosel.packages.model_package import ModelPackage

SUMMARY = summarise([Outcome(Arrival(0, 2, 100, 0.9), Ending.ANSWERED, 0.05, (("audio", 2),), 0.92)], 1.0)


# Floors that fruit can meet, and deadlines that it easily meets.
FOR_FRUIT = Demands(((1, 1_000.0),), full_accuracy=0.9, least_accuracy=0.7, slack=3.3, t=0.1)


def row(policy: str, load: float, missed: float, items_per_s: float = 0.0, slack: float = 3.3) -> Row:
    summary = replace(SUMMARY, job_miss_ratio=missed, item_miss_ratio=2 * missed, items_per_s=items_per_s)
    return Row(Setting(policy, slack, None if policy == "all" else 0.06, load), 10 * load, False, summary)


ROWS = [row("all", 0.5, 0.0, 50), row("all", 0.7, 0.1, 70), row("mosel", 1.0, 0.04, 100), row("mosel", 2.0, 0.06, 180)]


@pytest.fixture(scope="module")
def simulated() -> Simulated:
    world, demands = example()
    return Simulated.of(world, demands)


def test_throughput_is_interpolated_at_the_limit() -> None:
    for_jobs, for_items = (np.array(at_limit(ROWS[:2], by_items)) for by_items in (False, True))
    assert for_jobs == pytest.approx(np.array([0.6, 60]))
    assert for_items == pytest.approx(np.array([0.55, 55]))


def test_a_limit_that_was_not_seen_is_nan() -> None:
    assert all(map(math.isnan, at_limit(ROWS[:1], by_items=False)))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_gains_are_ordered_as_they_must_be(simulated: Simulated) -> None:
    few = replace(simulated, jobs=300)
    for_jobs, _ = gains(ROWS, few, Knees(few, 3.3))
    assert for_jobs.gain == pytest.approx(140 / 60)
    assert 1 < for_jobs.simulated < for_jobs.clairvoyant <= for_jobs.bound
    assert for_jobs.capacity_ratio > 1


def test_the_load_is_in_capacities_of_all(simulated: Simulated) -> None:
    setting = Setting("mosel", 3.3, 0.06, 2.0)
    assert len(list(simulated.arrivals(setting, 100))) == pytest.approx(200 * simulated.capacity, rel=0.05)


def test_a_policy_meets_the_same_jobs_at_every_load(simulated: Simulated) -> None:
    first = [next(simulated.arrivals(Setting("mosel", 3.3, 0.06, load), 10)) for load in (1.0, 2.0)]
    assert len({(arrival.size, arrival.min_accuracy) for arrival in first}) == 1


def test_everything_is_written_and_shown(tmp_path: Path) -> None:
    rows = [*ROWS, row("mosel", 3.0, math.nan)]
    write_results(tmp_path, {"about": "a test"}, rows, [])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["about"] == "a test"
    assert [run["summary"]["job_miss_ratio"] for run in results["runs"]] == [0.0, 0.1, 0.04, 0.06, None]
    with (tmp_path / "runs.csv").open() as stream:
        assert [line["policy"] for line in csv.DictReader(stream)] == ["all", "all", "mosel", "mosel", "mosel"]
    write_plot(tmp_path / "plot.png", ROWS, "a test")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=140, record=True)
    console.print(runs_table(rows, "runs"), gains_table([]), speedups_table(speedups_over_all(rows), "times"))
    assert "audio 100%" in console.export_text()


def test_speedups_need_a_run_of_all() -> None:
    slower = replace(ROWS[0], summary=replace(SUMMARY, mean_ms=200.0))
    faster = replace(ROWS[2], summary=replace(SUMMARY, mean_ms=50.0))
    assert [speedup.gain for speedup in speedups_over_all([slower, faster])] == [4.0]
    assert speedups_over_all([faster]) == []


def test_a_model_without_labelled_samples_gets_random_items(fruit: ModelPackage) -> None:
    items = items_of(fruit)
    assert items.labels is None
    rows = items.rows(5, seed=3)
    assert {name: payload.shape for name, payload in items.payloads_of(rows).items()} == {
        "photo": (5, 24, 24, 3),
        "scent": (5, 6),
    }
    assert items.scored(rows, ["apple"] * 5, fruit.output.labels) == ()


def test_labelled_items_are_scored_against_their_labels() -> None:
    labels, groups = np.array([1, 0, 1], np.int64), np.array([[7, 0], [7, 1], [8, 1]], np.int64)
    items = Items({"audio": np.zeros((3, 2))}, labels, groups, "a test")
    assert items.scored(slice(0, 3), ["b", "b", "b"], ["a", "b"]) == (((7, 0), True), ((7, 1), False), ((8, 1), True))


def test_real_services_answer_the_workload(services: Launcher, fruit: ModelPackage) -> None:
    arrivals = list(FOR_FRUIT.arrivals(poisson(20, 2, 0), 0))
    outcomes = serve(services, fruit, arrivals, items_of(fruit))
    assert [outcome.arrival for outcome in outcomes] == arrivals
    summary: Summary = summarise(outcomes, 2)
    assert summary.endings["answered"] > 0
    assert summary.below_floor == 0
    assert summary.mean_ms > 0


def test_runs_go_on_until_misses_are_seen_on_both_sides(
    services: Launcher, fruit: ModelPackage, simulated: Simulated
) -> None:
    workload = replace(simulated, demands=FOR_FRUIT)
    served = Served({"mosel": services}, fruit, items_of(fruit), workload, seconds=0.5)
    loads = [run.setting.load for run in served.around("mosel", 20.0, 0.06, knee=0.1)]
    # Nothing is missed at such loads, so each is higher than the one before.
    assert loads == sorted(loads)
    assert len(loads) == 6
    unreachable = replace(workload, demands=replace(FOR_FRUIT, full_accuracy=1.0, least_accuracy=1.0))
    served = Served({"mosel": services}, fruit, items_of(fruit), unreachable, seconds=0.5)
    loads = [run.setting.load for run in served.around("mosel", 20.0, 0.06, knee=0.1)]
    # Everything is missed, so each but the second is lower.
    assert sorted(loads, reverse=True) == [loads[1], loads[0], *loads[2:]]
