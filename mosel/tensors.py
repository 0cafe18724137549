"""Data types and tensors by value, between protobuf and numpy."""

import functools
import math

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mosel.errors import InvalidRequest
from mosel.v1 import tensor_pb2

# numpy has no bfloat16: its bits travel as uint16 and become bfloat16 at the torch edge.
DTYPES: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype("bool"),
    "UINT8": np.dtype("u1"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
# Where arrays of numbers may mean bfloat16: its bits, which are not to be taken for integers.
BFLOAT16 = np.dtype([("bfloat16", "<u2")])
MAX_RANK = 8
# On the wire.
_VALUES = {name: tensor_pb2.DataType.Value(name) for name in DTYPES}
_NAMES: dict[int, str] = {value: name for name, value in _VALUES.items()}


def dtype_name(value: int) -> str:
    """The name of a DataType on the wire.

    Raises:
        InvalidRequest: the number names no data type.
    """
    name = _NAMES.get(value)
    if name is None:
        raise InvalidRequest(f"dtype {value} is unknown; expected one of {', '.join(DTYPES)}")
    return name


def dtype_value(name: str) -> tensor_pb2.DataType.ValueType:
    """The number of a data type on the wire."""
    return _VALUES[name]


def name_of(dtype: DTypeLike) -> str | None:
    """The name of a numpy dtype, None if it cannot travel."""
    return _name_of(np.dtype(dtype))


def byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this data type and shape."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def checked_shape(shape: tuple[int, ...], field: str) -> tuple[int, ...]:
    """Returns the shape when it is one that a tensor can have.

    Raises:
        InvalidRequest: the rank is above 8, a dimension is negative, or the product is beyond 2^59 (zeros count as 1).
    """
    if len(shape) > MAX_RANK:
        raise InvalidRequest(f"{field} has rank {len(shape)}; at most {MAX_RANK} dimensions are expected")
    if min(shape, default=0) < 0:
        raise InvalidRequest(f"{field} has shape {list(shape)}; every dimension must be at least 0")
    # numpy refuses such a shape even where a zero makes the tensor empty.
    if (math.prod(shape) or math.prod(dimension or 1 for dimension in shape)) > 2**59:
        raise InvalidRequest(f"{field} has shape {list(shape)}, which is larger than any memory")
    return shape


def to_proto(array: NDArray[np.generic], field: str = "tensor") -> tensor_pb2.Tensor:
    """A numpy array as a Tensor message; `field` names it in messages.

    Raises:
        InvalidRequest: the array's dtype cannot travel.
    """
    name = name_of(array.dtype)
    if name is None:
        raise InvalidRequest(f"{field}: dtype {array.dtype} cannot be sent; expected one of {', '.join(DTYPES)}")
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    return tensor_pb2.Tensor(dtype=dtype_value(name), shape=array.shape, data=data)


def from_proto(tensor: tensor_pb2.Tensor, field: str) -> NDArray[np.generic]:
    """A Tensor message as a read-only numpy array over its bytes (BF16 as uint16).

    Raises:
        InvalidRequest: dtype, shape and the number of bytes contradict each other.
    """
    # Once: protobuf copies the bytes at each access.
    return from_bytes(dtype_name(tensor.dtype), tuple(tensor.shape), tensor.data, field, f"{field}.data")


def from_bytes(
    dtype: str, shape: tuple[int, ...], data: bytes | memoryview, field: str, data_field: str
) -> NDArray[np.generic]:
    """Bytes, little endian and row-major, as a read-only numpy array over them (BF16 as uint16).

    Args:
        dtype: one of DTYPES.
        shape: of the array.
        data: its bytes.
        field, data_field: name the tensor and its bytes in messages.

    Raises:
        InvalidRequest: dtype, shape and the number of bytes contradict each other.
    """
    shape = checked_shape(shape, f"{field}.shape")
    expected = byte_count(dtype, shape)
    nbytes = memoryview(data).nbytes
    if nbytes != expected:
        raise InvalidRequest(f"{data_field} has {nbytes} bytes; {dtype} {list(shape)} expects {expected} bytes")
    return np.frombuffer(data, DTYPES[dtype]).reshape(shape)


@functools.lru_cache(maxsize=64)
def _name_of(dtype: np.dtype[np.generic]) -> str | None:
    if dtype == BFLOAT16:
        return "BF16"
    wanted = dtype.newbyteorder("<")
    return next((name for name, known in DTYPES.items() if known == wanted and name != "BF16"), None)
