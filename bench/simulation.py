"""Runs the selector's core on a virtual clock: the scheduler is the real one, only the services are simulated.

A simulated call takes what the profile says for its batch: what it says of an idle system and of a saturated one, in
the proportion in which the tokens were in use lately; times the lane's drift, times lognormal noise as wide as the
profile's p50 and p95 say. Client and gateway add time, half of it before the scheduler sees a job and half after its
answer; and where they share the cores with the services, calls take longer by the share of the cores that client,
gateway and selector use for the jobs that come.
"""

import heapq
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from bench.outcomes import Ending, Outcome
from bench.workload import Arrival, Demands, demands
from mosel.config import Settings
from mosel.errors import Overloaded, Unreachable
from mosel.modality import FUSION, format_set
from mosel.profiles.files import Point, Profile
from selector.conversions import model_profile
from selector.core.jobs import Call, Effort, EncodeCall, Ended, Job, Wait
from selector.core.profile import LatencyCurve, ModelProfile
from selector.core.scheduler import Scheduler
from selector.core.work import Work

# What the simulated model is called.
MODEL = "model"
# The cores that client, gateway and selector share with the services.
_HOST = "cpu"
# Capacity is what a backlog of so many jobs is worked off at.
_BACKLOG = 300
# How long callers wait who want a late answer, too.
PATIENCE_S = 3600.0
# Keeps this chance apart from that of the workload with the same seed.
_STREAM = 2
# How far back `lately` reaches.
_LATELY_S = 1.0
# However many jobs come, calls keep this much of the cores.
_MOST_TAKEN = 0.5
# The 95 % point of the standard normal distribution.
_Z = statistics.NormalDist().inv_cdf(0.95)


@dataclass(frozen=True)
class World:
    """The simulated services.

    Attributes:
        profile: what calls take, and what the scheduler believes.
        tokens: calls at the same time.
        loaded: (overhead in milliseconds, factor) of calls on a saturated system, beside the profile, by lane.
        edge_ms, edge_item_ms: what client and gateway add to a job of one item, and for each further item.
        edge_cpu_ms: processor time that client, gateway and selector spend on a job, on the cores of the services.
        noise: standard deviation of the logarithm of a call's time, by lane.
        drift: how much longer calls take than the profile says, by lane; 1 where nothing is stated.
        failures: share of calls that fail.
        cancels: share of jobs that their caller cancels, at a random moment before the deadline.
        resources: what a lane computes on, where that is not the cores of the host; and every replica, wherever it is.
        seed: of all chance.
    """

    profile: ModelProfile
    tokens: int = 2
    loaded: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    edge_ms: float = 0.0
    edge_item_ms: float = 0.0
    edge_cpu_ms: float = 0.0
    noise: Mapping[str, float] = field(default_factory=dict)
    drift: Mapping[str, float] = field(default_factory=dict)
    failures: float = 0.0
    cancels: float = 0.0
    resources: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    def edge_s(self, size: int) -> float:
        """Seconds that client and gateway add to a job of a size, on each way."""
        return (self.edge_ms + self.edge_item_ms * (size - 1)) / 2000

    @property
    def lanes(self) -> dict[str, str]:
        """What each service computes on, by lane."""
        return dict.fromkeys((*self.profile.encoders, FUSION), _HOST) | dict(self.resources)

    @property
    def full(self) -> frozenset[str]:
        """The full modality set."""
        return max(self.profile.accuracy, key=len)


def world_and_demands(profile: Profile) -> tuple[World, Demands]:
    """The services that a profile was measured on, and what jobs ask of them."""
    known = model_profile(profile, None)
    noise = {modality: _noise(points) for modality, points in profile.encoders.items()}
    noise[FUSION] = max(_noise(points) for points in profile.fusion.values())
    loaded = {lane: (call.overhead_ms, call.factor) for lane, call in profile.loaded_calls.items()}
    # On a GPU, other processes do not compute where the networks do.
    edge_cpu_ms = profile.edge_cpu_ms if profile.hardware.device == "cpu" else 0.0
    edge = (profile.edge_ms, profile.edge_item_ms, edge_cpu_ms)
    return World(known, profile.concurrency, loaded, *edge, noise=noise), demands(profile, known)


