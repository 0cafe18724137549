"""The scheduler core: which rows of which job go to which lane, and when. No sockets, no threads, no clock.

A *lane* is one service that computes: the encoder of a modality, or fusion. Each lane has its queue of jobs in deadline
order and a bound on the calls under way. The driver feeds events in and asks `next` what to do:

    submit(job, now)                       -> the modality set it will use, or an error
    next(now)                              -> EncodeCall | FuseCall | Expired | Wait
    completed(call, now)
    failed(call, now)                      -> the jobs that are lost by it
    lane(name, up)                         -> the jobs that are lost by it
    cancelled(job_id)

Rows of different jobs share an encoder call when they belong to the same model.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field

from mosel.errors import InvalidRequest, ModelNotFound, Overloaded
from mosel.modality import ModalitySet, format_set
from selector.policies import Demand, choose, preferred_sets
from selector.profile import ModelProfile

FUSION = "fusion"
# Weight of the newest measurement in a lane's overhead.
_SMOOTHING = 0.1
_HALF_LIFE_S = 2.0


def service_name(lane: str) -> str:
    """How people know the service behind a lane: `fusion`, `encoder/image`."""
    return lane if lane == FUSION else f"encoder/{lane}"


@dataclass(frozen=True)
class Job:
    """Items that arrived together; see `Demand`. `deadline` is in seconds on the driver's clock."""

    id: bytes
    model: str
    size: int
    modalities: ModalitySet
    min_accuracy: float | None
    deadline: float
    exact: bool = False


@dataclass(frozen=True)
class Rows:
    """Rows [start, start + count) of a job."""

    job_id: bytes
    start: int
    count: int


@dataclass(frozen=True)
class EncodeCall:
    """One batch for one encoder."""

    id: int
    model: str
    modality: str
    rows: tuple[Rows, ...]


@dataclass(frozen=True)
class FuseCall:
    """Whole jobs whose embeddings are all there, with the modality set of each."""

    id: int
    model: str
    jobs: tuple[tuple[bytes, ModalitySet], ...]


@dataclass(frozen=True)
class Expired:
    """A job whose deadline passed before it was answered."""

    job_id: bytes


@dataclass(frozen=True)
class Wait:
    """Nothing to do before an event, or before `until` seconds on the driver's clock."""

    until: float | None


Call = EncodeCall | FuseCall


@dataclass(eq=False)
class Progress:
    """A job on its way.

    Attributes:
        sent_rows: rows handed to the encoder, by modality.
        encoded_rows: rows whose embeddings are there, by modality.
        started_at: when the first call was handed out, None before.
    """

    job: Job
    modality_set: ModalitySet
    expected_accuracy: float
    submitted_at: float
    sent_rows: dict[str, int]
    encoded_rows: dict[str, int]
    started_at: float | None = None


@dataclass
class _Lane:
    up: bool = False
    queue: list[Progress] = field(default_factory=list)
    calls: dict[int, tuple[Call, float, float]] = field(default_factory=dict)
    _overhead_ms: float = 0.0
    _learned_at: float = 0.0

    def overhead_ms(self, now: float) -> float:
        """What calls take beyond their profile. Fades while no call confirms it, or a busy hour would bar the next."""
        fading: float = 0.5 ** ((now - self._learned_at) / _HALF_LIFE_S)
        return self._overhead_ms * fading

    def learn(self, beyond_ms: float, now: float) -> None:
        """A call took so much more than its profile."""
        overhead_ms = self.overhead_ms(now)
        self._overhead_ms = overhead_ms + _SMOOTHING * (max(beyond_ms, 0.0) - overhead_ms)
        self._learned_at = now


