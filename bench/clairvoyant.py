"""What a policy that knows all arrivals could do: a bound that no policy exceeds, and a policy that nearly gets there.

The bound. In any schedule each job that is answered in time takes at least the work of its cheapest strategy that meets
its floor, in batches of the best size; all of it lies between its arrival and its deadline; and so many calls run at a
time as there are tokens. Let work be divisible at will, and let a job count by the share of its work that is done. Then
the amounts of work that fit are a polymatroid (flows from jobs to moments), over which a greedy rule finds the greatest
value exactly: take jobs by rising deadline; where work before a deadline no longer fits, cut the jobs that are worth
least per work among those that can only be done there. Every policy is one of these schedules, so none is better.

The policy. Jobs of which the bound cuts nothing are submitted, with `effort = cheapest`; the others are turned away on
arrival. Calls cannot be divided at will and batches are not always full, so the bound is computed for several speeds
of the services, and the one with the fewest misses is taken.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bench.outcomes import Ending, Outcome, Summary, summarise
from bench.simulation import World, new_scheduler, simulate
from bench.workload import Arrival
from mosel.modality import FUSION
from selector.core.frontier import Frontiers, Strategy
from selector.core.jobs import Effort
from selector.core.profile import LatencyCurve, ModelProfile

# Speeds at which the policy's plans are made, as a share of the services'.
_SPEEDS = (1.0, 0.9, 0.8)
_TOLERANCE = 1e-9

Floats = NDArray[np.float64]


class Cheapest:
    """The cheapest strategy that meets a floor, by size."""

    def __init__(self, profile: ModelProfile) -> None:
        self._frontiers, self._sets = Frontiers(profile), tuple(profile.accuracy)

    def __call__(self, arrival: Arrival) -> Strategy:
        """The one for a job; the most accurate one if none meets its floor."""
        found = self._frontiers.of(self._sets, arrival.size)
        meets_floor = int(np.searchsorted(found.accuracy, (arrival.min_accuracy or 0.0) - _TOLERANCE))
        return found[min(meets_floor, len(found) - 1)]


def capacity_ratio(profile: ModelProfile, arrivals: Sequence[Arrival]) -> float:
    """How much less compute the cheapest strategies take than all modalities, over all of these jobs."""
    cheapest, full = Cheapest(profile), max(profile.accuracy, key=len)
    needed = sum(cheapest(arrival).cost_ms for arrival in arrivals)
    return sum(profile.cost_ms(full, arrival.size) for arrival in arrivals) / needed


def least_work_s(world: World, arrivals: Sequence[Arrival]) -> Floats:
    """Seconds of all tokens together that each job takes at least."""
    cheapest = Cheapest(_ideal(world))
    return np.array([cheapest(arrival).cost_ms for arrival in arrivals]) / 1000 / world.tokens


def shares_done(world: World, arrivals: Sequence[Arrival], work_s: Floats, by_items: bool) -> Floats:
    """The share of each job that is done in the best divisible schedule.

    Args:
        world: the services.
        arrivals: the jobs, by rising time.
        work_s: seconds that each takes.
        by_items: a job is worth its items, else 1.
    """
    edge_s = np.array([world.edge_s(arrival.size) for arrival in arrivals])
    released = np.array([arrival.at_s for arrival in arrivals]) + edge_s
    due = np.array([arrival.at_s + arrival.deadline_ms / 1000 for arrival in arrivals]) - edge_s
    worth = np.array([arrival.size if by_items else 1 for arrival in arrivals]) / work_s
    least_worth_first = np.argsort(worth, kind="stable")
    done = np.zeros(len(arrivals))
    for job in np.argsort(due, kind="stable"):
        done[job] = work_s[job]
        _fit(released[: job + 1], done, least_worth_first, due[job])
    shares: Floats = done / work_s
    return shares


def bound(world: World, arrivals: Sequence[Arrival]) -> tuple[float, float]:
    """The least job-miss ratio and the least item-miss ratio of any policy."""
    work_s, sizes = least_work_s(world, arrivals), np.array([arrival.size for arrival in arrivals])
    jobs = shares_done(world, arrivals, work_s, by_items=False)
    items = shares_done(world, arrivals, work_s, by_items=True) * sizes
    return 1 - float(jobs.mean()), 1 - float(items.sum() / sizes.sum())


def clairvoyant(world: World, arrivals: Sequence[Arrival], seconds: float, by_items: bool = False) -> Summary:
    """The run of the policy that knows all arrivals."""
    work_s = least_work_s(world, arrivals)
    runs = (
        summarise(_with(world, arrivals, shares_done(world, arrivals, work_s / speed, by_items)), seconds)
        for speed in _SPEEDS
    )
    return min(runs, key=lambda run: run.item_miss_ratio if by_items else run.job_miss_ratio)


def _fit(released: Floats, done: Floats, least_worth_first: NDArray[np.intp], due_s: float) -> None:
    """Cuts work until all that is released from any moment on fits before the last job is due."""
    while True:
        behind = np.cumsum(done[::-1])[::-1][: len(released)]
        over = behind - (due_s - released)
        too_much = np.flatnonzero(over > _TOLERANCE)
        if not len(too_much):
            return
        # The shortest span first: what is cut there counts for the longer ones, too.
        start, excess = too_much[-1], over[too_much[-1]]
        for cut in least_worth_first[(least_worth_first >= start) & (done[least_worth_first] > 0)]:
            taken = min(excess, done[cut])
            done[cut] -= taken
            excess -= taken
            if excess <= _TOLERANCE / 2:
                break


def _with(world: World, arrivals: Sequence[Arrival], shares: Floats) -> Iterator[Outcome]:
    taken = [arrival for arrival, share in zip(arrivals, shares, strict=True) if share > 1 - _TOLERANCE]
    away = [arrival for arrival, share in zip(arrivals, shares, strict=True) if share <= 1 - _TOLERANCE]
    yield from (Outcome(arrival, Ending.REFUSED, arrival.at_s) for arrival in away)
    yield from simulate(taken, new_scheduler(world, "aggressive"), world, effort=Effort.CHEAPEST)


def _ideal(world: World) -> ModelProfile:
    """What calls take per item in batches of the best size, whatever the number of items."""

    def ideal(lane: str, curve: LatencyCurve) -> LatencyCurve:
        least = min(curve.call_ms(size) / size for size in range(1, curve.max_batch + 1))
        mean = math.exp(world.noise.get(lane, 0.0) ** 2 / 2) * world.drift.get(lane, 1.0)
        return LatencyCurve(((1, least * mean),))

    profile = world.profile
    encoders = {modality: ideal(modality, curve) for modality, curve in profile.encoders.items()}
    fusion = {modality_set: ideal(FUSION, curve) for modality_set, curve in profile.fusion.items()}
    return replace(profile, encoders=encoders, fusion=fusion)
