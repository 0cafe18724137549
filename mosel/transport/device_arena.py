"""Arenas in device memory, opened by consumers through CUDA IPC.

The control file holds header and generations; the slots are in one device allocation at the same offsets, with the
nonce at its start. Everything is host-ordered: who publishes or proves has waited for its own copies before.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from mosel.errors import ConfigError, InternalError, ReadNotProven
from mosel.transport.arena import ControlledArena
from mosel.transport.control import NONCE_BYTES, ControlView
from mosel.transport.device_ipc import HANDLE_BYTES, DeviceIpc
from mosel.transport.host import host_identity, no_shared_clock
from mosel.transport.layout import MIB
from mosel.transport.slots import Slot
from mosel.v1 import arena_pb2, tensor_pb2

log = logging.getLogger(__name__)


class DeviceLost(RuntimeError):
    """Not even waiting works any more, so copies may still land: what they write to must never be used again."""


@contextlib.contextmanager
def settled(ipc: DeviceIpc) -> Iterator[None]:
    """Waits for every copy that the body started, also when it fails.

    Raises:
        DeviceLost: waiting failed twice.
        RuntimeError: waiting failed once; nothing is under way any more, but what was copied is worthless.
    """
    try:
        yield
    finally:
        try:
            ipc.synchronize()
        except RuntimeError:
            _wait_again(ipc)
            raise


class DeviceArena(ControlledArena):
    """The producer's side; see `Arena`. The handle is exported once.

    Args:
        directory: where shared memory is mounted, /dev/shm.
        nbytes: the budget in bytes of device memory.
        setting: the setting that states the budget, for messages.
        ipc: the GPU.

    Raises:
        ConfigError: the GPU or the directory does not hold that much.
    """

    rung = tensor_pb2.CUDA_IPC

    def __init__(self, directory: Path, nbytes: int, setting: str, ipc: DeviceIpc) -> None:
        super().__init__(directory, nbytes, False, setting)
        self._ipc, self._usable = ipc, True
        with contextlib.ExitStack() as undo:
            undo.callback(self._control.close)
            try:
                self._allocate(undo)
            except RuntimeError:
                megabytes = self.layout.total_bytes // MIB
                message = f"the GPU did not give {megabytes} MiB that other processes can open; lower {setting}"
                raise ConfigError(message) from None
            undo.callback(self._retire)
            self._undo = undo.pop_all()

    def write(self, tensor: torch.Tensor, expires_at: float, wait_s: float = 0.0) -> Slot:
        """Copies a tensor into a slot and publishes it when the copy is complete on the device.

        Args:
            tensor: contiguous, on the device or in host memory.
            expires_at: end of the lease, seconds on the monotonic clock.
            wait_s: seconds to wait for a slot at most.

        Raises:
            PayloadTooLarge: no slot of this arena is that large.
            Overloaded: every slot that fits is in use.
            InternalError: the GPU failed; nothing was published.
        """
        source = tensor.detach().reshape(-1).view(torch.uint8)
        with self.filling(source.nbytes, expires_at, wait_s) as slot:
            if not self._usable:
                raise InternalError("the GPU failed before, so its memory is not used any more")
            try:
                with settled(self._ipc):
                    self._ipc.copy(self._memory[slot.offset : slot.offset + source.nbytes], source)
            except RuntimeError as error:
                if isinstance(error, DeviceLost):
                    self._usable = False
                raise InternalError("the GPU failed while it stored a tensor") from None
        return slot

    def close(self) -> None:
        """Gives the memory back, once. What consumers read from now on is not proven."""
        self._undo.close()

    def _allocate(self, undo: contextlib.ExitStack) -> None:
        address = self._ipc.allocate(self.layout.total_bytes)
        undo.callback(_give_back, self._ipc.free, address)
        self._memory = self._ipc.tensor(address, self.layout.total_bytes)
        with settled(self._ipc):
            self._ipc.copy(self._memory[:NONCE_BYTES], _bytes_tensor(self._control.nonce))
        self._handle, self._gpu_uuid = self._ipc.export(address), self._ipc.gpu_uuid()

    def _retire(self) -> None:
        """Lets no later read be proven: consumers may see anything once the memory is given back."""
        self._usable = False
        for index in range(self.layout.slot_count):
            self._control.claim(index, 0, 0)

    def _describe(self, arena: arena_pb2.ArenaDescription) -> None:
        arena.cuda_handle, arena.gpu_uuid = self._handle, self._gpu_uuid


class DeviceView:
    """The consumer's side: somebody else's device memory, opened once, and closed once when nobody reads it any more.

    Args:
        directory: where shared memory is mounted.
        arena: what the producer announced.
        ipc: this process's GPU.

    Attributes:
        nonce: what is written at the start of the device memory.

    Raises:
        ReadNotProven: the path does not work; says why.
    """

    def __init__(self, directory: Path, arena: arena_pb2.ArenaDescription, ipc: DeviceIpc) -> None:
        if reason := _unreachable(arena, ipc):
            raise ReadNotProven(reason)
        self._ipc, self._lock = ipc, threading.Lock()
        self._readers, self._closed = 0, False
        self._control = ControlView(directory, arena.arena_id, arena.epoch)
        with contextlib.ExitStack() as undo:
            undo.callback(self._control.close)
            if self._control.holds_slots:
                raise ReadNotProven("the arena's slots are not in device memory")
            try:
                address = ipc.open(arena.cuda_handle)
                undo.callback(_give_back, ipc.close, address)
                self._memory = ipc.tensor(address, self._control.layout.total_bytes)
                self.nonce = self._read_nonce()
            except RuntimeError:
                raise ReadNotProven(f"the GPU did not open the arena{_namespaces(arena.host)}") from None
            self._undo = undo.pop_all()

    def is_gone(self) -> bool:
        """See `ControlView.is_gone`."""
        return self._control.is_gone()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the memory open while the body reads it.

        Raises:
            ReadNotProven: the view was closed before.
        """
        with self._lock:
            if self._closed:
                raise ReadNotProven("the arena was closed")
            self._readers += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers -= 1
            self._close_if_idle()

    def bytes_of(self, slot: int, nbytes: int) -> torch.Tensor:
        """The first `nbytes` bytes of a slot, uint8 [nbytes] on the device, not copied; only while `held`.

        Raises:
            ReadNotProven: the arena has no such slot, or it is smaller.
        """
        self._control.check_bounds(slot, nbytes)
        start = self._control.layout.slot_offset(slot)
        return self._memory[start : start + nbytes]

    def prove(self, slot: int, generation: int, lease_expires_ns: int) -> None:
        """See `ControlView.prove`; to be called when the copy is complete on the device, while `held`."""
        self._control.prove(slot, generation, lease_expires_ns)

    def close(self) -> None:
        """Closes the handle, at once or when the last reader is done. Takes milliseconds; the second time, nothing."""
        with self._lock:
            self._closed = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        with self._lock:
            idle = self._closed and self._readers == 0
        if idle:
            self._undo.close()

    def _read_nonce(self) -> bytes:
        nonce = torch.empty(NONCE_BYTES, dtype=torch.uint8)
        with settled(self._ipc):
            self._ipc.copy(nonce, self._memory[:NONCE_BYTES])
        return bytes(nonce.tolist())


