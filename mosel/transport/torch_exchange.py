"""Publisher and Reader for torch tensors, wherever they are: as they are, in device or shared memory, or inline."""

import contextlib
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from mosel.deadline import Deadline
from mosel.errors import Overloaded, ReadNotProven
from mosel.tensors import dtype_value
from mosel.transport.device_arena import DeviceArena, DeviceLost, DeviceView, settled
from mosel.transport.device_ipc import DeviceIpc
from mosel.transport.exchange import Publisher, Reader, prefixed, release_slots, set_slot
from mosel.transport.layout import KIB
from mosel.transport.object_arena import ObjectArena
from mosel.transport.refs import CheckedSlice, checked_slice
from mosel.v1 import arena_pb2, tensor_pb2

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "FP32": torch.float32,
    "FP64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_Views = Mapping[tuple[int, int], DeviceView]


class TensorPublisher:
    """Turns torch tensors into refs. Thread-safe.

    Args:
        publisher: for what goes through host memory, and has the arena of objects.
        device_arena: this process's device memory, if it has a GPU that supports it.
    """

    def __init__(self, publisher: Publisher, device_arena: DeviceArena | None) -> None:
        self._publisher, self._device_arena = publisher, device_arena

    def publish(
        self, tensor: torch.Tensor, rung: tensor_pb2.Rung.ValueType, lease_s: float, wait_s: float = 0.0
    ) -> tensor_pb2.TensorRef:
        """Publishes a tensor; when this returns, its bytes are complete.

        Args:
            tensor: [rows, ...], of one of `TORCH_DTYPES`; on any device. With IN_PROCESS it stays where it is, and must
                not change any more.
            rung: how the consumers of this tensor reach this process.
            lease_s: seconds for which a slot is kept if nobody releases it.
            wait_s: seconds to wait for a slot when all are in use.

        Raises:
            PayloadTooLarge: it does not fit into any slot.
            Overloaded: the arena is full, and it is too large to travel inline instead.
            InternalError: the GPU failed.
        """
        arena, limits = self._arena_for(rung), self._publisher.settings
        # Inside one process, what is on a GPU never gains by leaving it.
        stays = tensor.is_cuda and rung == tensor_pb2.IN_PROCESS
        if arena is None or (tensor.nbytes <= limits.inline_max_kib * KIB and not stays):
            return self._publish_from_host(tensor, rung, lease_s, wait_s)
        expires_at = time.monotonic() + lease_s
        try:
            if isinstance(arena, ObjectArena):
                slot = arena.keep(_alone(tensor), expires_at, wait_s)
            else:
                slot = arena.write(tensor.contiguous(), expires_at, wait_s)
        except Overloaded:
            if tensor.nbytes > limits.inline_when_full_max_kib * KIB:
                raise
            return self._publish_from_host(tensor, tensor_pb2.INLINE, lease_s, wait_s)
        dtype = dtype_value(_NAMES[tensor.dtype])
        ref = tensor_pb2.TensorRef(dtype=dtype, shape=tensor.shape, nbytes=tensor.nbytes)
        set_slot(ref, arena, slot, expires_at)
        self._publisher.count(arena.rung, tensor.nbytes)
        return ref

    def announcement(self) -> arena_pb2.Announcement:
        """This process's arenas, best first."""
        publisher = self._publisher
        arenas = [arena for arena in (publisher.objects, self._device_arena, publisher.arena) if arena]
        return arena_pb2.Announcement(arenas=[arena.announcement() for arena in arenas])

    def release(self, slots: Iterable[tensor_pb2.ArenaSlot]) -> None:
        """Takes slots of any arena back; stale ones and those of other arenas are passed over."""
        slots = list(slots)
        self._publisher.release(slots)
        if self._device_arena:
            release_slots(self._device_arena, slots)

    def statistics(self) -> dict[str, int]:
        """As of `Publisher`, and the slots of the arena in device memory, `device_slots_free` and so on."""
        counters = self._publisher.statistics()
        if self._device_arena:
            counters |= prefixed("device", self._device_arena.statistics().as_counters())
        return counters

    def _arena_for(self, rung: tensor_pb2.Rung.ValueType) -> ObjectArena | DeviceArena | None:
        """Where consumers that are reached so find tensors where they were made; None: only in host memory."""
        if rung == tensor_pb2.IN_PROCESS:
            return self._publisher.objects
        return self._device_arena if rung == tensor_pb2.CUDA_IPC else None

    def _publish_from_host(
        self, tensor: torch.Tensor, rung: tensor_pb2.Rung.ValueType, lease_s: float, wait_s: float
    ) -> tensor_pb2.TensorRef:
        host = tensor.detach().reshape(-1).view(torch.uint8).cpu()
        data = host.numpy().data
        return self._publisher.publish(_NAMES[tensor.dtype], tuple(tensor.shape), data, lease_s, wait_s, rung)


