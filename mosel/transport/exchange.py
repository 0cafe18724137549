"""Publisher and Reader: tensors in, refs out, and back. For tensors in host memory."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mosel.config import TransportSettings
from mosel.errors import Overloaded, ReadNotProven
from mosel.tensors import DTYPES, dtype_value
from mosel.transport.arena import NANOSECONDS, Arena
from mosel.transport.control import remove_orphans
from mosel.transport.host import no_shared_clock
from mosel.transport.layout import KIB, MIB
from mosel.transport.refs import CheckedSlice, checked_slice
from mosel.transport.shared_memory import SharedMemoryArena, SharedMemoryView
from mosel.transport.slots import Slot
from mosel.v1 import arena_pb2, tensor_pb2

_RUNGS = {number: name.lower() for name, number in tensor_pb2.Rung.items()}


class Publisher:
    """Turns tensors into refs: inline up to a limit, in a slot of the arena above it.

    Args:
        arena: this process's arena.
        settings: the limits.

    Attributes:
        rung: how consumers are known to reach the arena; INLINE until the selector says otherwise.
        arena: this process's arena.
        settings: the limits.
    """

    def __init__(self, arena: SharedMemoryArena, settings: TransportSettings) -> None:
        self.rung: tensor_pb2.Rung.ValueType = tensor_pb2.INLINE
        self.arena, self.settings = arena, settings
        self._published: Counter[str] = Counter()
        self._lock = threading.Lock()

    def publish(
        self,
        dtype: str,
        shape: tuple[int, ...],
        data: memoryview,
        lease_s: float,
        wait_s: float = 0.0,
        rung: tensor_pb2.Rung.ValueType | None = None,
    ) -> tensor_pb2.TensorRef:
        """Publishes a tensor; when this returns, its bytes are complete.

        Args:
            dtype: name of the data type.
            shape: shape of the tensor.
            data: its contiguous bytes.
            lease_s: seconds for which a slot is kept if nobody releases it.
            wait_s: seconds to wait for a slot when all are in use.
            rung: how the consumers of this tensor reach the arena, if not as `rung` of this publisher says.

        Raises:
            PayloadTooLarge: it does not fit into any slot.
            Overloaded: the arena is full, and it is too large to travel inline instead.
        """
        ref = tensor_pb2.TensorRef(dtype=dtype_value(dtype), shape=shape, nbytes=data.nbytes)
        rung = self.rung if rung is None else rung
        if rung == tensor_pb2.INLINE or data.nbytes <= self.settings.inline_max_kib * KIB:
            return self._inline(ref, data)
        expires_at = time.monotonic() + lease_s
        try:
            slot = self.arena.write(data, expires_at, wait_s)
        except Overloaded:
            if data.nbytes > self.settings.inline_when_full_max_kib * KIB:
                raise
            return self._inline(ref, data)
        set_slot(ref, self.arena, slot, expires_at)
        self.count(self.arena.rung, data.nbytes)
        return ref

    def release(self, slots: Iterable[tensor_pb2.ArenaSlot]) -> None:
        """Takes slots back that nobody reads any more; stale ones and those of other arenas are passed over."""
        release_slots(self.arena, slots)

    def count(self, rung: tensor_pb2.Rung.ValueType, nbytes: int) -> None:
        """Counts a tensor that was published."""
        name = _RUNGS[rung]
        with self._lock:
            self._published[f"tensors.{name}"] += 1
            self._published[f"tensor_bytes.{name}"] += nbytes

    def statistics(self) -> dict[str, int]:
        """Slots of the arena, `slots_free` and so on, and what was published by rung, `tensors.inline` and so on."""
        return self.arena.statistics().as_counters() | dict(self._published)

    def _inline(self, ref: tensor_pb2.TensorRef, data: memoryview) -> tensor_pb2.TensorRef:
        ref.inline = bytes(data)
        self.count(tensor_pb2.INLINE, data.nbytes)
        return ref


class Reader:
    """Gathers rows from refs into host memory. Reads only arenas that were opened before. Thread-safe.

    Attributes:
        bytes_read: bytes of the rows gathered so far.

    Args:
        directory: where shared memory is mounted.
    """

    def __init__(self, directory: Path) -> None:
        self.bytes_read = 0
        self._directory = directory
        self._views: dict[tuple[int, int], SharedMemoryView] = {}
        self._lock = threading.Lock()

    def open(self, arena: arena_pb2.ArenaDescription) -> bytes:
        """Opens a producer's arena, once, and reads its nonce through the path that tensors will take.

        Raises:
            ReadNotProven: the path does not work; says why.
        """
        reason = no_shared_clock(arena.host)
        if not reason and arena.rung != tensor_pb2.POSIX_SHM:
            reason = "this consumer reads shared memory only"
        if reason:
            raise ReadNotProven(reason)
        key = (arena.arena_id, arena.epoch)
        with self._lock:
            # A selector that died could not tell which producers went before it came again.
            self._views = {known: view for known, view in self._views.items() if not view.is_gone()}
            if key not in self._views:
                self._views[key] = SharedMemoryView(self._directory, *key)
            return self._views[key].nonce

    def close(self, arena_id: int, epoch: int) -> None:
        """Forgets an arena whose producer is gone; it is unmapped when the last thread that reads it is done."""
        with self._lock:
            self._views.pop((arena_id, epoch), None)

    def gather(
        self, slices: Iterable[tensor_pb2.RowSlice], dtype: str, item_shape: tuple[int, ...]
    ) -> NDArray[np.generic]:
        """Copies rows of several tensors into one.

        Args:
            slices: the rows, in order.
            dtype: the data type that every tensor must have.
            item_shape: the shape that every row must have.

        Returns:
            [sum of row counts, *item_shape].

        Raises:
            InvalidRequest: a slice is out of bounds, or a tensor has another type or shape.
            ReadNotProven: a slot was reused, its lease was over, or its arena is not open.
        """
        return self.gather_checked([checked_slice(s, dtype, item_shape) for s in slices], dtype, item_shape)

    def gather_checked(
        self, parts: Sequence[CheckedSlice], dtype: str, item_shape: tuple[int, ...]
    ) -> NDArray[np.generic]:
        """As `gather`, of slices that `checked_slice` has let pass for this dtype and shape."""
        rows = sum(part.rows for part in parts)
        batch = np.empty((rows, *item_shape), DTYPES[dtype])
        flat = batch.reshape(-1).view(np.uint8)
        done = 0
        for part in parts:
            nbytes = part.end - part.begin
            self.copy(part, flat[done : done + nbytes])
            done += nbytes
        self.count(batch.nbytes)
        return batch

    def copy(self, part: CheckedSlice, target: NDArray[np.uint8]) -> None:
        """Copies the bytes of a slice, and proves what was copied."""
        if part.inline is not None:
            target[:] = np.frombuffer(part.inline, np.uint8)[part.begin : part.end]
            return
        slot = part.slot
        with self._lock:
            view = self._views.get((slot.arena_id, slot.epoch))
        if view is None:
            raise ReadNotProven("the arena that the ref names is not open here")
        target[:] = view.bytes_of(slot.slot, part.nbytes)[part.begin : part.end]
        view.prove(slot.slot, slot.generation, slot.lease_expires_ns)

    def count(self, nbytes: int) -> None:
        """Adds to `bytes_read`."""
        with self._lock:
            self.bytes_read += nbytes

    def arenas_open(self) -> int:
        """How many arenas are open."""
        return len(self._views)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exc: object) -> None:
        for view in self._views.values():
            view.close()
        self._views.clear()


@contextlib.contextmanager
def open_arena(settings: TransportSettings, mib: int, setting: str) -> Iterator[tuple[SharedMemoryArena, Publisher]]:
    """A new arena with its publisher, after orphans of dead processes have been removed.

    Args:
        settings: the transport's.
        mib: the arena's budget in MiB.
        setting: the setting that states the budget, for messages.

    Raises:
        ConfigError: shared memory is too small for it.
    """
    remove_orphans(settings.shm_dir)
    with SharedMemoryArena(settings.shm_dir, mib * MIB, setting) as arena:
        yield arena, Publisher(arena, settings)


def set_slot(ref: tensor_pb2.TensorRef, arena: Arena, slot: Slot, expires_at: float) -> None:
    """Lets a ref name a published slot."""
    ref.slot.arena_id, ref.slot.epoch = arena.arena_id, arena.epoch
    ref.slot.slot, ref.slot.generation = slot.index, slot.generation
    ref.slot.lease_expires_ns = int(expires_at * NANOSECONDS)


def release_slots(arena: Arena, slots: Iterable[tensor_pb2.ArenaSlot]) -> None:
    """Takes an arena's slots back; stale ones and those of other arenas are passed over."""
    for slot in slots:
        if (slot.arena_id, slot.epoch) == (arena.arena_id, arena.epoch):
            arena.release(slot.slot, slot.generation)