def _wait_again(ipc: DeviceIpc) -> None:
    try:
        ipc.synchronize()
    except RuntimeError:
        raise DeviceLost("the GPU does not answer") from None


def _unreachable(arena: arena_pb2.ArenaDescription, ipc: DeviceIpc) -> str:
    here = host_identity()
    if reason := no_shared_clock(arena.host):
        return reason
    if (arena.host.pid, arena.host.pid_namespace) == (here.pid, here.pid_namespace):
        return "the producer is this process, and no process can open its own handle"
    if len(arena.cuda_handle) != HANDLE_BYTES:
        return f"the handle has {len(arena.cuda_handle)} bytes; expected {HANDLE_BYTES}"
    if arena.gpu_uuid != ipc.gpu_uuid():
        return "the producer uses another GPU"
    return ""


def _namespaces(producer: arena_pb2.HostIdentity) -> str:
    """The usual cause between containers, for messages."""
    here = host_identity()
    fields = {"PID": "pid_namespace", "IPC": "ipc_namespace"}
    apart = [kind for kind, field in fields.items() if getattr(here, field) != getattr(producer, field)]
    return f"; the producer has another {' and '.join(apart)} namespace" if apart else ""


def _give_back(how: Callable[[int], None], address: int) -> None:
    try:
        how(address)
    except RuntimeError:
        # Nobody can do anything about it; the error's own message could name addresses.
        log.warning("the GPU failed to give back the memory of an arena")


def _bytes_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
