"""Publisher and Reader: tensors in, refs out, and back. For tensors in host memory."""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mosel.config import TransportSettings
from mosel.deadline import Deadline
from mosel.errors import Overloaded, ReadNotProven
from mosel.tensors import DTYPES, dtype_value
from mosel.transport.arena import NANOSECONDS, Arena
from mosel.transport.fetched import Connect, FetchedArena, Wanted
from mosel.transport.host import no_shared_clock
from mosel.transport.layout import KIB
from mosel.transport.object_arena import ObjectArena, ObjectView
from mosel.transport.refs import CheckedSlice, checked_slice
from mosel.transport.shared_memory import SharedMemoryArena, SharedMemoryView
from mosel.transport.slots import Slot
from mosel.v1 import arena_pb2, tensor_pb2

# How long a producer has to show its nonce, and to send rows where nobody says otherwise.
_OPEN_S, _FETCH_S = 3.0, 60.0
# What is counted of tensors, by the rung that they travel on.
_COUNTED = {number: (f"tensors.{n.lower()}", f"tensor_bytes.{n.lower()}") for n, number in tensor_pb2.Rung.items()}


class Publisher:
    """Turns tensors into refs: inline up to a limit, in a slot of an arena above it.

    Args:
        arena: for consumers in other processes, if there are any.
        settings: the limits.
        objects: for consumers in this process, if there are any.

    Attributes:
        rung: how consumers are known to reach the arenas; INLINE until the selector says otherwise.
        arena, settings, objects: as given.
    """

    def __init__(
        self, arena: SharedMemoryArena | None, settings: TransportSettings, objects: ObjectArena | None = None
    ) -> None:
        self.rung: tensor_pb2.Rung.ValueType = tensor_pb2.INLINE
        self.arena, self.settings, self.objects = arena, settings, objects
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
            data: its contiguous bytes; with IN_PROCESS they stay where they are, and must not change any more.
            lease_s: seconds for which a slot is kept if nobody releases it.
            wait_s: seconds to wait for a slot when all are in use.
            rung: how the consumers of this tensor reach this process, if not as `rung` of this publisher says.

        Raises:
            PayloadTooLarge: it does not fit into any slot.
            Overloaded: the arena is full, and it is too large to travel inline instead.
        """
        ref = tensor_pb2.TensorRef(dtype=dtype_value(dtype), shape=shape, nbytes=data.nbytes)
        arena = self._arena_for(self.rung if rung is None else rung)
        if arena is None or data.nbytes <= self.settings.inline_max_kib * KIB:
            return self._inline(ref, data)
        expires_at = time.monotonic() + lease_s
        try:
            slot = arena.write(data, expires_at, wait_s)
        except Overloaded:
            if data.nbytes > self.settings.inline_when_full_max_kib * KIB:
                raise
            return self._inline(ref, data)
        set_slot(ref, arena, slot, expires_at)
        self.count(arena.rung, data.nbytes)
        return ref

    def has_room(self, nbytes: int) -> bool:
        """Whether there is a slot for so many bytes now."""
        arena = self._arena_for(self.rung)
        return arena is None or arena.has_room(nbytes)

    @property
    def arenas(self) -> list[ObjectArena | SharedMemoryArena]:
        """Those there are, best first."""
        return [arena for arena in (self.objects, self.arena) if arena]

    @property
    def largest_slot(self) -> int:
        """Bytes of the largest tensor that every arena takes."""
        return min(arena.largest_slot for arena in self.arenas)

    @property
    def copies(self) -> bool:
        """Whether a large tensor is copied when it is published."""
        return not isinstance(self._arena_for(self.rung), ObjectArena)

    def announcement(self) -> arena_pb2.Announcement:
        """What the selector is told: the arenas, best first."""
        return arena_pb2.Announcement(arenas=[arena.announcement() for arena in self.arenas])

    def release(self, slots: Iterable[tensor_pb2.ArenaSlot]) -> None:
        """Takes slots back that nobody reads any more; stale ones and those of other arenas are passed over."""
        slots = list(slots)
        for arena in self.arenas:
            release_slots(arena, slots)

    def count(self, rung: tensor_pb2.Rung.ValueType, nbytes: int) -> None:
        """Counts a tensor that was published."""
        tensors, tensor_bytes = _COUNTED[rung]
        with self._lock:
            self._published[tensors] += 1
            self._published[tensor_bytes] += nbytes

    def statistics(self) -> dict[str, int]:
        """What was published by rung, `tensors.inline` and so on, and slots.

        Those of shared memory are `slots_free` and so on, those that hold objects `object_slots_free` and so on.
        """
        counters = self.arena.statistics().as_counters() if self.arena else {}
        if self.objects:
            counters |= prefixed("object", self.objects.statistics().as_counters())
        return counters | dict(self._published)

    def _arena_for(self, rung: tensor_pb2.Rung.ValueType) -> ObjectArena | SharedMemoryArena | None:
        """Where consumers that are reached so find tensors in host memory; None: only inside messages."""
        if rung == tensor_pb2.IN_PROCESS and self.objects:
            return self.objects
        return None if rung == tensor_pb2.INLINE else self.arena

    def _inline(self, ref: tensor_pb2.TensorRef, data: memoryview) -> tensor_pb2.TensorRef:
        ref.inline = bytes(data)
        self.count(tensor_pb2.INLINE, data.nbytes)
        return ref


class Reader:
    """Gathers rows from refs into host memory. Reads only arenas that were opened before. Thread-safe.

    A context manager that closes what it opened.

    Attributes:
        bytes_read: bytes of the rows gathered so far.
        bytes_fetched: those of them that were fetched from their producers.

    Args:
        directory: where shared memory is mounted.
        connect: makes channels to producers whose arenas cannot be mapped; None: they are not read.
    """

    def __init__(self, directory: Path, connect: Connect | None = None) -> None:
        self.bytes_read = self.bytes_fetched = 0
        self._directory, self._connect = directory, connect
        self._views: dict[tuple[int, int], SharedMemoryView | ObjectView] = {}
        self._fetched: dict[tuple[int, int], FetchedArena] = {}
        self._lock, self._opening = threading.Lock(), threading.Lock()

    def open(self, arena: arena_pb2.ArenaDescription) -> bytes:
        """Opens a producer's arena, once, and reads its nonce through the path that tensors will take.

        Raises:
            ReadNotProven: the path does not work; says why.
            MoselError: the producer cannot be fetched from; says why.
        """
        if arena.rung == tensor_pb2.FETCH:
            return self._open_fetched(arena)
        if reason := no_shared_clock(arena.host):
            raise ReadNotProven(reason)
        key = (arena.arena_id, arena.epoch)
        with self._lock:
            # A selector that died could not tell which producers went before it came again.
            self._views = {known: view for known, view in self._views.items() if not view.is_gone()}
            if key not in self._views:
                self._views[key] = self._view(arena.rung, key)
            return self._views[key].nonce

    def close(self, arena_id: int, epoch: int) -> None:
        """Forgets an arena whose producer is gone; it is unmapped when the last thread that reads it is done."""
        with self._lock:
            self._views.pop((arena_id, epoch), None)
            fetched = self._fetched.pop((arena_id, epoch), None)
        if fetched:
            fetched.close()

    def gather(
        self,
        slices: Iterable[tensor_pb2.RowSlice],
        dtype: str,
        item_shape: tuple[int, ...],
        deadline: Deadline | None = None,
    ) -> NDArray[np.generic]:
        """Rows of several tensors as one.

        Args:
            slices: the rows, in order.
            dtype: the data type that every tensor must have.
            item_shape: the shape that every row must have.
            deadline: until when rows may be fetched; None: for a minute.

        Returns:
            [sum of row counts, *item_shape]. The rows of one object of this process are a view of it, read-only;
            everything else is copied.

        Raises:
            InvalidRequest: a slice is out of bounds, or a tensor has another type or shape.
            ReadNotProven: a slot was reused, its lease was over, its arena is not open, or its producer is away.
            DeadlineExceeded: rows could not be fetched in time.
        """
        return self.gather_checked([checked_slice(s, dtype, item_shape) for s in slices], dtype, item_shape, deadline)

    def gather_checked(
        self, parts: Sequence[CheckedSlice], dtype: str, item_shape: tuple[int, ...], deadline: Deadline | None = None
    ) -> NDArray[np.generic]:
        """As `gather`, of slices that `checked_slice` has let pass for this dtype and shape."""
        rows = sum(part.rows for part in parts)
        if len(parts) == 1 and (there := self._bytes_here(parts[0])) is not None:
            batch = there.view(DTYPES[dtype]).reshape(rows, *item_shape)
            self.count(batch.nbytes)
            # Bytes of a message may lie anywhere, and not all that computes can bear that.
            return batch if batch.flags.aligned else batch.copy()
        batch = np.empty((rows, *item_shape), DTYPES[dtype])
        flat = batch.reshape(-1).view(np.uint8)
        wanted, done = [], 0
        for part in parts:
            nbytes = part.end - part.begin
            wanted.append((part, flat[done : done + nbytes]))
            done += nbytes
        self.copy(wanted, deadline)
        self.count(batch.nbytes)
        return batch

    def copy(self, wanted: Iterable[Wanted], deadline: Deadline | None = None) -> None:
        """Copies the bytes of slices to where they are wanted, and proves what was copied; errors as of `gather`."""
        elsewhere: dict[FetchedArena, list[Wanted]] = {}
        for part, target in wanted:
            if part.inline is not None:
                target[:] = np.frombuffer(part.inline, np.uint8)[part.begin : part.end]
                continue
            slot, opened = part.slot, self._opened(part.slot)
            if isinstance(opened, FetchedArena):
                elsewhere.setdefault(opened, []).append((part, target))
                continue
            target[:] = opened.bytes_of(slot.slot, part.nbytes)[part.begin : part.end]
            opened.prove(slot.slot, slot.generation, slot.lease_expires_ns)
        for producer, parts in elsewhere.items():
            producer.fetch(parts, deadline or Deadline.after(_FETCH_S))
            with self._lock:
                self.bytes_fetched += sum(target.nbytes for _, target in parts)

    def object_view(self, part: CheckedSlice) -> ObjectView | None:
        """The arena that a slice is in, if that is one of objects and is open here; None otherwise."""
        if part.inline is not None:
            return None
        with self._lock:
            view = self._views.get((part.slot.arena_id, part.slot.epoch))
        return view if isinstance(view, ObjectView) else None

    def count(self, nbytes: int) -> None:
        """Adds to `bytes_read`."""
        with self._lock:
            self.bytes_read += nbytes

    def arenas_open(self) -> int:
        """How many arenas are open."""
        return len(self._views) + len(self._fetched)

    def statistics(self) -> dict[str, int]:
        """Arenas that are open, and bytes that were fetched."""
        return {"arenas_open": self.arenas_open(), "bytes_fetched": self.bytes_fetched}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exc: object) -> None:
        for view in self._views.values():
            view.close()
        for producer in self._fetched.values():
            producer.close()
        self._views.clear()
        self._fetched.clear()

    def _open_fetched(self, arena: arena_pb2.ArenaDescription) -> bytes:
        if self._connect is None:
            raise ReadNotProven("this consumer does not fetch")
        key = (arena.arena_id, arena.epoch)
        # Takes round trips, and other threads read meanwhile: not the lock that they take.
        with self._opening:
            with self._lock:
                opened = self._fetched.get(key)
            if opened is not None and opened.address == arena.address:
                return opened.nonce(Deadline.after(_OPEN_S))
            new = FetchedArena(arena, self._connect)
            try:
                nonce = new.nonce(Deadline.after(_OPEN_S))
            except BaseException:
                new.close()
                raise
            with self._lock:
                # An address is one producer's: what was opened there before is gone, and so is what moved away.
                gone = [k for k, old in self._fetched.items() if k == key or old.address == arena.address]
                closing = [self._fetched.pop(k) for k in gone]
                self._fetched[key] = new
            for old in closing:
                old.close()
            return nonce

    def _view(self, rung: tensor_pb2.Rung.ValueType, key: tuple[int, int]) -> SharedMemoryView | ObjectView:
        if rung == tensor_pb2.IN_PROCESS:
            return ObjectView(*key)
        if rung != tensor_pb2.POSIX_SHM:
            raise ReadNotProven("this consumer reads shared memory only")
        return SharedMemoryView(self._directory, *key)

    def _bytes_here(self, part: CheckedSlice) -> NDArray[np.uint8] | None:
        """The bytes of a slice, proven and not copied, if it is of an object of this process; None otherwise."""
        objects = self.object_view(part)
        if objects is None:
            return None
        found = objects.bytes_of(part.slot.slot, part.nbytes)[part.begin : part.end]
        objects.prove(part.slot.slot, part.slot.generation, part.slot.lease_expires_ns)
        return found

    def _opened(self, slot: tensor_pb2.ArenaSlot) -> SharedMemoryView | ObjectView | FetchedArena:
        key = (slot.arena_id, slot.epoch)
        with self._lock:
            opened = self._views.get(key) or self._fetched.get(key)
        if opened is None:
            raise ReadNotProven("the arena that the ref names is not open here")
        return opened


def prefixed(name: str, counters: dict[str, int]) -> dict[str, int]:
    """Counters of an arena by the name of its kind."""
    return {f"{name}_{counter}": count for counter, count in counters.items()}


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
