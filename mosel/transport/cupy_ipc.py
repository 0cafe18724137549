"""`DeviceIpc` on a real GPU, through CuPy. Nothing imports CuPy before a `CupyIpc` is made.

CuPy gives the CUDA runtime's IPC calls as plain functions, and memory outside torch's caching allocator, so that
`PYTORCH_CUDA_ALLOC_CONF` has no say; torch sees that memory through DLPack.
"""

import contextlib
import warnings
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from mosel.transport.device_ipc import HANDLE_BYTES, DeviceIpc
from mosel.transport.layout import MIB

# cudaMalloc takes small allocations from blocks of 2 MiB, and a handle shares the whole block (CUDA Runtime API,
# cudaIpcGetMemHandle).
_BLOCK_BYTES = 2 * MIB
# enum cudaDeviceAttr in CUDA's driver_types.h; the second is how a device says that it supports legacy IPC.
_UNIFIED_ADDRESSING, _IPC_EVENT_SUPPORT = 41, 125


class CupyIpc:
    """One GPU; see `DeviceIpc`. Thread-safe.

    Args:
        device: the GPU, as torch counts.

    Raises:
        ImportError: CuPy is not installed, or does not fit the driver.
        RuntimeError: the GPU does not support CUDA IPC, or does not answer.
    """

    def __init__(self, device: torch.device) -> None:
        with warnings.catch_warnings():
            # CuPy warns of a toolkit that it does not find; none is needed here.
            warnings.simplefilter("ignore")
            import cupy
        self._cupy, self._runtime = cupy, cupy.cuda.runtime
        index: int | None = device.index
        self._index = torch.cuda.current_device() if index is None else index
        self._device = torch.device("cuda", self._index)
        for attribute in (_UNIFIED_ADDRESSING, _IPC_EVENT_SUPPORT):
            if not self._runtime.deviceGetAttribute(attribute, self._index):
                raise RuntimeError("the GPU or its platform does not support CUDA IPC")
        # Some platforms claim it and fail (virtual GPUs, WSL): try.
        address = self.allocate(_BLOCK_BYTES)
        try:
            self.export(address)
        finally:
            self.free(address)

    def gpu_uuid(self) -> str:
        """See `DeviceIpc`."""
        return str(torch.cuda.get_device_properties(self._device).uuid)

    def allocate(self, nbytes: int) -> int:
        """See `DeviceIpc`; whole blocks, so that nothing else is shared with them."""
        with self._here():
            return int(self._runtime.malloc(-(-nbytes // _BLOCK_BYTES) * _BLOCK_BYTES))

    def free(self, address: int) -> None:
        """See `DeviceIpc`."""
        with self._here():
            self._runtime.free(address)

    def export(self, address: int) -> bytes:
        """See `DeviceIpc`."""
        with self._here():
            handle = bytes(self._runtime.ipcGetMemHandle(address))
        if len(handle) != HANDLE_BYTES:
            raise RuntimeError(f"the GPU gave a handle of {len(handle)} bytes; expected {HANDLE_BYTES}")
        return handle

    def open(self, handle: bytes) -> int:
        """See `DeviceIpc`."""
        with self._here():
            return int(self._runtime.ipcOpenMemHandle(handle, self._runtime.cudaIpcMemLazyEnablePeerAccess))

    def close(self, address: int) -> None:
        """See `DeviceIpc`."""
        with self._here():
            self._runtime.ipcCloseMemHandle(address)

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        """See `DeviceIpc`."""
        cuda = self._cupy.cuda
        with self._here():
            memory = cuda.UnownedMemory(address, nbytes, self, self._index)
            array = self._cupy.ndarray((nbytes,), self._cupy.uint8, cuda.MemoryPointer(memory, 0))
            tensor: torch.Tensor = from_dlpack(array)
        return tensor

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `DeviceIpc`."""
        with torch.cuda.device(self._device):
            target.copy_(source, non_blocking=True)

    def synchronize(self) -> None:
        """See `DeviceIpc`; waits for torch's current stream of this thread, and lets other threads run meanwhile."""
        torch.cuda.current_stream(self._device).synchronize()

    def _here(self) -> contextlib.AbstractContextManager[Any]:
        """The CUDA runtime counts the current device per thread."""
        device: contextlib.AbstractContextManager[Any] = self._cupy.cuda.Device(self._index)
        return device


def device_ipc_for(device: torch.device) -> tuple[DeviceIpc | None, str]:
    """CUDA IPC for a device, or None and the reason why there is none."""
    if device.type != "cuda":
        return None, f"no CUDA IPC on device '{device.type}'"
    if not torch.cuda.is_available():
        return None, "no CUDA IPC: torch finds no GPU"
    try:
        return CupyIpc(device), ""
    except ImportError:
        return None, "no CUDA IPC: CuPy is not installed or does not fit; see the extras cuda12 and cuda13"
    except RuntimeError as error:
        return None, f"no CUDA IPC: {str(error).splitlines()[0]}"
