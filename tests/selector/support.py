"""Profiles with round numbers, jobs for them, and a driver that runs the scheduler on a virtual clock."""

import heapq
import math
from collections.abc import Callable, Iterable, Mapping

from mosel.modality import FUSION, ModalitySet, parse_set
from selector.core.jobs import Call, Effort, EncodeCall, Ended, FuseCall, Job, Wait
from selector.core.profile import LatencyCurve, ModelProfile
from selector.core.scheduler import Scheduler

THREE = {
    "pen": 0.60,
    "image": 0.65,
    "audio": 0.72,
    "image+pen": 0.88,
    "audio+pen": 0.89,
    "audio+image": 0.90,
    "audio+image+pen": 0.96,
}

Points = tuple[tuple[int, float], ...]


def points_of(curve: float | Points) -> LatencyCurve:
    """A curve; a number is the time of one item, and of each in a batch of 4 three quarters of it."""
    return LatencyCurve(((1, curve), (4, 3 * curve)) if isinstance(curve, float) else curve)


def profile_of(
    accuracy: Mapping[str, float],
    encoders: Mapping[str, float | Points],
    fusion: float | Points = 0.5,
    default_floor: float | None = None,
) -> ModelProfile:
    """A profile from set names, and milliseconds or curves by modality."""
    curves = {name: points_of(curve) for name, curve in encoders.items()}
    return ModelProfile(
        accuracy={parse_set(name): value for name, value in accuracy.items()},
        samples=1000,
        default_min_accuracy=default_floor,
        encoders=curves,
        fusion={parse_set(name): points_of(fusion) for name in accuracy},
        paths={s: back_to_back([points_of(fusion), *(curves[m] for m in s)]) for s in map(parse_set, accuracy)},
    )


def back_to_back(curves: Iterable[LatencyCurve]) -> LatencyCurve:
    """What calls take together, one after the other, for as many items as all were measured with."""
    curves = list(curves)
    sizes = sorted(set.intersection(*(set(range(1, curve.max_batch + 1)) for curve in curves)))
    return LatencyCurve(tuple((size, sum(curve.call_ms(size) for curve in curves)) for size in sizes))


def profiled_ms(profiles: Mapping[str, ModelProfile], call: Call) -> float:
    """What a call takes by its profile."""
    profile = profiles[call.model]
    items = sum(len(rows.items) for rows in call.rows)
    if isinstance(call, FuseCall):
        curves = profile.paths if call.from_payloads else profile.fusion
        return curves[call.modality_set].call_ms(items)
    return profile.encoders[call.modality].call_ms(items)


ACCURACY = {"image": 0.7, "pen": 0.6, "image+pen": 0.9}
# Calls of up to 4: image 10, 20, 30 ms, pen 2, 4, 6 ms, in both models.
ENCODERS = {"image": ((1, 10.0), (4, 20.0)), "pen": ((1, 2.0), (4, 4.0))}
PROFILES = {
    "one": profile_of(ACCURACY, ENCODERS, ((1, 1.0), (4, 1.0))),
    "two": profile_of(ACCURACY, ENCODERS, ((1, 1.0), (4, 1.0)), default_floor=0.5),
}
MAX_QUEUED = 40
PEN, BOTH = parse_set("pen"), parse_set("image+pen")


def scheduler_with(policy: str = "mosel", tokens: int = 2, away: str = "", fusion_on: str = "cpu") -> Scheduler:
    scheduler = Scheduler(PROFILES, policy, MAX_QUEUED, tokens)
    for name in ("image", "pen", FUSION):
        assert scheduler.lane(name, name != away, fusion_on if name == FUSION else "cpu") == []
    return scheduler


def job(
    name: str,
    deadline: float = 10.0,
    size: int = 1,
    sent: str = "pen",
    model: str = "one",
    floor: float | None = None,
    effort: Effort | None = None,
    late_ok: bool = False,
) -> Job:
    expires = deadline + 60 if late_ok else None
    return Job(name.encode(), model, size, parse_set(sent), floor, deadline, False, effort, late_ok, expires)


def encode_call(scheduler: Scheduler, now: float = 0.0) -> EncodeCall:
    call = scheduler.next(now)
    assert isinstance(call, EncodeCall)
    return call


def fuse_call(scheduler: Scheduler, now: float = 0.0) -> FuseCall:
    call = scheduler.next(now)
    assert isinstance(call, FuseCall)
    return call


# Counts since the start, and frontiers, which are kept for jobs to come.
NOT_HELD = {"jobs_dropped", "items_tried_again", "frontiers_kept", "frontiers_computed", "mixes_compared"}


def held(scheduler: Scheduler) -> dict[str, int]:
    """What there is of jobs and calls."""
    return {name: count for name, count in scheduler.statistics().items() if count and name not in NOT_HELD}


def is_empty(scheduler: Scheduler) -> bool:
    return not held(scheduler)


class Driver:
    """Does what the service does: makes calls that take the time of the profile, until nothing is left.

    Attributes:
        now: seconds on the virtual clock.
        answered: seconds at which each job was answered.
        ended: the jobs that ended without an answer.
        fused: how many items of each job were fused, by modality set.
        calls: every call so far, in order.
        drift: how much longer than profiled each call takes, by its number.
        slower: the same by lane, where it is not 1.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        profiles: Mapping[str, ModelProfile],
        drift: Callable[[int], float] = lambda number: 1.0,
        slower: Mapping[str, float] | None = None,
    ) -> None:
        self.scheduler, self.profiles, self.now, self.drift = scheduler, profiles, 0.0, drift
        self.slower = slower or {}
        self.answered: dict[bytes, float] = {}
        self.ended: dict[bytes, Ended] = {}
        self.fused: dict[bytes, dict[ModalitySet, int]] = {}
        self.calls: list[Call] = []
        self._under_way: list[tuple[float, int, Call]] = []

    def dispatch(self) -> Wait:
        """Makes every call that can be made now."""
        while not isinstance(action := self.scheduler.next(self.now), Wait):
            if isinstance(action, Ended):
                self.ended[action.job_id] = action
                continue
            self.calls.append(action)
            factor = self.drift(action.id) * self.slower.get(action.lane, 1.0)
            over = self.now + factor * profiled_ms(self.profiles, action) / 1000
            heapq.heappush(self._under_way, (over, action.id, action))
        return action

    def run(self, until: float = math.inf) -> None:
        """Goes on until a time, or until nothing is left to do."""
        while True:
            wait = self.dispatch()
            over = self._under_way[0][0] if self._under_way else math.inf
            event = min(over, math.inf if wait.until is None else wait.until)
            if event > until or event == math.inf:
                break
            self.now = event
            if over == event:
                self._returned(heapq.heappop(self._under_way)[2])
        self.now = max(self.now, until if until < math.inf else self.now)

    def _returned(self, call: Call) -> None:
        if isinstance(call, FuseCall):
            for rows in call.rows:
                fused = self.fused.setdefault(rows.job_id, {})
                fused[call.modality_set] = fused.get(call.modality_set, 0) + len(rows.items)
        for job_id in self.scheduler.completed(call, self.now):
            self.answered[job_id] = self.now
