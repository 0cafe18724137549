"""Whatever holds numbers, as numpy arrays that can be sent: numpy, lists, and tensors of torch, JAX and others."""

from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mosel.errors import InvalidRequest
from mosel.tensors import BFLOAT16


class SupportsDlpack(Protocol):
    """A tensor of any library that exports DLPack."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        """The capsule."""


Payload: TypeAlias = ArrayLike | SupportsDlpack


def as_array(value: Payload, field: str) -> NDArray[np.generic]:
    """The numbers as a numpy array, without a copy where that is possible; bfloat16 has the dtype `BFLOAT16`.

    A torch tensor may be on any device, and part of a graph.

    Args:
        value: what holds them.
        field: names it in messages.

    Raises:
        InvalidRequest: it cannot be read.
    """
    try:
        return _as_array(value)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        reason = " ".join(str(error).split())
        raise InvalidRequest(f"{field}: a {type(value).__name__} cannot be sent: {reason}") from None


def _as_array(value: Any) -> NDArray[np.generic]:
    if type(value) is np.ndarray and value.dtype.isbuiltin == 1:
        # What most callers send; to find out what else it may be takes longer than all other checks.
        return value
    # torch: out of the graph, and off the GPU.
    for step in ("detach", "cpu"):
        if callable(getattr(value, step, None)):
            value = getattr(value, step)()
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":
        # numpy has no such type; its bits are the upper half of a float32's.
        return (np.asarray(value.float(), "<f4").view("<u4") >> 16).astype("<u2").view(BFLOAT16)
    exports = hasattr(value, "__dlpack__") and not hasattr(value, "__array__")
    array: NDArray[np.generic] = np.from_dlpack(value) if exports else np.asarray(value)
    # How JAX and others write it (the package ml_dtypes).
    return array.view(BFLOAT16) if array.dtype.name == "bfloat16" else array
