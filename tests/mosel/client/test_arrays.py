"""What may be given to a client as numbers."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mosel.client.arrays import as_array
from mosel.client.demands import Upload, predict_request
from mosel.errors import InvalidRequest
from mosel.tensors import BFLOAT16, from_proto, to_proto
from mosel.transport.torch_exchange import TORCH_DTYPES
from mosel.v1 import tensor_pb2


def sent(value: Any) -> tuple[str, NDArray[Any]]:
    """Data type and numbers as the gateway gets them."""
    tensor = predict_request("digits", {"pen": value}, {}, 64).payloads["pen"]
    return tensor_pb2.DataType.Name(tensor.dtype), from_proto(tensor, "pen")


@pytest.mark.parametrize("name", [name for name in TORCH_DTYPES if name != "BF16"])
def test_torch_tensors_of_every_type(name: str) -> None:
    tensor = torch.randint(0, 2, (3, 4)).to(TORCH_DTYPES[name])
    kind, array = sent(tensor)
    assert kind == name
    np.testing.assert_array_equal(array, tensor.numpy())


def test_bfloat16_tensors_of_torch_travel_bit_for_bit() -> None:
    tensor = torch.cat([torch.randn(5, 7), torch.tensor([[float("inf"), -0.0, 1e-40, 3e38, 0, 1, -1.5]])]).bfloat16()
    kind, bits = sent(tensor)
    assert (kind, bits.shape) == ("BF16", (6, 7))
    np.testing.assert_array_equal(bits, tensor.view(torch.int16).numpy().view(np.uint16))
    # In parts as well.
    upload = Upload("digits", {"pen": tensor}, None, {}, 64)
    (_, batch) = upload.requests()
    assert batch.items.payloads["pen"].data == bits.tobytes()


def test_tensors_in_a_graph_transposed_or_sliced() -> None:
    tensor = torch.arange(12.0, requires_grad=True).reshape(3, 4).T[1:]
    np.testing.assert_array_equal(sent(tensor)[1], tensor.detach().numpy())
    np.testing.assert_array_equal(sent(tensor.bfloat16())[1].shape, (3, 3))


class OnlyDlpack:
    """A tensor of a library that numpy does not know."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self._array.__dlpack__(*args, **kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def test_whatever_exports_dlpack() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    kind, came = sent(OnlyDlpack(array))
    assert kind == "FP32"
    np.testing.assert_array_equal(came, array)


def test_numpy_arrays_are_not_copied_and_lists_are_read() -> None:
    array = np.ones((2, 3), np.float32)
    assert as_array(array, "x") is array
    assert sent([[True, False]])[0] == "BOOL"


def test_bits_of_bfloat16_are_not_taken_for_integers() -> None:
    bits = np.array([0x3F80, 0x4000], "<u2")
    assert to_proto(bits.view(BFLOAT16)) == tensor_pb2.Tensor(
        dtype=tensor_pb2.BF16, shape=[2], data=b"\x80\x3f\x00\x40"
    )
    with pytest.raises(InvalidRequest, match=r"^pen: dtype uint16 cannot be sent"):
        to_proto(bits, "pen")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1], [2, 3]], r"^payloads\.pen: a list cannot be sent: .*inhomogeneous"),
        (torch.eye(3).to_sparse(), r"^payloads\.pen: a Tensor cannot be sent: .*[Ss]parse"),
        (object(), r"^payloads\.pen: dtype object cannot be sent; expected one of BOOL"),
        (np.array([1j]), r"^payloads\.pen: dtype complex128 cannot be sent"),
    ],
)
def test_what_holds_no_numbers_is_named(value: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        sent(value)
