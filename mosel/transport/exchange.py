"""Publisher and Reader: tensors in, refs out, and back."""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from mosel.config import TransportSettings
from mosel.errors import InvalidRequest
from mosel.tensors import DTYPES, byte_count, checked_shape, dtype_name, dtype_value
from mosel.transport.layout import KIB, MIB, SLOT_SIZES
from mosel.transport.shared_memory import Arena, ArenaView, remove_orphans
from mosel.v1 import tensor_pb2


class Publisher:
    """Turns tensors into refs: inline up to a limit, in a slot of the arena above it.

    Args:
        arena: this process's arena.
        inline_max_bytes: the largest tensor that travels inside its ref.
    """

    def __init__(self, arena: Arena, inline_max_bytes: int) -> None:
        self._arena = arena
        self._inline_max_bytes = inline_max_bytes

    def publish(self, dtype: str, shape: tuple[int, ...], data: memoryview, lease_s: float) -> tensor_pb2.TensorRef:
        """Publishes a tensor; when this returns, its bytes are complete.

        Args:
            dtype: name of the data type.
            shape: shape of the tensor.
            data: its contiguous bytes.
            lease_s: seconds for which a slot is kept if nobody releases it.

        Raises:
            PayloadTooLarge: it does not fit into any slot.
            Overloaded: the arena is full.
        """
        ref = tensor_pb2.TensorRef(dtype=dtype_value(dtype), shape=shape, nbytes=data.nbytes)
        if data.nbytes <= self._inline_max_bytes:
            ref.inline = bytes(data)
            return ref
        slot = self._arena.write(data, time.monotonic() + lease_s)
        ref.shared_memory.arena_id, ref.shared_memory.epoch = self._arena.arena_id, self._arena.epoch
        ref.shared_memory.slot, ref.shared_memory.generation = slot.index, slot.generation
        return ref

    def publish_array(self, array: NDArray[np.float32], lease_s: float) -> tensor_pb2.TensorRef:
        """Publishes an FP32 array."""
        contiguous = np.ascontiguousarray(array)
        return self.publish("FP32", contiguous.shape, contiguous.data.cast("B"), lease_s)

    def release(self, slots: Iterable[tensor_pb2.SharedMemorySlot]) -> None:
        """Takes slots back that nobody reads any more; stale ones and those of other arenas are passed over."""
        for slot in slots:
            if (slot.arena_id, slot.epoch) == (self._arena.arena_id, self._arena.epoch):
                self._arena.release(slot.slot, slot.generation)


@dataclass(frozen=True, slots=True)
class _Slice:
    """A checked RowSlice: all fields are plain integers within bounds."""

    ref: tensor_pb2.TensorRef
    dtype: str
    item_shape: tuple[int, ...]
    row_bytes: int
    start: int
    count: int


