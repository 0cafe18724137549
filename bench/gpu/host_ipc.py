"""`DeviceIpc` over host memory that other processes can map: rehearses what needs a GPU, where there is none."""

import ctypes
import mmap
import os

import torch

from mosel.transport.device_ipc import HANDLE_BYTES


class HostIpc:
    """Memory files in the place of device memory; see `DeviceIpc`. Copies are complete when `copy` returns.

    Attributes:
        opened, closed: how often.
    """

    def __init__(self) -> None:
        self.opened = self.closed = 0
        self._files: dict[int, int] = {}
        self._maps: dict[int, mmap.mmap] = {}

    def gpu_uuid(self) -> str:
        """See `DeviceIpc`."""
        return "host memory"

    def allocate(self, nbytes: int) -> int:
        """See `DeviceIpc`."""
        file = os.memfd_create("mosel-bench")
        os.truncate(file, nbytes)
        address = self._map(file)
        self._files[address] = file
        return address

    def free(self, address: int) -> None:
        """See `DeviceIpc`."""
        os.close(self._files.pop(address))
        del self._maps[address]

    def export(self, address: int) -> bytes:
        """See `DeviceIpc`."""
        return f"{os.getpid()}/fd/{self._files[address]}".encode().ljust(HANDLE_BYTES, b"\0")

    def open(self, handle: bytes) -> int:
        """See `DeviceIpc`."""
        path = handle.rstrip(b"\0").decode()
        if path.startswith(f"{os.getpid()}/"):
            raise RuntimeError("a handle of this process")
        file = os.open(f"/proc/{path}", os.O_RDWR)
        self.opened += 1
        try:
            return self._map(file)
        finally:
            os.close(file)

    def close(self, address: int) -> None:
        """See `DeviceIpc`. The pages go when the last tensor over them does."""
        self.closed += 1
        del self._maps[address]

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        """See `DeviceIpc`."""
        return torch.frombuffer(self._maps[address], dtype=torch.uint8, count=nbytes)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `DeviceIpc`."""
        target.copy_(source)

    def synchronize(self) -> None:
        """See `DeviceIpc`."""

    def _map(self, file: int) -> int:
        mapped = mmap.mmap(file, os.fstat(file).st_size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        self._maps[address] = mapped
        return address