def new_scheduler(world: World, policy: str, max_queued_items: int = 1_000_000) -> Scheduler:
    """A scheduler with every service up."""
    scheduler = Scheduler({MODEL: world.profile}, policy, max_queued_items, world.tokens, Settings().selector.reply_ms)
    # Each lane that comes says anew what is joined; until fusion is there, nothing is.
    joined = world.profile.joined
    for lane, resource in world.lanes.items():
        scheduler.lane(lane, True, resource, joined)
    return scheduler


def simulate(
    arrivals: Iterable[Arrival],
    scheduler: Scheduler,
    world: World,
    *,
    late_ok: bool = False,
    effort: Effort = Effort.BEST,
) -> Iterator[Outcome]:
    """Runs jobs through a scheduler until all are over; outcomes come in the order of their ends.

    Args:
        arrivals: by rising time; may be endless.
        scheduler: of `new_scheduler`.
        world: the same as the scheduler's.
        late_ok: no job is refused, dropped or given up for its deadline.
        effort: of every job.
    """
    yield from _Simulation(scheduler, world, late_ok, effort).run(iter(arrivals))


def capacity(world: World, demands: Demands, policy: str) -> float:
    """Jobs per second that a policy answers when it never idles and nobody minds being late."""
    arrivals = list(demands.arrivals([0.0] * _BACKLOG, seed=0))
    outcomes = list(simulate(arrivals, new_scheduler(world, policy), world, late_ok=True))
    return len(outcomes) / max(outcome.at_s for outcome in outcomes)