class Scheduler:
    """All models of one selector.

    Args:
        profiles: by model name; their latencies may arrive later.
        max_queued_items: bound on the items of all jobs on their way.
        calls_per_lane: calls under way per lane: as many as its service computes at the same time.
    """

    def __init__(self, profiles: Mapping[str, ModelProfile], max_queued_items: int, calls_per_lane: int) -> None:
        self._profiles = profiles
        self._max_queued_items = max_queued_items
        self._calls_per_lane = calls_per_lane
        self._jobs: dict[bytes, Progress] = {}
        self._deadlines: list[tuple[float, bytes]] = []
        modalities = {m for profile in profiles.values() for s in profile.accuracy for m in s}
        self._lanes = {name: _Lane() for name in sorted(modalities)} | {FUSION: _Lane()}
        self._queued_items = 0
        self._last_call = 0

    def submit(self, job: Job, now: float) -> Progress:
        """Admits a job and chooses its modality set.

        Raises:
            ModelNotFound, InvalidRequest, FloorUnreachable, DeadlineUnreachable, Overloaded, ServiceUnavailable.
        """
        if job.model not in self._profiles:
            raise ModelNotFound(f"model '{job.model}' is not served; known: {', '.join(sorted(self._profiles))}")
        if job.modalities not in self._profiles[job.model].accuracy:
            raise InvalidRequest(f"modalities are {format_set(job.modalities)}; model '{job.model}' has no such set")
        if self._queued_items + job.size > self._max_queued_items:
            raise Overloaded(f"{self._queued_items} items are queued, at most {self._max_queued_items} may be")
        profile = self._profiles[job.model]
        demand = Demand(job.size, job.modalities, job.min_accuracy, (job.deadline - now) * 1000, job.exact)
        sets = preferred_sets(profile, demand, self.is_up)
        chosen = choose(
            profile, demand, sets, lambda s: self.idle_ms(job, s, now), lambda s: self.predicted_ms(job, s, now)
        )
        zero = dict.fromkeys(chosen, 0)
        progress = Progress(job, chosen, profile.accuracy[chosen], now, zero, dict(zero))
        self._jobs[job.id] = progress
        heapq.heappush(self._deadlines, (job.deadline, job.id))
        self._queued_items += job.size
        for modality in chosen:
            self._enqueue(self._lanes[modality], progress)
        return progress

    def next(self, now: float) -> Call | Expired | Wait:
        """The next thing to do; call it until it answers Wait."""
        while self._deadlines and (self._deadlines[0][1] not in self._jobs or self._deadlines[0][0] <= now):
            _, job_id = heapq.heappop(self._deadlines)
            if self.cancelled(job_id):
                return Expired(job_id)
        for name, lane in self._lanes.items():
            if lane.up and lane.queue and len(lane.calls) < self._calls_per_lane:
                return self._fuse_call(lane, now) if name == FUSION else self._encode_call(name, lane, now)
        return Wait(self._deadlines[0][0] if self._deadlines else None)

    def completed(self, call: Call, now: float) -> None:
        """A call came back well: its rows are encoded, or its jobs are done."""
        self._learn(call, now)
        if isinstance(call, FuseCall):
            for job_id, _ in call.jobs:
                self.cancelled(job_id)
            return
        for rows in call.rows:
            progress = self._jobs.get(rows.job_id)
            if progress is None:
                continue
            progress.encoded_rows[call.modality] += rows.count
            if all(done == progress.job.size for done in progress.encoded_rows.values()):
                self._enqueue(self._lanes[FUSION], progress)

    def failed(self, call: Call, now: float) -> list[bytes]:
        """A call failed; returns the jobs that are lost by it."""
        # What it took says nothing about calls that go well.
        del self._lane_of(call).calls[call.id]
        in_call = [job_id for job_id, _ in call.jobs] if isinstance(call, FuseCall) else [r.job_id for r in call.rows]
        return [job_id for job_id in in_call if self.cancelled(job_id)]

    def lane(self, name: str, up: bool) -> list[bytes]:
        """A service came or went; returns the queued jobs that are lost by it."""
        lane = self._lanes[name]
        lane.up = up
        if up:
            return []
        in_calls = {r.job_id for call, _, _ in lane.calls.values() if isinstance(call, EncodeCall) for r in call.rows}
        needing = [p for p in self._jobs.values() if name == FUSION or p.sent_rows.get(name, p.job.size) < p.job.size]
        return [p.job.id for p in needing if p.job.id not in in_calls and self.cancelled(p.job.id)]

    def cancelled(self, job_id: bytes) -> bool:
        """Forgets a job: nothing more is done for it. False if it is not known."""
        progress = self._jobs.pop(job_id, None)
        if progress is None:
            return False
        self._queued_items -= progress.job.size
        for name in (*progress.modality_set, FUSION):
            queue = self._lanes[name].queue
            if progress in queue:
                queue.remove(progress)
        return True

    def is_up(self, modality_set: ModalitySet) -> bool:
        """Whether fusion and all encoders of a set are there."""
        return self._lanes[FUSION].up and all(self._lanes[m].up for m in modality_set)

    def progress_of(self, job_id: bytes) -> Progress | None:
        """A job on its way, None if it is not known (any more)."""
        return self._jobs.get(job_id)

    def statistics(self) -> dict[str, int]:
        """Counts of what is queued and under way."""
        under_way = {f"calls_in_flight.{name}": len(lane.calls) for name, lane in self._lanes.items()}
        return {"jobs": len(self._jobs), "queued_items": self._queued_items} | under_way

    def idle_ms(self, job: Job, modality_set: ModalitySet, now: float) -> float:
        """Predicted milliseconds until a job is answered with this set if nothing is in front of it."""
        return self._answer_ms(job, modality_set, now, dict.fromkeys(modality_set, 0.0))

    def predicted_ms(self, job: Job, modality_set: ModalitySet, now: float) -> float:
        """The same behind the work that is under way or due before it."""
        return self._answer_ms(job, modality_set, now, {m: self._backlog_ms(m, job, now) for m in modality_set})

    def _answer_ms(self, job: Job, modality_set: ModalitySet, now: float, backlog_ms: Mapping[str, float]) -> float:
        profile = self._profiles[job.model]
        encoding = max(
            backlog_ms[m] + self._lanes[m].overhead_ms(now) + profile.encoders[m].ms(job.size) for m in modality_set
        )
        return encoding + profile.fusion[modality_set].ms(job.size) + self._lanes[FUSION].overhead_ms(now)

    def _backlog_ms(self, modality: str, job: Job, now: float) -> float:
        lane = self._lanes[modality]
        under_way = sum(max(ms - (now - at) * 1000, 0.0) for _, at, ms in lane.calls.values())
        ahead: dict[str, int] = {}
        for other in lane.queue:
            if other.job.deadline <= job.deadline:
                rows = other.job.size - other.sent_rows[modality]
                ahead[other.job.model] = ahead.get(other.job.model, 0) + rows
        queued = sum(self._profiles[model].encoders[modality].ms(rows) for model, rows in ahead.items())
        return (under_way + queued) / self._calls_per_lane

    def _enqueue(self, lane: _Lane, progress: Progress) -> None:
        at = len(lane.queue)
        while at and lane.queue[at - 1].job.deadline > progress.job.deadline:
            at -= 1
        lane.queue.insert(at, progress)

    def _encode_call(self, modality: str, lane: _Lane, now: float) -> EncodeCall:
        """Fills a batch in deadline order with rows of the model that is first."""
        model = lane.queue[0].job.model
        curve = self._profiles[model].encoders[modality]
        room, rows = curve.max_batch, []
        for progress in [p for p in lane.queue if p.job.model == model]:
            start = progress.sent_rows[modality]
            count = min(room, progress.job.size - start)
            rows.append(Rows(progress.job.id, start, count))
            progress.sent_rows[modality] = start + count
            progress.started_at = now if progress.started_at is None else progress.started_at
            if start + count == progress.job.size:
                lane.queue.remove(progress)
            room -= count
            if room == 0:
                break
        self._last_call += 1
        call = EncodeCall(self._last_call, model, modality, tuple(rows))
        lane.calls[call.id] = (call, now, curve.ms(curve.max_batch - room))
        return call

    def _fuse_call(self, lane: _Lane, now: float) -> FuseCall:
        model = lane.queue[0].job.model
        profile = self._profiles[model]
        ready: list[Progress] = []
        room = max(curve.max_batch for curve in profile.fusion.values())
        for progress in [p for p in lane.queue if p.job.model == model]:
            if ready and progress.job.size > room:
                break
            ready.append(progress)
            lane.queue.remove(progress)
            room -= progress.job.size
        self._last_call += 1
        call = FuseCall(self._last_call, model, tuple((p.job.id, p.modality_set) for p in ready))
        lane.calls[call.id] = (call, now, sum(profile.fusion[p.modality_set].ms(p.job.size) for p in ready))
        return call

    def _lane_of(self, call: Call) -> _Lane:
        return self._lanes[FUSION if isinstance(call, FuseCall) else call.modality]

    def _learn(self, call: Call, now: float) -> None:
        """Corrects the lane's overhead by what the call took beyond its profile."""
        lane = self._lane_of(call)
        _, started, predicted_ms = lane.calls.pop(call.id)
        lane.learn((now - started) * 1000 - predicted_ms, now)
