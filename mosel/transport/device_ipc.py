"""What device arenas need of a GPU runtime, and nothing more, so that a nasty fake can stand in for one in tests."""

from typing import Protocol

import torch

HANDLE_BYTES = 64  # sizeof(cudaIpcMemHandle_t)


class DeviceIpc(Protocol):
    """Memory of one GPU that other processes can open. Addresses are plain integers."""

    def gpu_uuid(self) -> str:
        """The GPU that this process uses, by its UUID: indices differ from process to process."""
        ...

    def allocate(self, nbytes: int) -> int:
        """Device memory from plain cudaMalloc, outside every caching allocator; returns its address."""
        ...

    def free(self, address: int) -> None:
        """Gives the memory back."""
        ...

    def export(self, address: int) -> bytes:
        """The handle of an allocation, `HANDLE_BYTES` long, for other processes of this host."""
        ...

    def open(self, handle: bytes) -> int:
        """Opens another process's allocation; takes 1-10 ms. Fails in the process that exported it."""
        ...

    def close(self, address: int) -> None:
        """Closes what `open` opened; once."""
        ...

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        """The memory as a uint8 tensor [nbytes] that owns nothing."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Starts a copy on this thread's stream; it is complete after `synchronize`."""
        ...

    def synchronize(self) -> None:
        """Waits until everything that this thread started on the device is complete."""
        ...
