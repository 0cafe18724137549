"""How long one decision of the policy `mosel` takes: a job comes, and the whole queue is planned again."""

import argparse
import statistics
import time

from rich.console import Console
from rich.table import Table

from bench.example import example
from bench.machine import machine_line
from bench.simulation import MODEL, World, new_scheduler
from bench.workload import Demands
from selector.core.jobs import Effort, Job

_QUEUES = (20, 200)
# Later than the scheduler waits between two plans.
_NEXT_PLAN_S = 0.02
# Deadlines, as a share of what the queue up to there takes with every modality: plans must give up accuracy.
_TIGHT = 0.7

console = Console(width=140)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decisions", type=int, default=31, help="medians are of so many")
    parser.add_argument("--policy", default="mosel")
    arguments = parser.parse_args()
    console.print(machine_line(), highlight=False)
    table = Table(
        "queued jobs", "decisions", "median ms", "slowest ms", "jobs that give up accuracy", title=arguments.policy
    )
    for queued in _QUEUES:
        decisions = [_decide(arguments.policy, queued, seed) for seed in range(arguments.decisions)]
        times = [ms for ms, _ in decisions]
        giving_up = statistics.median(count for _, count in decisions)
        table.add_row(
            str(queued), str(len(times)), f"{statistics.median(times):.2f}", f"{max(times):.2f}", f"{giving_up:g}"
        )
    console.print(table)


def _decide(policy: str, queued: int, seed: int) -> tuple[float, int]:
    """Milliseconds of one decision, and how many jobs have a strategy below their best after it."""
    world, demands = example()
    scheduler, jobs = new_scheduler(world, policy), _jobs(world, demands, queued + 1, seed)
    for job in jobs[:-1]:
        scheduler.submit(job, 0.0)
    started = time.perf_counter()
    scheduler.submit(jobs[-1], _NEXT_PLAN_S)
    ms = (time.perf_counter() - started) * 1000
    works = [scheduler.work_of(job.id) for job in jobs]
    best = max(world.profile.accuracy.values())
    return ms, sum(work is not None and work.strategy.accuracy < best for work in works)


def _jobs(world: World, demands: Demands, count: int, seed: int) -> list[Job]:
    """Jobs that can all be in time, but not with every modality."""
    jobs, deadline = [], _NEXT_PLAN_S
    for number, arrival in enumerate(demands.arrivals([0.0] * count, seed)):
        full_s = world.profile.cost_ms(world.full, arrival.size) / 1000 / world.tokens
        deadline += max(_TIGHT * full_s, demands.full_latency_ms(arrival.size) / 1000 if number == 0 else 0.0)
        job = Job(
            id=number.to_bytes(16),
            model=MODEL,
            size=arrival.size,
            modalities=world.full,
            min_accuracy=demands.least_accuracy,
            deadline=deadline,
            effort=Effort.BEST,
        )
        jobs.append(job)
    return jobs


if __name__ == "__main__":
    main()