class TensorReader:
    """Gathers rows from refs into torch tensors. Reads only arenas that were opened before. Thread-safe.

    A context manager that closes what it opened in device memory; `reader` is left to its owner.

    Args:
        reader: for what is in host memory.
        directory: where shared memory is mounted.
        device: where tensors are gathered.
        ipc: the GPU, if there is one that supports it.
        no_ipc: why there is none.
    """

    def __init__(
        self,
        reader: Reader,
        directory: Path,
        device: torch.device,
        ipc: DeviceIpc | None,
        no_ipc: str = "this consumer has no CUDA IPC",
    ) -> None:
        self._reader, self._directory, self._device = reader, directory, device
        self._ipc, self._no_ipc = ipc, no_ipc
        self._views: dict[tuple[int, int], DeviceView] = {}
        self._lock, self._opening = threading.Lock(), threading.Lock()
        # What copies may still be written to, or read from, for ever: the GPU failed and does not say.
        self._lost: list[object] = []

    @property
    def bytes_read(self) -> int:
        """Bytes of the rows gathered so far."""
        return self._reader.bytes_read

    def open(self, arena: arena_pb2.ArenaDescription) -> bytes:
        """Opens a producer's arena, once, and reads its nonce through the path that tensors will take.

        Raises:
            ReadNotProven: the path does not work; says why.
        """
        if arena.rung != tensor_pb2.CUDA_IPC:
            return self._reader.open(arena)
        if self._ipc is None:
            raise ReadNotProven(self._no_ipc)
        key = (arena.arena_id, arena.epoch)
        # Takes milliseconds, and other threads read meanwhile: not the lock that they take.
        with self._opening:
            # A selector that died could not tell which producers went before it came again.
            for gone in [known for known, view in list(self._views.items()) if view.is_gone()]:
                self.close(*gone)
            view = self._views.get(key)
            if view is None:
                view = DeviceView(self._directory, arena, self._ipc)
                with self._lock:
                    self._views[key] = view
        return view.nonce

    def close(self, arena_id: int, epoch: int) -> None:
        """Closes an arena whose producer is gone, once the last thread that reads it is done. Takes milliseconds."""
        self._reader.close(arena_id, epoch)
        with self._lock:
            view = self._views.pop((arena_id, epoch), None)
        if view:
            view.close()

    def gather(
        self,
        slices: Iterable[tensor_pb2.RowSlice],
        dtype: str,
        item_shape: tuple[int, ...],
        deadline: Deadline | None = None,
    ) -> torch.Tensor:
        """Rows of several tensors as one; when this returns, they are complete and proven.

        Args:
            slices: the rows, in order.
            dtype: the data type that every tensor must have.
            item_shape: the shape that every row must have.
            deadline: until when rows may be fetched; None: for a minute.

        Returns:
            [sum of row counts, *item_shape], on the device. The rows of one tensor that is there already are a view of
            it, not to be written to; everything else is copied.

        Raises:
            InvalidRequest: a slice is out of bounds, or a tensor has another type or shape.
            ReadNotProven: a slot was reused, its lease was over, its arena is not open, or the GPU failed.
            DeadlineExceeded: rows could not be fetched in time.
        """
        parts = [checked_slice(s, dtype, item_shape) for s in slices]
        views = self._views_of(parts)
        if self._ipc is not None and views:
            flat = self._copied(self._ipc, parts, views, deadline)
        elif any(self._reader.object_view(part) for part in parts):
            pieces = [self._source(part, None, deadline).to(self._device) for part in parts]
            flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        else:
            return tensor_over(self._reader.gather_checked(parts, dtype, item_shape, deadline), dtype).to(self._device)
        self._reader.count(flat.nbytes)
        return flat.view(TORCH_DTYPES[dtype]).reshape(sum(part.rows for part in parts), *item_shape)

    def arenas_open(self) -> int:
        """How many arenas are open."""
        return self._reader.arenas_open() + len(self._views)

    def statistics(self) -> dict[str, int]:
        """As of `Reader`."""
        return self._reader.statistics() | {"arenas_open": self.arenas_open()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for arena_id, epoch in list(self._views):
            self.close(arena_id, epoch)

    def _views_of(self, parts: list[CheckedSlice]) -> _Views:
        """Those of the parts' arenas that are in device memory."""
        keys = {(part.slot.arena_id, part.slot.epoch) for part in parts if part.inline is None}
        with self._lock:
            return {key: self._views[key] for key in keys if key in self._views}

    def _copied(
        self, ipc: DeviceIpc, parts: list[CheckedSlice], views: _Views, deadline: Deadline | None
    ) -> torch.Tensor:
        """The bytes of all parts, some of them in device memory of other processes: copied and proven."""
        flat = torch.empty(sum(part.end - part.begin for part in parts), dtype=torch.uint8, device=self._device)
        with contextlib.ExitStack() as held:
            for opened in views.values():
                held.enter_context(opened.held())
            self._copy(ipc, parts, views, flat, deadline)
            for part in parts:
                if view := _view_of(part, views):
                    view.prove(part.slot.slot, part.slot.generation, part.slot.lease_expires_ns)
        return flat

    def _copy(
        self,
        ipc: DeviceIpc,
        parts: list[CheckedSlice],
        views: _Views,
        target: torch.Tensor,
        deadline: Deadline | None,
    ) -> None:
        """Copies all parts one after the other; whatever happens, no copy is under way when this ends."""
        sources: list[torch.Tensor] = []
        try:
            with settled(ipc):
                done = 0
                for part in parts:
                    nbytes = part.end - part.begin
                    # Kept: a copy from host memory may read its source until it is settled.
                    sources.append(self._source(part, _view_of(part, views), deadline))
                    ipc.copy(target[done : done + nbytes], sources[-1])
                    done += nbytes
        except RuntimeError as error:
            if isinstance(error, DeviceLost):
                self._lost.append((target, sources))
            raise ReadNotProven("the GPU failed while it copied a tensor") from None

    def _source(self, part: CheckedSlice, view: DeviceView | None, deadline: Deadline | None) -> torch.Tensor:
        if view:
            return view.bytes_of(part.slot.slot, part.nbytes)[part.begin : part.end]
        if objects := self._reader.object_view(part):
            content = objects.taken(part.slot, part.nbytes)
            whole = content if isinstance(content, torch.Tensor) else tensor_over(np.asarray(content), "UINT8")
            return whole[part.begin : part.end]
        host = torch.empty(part.end - part.begin, dtype=torch.uint8)
        self._reader.copy([(part, host.numpy())], deadline)
        return host


class _Writable:
    """An array's memory as numpy's array interface states it, but for the read-only flag, of which torch would warn."""

    def __init__(self, array: NDArray[np.generic]) -> None:
        interface = array.__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}
        # Kept while it is used.
        self._array = array


def tensor_over(array: NDArray[np.generic], dtype: str) -> torch.Tensor:
    """An array as a torch tensor over the same memory, also where that is not to be written to.

    The bits of BF16 arrive as uint16. Torch has no read-only tensors: it is for networks not to write to their inputs.
    """
    writable = array if array.flags.writeable else np.asarray(_Writable(array))
    tensor = torch.from_numpy(writable)
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, uint8 [nbytes] on its device, complete: the tensor itself wherever that is possible."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    # What is a view of a larger tensor would keep all of that in memory, and nobody would count it.
    if flat.untyped_storage().nbytes() != flat.nbytes:
        flat = flat.clone()
    if flat.is_cuda:
        torch.cuda.current_stream(flat.device).synchronize()
    return flat


def _view_of(part: CheckedSlice, views: _Views) -> DeviceView | None:
    return None if part.inline is not None else views.get((part.slot.arena_id, part.slot.epoch))
