"""What the selector's core costs: per job from arrival to answer, and one decision that plans a whole queue again.

Per job: so many jobs are always there, each answer is followed by the next job, and nobody is late. The processor time
of all `submit`, `next` and `completed` together, divided by the jobs. Calls take what a profile of fast networks says.
"""

import argparse
import heapq
import statistics
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.example import example
from bench.machine import machine_line
from bench.simulation import MODEL, World, new_scheduler
from bench.workload import Demands
from mosel.modality import FUSION, subsets
from mosel.packages.model_package import load_package
from selector.conversions import certificates
from selector.core.jobs import Call, Effort, EncodeCall, Ended, Job, Wait
from selector.core.profile import LatencyCurve, ModelProfile
from selector.core.scheduler import Scheduler

_QUEUES = (20, 200)
_HERE, _SIZES = (1, 8, 20, 200), (1, 8, 32)
# (min_accuracy, max_accuracy_loss).
_FLOORS = {"none": (None, None), "min_accuracy 0.85": (0.85, None), "max_accuracy_loss 0.05": (None, 0.05)}
_PACKAGE = Path("models/digits")
# Milliseconds of calls of 1, 8 and 32 items.
_ENCODERS = {"audio": (0.9, 4.7, 20.0), "image": (0.32, 1.1, 3.7), "pen": (0.1, 0.2, 0.5)}
_FUSION_MS = (0.2, 0.4, 0.8)
_CONFIDENCE = 0.95
# Later than any answer.
_LATE_S = 1000.0
# Later than the scheduler waits between two plans.
_NEXT_PLAN_S = 0.02
# Deadlines, as a share of what the queue up to there takes with every modality: plans must give up accuracy.
_TIGHT = 0.7

console = Console(width=140)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decisions", type=int, default=31, help="medians are of so many")
    parser.add_argument("--jobs", type=int, default=400, help="of each measurement per job, and of its warm-up")
    parser.add_argument("--policy", default="mosel")
    arguments = parser.parse_args()
    console.print(machine_line(), highlight=False)
    console.print(_per_job(arguments.policy, arguments.jobs))
    console.print(_per_decision(arguments.policy, arguments.decisions))


def _per_job(policy: str, jobs: int) -> Table:
    table = Table("floor", "items", *(f"{count} here" for count in _HERE), title="core ms per job")
    profile = _digits()
    for name, (least, loss) in _FLOORS.items():
        for size in _SIZES:
            job = Job(b"", MODEL, size, profile.modalities, least, 0.0, max_accuracy_loss=loss)
            times = (_Loop(profile, policy, job).ms_per_job(here, jobs) for here in _HERE)
            table.add_row(name, str(size), *(f"{ms:.3f}" for ms in times))
    return table


def _per_decision(policy: str, decisions_of_each: int) -> Table:
    table = Table("queued jobs", "decisions", "median ms", "slowest ms", "jobs that give up accuracy", title=policy)
    for queued in _QUEUES:
        decisions = [_decide(policy, queued, seed) for seed in range(decisions_of_each)]
        times = [ms for ms, _ in decisions]
        giving_up = statistics.median(count for _, count in decisions)
        table.add_row(
            str(queued), str(len(times)), f"{statistics.median(times):.2f}", f"{max(times):.2f}", f"{giving_up:g}"
        )
    return table


def _digits() -> ModelProfile:
    """The model `digits` with its calibration, as if on fast networks."""
    package = load_package(_PACKAGE)
    curves = {name: LatencyCurve(tuple(zip(_SIZES, ms, strict=True))) for name, ms in _ENCODERS.items()}
    fusion = dict.fromkeys(subsets(_ENCODERS), LatencyCurve(tuple(zip(_SIZES, _FUSION_MS, strict=True))))
    made = certificates(package.calibration, _CONFIDENCE)
    stated, default = package.accuracy, package.default_min_accuracy
    return ModelProfile(dict(stated.sets), stated.samples, default, curves, fusion, certificates=made)


class _Loop:
    """Jobs that are all alike, on a virtual clock; each answer is followed by the next."""

    def __init__(self, profile: ModelProfile, policy: str, job: Job) -> None:
        self._scheduler, self._profile, self._job = Scheduler({MODEL: profile}, policy, 1_000_000), profile, job
        for lane in (*profile.encoders, FUSION):
            self._scheduler.lane(lane, True)
        self._count, self._now = 0, 0.0
        self._under_way: list[tuple[float, int, Call]] = []

    def ms_per_job(self, here: int, jobs: int) -> float:
        """Processor milliseconds of the core for each of so many jobs, after as many that nobody measures."""
        for _ in range(here):
            self._submit()
        used: list[float] = []
        for _ in range(2):
            until, taken = self._count + jobs, 0.0
            while self._count < until:
                taken += self._step()
            used.append(taken / jobs * 1000)
        return used[-1]

    def _submit(self) -> None:
        self._count += 1
        job = replace(self._job, id=self._count.to_bytes(16), deadline=self._now + _LATE_S)
        self._scheduler.submit(job, self._now)

    def _step(self) -> float:
        """What follows the next return of a call; returns the seconds that the core takes for it."""
        before = time.process_time()
        answered = []
        if self._under_way:
            self._now, _, call = heapq.heappop(self._under_way)
            answered = self._scheduler.completed(call, self._now)
        for _ in answered:
            self._submit()
        while not isinstance(action := self._scheduler.next(self._now), Wait):
            if isinstance(action, Ended):
                raise RuntimeError(f"nobody is late, but job {action.job_id.hex()} ended: {action.error}")
            heapq.heappush(self._under_way, (self._now + self._ms(action) / 1000, action.id, action))
        return time.process_time() - before

    def _ms(self, call: Call) -> float:
        items = sum(len(rows.items) for rows in call.rows)
        if isinstance(call, EncodeCall):
            return self._profile.encoders[call.modality].call_ms(items)
        return self._profile.fusion[call.modality_set].call_ms(items)


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
