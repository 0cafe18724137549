"""The life of slots, decided by the producer alone: FREE -> FILLING -> PUBLISHED -> FREE.

acquire   FREE -> FILLING       the generation rises, so old refs no longer match
publish   FILLING -> PUBLISHED  a lease begins; it ends with release or at its expiry
abort     FILLING -> FREE
release   PUBLISHED -> FREE     only with the right generation: a second release finds another one
expire    PUBLISHED -> FREE     for every lease whose time is over
"""

import enum
import heapq
from collections import deque
from dataclasses import asdict, dataclass
from typing import Protocol

from mosel.transport.layout import SLOT_SIZES, Layout

# Entries that the heap of leases may have beyond twice those that it needs, so that few slots need no tidying.
_SPARE_LEASES = 64


class SlotState(enum.Enum):
    """What a slot is used for."""

    FREE = "free"
    FILLING = "filling"
    PUBLISHED = "published"


class Content(Protocol):
    """The bytes of a tensor that are kept in place."""

    @property
    def nbytes(self) -> int:
        """How many."""
        ...


@dataclass(slots=True)
class Slot:
    """One slot and its lease."""

    index: int
    size_class: int
    offset: int
    generation: int = 0
    state: SlotState = SlotState.FREE
    content: Content | None = None


@dataclass(frozen=True)
class SlotStatistics:
    """Counts since the start, and slots by state now."""

    free: int
    filling: int
    published: int
    acquired_total: int
    released_total: int
    expired_total: int
    refused_total: int

    def as_counters(self) -> dict[str, int]:
        """The same by name, `slots_free` and so on."""
        return {f"slots_{name}": count for name, count in asdict(self).items()}


class SlotTable:
    """All slots of one arena. Acquire and release take constant time. Not thread-safe."""

    def __init__(self, layout: Layout) -> None:
        self.slots = [self._new_slot(layout, index) for index in range(layout.slot_count)]
        self._free: list[deque[Slot]] = [deque() for _ in SLOT_SIZES]
        for slot in self.slots:
            self._free[slot.size_class].append(slot)
        # Leases that are over stay in the heap until they come to its top, or there are too many of them.
        self._leases: list[tuple[float, int, int]] = []
        self._published = 0
        self._acquired = self._released = self._expired = self._refused = 0

    @staticmethod
    def _new_slot(layout: Layout, index: int) -> Slot:
        return Slot(index, SLOT_SIZES.index(layout.slot_size(index)), layout.slot_offset(index))

    def acquire(self, nbytes: int, now: float) -> Slot | None:
        """Takes a free slot of the smallest class that fits; a full class borrows from the next.

        Args:
            nbytes: bytes to be stored.
            now: seconds on the monotonic clock; leases that are over by then are taken back first.
        """
        self.expire(now)
        for size, free in zip(SLOT_SIZES, self._free, strict=True):
            if nbytes <= size and free:
                slot = free.popleft()
                slot.state, slot.generation = SlotState.FILLING, slot.generation + 1
                self._acquired += 1
                return slot
        return None

    def has_room(self, nbytes: int, now: float) -> bool:
        """Whether `acquire` would find a slot; takes none."""
        self.expire(now)
        return any(nbytes <= size and free for size, free in zip(SLOT_SIZES, self._free, strict=True))

    def refuse(self) -> None:
        """Counts a tensor for which no slot was free, however often that was tried."""
        self._refused += 1

    def publish(self, slot: Slot, expires_at: float) -> None:
        """The slot is filled; its lease ends at `expires_at` seconds on the monotonic clock."""
        _require(slot, SlotState.FILLING)
        slot.state = SlotState.PUBLISHED
        self._published += 1
        heapq.heappush(self._leases, (expires_at, slot.index, slot.generation))

    def abort(self, slot: Slot) -> None:
        """The slot will not be filled after all."""
        _require(slot, SlotState.FILLING)
        self._free_again(slot)

    def release(self, index: int, generation: int) -> bool:
        """Ends a lease; False if there is no such lease (any more)."""
        slot = self.published(index, generation)
        if slot is None:
            return False
        self._end_lease(slot)
        self._released += 1
        return True

    def published(self, index: int, generation: int) -> Slot | None:
        """The slot, if there is a lease for this generation of it."""
        slot = self.slots[index] if 0 <= index < len(self.slots) else None
        there = slot is not None and slot.state is SlotState.PUBLISHED and slot.generation == generation
        return slot if there else None

    def expire(self, now: float) -> int:
        """Frees every slot whose lease is over; returns how many."""
        expired = 0
        while self._leases and self._leases[0][0] <= now:
            _, index, generation = heapq.heappop(self._leases)
            if slot := self.published(index, generation):
                self._end_lease(slot)
                expired += 1
        self._expired += expired
        return expired

    def next_expiry(self) -> float | None:
        """When the next lease may end, seconds on the monotonic clock; None without leases."""
        return self._leases[0][0] if self._leases else None

    def statistics(self) -> SlotStatistics:
        """Counts for metrics and tests."""
        by_state = dict.fromkeys(SlotState, 0)
        for slot in self.slots:
            by_state[slot.state] += 1
        return SlotStatistics(
            free=by_state[SlotState.FREE],
            filling=by_state[SlotState.FILLING],
            published=by_state[SlotState.PUBLISHED],
            acquired_total=self._acquired,
            released_total=self._released,
            expired_total=self._expired,
            refused_total=self._refused,
        )

    def _end_lease(self, slot: Slot) -> None:
        self._free_again(slot)
        self._published -= 1
        if len(self._leases) > 2 * self._published + _SPARE_LEASES:
            self._leases = [lease for lease in self._leases if self.published(*lease[1:])]
            heapq.heapify(self._leases)

    def _free_again(self, slot: Slot) -> None:
        slot.state, slot.content = SlotState.FREE, None
        self._free[slot.size_class].append(slot)


def _require(slot: Slot, state: SlotState) -> None:
    if slot.state is not state:
        raise ValueError(f"slot {slot.index} is {slot.state.value}; expected {state.value}")
