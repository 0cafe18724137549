"""When queued jobs will be answered: their calls, list-scheduled in deadline order on the tokens of each resource.

A *resource* is what services compete for (the cores of a host, a GPU); its *tokens* are the calls that run on it at the
same time. Calls of several jobs to the same stage share batches, so a job costs what it adds to the calls of the jobs
in front of it.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from selector.core.stages import Remaining, RowsByStage, Stage

# Instead of nothing, where calls are divided by their time.
_NO_TIME_S = 1e-6
# What sums of floats may be off by.
_ROUNDING_S = 1e-6


@dataclass(frozen=True)
class ServiceDemand:
    """What one job asks of the system.

    Attributes:
        seconds: how much longer every job behind it waits, by resource.
        alone_s: the least time from its first call to its answer, with every token at its service.
    """

    seconds: Mapping[str, float]
    alone_s: float


class Forecast:
    """The state of the resources at one moment.

    Args:
        now: seconds on the driver's clock.
        free_at: when each token is free, in seconds, by resource; at least one token each.
        resources: the resource of each lane.
        reply_s: seconds that an answer takes back to the caller.
        reserve: the share 0..1 of each resource that jobs need which have not come yet.
        spread: where calls of a modality may be made, if not just on its first lane: a lane on each resource.
        cautious: calls take as long as on what the reserve leaves.
    """

    def __init__(
        self,
        now: float,
        free_at: Mapping[str, Sequence[float]],
        resources: Mapping[str, str],
        reply_s: float = 0.0,
        reserve: Mapping[str, float] | None = None,
        spread: Mapping[str, Sequence[str]] | None = None,
        *,
        cautious: bool = False,
    ) -> None:
        self.now, self._reply_s = now, reply_s
        self._reserve, self._spread, self._cautious = reserve or {}, spread or {}, cautious
        self._free_at, self._resources = free_at, resources
        self._call_s: dict[Stage, _CallSeconds] = {}

    def cautious(self) -> "Forecast":
        """The same, for a plan that leaves the reserve to the jobs to come."""
        known = self._free_at, self._resources, self._reply_s, self._reserve, self._spread
        return Forecast(self.now, *known, cautious=True)

    def finish(self, queue: Sequence[Remaining]) -> list[float]:
        """When each job is answered, in seconds on the driver's clock, if the queue is served in this order.

        Jobs behind do not count: they join a call only as far as the slack of its first job allows.
        """
        queued: dict[Stage, _Queued] = {}
        if self._spread:
            queued = {stage: self._queued(stage, rows) for stage, rows in _rows(queue).items()}
        tokens = {resource: sorted(times) for resource, times in self._free_at.items()}
        answered = []
        for left in queue:
            encoded = self._run(left.encode, queued, tokens, self.now) if left.encode else self.now
            begins = max(encoded, left.not_before)
            done = self._run(left.fuse, queued, tokens, begins) if left.fuse else begins
            answered.append(done + self._reply_s)
        return answered

    def latest(self, queue: Iterable[Remaining]) -> float:
        """A time, in seconds, at which every job of a queue is answered for sure; far quicker to find than `finish`.

        As if all calls were made one after another on the token that is free last, and no job joined the fusion of
        another. Then the answer to a job waits at most for that, and once more for a call of each kind.
        """
        busy = max([self.now, *(at for times in self._free_at.values() for at in times)])
        encode: dict[Stage, int] = {}
        fuse: dict[Stage, tuple[int, int]] = {}
        # Jobs that are alike have the same left.
        for left, jobs in Counter(queue).items():
            busy = max(busy, left.not_before)
            for stage, rows in left.encode:
                encode[stage] = encode.get(stage, 0) + jobs * rows
            for stage, rows in left.fuse:
                queued, alone = fuse.get(stage, (0, 0))
                fuse[stage] = queued + jobs * rows, alone + jobs
        encodes = {stage: self._longest_s(stage, rows) for stage, rows in encode.items() if rows}
        fuses = {stage: self._longest_s(stage, rows) for stage, (rows, _) in fuse.items() if rows}
        busy += sum(-(-encode[stage] // stage.curve.best_batch) * longest for stage, longest in encodes.items())
        for stage, longest in fuses.items():
            rows, alone = fuse[stage]
            # Each of so many begins a call that it does not fill.
            busy += (rows + alone * (stage.curve.best_batch - 1)) // stage.curve.best_batch * longest
        slowest = max(encodes.values(), default=0.0) + max(fuses.values(), default=0.0)
        return busy + slowest + self._reply_s + _ROUNDING_S

    def demands(self, jobs: Iterable[Sequence[Remaining]], queue: Sequence[Remaining]) -> list[list[ServiceDemand]]:
        """What each job asks with each of its options, if it is one of this queue."""
        rows = _rows(queue)
        return [[self._demand(option, rows) for option in options] for options in jobs]

    def busy_s(self, resource: str) -> float:
        """Seconds from now until a token of the resource is free, the mean over its tokens."""
        times = self._free_at[resource]
        return sum(max(at - self.now, 0.0) for at in times) / len(times)

    def _demand(self, left: Remaining, queued: Mapping[Stage, int]) -> ServiceDemand:
        seconds: dict[str, float] = {}
        longest = []
        for steps in (left.encode, left.fuse):
            path = 0.0
            for stage, rows in steps:
                batch = min(max(queued.get(stage, 0), rows), stage.curve.best_batch)
                if stage.lane in self._spread:
                    path = max(path, self._spread_demand(stage, rows, batch, seconds))
                    continue
                resource = self._resources[stage.lane]
                tokens = len(self._free_at[resource])
                call = self._seconds(stage)[batch]
                seconds[resource] = seconds.get(resource, 0.0) + rows / batch * call / tokens
                path = max(path, math.ceil(math.ceil(rows / batch) / tokens) * call)
            longest.append(path)
        return ServiceDemand(seconds, max(sum(longest), *seconds.values(), 0.0) + self._reply_s)

    def _spread_demand(self, stage: Stage, rows: int, batch: int, seconds: dict[str, float]) -> float:
        """Adds what a stage asks of each of several resources, as they share it when all are busy; returns its path."""
        stages = self._stages_of(stage)
        calls = [self._seconds(one)[batch] for one in stages]
        tokens = [len(self._free_at[self._resources[one.lane]]) for one in stages]
        each = rows / batch / sum(count / max(call, _NO_TIME_S) for count, call in zip(tokens, calls, strict=True))
        for one in stages:
            resource = self._resources[one.lane]
            seconds[resource] = seconds.get(resource, 0.0) + each
        return math.ceil(math.ceil(rows / batch) / sum(tokens)) * min(calls)

    def _stages_of(self, stage: Stage) -> list[Stage]:
        """The stage on each lane where its calls may be made; never empty."""
        lanes = [lane for lane in self._spread[stage.lane] if lane not in stage.lacking]
        return [stage.on(lane) for lane in lanes or self._spread[stage.lane]]

    def _run(
        self, steps: RowsByStage, queued: dict[Stage, "_Queued"], tokens: Mapping[str, list[float]], earliest: float
    ) -> float:
        """Puts what some steps add to the calls of jobs in front on the tokens that are free first; returns the end."""
        end = earliest
        waiting: dict[str, list[float]] = {}
        for stage, rows in steps:
            last = queued.get(stage)
            if last is None:
                last = queued[stage] = self._queued(stage)
            free, own = self._begun(last.resource, waiting, tokens, earliest)
            # What is ready only after the last call has begun does not join it.
            joined = last.joined if earliest <= last.begins else 0
            while rows:
                count = min(rows, last.best_batch - joined)
                if last.several and not joined:
                    self._move(last, self._soonest(last, waiting, tokens, earliest))
                    free, own = self._begun(last.resource, waiting, tokens, earliest)
                begins, call = own[0], last.call_s[joined + count]
                if joined:
                    added = max(call - last.call_s[joined], 0.0)
                else:
                    last.begins, added = begins, call
                heapq.heapreplace(own, begins + added)
                if own is not free:
                    heapq.heapreplace(free, free[0] + added)
                end = max(end, begins + added, earliest + call)
                joined = last.joined = (joined + count) % last.best_batch
                last.left -= count
                rows -= count
        return end

    def _queued(self, stage: Stage, rows: int = 0) -> "_Queued":
        several = self._stages_of(stage) if stage.lane in self._spread else ()
        resource, call_s = self._resources[stage.lane], self._seconds(stage)
        return _Queued(several, stage.curve.best_batch, resource, call_s, rows)

    def _move(self, queued: "_Queued", on: Stage) -> None:
        queued.resource, queued.call_s = self._resources[on.lane], self._seconds(on)

    def _begun(
        self, resource: str, waiting: dict[str, list[float]], tokens: Mapping[str, list[float]], earliest: float
    ) -> tuple[list[float], list[float]]:
        """When the tokens of a resource are free; and when for steps that may begin at the earliest at some time."""
        free, own = tokens[resource], waiting.get(resource)
        if own is None:
            # Until these steps may begin, jobs behind use the tokens: those lose only the time that the calls take.
            own = [max(at, earliest) for at in free] if free[0] < earliest else free
            waiting[resource] = own
        return free, own

    def _soonest(
        self, queued: "_Queued", waiting: dict[str, list[float]], tokens: Mapping[str, list[float]], earliest: float
    ) -> Stage:
        """Where the next call of what is queued is over first."""
        items = min(queued.left, queued.best_batch)
        begins = [self._begun(self._resources[on.lane], waiting, tokens, earliest)[1][0] for on in queued.several]
        ends = [at + self._seconds(on)[items] for at, on in zip(begins, queued.several, strict=True)]
        return queued.several[ends.index(min(ends))]

    def _longest_s(self, stage: Stage, rows: int) -> float:
        """What any call with some of these rows takes at most, wherever it is made and however they come together."""
        items = min(rows, stage.curve.best_batch)
        if stage.lane not in self._spread:
            return stage.most_ms(items, self.now) / 1000 / self._share(stage)
        several = self._stages_of(stage)
        return max(one.most_ms(items, self.now) / 1000 / self._share(one) for one in several)

    def _share(self, stage: Stage) -> float:
        """The share of its resource that the calls of a stage have."""
        return 1 - self._reserve.get(self._resources[stage.lane], 0.0) if self._cautious else 1.0

    def _seconds(self, stage: Stage) -> "_CallSeconds":
        if (found := self._call_s.get(stage)) is None:
            found = self._call_s[stage] = _CallSeconds(stage, self.now, self._share(stage))
        return found


class _CallSeconds(dict[int, float]):
    """What calls of a stage are expected to take by the rows in them, on a share of its resource."""

    def __init__(self, stage: Stage, now: float, share: float) -> None:
        self._stage, self._now, self._share = stage, now, share

    def __missing__(self, items: int) -> float:
        seconds = self[items] = self._stage.expected_ms(items, self._now) / 1000 / self._share
        return seconds


@dataclass(slots=True)
class _Queued:
    """What is queued for a stage, and its last call that is not full.

    Attributes:
        several: the stage on each lane where its calls may be made, if these are several.
        best_batch: rows of a full call.
        resource: where the last call is made.
        call_s: what calls take there.
        left: rows that are queued, where there are several lanes.
        joined: rows of the last call.
        begins: when it does.
    """

    several: Sequence[Stage]
    best_batch: int
    resource: str
    call_s: _CallSeconds
    left: int = 0
    joined: int = 0
    begins: float = -math.inf


def _rows(queue: Sequence[Remaining]) -> dict[Stage, int]:
    """How many rows are queued for each stage; they share its calls."""
    rows_of: dict[Stage, int] = {}
    for left in queue:
        for stage, rows in (*left.encode, *left.fuse):
            rows_of[stage] = rows_of.get(stage, 0) + rows
    return rows_of
