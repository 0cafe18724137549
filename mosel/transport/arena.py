"""What every arena has: slots with leases. Where the bytes are is for subclasses to say."""

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from mosel.errors import Overloaded, PayloadTooLarge, ReadNotProven
from mosel.transport.control import ControlFile
from mosel.transport.host import host_identity
from mosel.transport.layout import MIB, SLOT_SIZES, Layout
from mosel.transport.slots import Slot, SlotStatistics, SlotTable
from mosel.v1 import arena_pb2, tensor_pb2

NANOSECONDS = 1_000_000_000


class Arena(ABC):
    """The producer's side: fills slots and takes them back. Thread-safe; a context manager.

    Args:
        nbytes: the budget in bytes.
        setting: the setting that states the budget, for messages.

    Attributes:
        rung: how consumers reach the slots at best.
        arena_id, epoch: name the arena; both drawn at random.
        nonce: random bytes that a consumer can read only through the path that tensors will take.
    """

    rung: tensor_pb2.Rung.ValueType
    arena_id: int
    epoch: int
    nonce: bytes

    def __init__(self, nbytes: int, setting: str) -> None:
        self.layout = Layout.for_budget(nbytes)
        self._setting = setting
        self._table = SlotTable(self.layout)
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)

    @property
    def largest_slot(self) -> int:
        """Bytes of the largest slot."""
        return max(size for size, count in zip(SLOT_SIZES, self.layout.counts, strict=True) if count)

    def announcement(self) -> arena_pb2.AnnouncedArena:
        """What the selector is told, so that consumers can open this arena."""
        arena = arena_pb2.ArenaDescription(
            arena_id=self.arena_id, epoch=self.epoch, rung=self.rung, host=host_identity()
        )
        self._describe(arena)
        return arena_pb2.AnnouncedArena(arena=arena, nonce=self.nonce)

    @contextlib.contextmanager
    def filling(self, nbytes: int, expires_at: float, wait_s: float) -> Iterator[Slot]:
        """A slot that the body fills; it is published when the body ends well, and free again when it does not.

        Args:
            nbytes: bytes to be stored.
            expires_at: end of the lease, seconds on the monotonic clock.
            wait_s: seconds to wait for a slot at most.

        Raises:
            PayloadTooLarge: no slot of this arena is that large.
            Overloaded: every slot that fits is in use.
        """
        if nbytes > self.largest_slot:
            raise PayloadTooLarge(
                f"a tensor of {nbytes} bytes is larger than the largest slot, {self.largest_slot} bytes; "
                f"send fewer items or raise {self._setting}"
            )
        slot = self._acquire(nbytes, wait_s)
        try:
            yield slot
        except BaseException:
            with self._lock:
                self._table.abort(slot)
                self._freed.notify_all()
            raise
        with self._lock:
            self._table.publish(slot, expires_at)

    def has_room(self, nbytes: int) -> bool:
        """Whether a slot for so many bytes is free now."""
        with self._lock:
            return self._table.has_room(nbytes, time.monotonic())

    def release(self, index: int, generation: int) -> bool:
        """Ends a lease early; False if there is no such lease."""
        with self._lock:
            # All: the first to wait may need a larger slot than this one.
            self._freed.notify_all()
            return self._table.release(index, generation)

    def check_published(self, index: int, generation: int) -> Slot:
        """The slot that a ref names; where the bytes were copied before, this proves them: the producer decides alone.

        Raises:
            ReadNotProven: there is no such lease (any more).
        """
        with self._lock:
            self._table.expire(time.monotonic())
            slot = self._table.published(index, generation)
        if slot is None:
            raise ReadNotProven("the slot was reused, or its lease was over, before it was read")
        return slot

    def statistics(self) -> SlotStatistics:
        """Slots by state, after taking back expired leases."""
        with self._lock:
            self._table.expire(time.monotonic())
            return self._table.statistics()

    @abstractmethod
    def close(self) -> None:
        """Gives everything back, once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @abstractmethod
    def _describe(self, arena: arena_pb2.ArenaDescription) -> None:
        """Adds what a consumer needs to reach the slots."""

    @abstractmethod
    def _claim(self, slot: Slot, nbytes: int) -> None:
        """Tells readers that a slot will be filled anew with so many bytes, before the first of them is written."""

    def _acquire(self, nbytes: int, wait_s: float) -> Slot:
        until = time.monotonic() + wait_s
        with self._lock:
            while (slot := self._table.acquire(nbytes, now := time.monotonic())) is None:
                next_expiry = self._table.next_expiry()
                if now >= until:
                    self._table.refuse()
                    megabytes = self.layout.total_bytes // MIB
                    raise Overloaded(f"every slot for {nbytes} bytes is in use ({megabytes} MiB, {self._setting})")
                self._freed.wait(min(until, next_expiry or until) - now)
            # Before the first byte, so that a reader of an older generation finds out.
            self._claim(slot, nbytes)
            return slot


class ControlledArena(Arena):
    """An arena that other processes can open: a control file in shared memory tells them of its slots.

    Args:
        directory: where shared memory is mounted, /dev/shm.
        nbytes: the budget in bytes.
        holds_slots: whether the slots are in the control file.
        setting: the setting that states the budget, for messages.

    Raises:
        ConfigError: the directory does not hold that much; gives the numbers and the setting.
    """

    def __init__(self, directory: Path, nbytes: int, holds_slots: bool, setting: str) -> None:
        super().__init__(nbytes, setting)
        self._control = ControlFile(directory, self.layout, holds_slots, setting)
        self.arena_id, self.epoch, self.nonce = self._control.arena_id, self._control.epoch, self._control.nonce

    def close(self) -> None:
        """Removes the file; consumers that have the arena open keep what they opened until they close it."""
        self._control.close()

    def _claim(self, slot: Slot, nbytes: int) -> None:
        self._control.claim(slot.index, slot.generation, nbytes)
