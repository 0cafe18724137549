"""Tensors by value."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mosel.errors import InvalidRequest
from mosel.tensors import DTYPES, byte_count, checked_shape, dtype_name, dtype_value, from_proto, name_of, to_proto
from mosel.v1 import tensor_pb2

NUMPY_NAMES = [name for name in DTYPES if name != "BF16"]


def test_the_table_names_every_type_of_the_wire_and_no_other() -> None:
    assert {"DATA_TYPE_UNSPECIFIED", *DTYPES} == set(tensor_pb2.DataType.keys())


@pytest.mark.parametrize("name", list(DTYPES))
def test_a_name_comes_back_from_its_number(name: str) -> None:
    assert dtype_name(dtype_value(name)) == name


@pytest.mark.parametrize("value", [-1, 0, 11, 2**31 - 1])
def test_a_number_that_names_no_type_is_refused_with_those_that_do(value: int) -> None:
    with pytest.raises(InvalidRequest, match=f"dtype {value} is unknown; expected one of BOOL, .*FP64"):
        dtype_name(value)


@pytest.mark.parametrize("name", NUMPY_NAMES)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_arrays_come_back_bit_for_bit_and_read_only(name: str, data: st.DataObject) -> None:
    shape = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    array = data.draw(arrays.arrays(DTYPES[name], shape))
    back = from_proto(to_proto(array), "payload")
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()
    assert not back.flags.writeable


def test_memory_order_and_byte_order_do_not_matter() -> None:
    array = np.arange(12, dtype=">f4").reshape(3, 4)
    assert np.array_equal(from_proto(to_proto(array.T[::-1]), "x"), array.T[::-1])


def test_bfloat16_travels_as_its_bits() -> None:
    tensor = tensor_pb2.Tensor(dtype=tensor_pb2.BF16, shape=[2], data=b"\x80\x3f\x00\x40")
    assert from_proto(tensor, "x").tolist() == [0x3F80, 0x4000]


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "complex64", "object", "U3", "datetime64[s]"])
def test_what_cannot_travel_is_refused_by_name(dtype: str) -> None:
    array = np.zeros(2, dtype)
    assert name_of(array.dtype) is None
    with pytest.raises(InvalidRequest, match=r"cannot be sent; expected one of BOOL"):
        to_proto(array)


@pytest.mark.parametrize("size", [0, 15, 17])
def test_bytes_that_contradict_the_shape_are_refused_by_field(size: int) -> None:
    tensor = tensor_pb2.Tensor(dtype=tensor_pb2.FP32, shape=[2, 2], data=bytes(size))
    with pytest.raises(InvalidRequest, match=rf"payloads\.image\.data has {size} bytes; FP32 \[2, 2\] expects 16"):
        from_proto(tensor, "payloads.image")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([1] * 9, "f has rank 9; at most 8"),
        ([2, -1], r"f has shape \[2, -1\]; every dimension must be at least 0"),
        ([2**40, 2**40], "larger than any memory"),
        ([0, 2**40, 2**40], "larger than any memory"),
    ],
)
def test_shapes_that_no_tensor_has_are_refused_by_field(shape: list[int], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        checked_shape(tuple(shape), "f")


DIMENSIONS = st.sampled_from([-1, 0, 1, 2, 3, 2**31, 2**59, 2**62, 2**63 - 1])


@settings(deadline=None, max_examples=200)
@given(dtype=st.integers(-2, 12), shape=st.lists(DIMENSIONS, max_size=10), data=st.binary(max_size=32))
def test_whatever_is_sent_becomes_an_array_or_a_refusal(dtype: int, shape: list[int], data: bytes) -> None:
    tensor = tensor_pb2.Tensor(shape=shape, data=data)
    tensor.dtype = dtype  # type: ignore[assignment]
    try:
        array = from_proto(tensor, "payload")
    except InvalidRequest:
        return
    assert list(array.shape) == shape
    assert array.nbytes == byte_count(dtype_name(dtype), tuple(shape)) == len(data)
