"""A nasty CUDA runtime without a GPU, behind `DeviceIpc`. What real ones forgive now and then, this one never does.

One `FakeGpu` is shared by several `FakeRuntime`s; each stands for one process. Device memory is a memfd that every
runtime maps at an address of its own, so the same bytes have as many addresses as on a real GPU.

* A runtime cannot open what it exported itself (201), and a handle of freed memory cannot be opened (400).
* Only the address that `allocate` gave can be exported.
* Copies land late, one half after the other, on another thread; a thread's `synchronize` waits for its own only.
* Freed memory is scribbled over. Touching what was freed or closed is a violation; so is closing or freeing twice.
* Any operation can be made to fail, `fail("copy", at=2)`; a synchronisation that fails has not waited.
"""

import mmap
import os
import secrets
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from mosel.transport.device_ipc import HANDLE_BYTES

SCRIBBLE = 0xDD
INVALID_VALUE, INVALID_CONTEXT, INVALID_HANDLE, ILLEGAL_ADDRESS, LAUNCH_FAILURE = 1, 201, 400, 700, 719


class FakeCudaError(RuntimeError):
    """Has the number that CUDA would give."""

    def __init__(self, number: int) -> None:
        super().__init__(f"fake cuda error {number}")
        self.number = number


@dataclass
class _Mapping:
    """Device memory as one runtime sees it."""

    memory: mmap.mmap
    address: int
    nbytes: int
    opened: bool
    handle: bytes
    alive: bool = True


@dataclass
class FakeGpu:
    """What all runtimes share."""

    uuid: str = field(default_factory=lambda: f"GPU-{secrets.token_hex(8)}")
    # Before each half of a copy, in seconds.
    delay_s: float = 0.0005
    # File descriptors of the memory, by handle.
    exported: dict[bytes, int] = field(default_factory=dict)
    nbytes_allocated: int = 0


