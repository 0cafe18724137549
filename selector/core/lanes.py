"""Which encoder a call goes to where a modality has several: the one where it should be over first.

If that one has no free token, the call waits for it rather than going to a slower one. What waits takes the token that
is free next, in the order of the queue, so that jobs further back see how long it would be until their turn.
"""

import heapq
from collections.abc import Callable
from functools import cached_property

from selector.core.resources import Resources, UnderWay
from selector.core.stages import Stage

# Of a call's time: what is learned of it is no more exact, and lanes that differ by less are as good.
_ALIKE = 0.1


class Lanes:
    """The lanes that may be called at one moment; asked once for each job and modality, in the order of the queue.

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
        free_at = self._resources.free_at(self._now, UnderWay.ends_if_ever)
        return {resource: sorted(times) for resource, times in free_at.items()}