class Reader:
    """Gathers rows from refs. Maps each arena once, at its first ref. Thread-safe.

    Attributes:
        bytes_read: bytes of the rows gathered so far.

    Args:
        directory: where shared memory is mounted.
    """

    def __init__(self, directory: Path) -> None:
        self.bytes_read = 0
        self._directory = directory
        self._views: dict[tuple[int, int], ArenaView] = {}
        self._lock = threading.Lock()

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
            ReadNotProven: a slot was reused, or its arena is gone.
        """
        checked = [_checked(s, dtype, item_shape) for s in slices]
        rows = sum(s.count for s in checked)
        batch = np.empty((rows, *item_shape), DTYPES[dtype])
        flat = batch.reshape(rows, -1).view(np.uint8) if rows else batch
        done = 0
        for part in checked:
            self._copy(part, flat[done : done + part.count])
            done += part.count
        with self._lock:
            self.bytes_read += batch.nbytes
        return batch

    def _copy(self, part: _Slice, target: NDArray[np.generic]) -> None:
        start, end = part.start * part.row_bytes, (part.start + part.count) * part.row_bytes
        if part.ref.WhichOneof("place") == "inline":
            target[:] = np.frombuffer(part.ref.inline, np.uint8)[start:end].reshape(target.shape)
            return
        slot = part.ref.shared_memory
        view = self._view(slot.arena_id, slot.epoch)
        source = view.bytes_of(slot.slot, part.ref.nbytes)
        view.prove(slot.slot, slot.generation)
        target[:] = source[start:end].reshape(target.shape)
        view.prove(slot.slot, slot.generation)

    def _view(self, arena_id: int, epoch: int) -> ArenaView:
        key = (arena_id, epoch)
        with self._lock:
            if key not in self._views:
                self._forget_gone()
                self._views[key] = ArenaView(self._directory, arena_id, epoch)
            return self._views[key]

    def _forget_gone(self) -> None:
        """Drops arenas whose producers have gone; each is unmapped when the last thread that reads it is done."""
        for key in [key for key, view in self._views.items() if view.is_gone()]:
            del self._views[key]

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for view in self._views.values():
            view.close()
        self._views.clear()


@contextlib.contextmanager
def open_arena(settings: TransportSettings, mib: int, setting: str) -> Iterator[tuple[Arena, Publisher]]:
    """A new arena with its publisher, after orphans of dead processes have been removed.

    Args:
        settings: the transport's.
        mib: the arena's budget in MiB.
        setting: the setting that states the budget, for messages.

    Raises:
        ConfigError: shared memory is too small for it.
    """
    remove_orphans(settings.shm_dir)
    with Arena(settings.shm_dir, mib * MIB, setting) as arena:
        yield arena, Publisher(arena, settings.inline_max_kib * KIB)


def _checked(part: tensor_pb2.RowSlice, dtype: str, item_shape: tuple[int, ...]) -> _Slice:
    ref = part.ref
    name = dtype_name(ref.dtype)
    shape = checked_shape(tuple(ref.shape), "ref.shape")
    if name != dtype or shape[1:] != item_shape or not shape:
        raise InvalidRequest(f"ref is {name} {list(shape)}; expected {dtype} [rows, {', '.join(map(str, item_shape))}]")
    if ref.nbytes != byte_count(name, shape):
        raise InvalidRequest(f"ref.nbytes is {ref.nbytes}; {name} {list(shape)} has {byte_count(name, shape)}")
    if ref.WhichOneof("place") is None:
        raise InvalidRequest("ref says no place; expected inline bytes or a shared-memory slot")
    if ref.WhichOneof("place") == "inline" and len(ref.inline) != ref.nbytes:
        raise InvalidRequest(f"ref.inline has {len(ref.inline)} bytes; expected {ref.nbytes}")
    if ref.WhichOneof("place") == "shared_memory" and ref.nbytes > SLOT_SIZES[-1]:
        raise InvalidRequest(f"ref.nbytes is {ref.nbytes}; the largest slot has {SLOT_SIZES[-1]}")
    if part.row_start + part.row_count > shape[0]:
        raise InvalidRequest(f"rows {part.row_start}..+{part.row_count} of a tensor with {shape[0]} rows")
    return _Slice(ref, name, item_shape, byte_count(name, item_shape), part.row_start, part.row_count)


def slice_rows(ref: tensor_pb2.TensorRef, start: int, count: int) -> tensor_pb2.RowSlice:
    """Rows [start, start + count) of a tensor, for the wire. Of an inline tensor only those rows travel on."""
    if ref.WhichOneof("place") != "inline" or (start == 0 and count == ref.shape[0]):
        return tensor_pb2.RowSlice(ref=ref, row_start=start, row_count=count)
    row_bytes = len(ref.inline) // max(ref.shape[0], 1)
    rows = ref.inline[start * row_bytes : (start + count) * row_bytes]
    part = tensor_pb2.TensorRef(dtype=ref.dtype, shape=[count, *ref.shape[1:]], nbytes=len(rows), inline=rows)
    return tensor_pb2.RowSlice(ref=part, row_start=0, row_count=count)
