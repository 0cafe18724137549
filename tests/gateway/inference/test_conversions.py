"""Messages of the Open Inference Protocol into words, and back."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gateway.inference.conversions import message_from, request_from
from gateway.inference.messages import ModelInferRequest, ModelInferResponse
from gateway.inference.words import InferResponse, OutputTensor, Parameter
from mosel.errors import InvalidRequest
from tests.gateway.inference.support import parameters_of

PARAMETERS: dict[str, Parameter] = {"a": True, "b": -7, "c": "text", "d": 0.5, "e": 2**64 - 1}
FIELDS = {"a": "bool_param", "b": "int64_param", "c": "string_param", "d": "double_param", "e": "uint64_param"}


def request_with(*shapes: tuple[int, ...], datatype: str = "FP32") -> Any:
    request = ModelInferRequest(model_name="fruit", model_version="1", id="é7")
    for index, shape in enumerate(shapes):
        request.inputs.add(name=f"x{index}", datatype=datatype, shape=shape)
    return request


def test_a_request_with_raw_contents() -> None:
    request = request_with((2, 1), (2, 3))
    request.raw_input_contents.extend([b"first", b"second"])
    for name, value in PARAMETERS.items():
        setattr(request.parameters[name], FIELDS[name], value)
    request.inputs[1].parameters["binary_data_size"].int64_param = 6
    request.outputs.add(name="y").parameters["classification"].int64_param = 3
    request.outputs.add(name="z")
    words = request_from(request)
    assert (words.model, words.version, words.id, words.parameters) == ("fruit", "1", "é7", PARAMETERS)
    assert [(t.name, t.datatype, t.shape, t.raw, list(t.values), t.parameters) for t in words.inputs] == [
        ("x0", "FP32", (2, 1), b"first", [], {}),
        ("x1", "FP32", (2, 3), b"second", [], {"binary_data_size": 6}),
    ]
    assert (words.outputs, words.output_parameters) == (["y", "z"], {"y": {"classification": 3}})


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("BOOL", "bool_contents", [True, False]),
        ("INT8", "int_contents", [-1, 2]),
        ("INT16", "int_contents", [-1, 2]),
        ("INT32", "int_contents", [-1, 2]),
        ("INT64", "int64_contents", [-1, 2**62]),
        ("UINT8", "uint_contents", [1, 2]),
        ("UINT16", "uint_contents", [1, 2]),
        ("UINT32", "uint_contents", [1, 2**32 - 1]),
        ("UINT64", "uint64_contents", [1, 2**64 - 1]),
        ("FP32", "fp32_contents", [0.5, 2.0]),
        ("FP64", "fp64_contents", [0.1, 2.0]),
        ("BYTES", "bytes_contents", [b"a", b""]),
    ],
)
def test_values_come_in_the_field_of_their_datatype(datatype: str, field: str, values: list[Any]) -> None:
    request = request_with((2,), datatype=datatype)
    getattr(request.inputs[0].contents, field).extend(values)
    tensor = request_from(request).inputs[0]
    assert (tensor.raw, list(tensor.values)) == (None, values)


def contents(*fields: str, raw: int = 0) -> Callable[[Any], None]:
    def change(request: Any) -> None:
        for field in fields:
            getattr(request.inputs[0].contents, field).append(1)
        request.raw_input_contents.extend([b"1"] * raw)

    return change


EXPECTED = "expected one of bool_param, int64_param, double_param, string_param"
BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "few raw contents": (
        contents(raw=1),
        "raw_input_contents has 1 entries; expected none, or one for each of 2 inputs",
    ),
    "many raw contents": (
        contents(raw=3),
        "raw_input_contents has 3 entries; expected none, or one for each of 2 inputs",
    ),
    "both": (
        contents("fp32_contents", raw=2),
        "inputs[0] 'x0' has contents beside raw_input_contents; expected one of them",
    ),
    "field of another datatype": (
        contents("int_contents"),
        "inputs[0] 'x0'.contents has int_contents; FP32 expects fp32_contents",
    ),
    "two fields": (
        contents("fp32_contents", "fp64_contents"),
        "inputs[0] 'x0'.contents has fp32_contents, fp64_contents; FP32 expects fp32_contents",
    ),
    "parameter without a value": (
        lambda request: request.parameters["min_accuracy"].SetInParent(),
        f"parameters has 'min_accuracy' without a value; {EXPECTED}",
    ),
    "parameter of an input without a value": (
        lambda request: request.inputs[1].parameters["p"].SetInParent(),
        f"inputs[1] 'x1'.parameters has 'p' without a value; {EXPECTED}",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_a_message_that_contradicts_itself_is_refused(change: Callable[[Any], Any], message: str) -> None:
    request = request_with((1,), (1,))
    change(request)
    with pytest.raises(InvalidRequest) as refused:
        request_from(request)
    assert str(refused.value) == message


def test_a_response_has_raw_contents() -> None:
    numbers = np.array([[0.5, 2.0], [1.0, 4.0]], np.float32)
    texts = np.array([b"pear", "zwölf".encode()], object)
    outputs = [OutputTensor("y", "FP32", numbers), OutputTensor("modalities", "BYTES", texts)]
    parameters: dict[str, Parameter] = {"a": True, "b": -7, "c": "text", "d": 0.5}
    message = message_from(InferResponse("fruit", "1", "é7", parameters, outputs))
    back = ModelInferResponse.FromString(message.SerializeToString())
    assert (back.model_name, back.model_version, back.id, parameters_of(back)) == ("fruit", "1", "é7", parameters)
    assert [(t.name, t.datatype, list(t.shape), t.HasField("contents")) for t in back.outputs] == [
        ("y", "FP32", [2, 2], False),
        ("modalities", "BYTES", [2], False),
    ]
    assert list(back.raw_output_contents) == [numbers.tobytes(), b"\4\0\0\0pear\6\0\0\0zw\xc3\xb6lf"]
