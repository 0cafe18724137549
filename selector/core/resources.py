"""The services that compute, what they compute on, the calls under way, and which service the next call goes to."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

from mosel.modality import FUSION, ModalitySet, modality_of
from selector.core.forecast import Forecast
from selector.core.jobs import Call
from selector.core.stages import Stage

# A call that is overdue is expected to take so much longer, as a share of what it was expected to take in all.
_OVERDUE = 0.1
# Of a call's time: what is learned of it is no more exact, and lanes that differ by less are as good.
_ALIKE = 0.1


@dataclass(frozen=True)
class CallInFlight:
    """A call that a service has.

    Attributes:
        items: rows in it.
        started: seconds on the driver's clock.
        expected_s: seconds that it is expected to take.
    """

    call: Call
    items: int
    started: float
    expected_s: float

    @property
    def due(self) -> float:
        """When it should be over."""
        return self.started + self.expected_s

    def ends(self, now: float) -> float:
        """When it will be over, if it is not yet."""
        return max(self.due, now + _OVERDUE * self.expected_s)

    def ends_if_ever(self, now: float) -> float:
        """The same for calls that need not wait for it: what is overdue may hang, and takes as long again."""
        return max(self.ends(now), now + (now - self.due))


@dataclass
class _Lane:
    """A service; one that is `leaving` serves the jobs that it has, and no others."""

    up: bool = False
    resource: str = "cpu"
    leaving: bool = False


class Resources:
    """Lanes on the same resource share its tokens; each call under way holds one.

    A modality may have several lanes. It is known by the name of the first, which is its own; fusion has one.

    Args:
        lanes: the first of each modality, and fusion.
        tokens: calls at the same time on each resource.
        reply_ms: what an answer takes from here to the caller.

    Attributes:
        reply_s: the same in seconds.
        version: another one after each change of which services are there.
        is_one: whether all services that are there compute on the same resource.
    """

    def __init__(self, lanes: Iterable[str], tokens: int, reply_ms: float) -> None:
        self._lanes = {name: _Lane() for name in lanes}
        self._tokens, self.reply_s, self.version = tokens, reply_ms / 1000, 0
        self._calls: dict[int, CallInFlight] = {}
        self._open: set[str] | None = None
        self._replicas: dict[str, tuple[str, ...]] = {}
        self._spread: dict[str, tuple[str, ...]] = {}
        self._changed()

    def add_lanes(self, names: Iterable[str]) -> None:
        """Services that may come; those that are known stay as they are."""
        self._lanes = {name: _Lane() for name in names} | self._lanes
        self._changed()

    def set_lane(self, name: str, up: bool, resource: str) -> None:
        """A service came or went."""
        self._lanes[name] = _Lane(up, resource)
        self._changed()

    def remove_lane(self, name: str) -> None:
        """A service is none of those that may come any more."""
        self._lanes.pop(name, None)
        self._changed()

    def _changed(self) -> None:
        self.version += 1
        self._open = None
        self.is_one = len({lane.resource for lane in self._lanes.values() if lane.up}) == 1
        self._resource_of = {name: lane.resource for name, lane in self._lanes.items()}
        lanes: dict[str, list[str]] = {}
        for lane in self._lanes:
            lanes.setdefault(modality_of(lane), []).append(lane)
        self._replicas = {modality: tuple(sorted(names)) for modality, names in lanes.items() if len(names) > 1}
        self._spread = {}
        for modality, names in self._replicas.items():
            by_resource = {self._lanes[lane].resource: lane for lane in reversed(names) if self._lanes[lane].up}
            if by_resource and [*by_resource.values()] != [modality]:
                self._spread[modality] = tuple(sorted(by_resource.values()))

    def set_leaving(self, name: str) -> None:
        """A service is about to go: no further job may be planned with it."""
        self._lanes[name].leaving = True
        self.version += 1

    def is_up(self, modality_set: ModalitySet, lacking: Set[str] = frozenset()) -> bool:
        """Whether fusion and an encoder of each modality are there and stay; those without the model do not count."""
        return all(self.is_served(m, lacking, staying=True) for m in (FUSION, *modality_set))

    def is_served(self, modality: str, lacking: Set[str], *, staying: bool = False) -> bool:
        """Whether an encoder of a modality is there, or fusion.

        Args:
            modality: the modality, or fusion.
            lacking: lanes that do not have the model, and do not count.
            staying: whether those do not count either that are about to go.
        """
        there = [lane for lane in self._replicas.get(modality, (modality,)) if self._lanes[lane].up]
        if modality in self._replicas:
            there = [lane for lane in there if lane not in lacking]
        return bool(self.staying(there) if staying else there)

    def staying(self, lanes: Iterable[str]) -> list[str]:
        """Those that are not about to go."""
        return [lane for lane in lanes if not self._lanes[lane].leaving]

    def open_lanes(self) -> set[str]:
        """The services that are there and may be called now."""
        if self._open is None:
            used = [self._resource_of[under_way.call.lane] for under_way in self._calls.values()]
            free = {resource for resource in self._resource_of.values() if used.count(resource) < self._tokens}
            self._open = {name for name, lane in self._lanes.items() if lane.up and lane.resource in free}
        return self._open

    def replicas(self, modality: str) -> list[str]:
        """The encoders of a modality that are there, if it has several; else nothing."""
        lanes = self._replicas.get(modality)
        return [lane for lane in lanes if self._lanes[lane].up] if lanes else []

    def without_replicas(self, modalities: Iterable[str]) -> frozenset[str]:
        """Those of some modalities that have one encoder."""
        return frozenset(modality for modality in modalities if modality not in self._replicas)

    def resource_of(self, lane: str) -> str:
        """What a service computes on."""
        return self._lanes[lane].resource

    def calls_of(self, lane: str) -> int:
        """Calls that a service has."""
        return sum(under_way.call.lane == lane for under_way in self._calls.values())

    def free_at(
        self, now: float, ends: Callable[[CallInFlight, float], float] = CallInFlight.ends
    ) -> dict[str, list[float]]:
        """When each token of each resource will be free; `ends` says when a call is over that is under way."""
        free_at = self._all_free(now)
        for under_way in self._calls.values():
            free = free_at[self._resource_of[under_way.call.lane]]
            # Where a lane came back on another resource, there may be more calls than tokens for a moment.
            free[free.index(min(free))] = max(ends(under_way, now), min(free))
        return free_at

    def begin(self, call: Call, items: int, now: float, expected_s: float) -> None:
        """A call is handed out."""
        self._calls[call.id] = CallInFlight(call, items, now, expected_s)
        self._open = None

    def over(self, call: Call) -> CallInFlight:
        """A call came back, well or not."""
        self._open = None
        return self._calls.pop(call.id)

    def calls(self, ids: Iterable[int]) -> list[CallInFlight]:
        """Some of the calls under way."""
        return [self._calls[call_id] for call_id in ids]

    @property
    def is_idle(self) -> bool:
        """Whether no call is under way."""
        return not self._calls

    def is_called_for(self, model: str) -> bool:
        """Whether a call of a model is under way."""
        return any(under_way.call.model == model for under_way in self._calls.values())

    def forecast(self, now: float, reserve: dict[str, float]) -> Forecast:
        """From what is under way now; `reserve` is the share of each resource for jobs that have not come yet."""
        return self._forecast(now, self.free_at(now), reserve)

    def idle_forecast(self, now: float) -> Forecast:
        """As if nothing were under way."""
        return self._forecast(now, self._all_free(now), {})

    def statistics(self) -> dict[str, int]:
        """Calls under way by lane."""
        under_way = Counter(under_way.call.lane for under_way in self._calls.values())
        return {f"calls_in_flight.{name}": under_way[name] for name in self._lanes}

    def _forecast(self, now: float, free_at: Mapping[str, Sequence[float]], reserve: Mapping[str, float]) -> Forecast:
        return Forecast(now, free_at, self._resource_of, self.reply_s, reserve, self._spread)

    def _all_free(self, now: float) -> dict[str, list[float]]:
        return {resource: [now] * self._tokens for resource in self._resource_of.values()}


class LaneBalancer:
    """The lanes that may be called at one moment; asked once for each job and modality, in the order of the queue.

    Where a modality has several encoders, a call goes to the one where it should be over first. If that one has no free
    token, the call waits for it rather than going to a slower one. What waits takes the token that is free next, in the
    order of the queue, so that jobs further back see how long it would be until their turn.

    Args:
        resources: where work runs.
        now: seconds on the driver's clock.

    Attributes:
        open: those that are there, on a resource with a free token.
    """

    def __init__(self, resources: Resources, now: float) -> None:
        self._resources, self._now = resources, now
        self.open = resources.open_lanes()
        # Rows that still fit into the last call that waits.
        self._room: dict[Stage, int] = {}

    def of(self, stage: Stage, rows: int, queued: Callable[[], int]) -> str:
        """The lane to be called now for rows of a job that wait for an encoder; empty if none is.

        Args:
            stage: the encoder's, on its first lane.
            rows: at least one.
            queued: counts these and those of jobs behind, which fill the call.
        """
        lanes = self._resources.replicas(stage.lane)
        if not lanes:
            return stage.lane if stage.lane in self.open else ""
        lanes = [lane for lane in lanes if lane not in stage.lacking]
        lanes = self._resources.staying(lanes) or lanes
        if self.open.isdisjoint(lanes):
            return ""
        room, best_batch = self._room.get(stage, 0), stage.curve.best_batch
        rows -= room
        left = queued() - room if rows > 0 else 0
        while rows > 0:
            items = min(left, best_batch)
            lane = self._first_over(stage, lanes, items)
            if lane in self.open:
                return lane
            heapq.heapreplace(self._tokens[self._resources.resource_of(lane)], self._over(stage, lane, items))
            rows, left = rows - best_batch, left - best_batch
        self._room[stage] = -rows
        return ""

    def _first_over(self, stage: Stage, lanes: list[str], items: int) -> str:
        """Where a call of so many items is over first; of several that are as good, one that is free and has least."""
        over = {lane: self._over(stage, lane, items) for lane in lanes}
        first = min(lanes, key=over.__getitem__)
        latest = over[first] + _ALIKE * stage.on(first).expected_ms(items, self._now) / 1000
        alike = [lane for lane in lanes if over[lane] <= latest]
        return min(alike, key=lambda lane: (lane not in self.open, self._resources.calls_of(lane)))

    def _over(self, stage: Stage, lane: str, items: int) -> float:
        tokens = self._tokens[self._resources.resource_of(lane)]
        return tokens[0] + stage.on(lane).expected_ms(items, self._now) / 1000

    @cached_property
    def _tokens(self) -> dict[str, list[float]]:
        free_at = self._resources.free_at(self._now, CallInFlight.ends_if_ever)
        return {resource: sorted(times) for resource, times in free_at.items()}
