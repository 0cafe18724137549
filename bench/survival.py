"""A million simulated jobs with cancels, failures and a wrong profile: memory stays bounded, and jobs are served."""

import argparse
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice

import numpy as np
import psutil
from rich.console import Console

from bench.example import example
from bench.machine import machine_line
from bench.outcomes import Tally
from bench.simulation import World, capacity, new_scheduler, simulate
from bench.workload import Demands, poisson

_DRIFT = (0.7, 1.5)
_FAILURES, _CANCELS = 0.01, 0.05
_REPORTS = 20
# Jobs between two looks at the scheduler.
_LOOK = 50

console = Console(width=140)


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--compared", type=int, default=20_000, help="jobs of the runs with and without drift")
    parser.add_argument("--load", type=float, default=1.2, help="in capacities of `all`")
    parser.add_argument("--policy", default="mosel")
    arguments = parser.parse_args()
    console.print(machine_line(), highlight=False)
    world, demands = example()
    rate = arguments.load * capacity(world, demands, "all")
    drifted = replace(world, drift=_drift(world, 0))
    for name, services in {"as profiled": world, "drifted": drifted}.items():
        _run(name, services, demands, rate, arguments.policy, arguments.compared, reports=1)
    hard = replace(drifted, failures=_FAILURES, cancels=_CANCELS)
    name = f"drifted, {_FAILURES:.0%} of calls fail, {_CANCELS:.0%} of jobs cancelled"
    _run(name, hard, demands, rate, arguments.policy, arguments.jobs, _REPORTS)


def _drift(world: World, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {lane: float(rng.uniform(*_DRIFT)) for lane in world.noise}


def _run(name: str, world: World, demands: Demands, rate: float, policy: str, jobs: int, reports: int) -> None:
    drift = ", ".join(f"{lane} {factor:.2f}" for lane, factor in world.drift.items()) or "none"
    console.print(f"\n{name}: {jobs} jobs, {rate:.1f}/s; calls take, of their profile: {drift}", highlight=False)
    arrivals = islice(demands.arrivals(poisson(rate, math.inf, 0), 0), jobs)
    scheduler, tally, most = new_scheduler(world, policy), Tally(), Counter[str]()
    started, every = time.perf_counter(), max(jobs // reports, 1)
    for done, outcome in enumerate(simulate(arrivals, scheduler, world), 1):
        tally.add(outcome)
        if done % _LOOK == 0:
            most |= Counter(scheduler.statistics())
        if done % every == 0:
            summary = tally.summary(outcome.at_s)
            console.print(
                f"{done:>8} jobs, {done / (time.perf_counter() - started):6.0f} simulated per second, "
                f"{psutil.Process().memory_info().rss / 2**20:.1f} MiB, {summary.job_miss_ratio:.2%} of jobs and "
                f"{summary.item_miss_ratio:.2%} of items missed, {summary.below_floor} below their floor",
                highlight=False,
            )
    console.print(f"ended as {tally.summary(1).endings}", highlight=False)
    console.print(f"left in the scheduler: {_nonzero(scheduler.statistics())}", highlight=False)
    console.print(f"most at any look: {dict(most)}", highlight=False)


def _nonzero(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


if __name__ == "__main__":
    main()