class FakeRuntime:
    """One process's runtime.

    Attributes:
        calls: how often each operation was called.
        violations: what a real runtime might have let pass.
        delay_s: before each half of a copy, in seconds.
        may_land: what copies wait for, before each half.
    """

    def __init__(self, gpu: FakeGpu) -> None:
        self.delay_s = gpu.delay_s
        self.may_land = threading.Event()
        self.may_land.set()
        self.calls: Counter[str] = Counter()
        self.violations: list[str] = []
        self._gpu = gpu
        self._failures: dict[str, set[int]] = defaultdict(set)
        self._mappings: list[_Mapping] = []
        self._pending: dict[int, list[Future[None]]] = defaultdict(list)
        self._device = ThreadPoolExecutor(1, "fake-gpu")
        self._lock = threading.Lock()

    def fail(self, operation: str, at: int = 1, times: int = 1) -> None:
        """Makes the `at`-th call from now on fail, and as many after it as are needed to make it `times`."""
        first = self.calls[operation] + at
        self._failures[operation] |= set(range(first, first + times))

    def under_way(self) -> int:
        """Copies that have not landed yet, of any thread."""
        with self._lock:
            return sum(not future.done() for futures in self._pending.values() for future in futures)

    def open_handles(self) -> int:
        """How many are open now."""
        return sum(m.alive for m in self._mappings if m.opened)

    def gpu_uuid(self) -> str:
        return self._gpu.uuid

    def allocate(self, nbytes: int) -> int:
        self._enter("allocate")
        fd = os.memfd_create("fake-device-memory")
        os.ftruncate(fd, nbytes)
        self._gpu.nbytes_allocated += nbytes
        handle = secrets.token_bytes(HANDLE_BYTES)
        self._gpu.exported[handle] = fd
        return self._map(fd, nbytes, opened=False, handle=handle)

    def free(self, address: int) -> None:
        self._enter("free")
        mapping = self._base(address, opened=False)
        mapping.alive = False
        mapping.memory[:] = bytes([SCRIBBLE]) * mapping.nbytes
        os.close(self._gpu.exported.pop(mapping.handle))
        self._gpu.nbytes_allocated -= mapping.nbytes

    def export(self, address: int) -> bytes:
        self._enter("export")
        return self._base(address, opened=False).handle

    def open(self, handle: bytes) -> int:
        self._enter("open")
        if any(m.handle == handle and not m.opened for m in self._mappings):
            raise FakeCudaError(INVALID_CONTEXT)
        fd = self._gpu.exported.get(handle)
        if fd is None:
            raise FakeCudaError(INVALID_HANDLE)
        return self._map(fd, os.fstat(fd).st_size, opened=True, handle=handle)

    def close(self, address: int) -> None:
        self._enter("close")
        self._base(address, opened=True).alive = False

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        self._enter("tensor")
        mapping = next((m for m in self._mappings if m.address == address and m.alive), None)
        if mapping is None or nbytes > mapping.nbytes:
            raise self._violation(f"tensor of {nbytes} bytes", INVALID_VALUE)
        return torch.frombuffer(mapping.memory, dtype=torch.uint8, count=nbytes)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._enter("copy")
        assert target.dtype == source.dtype == torch.uint8
        assert target.shape == source.shape
        assert target.is_contiguous()
        assert source.is_contiguous()
        self._touch(target)
        self._touch(source)
        with self._lock:
            self._pending[threading.get_ident()].append(self._device.submit(self._land, target, source))

    def synchronize(self) -> None:
        self._enter("synchronize")
        with self._lock:
            futures = list(self._pending[threading.get_ident()])
        done = wait(futures).done
        with self._lock:
            self._pending[threading.get_ident()].clear()
        for future in done:
            future.result()

    def shut_down(self) -> None:
        """Waits for everything; to be called at the end of a test."""
        self._device.shutdown()

    def _land(self, target: torch.Tensor, source: torch.Tensor) -> None:
        half = len(target) // 2
        for part in (slice(None, half), slice(half, None)):
            time.sleep(self.delay_s)
            self.may_land.wait(60)
            self._touch(target)
            self._touch(source)
            # Not through torch, whose threads and modes are those of the caller.
            np.copyto(target.numpy()[part], source.numpy()[part])

    def _enter(self, operation: str) -> None:
        with self._lock:
            self.calls[operation] += 1
            fails = self.calls[operation] in self._failures[operation]
        if fails:
            raise FakeCudaError(LAUNCH_FAILURE)

    def _map(self, fd: int, nbytes: int, opened: bool, handle: bytes) -> int:
        memory = mmap.mmap(fd, nbytes)
        address = np.frombuffer(memory, np.uint8).ctypes.data
        self._mappings.append(_Mapping(memory, address, nbytes, opened, handle))
        return address

    def _base(self, address: int, opened: bool) -> _Mapping:
        for mapping in self._mappings:
            if (mapping.address, mapping.opened, mapping.alive) == (address, opened, True):
                return mapping
        raise self._violation("no such memory, or not any more", INVALID_VALUE)

    def _touch(self, tensor: torch.Tensor) -> None:
        first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        for mapping in self._mappings:
            overlaps = first < mapping.address + mapping.nbytes and end > mapping.address
            if overlaps and not mapping.alive:
                raise self._violation("a copy touches memory that was freed or closed", ILLEGAL_ADDRESS)

    def _violation(self, what: str, number: int) -> FakeCudaError:
        self.violations.append(what)
        return FakeCudaError(number)


class ImpatientRuntime(FakeRuntime):
    """The negative control: never waits for what it started."""

    def synchronize(self) -> None:
        self._enter("synchronize")


@contextmanager
def runtimes(gpu: FakeGpu, *kinds: type[FakeRuntime]) -> Iterator[list[FakeRuntime]]:
    """As many processes on one GPU; that nobody misbehaved is checked at the end."""
    made = [kind(gpu) for kind in kinds]
    yield made
    for runtime in made:
        runtime.shut_down()
        assert runtime.violations == []
        assert runtime.open_handles() == 0
    assert gpu.nbytes_allocated == 0