class _Simulation:
    def __init__(self, scheduler: Scheduler, world: World, late_ok: bool, effort: Effort) -> None:
        self._scheduler, self._world, self._late_ok, self._effort = scheduler, world, late_ok, effort
        self._rng = np.random.default_rng((world.seed, _STREAM))
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._event_count = self._job_count = 0
        self._works: dict[bytes, tuple[Arrival, Work]] = {}
        self._over: list[Outcome] = []
        self._lanes = world.lanes
        self._in_use = {resource: _InUse(world.tokens) for resource in self._lanes.values()}
        self._rate = _Rate()

    def run(self, arrivals: Iterator[Arrival]) -> Iterator[Outcome]:
        self._expect_next(arrivals, 0.0)
        wake = math.inf
        while self._events or wake < math.inf:
            now = wake
            if self._events and self._events[0][0] <= wake:
                now, _, happens = heapq.heappop(self._events)
                happens(now)
            wake = self._dispatch(now)
            yield from self._over
            self._over.clear()

    def _at(self, at_s: float, happens: Callable[[float], None]) -> None:
        self._event_count += 1
        heapq.heappush(self._events, (at_s, self._event_count, happens))

    def _expect_next(self, arrivals: Iterator[Arrival], now: float) -> None:
        arrival = next(arrivals, None)
        if arrival is not None:
            self._at(
                max(now, arrival.at_s + self._world.edge_s(arrival.size)), partial(self._arrive, arrival, arrivals)
            )

    def _arrive(self, arrival: Arrival, arrivals: Iterator[Arrival], now: float) -> None:
        self._expect_next(arrivals, now)
        self._job_count += 1
        self._rate.add(now)
        job = Job(
            id=self._job_count.to_bytes(16),
            model=MODEL,
            size=arrival.size,
            modalities=self._world.full,
            min_accuracy=arrival.min_accuracy,
            deadline=now + arrival.deadline_ms / 1000,
            effort=self._effort,
            late_ok=self._late_ok,
            expires=now + PATIENCE_S if self._late_ok else None,
        )
        try:
            work = self._scheduler.submit(job, now)
        except (Overloaded, Unreachable):
            self._over.append(Outcome(arrival, Ending.REFUSED, now + self._world.edge_s(arrival.size)))
            return
        self._works[job.id] = arrival, work
        if self._rng.random() < self._world.cancels:
            self._at(now + self._rng.random() * arrival.deadline_ms / 1000, partial(self._cancel, job.id))

    def _dispatch(self, now: float) -> float:
        """Does what the scheduler says; returns when to ask it again at the latest."""
        while not isinstance(step := self._scheduler.next(now), Wait):
            if isinstance(step, Ended):
                self._end(step.job_id, Ending.EXPIRED, now)
            else:
                self._at(now + self._takes_s(step, now), partial(self._return, step))
                self._in_use[self._lanes[step.lane]].add(1, now)
        return math.inf if step.until is None else step.until

    def _takes_s(self, call: Call, now: float) -> float:
        world, curve = self._world, _curve(self._world.profile, call)
        noise = math.exp(self._rng.normal(0, world.noise.get(call.lane, 0.0)))
        items = sum(len(rows.items) for rows in call.rows)
        resource = self._lanes[call.lane]
        idle_ms, share = curve.call_ms(items), self._in_use[resource].share(now)
        overhead_ms, factor = world.loaded.get(call.lane, (0.0, 1.0))
        ms = (1 - share) * idle_ms + share * (overhead_ms + factor * idle_ms)
        # While every token is in use, whatever else runs on the cores takes them from calls.
        edge_cpu_ms = world.edge_cpu_ms if resource == _HOST else 0.0
        taken = min(self._rate.per_s(now) * edge_cpu_ms / 1000 / world.tokens, _MOST_TAKEN) * share
        return ms / 1000 / (1 - taken) * world.drift.get(call.lane, 1.0) * noise

    def _return(self, call: Call, now: float) -> None:
        self._in_use[self._lanes[call.lane]].add(-1, now)
        if self._rng.random() < self._world.failures:
            for job_id in self._scheduler.failed(call, now):
                self._end(job_id, Ending.FAILED, now)
            return
        for job_id in self._scheduler.completed(call, now):
            self._end(job_id, Ending.ANSWERED, now)

    def _cancel(self, job_id: bytes, now: float) -> None:
        if self._scheduler.cancelled(job_id):
            self._end(job_id, Ending.CANCELLED, now)

    def _end(self, job_id: bytes, ending: Ending, now: float) -> None:
        arrival, work = self._works.pop(job_id)
        at_s = now + self._world.edge_s(arrival.size)
        if ending is not Ending.ANSWERED:
            self._over.append(Outcome(arrival, ending, at_s))
            return
        counts = tuple((format_set(modality_set), count) for modality_set, count in work.strategy.counts)
        self._over.append(Outcome(arrival, ending, at_s, counts, work.strategy.accuracy))


class _Rate:
    """Jobs per second over about the last second."""

    def __init__(self) -> None:
        self._per_s, self._at = 0.0, 0.0

    def add(self, now: float) -> None:
        """A job came."""
        self._per_s = self.per_s(now) + 1 / _LATELY_S

    def per_s(self, now: float) -> float:
        """The rate."""
        self._per_s *= math.exp((self._at - now) / _LATELY_S)
        self._at = now
        return self._per_s


class _InUse:
    """The share of the tokens that were in use over about the last second."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._calls = tokens, 0
        self._share, self._at = 0.0, 0.0

    def add(self, calls: int, now: float) -> None:
        """So many calls more are under way."""
        self.share(now)
        self._calls += calls

    def share(self, now: float) -> float:
        """The share 0..1."""
        fading = math.exp((self._at - now) / _LATELY_S)
        self._share = self._share * fading + self._calls / self._tokens * (1 - fading)
        self._at = now
        return self._share


def _curve(profile: ModelProfile, call: Call) -> LatencyCurve:
    if isinstance(call, EncodeCall):
        return profile.encoders[call.modality]
    return (profile.paths if call.from_payloads else profile.fusion)[call.modality_set]


def _noise(points: Iterable[Point]) -> float:
    return statistics.median(math.log(max(p.p95_ms / p.p50_ms, 1.0)) / _Z if p.p50_ms else 0.0 for p in points)
