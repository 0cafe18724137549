"""JSON and binary tensors: what is read, what is written, and what is refused."""

import contextlib
import json
import math
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gateway.inference.json_codec import json_bytes_of, read_request, write_response
from gateway.inference.words import InferRequest, InferResponse, OutputTensor
from mosel.errors import InvalidRequest
from mosel.tensors import DTYPES

SCENT: dict[str, Any] = {"name": "scent", "datatype": "FP32", "shape": [2, 3], "data": [1, 2.5, 3, 4, 5, 6]}


def read(content: Any, behind: bytes = b"") -> InferRequest:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return read_request("fruit", "", memoryview(text + behind), len(text))


def request_with(**changes: Any) -> dict[str, Any]:
    return {"inputs": [SCENT | changes]}


def response_of(*outputs: OutputTensor, id: str = "") -> InferResponse:
    return InferResponse("fruit", "1", id, {"queue_ms": 1.5, "modalities_used": "scent"}, outputs)


def written(response: InferResponse, **fields: Any) -> tuple[Any, bytes]:
    """The JSON of a written response, and the bytes behind it."""
    done = write_response(InferRequest("fruit", **fields), response)
    end = len(done.body) if done.json_bytes is None else done.json_bytes
    return json.loads(done.body[:end]), done.body[end:]


def test_everything_that_a_request_says() -> None:
    request = read(
        {
            "id": "7",
            "parameters": {"min_accuracy": 0.5, "priority": 3, "late_ok": True, "modalities": "scent"},
            "inputs": [SCENT],
            "outputs": [{"name": "labels"}, {"name": "probabilities", "parameters": {"classification": 2}}],
        }
    )
    assert (request.model, request.version, request.id) == ("fruit", "", "7")
    assert request.parameters == {"min_accuracy": 0.5, "priority": 3, "late_ok": True, "modalities": "scent"}
    assert request.outputs == ["labels", "probabilities"]
    assert request.output_parameters == {"labels": {}, "probabilities": {"classification": 2}}
    (tensor,) = request.inputs
    assert (tensor.name, tensor.datatype, tensor.shape, tensor.raw) == ("scent", "FP32", (2, 3), None)
    np.testing.assert_array_equal(tensor.values, [1, 2.5, 3, 4, 5, 6])


def test_what_is_null_is_absent_and_other_members_are_ignored() -> None:
    """KServe's own client sends these."""
    absent = {"id": None, "parameters": None, "outputs": None, "model_name": "fruit", "model_version": None}
    scent = SCENT | {"parameters": {"content_type": "np", "other": None}, "shape_of": [1]}
    request = read({**absent, "inputs": [scent], "raw": [1]})
    assert (request.id, request.parameters, request.outputs) == ("", {}, read({"inputs": [SCENT]}).outputs)
    assert request.inputs[0].parameters == {"content_type": "np"}
    asked = read(
        {
            "inputs": [SCENT],
            "parameters": {"min_accuracy": None, "priority": 3},
            "outputs": [{"name": "labels", "parameters": None}],
        }
    )
    assert (asked.parameters, asked.output_parameters) == ({"priority": 3}, {"labels": {}})


def test_bytes_behind_the_json_are_taken_in_the_order_of_the_inputs() -> None:
    first, second = {"binary_data_size": 5}, {"binary_data_size": 0}
    inputs = [
        {"name": "a", "datatype": "UINT8", "shape": [5], "parameters": first},
        SCENT,
        {"name": "b", "datatype": "UINT8", "shape": [0], "parameters": second},
        {"name": "c", "datatype": "UINT8", "shape": [2], "parameters": {"binary_data_size": 2}},
    ]
    request = read({"inputs": inputs}, b"abcdefg")
    assert [tensor.raw if tensor.raw is None else bytes(tensor.raw) for tensor in request.inputs] == [
        b"abcde",
        None,
        b"",
        b"fg",
    ]


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.sampled_from(["FP32", "INT64", "UINT8", "BOOL"]),
    st.booleans(),
    st.data(),
)
def test_nested_and_flat_data_are_the_same_tensor(
    shape: list[int], dtype: str, flat: bool, data: st.DataObject
) -> None:
    bits = data.draw(st.binary(min_size=math.prod(shape), max_size=math.prod(shape)))
    array = np.frombuffer(bits, np.uint8).reshape(shape).astype(DTYPES[dtype])
    sent = (array.ravel() if flat else array).tolist()
    (tensor,) = read(request_with(datatype=dtype, shape=shape, data=sent)).inputs
    assert isinstance(tensor.values, np.ndarray)
    np.testing.assert_array_equal(tensor.values, array.ravel())


NO_PARAMETER = "expected true, false, a number of 64 bits or a short text"
WRONG: dict[str, tuple[Any, str]] = {
    "nothing": (b"", "the JSON is wrong at character 0: Expecting value"),
    "half": (b'{"inputs": [', "the JSON is wrong at character 12: Expecting value"),
    "two": (b"{} {}", "the JSON is wrong at character 3: Extra data"),
    "a list": (b"[]", "the JSON is []; expected an object"),
    "no UTF-8": (b'{"id": "\xff"}', "the JSON is no UTF-8: byte 8 is 0xff"),
    "UTF-16": ("{}".encode("utf-16"), "the JSON is no UTF-8: byte 0 is 0xff"),
    "half a character": (b'{"id": "\\ud800", "inputs": []}', "id is '\\ud800'; expected text that UTF-8 can hold"),
    "half a character in a name": (
        b'{"inputs": [], "parameters": {"\\ud800": 1}}',
        "parameters.\ufffd\ufffd\ufffd.[key] is '\\ud800'; expected text that UTF-8 can hold",
    ),
    "half a character in a parameter": (
        b'{"inputs": [], "parameters": {"a": "\\udfff"}}',
        f"parameters.a is '\\udfff'; {NO_PARAMETER}",
    ),
    "NaN": (b'{"inputs": [NaN]}', "the JSON has NaN; expected numbers as JSON knows them"),
    "minus infinity": (b"[-Infinity]", "the JSON has -Infinity; expected numbers as JSON knows them"),
    "twice": (b'{"id": "a", "id": "b"}', "the JSON has 'id' twice in one object; expected it once"),
    "many members": (
        json.dumps({"parameters": {str(n): 1 for n in range(300)}}).encode(),
        "the JSON has an object of 300 members; expected at most 256",
    ),
    "many digits": (b'{"id": ' + b"1" * 5000 + b"}", "the JSON has a whole number of too many digits"),
    "deep": (b"[" * 100_000, "the JSON is nested too deeply; expected at most 8 dimensions of data"),
    "deep objects": (b'{"a":' * 100_000, "the JSON is nested too deeply; expected at most 8 dimensions of data"),
    "no inputs": ({}, "inputs is missing"),
    "inputs that are none": ({"inputs": {}}, "inputs is {}; expected a valid list"),
    "an input that is none": ({"inputs": [SCENT, 5]}, "inputs[1] is 5; expected an object"),
    "id": ({"inputs": [], "id": 5}, "id is 5; expected a valid string"),
    "long id": ({"inputs": [], "id": "x" * 2000}, "id is 'xxxxxxxxxxxx...xxxxxxxxxxxxx': String should have at most"),
    "parameter": ({"inputs": [], "parameters": {"a": [1]}}, f"parameters.a is [1]; {NO_PARAMETER}"),
    "no parameter": ({"inputs": [], "parameters": {"a": []}}, f"parameters.a is []; {NO_PARAMETER}"),
    "large parameter": ({"inputs": [], "parameters": {"a": 2**63}}, "parameters.a is 92233720368547"),
    "no name": ({"inputs": [{"datatype": "FP32", "shape": [1]}]}, "inputs[0].name is missing"),
    "name": (request_with(name=5), "inputs[0].name is 5; expected a valid string"),
    "data type": (request_with(datatype=32), "inputs[0].datatype is 32; expected a valid string"),
    "shape": (request_with(shape=6), "inputs[0].shape is 6; expected a valid list"),
    "dimension": (request_with(shape=[2, "3"]), "inputs[0].shape[1] is '3'; expected a valid integer"),
    "half a dimension": (request_with(shape=[2, 3.0]), "inputs[0].shape[1] is 3.0; expected a valid integer"),
    "true dimension": (request_with(shape=[2, True]), "inputs[0].shape[1] is True; expected a valid integer"),
    "large dimension": (request_with(shape=[2**63]), "inputs[0].shape[0] is 9223372036854775808; expected less than"),
    "dimensions": (request_with(shape=[1] * 9), "inputs[0].shape is [1, 1, 1, 1, 1, 1, ...]: List should have at most"),
    "data": (request_with(data="123"), "inputs[0].data is '123'; expected a valid list"),
    "no data": (request_with(data=None), "inputs[0] 'scent' has no data; expected it, or binary_data_size among"),
    "text in data": (request_with(data=[1, "2", 3]), "inputs[0] 'scent' has '2' in its data; expected numbers alone"),
    "nothing in data": (request_with(data=[1, None]), "inputs[0] 'scent' has None in its data; expected numbers alone"),
    "objects in data": (request_with(data=[{}]), "inputs[0] 'scent' has {} in its data; expected numbers alone"),
    "numbers and booleans": (request_with(data=[1, True]), "inputs[0] 'scent' has True in its data; expected numbers"),
    "ragged": (
        request_with(data=[[1, 2, 3], [4, 5]]),
        "inputs[0] 'scent' has data that is not nested as its shape [2, 3]",
    ),
    "half nested": (request_with(data=[[1, 2, 3], 4]), "inputs[0] 'scent' has data that is not nested as its shape"),
    "nested too deep": (request_with(data=[[[1], [2], [3]]] * 2), "inputs[0] 'scent' has [1] in its data"),
    "nested otherwise": (request_with(data=[[1, 2]] * 3), "inputs[0] 'scent' has data that is not nested as its shape"),
    "output": ({"inputs": [], "outputs": ["labels"]}, "outputs[0] is 'labels'; expected an object"),
    "flag": (
        {"inputs": [], "outputs": [{"name": "labels", "parameters": {"binary_data": 1}}]},
        "outputs[0] 'labels' has binary_data 1; expected true or false",
    ),
    "flag of all": (
        {"inputs": [], "parameters": {"binary_data_output": "yes"}},
        "parameters has binary_data_output 'yes'; expected true or false",
    ),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_refused(content: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(content)
    assert str(refused.value).startswith(message)
    assert len(str(refused.value)) < 200


def binary(size: object, **changes: Any) -> dict[str, Any]:
    return request_with(data=None, parameters={"binary_data_size": size}) | changes


@pytest.mark.parametrize(
    ("content", "behind", "message"),
    [
        (binary(24), 23, "inputs[0] 'scent' has binary_data_size 24; behind the JSON there are 23 bytes for it"),
        (binary(24), 25, "behind the JSON there are 25 bytes; expected 24, as the inputs say"),
        ({"inputs": []}, 1, "behind the JSON there are 1 bytes; expected 0, as the inputs say"),
        (binary(-1), 24, "inputs[0] 'scent' has binary_data_size -1; behind"),
        (binary(True), 24, "inputs[0] 'scent' has binary_data_size True; behind"),
        (binary(24.0), 24, "inputs[0] 'scent' has binary_data_size 24.0; behind"),
        (binary("24"), 24, "inputs[0] 'scent' has binary_data_size '24'; behind"),
        (
            request_with(parameters={"binary_data_size": 24}),
            24,
            "inputs[0] 'scent' has data and binary_data_size; expected one of them",
        ),
    ],
)
def test_bytes_that_are_not_as_the_json_says(content: dict[str, Any], behind: int, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(content, bytes(behind))
    assert str(refused.value).startswith(message)


def test_how_much_is_json() -> None:
    assert json_bytes_of(None, 10) == 10
    assert json_bytes_of("0", 10) == 0
    assert json_bytes_of("10", 10) == 10
    for header in ("11", "-1", "1.0", "", " 1", "ten", "1_0", "٣", "9" * 5000):
        with pytest.raises(InvalidRequest, match=r"header inference-header-content-length is .*expected at most"):
            json_bytes_of(header, 10)


@pytest.mark.parametrize("data", [[2**70], [10**400, 1.5], [-(2**64), 2**63]])
def test_numbers_that_no_data_type_holds_are_left_to_be_refused(data: list[float]) -> None:
    (tensor,) = read(request_with(data=data)).inputs
    assert isinstance(tensor.values, np.ndarray)
    assert tensor.values.dtype == object


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
MEMBERS = ["id", "inputs", "outputs", "parameters", "name", "datatype", "shape", "data"]
# Where a request has something, there may be anything.
LIKE_A_REQUEST = st.fixed_dictionaries(
    {"inputs": JSON | st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(MEMBERS, JSON)), max_size=2)},
    optional={"outputs": JSON, "id": JSON, "parameters": JSON | st.dictionaries(st.text(max_size=5), JSON)},
)
ALMOST_AN_INPUT = st.fixed_dictionaries(
    {"name": st.text(max_size=5), "datatype": st.sampled_from([*DTYPES, "BYTES", ""]), "shape": JSON, "data": JSON}
)


def is_request_or_refused(text: bytes, behind: bytes = b"") -> None:
    with contextlib.suppress(InvalidRequest):
        request = read(text, behind)
        assert all(tensor.raw is not None or len(tensor.values) >= 0 for tensor in request.inputs)


@given(LIKE_A_REQUEST | st.fixed_dictionaries({"inputs": st.lists(ALMOST_AN_INPUT, max_size=2)}), st.binary(max_size=8))
def test_any_json_is_a_request_or_refused(content: Any, behind: bytes) -> None:
    is_request_or_refused(json.dumps(content).encode(), behind)


@settings(max_examples=300)
@given(st.data())
def test_any_bytes_are_a_request_or_refused(data: st.DataObject) -> None:
    text = bytearray(json.dumps({"id": "7", "inputs": [SCENT | {"data": [[1, 2.5e3, 3], [4, -5, 6]]}]}).encode())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.sampled_from([b"", b"[", b"]", b"{", b'"', b",", b"1e9", b"NaN", b"null", b"\\u", b"\xf0\x9f"])
            | st.binary(max_size=2)
        )
        if not text:
            break
    is_request_or_refused(bytes(text))


def test_reading_gives_way_to_other_threads() -> None:
    nested = np.arange(900_000).reshape(-1, 3)
    content = json.dumps(request_with(shape=nested.shape, data=nested.tolist())).encode()
    reading = threading.Thread(target=read, args=(content,))
    # Processor time of this process: what other programs take of the cores does not count.
    started = last = time.process_time()
    longest = 0.0
    reading.start()
    while reading.is_alive():
        now = time.process_time()
        longest, last = max(longest, now - last), now
    # If it did not, the longest would be most of it.
    assert longest < (time.process_time() - started) / 3


# Responses


def array(values: Sequence[Any], dtype: Any = np.float32) -> NDArray[Any]:
    return np.array(values, dtype)


def texts(*values: bytes) -> NDArray[Any]:
    made = np.empty(len(values), object)
    made[:] = values
    return made


PROBABILITIES = OutputTensor("probabilities", "FP32", array([[0.1, 0.2, 0.7], [1, 0, 0]]))
LABELS = OutputTensor("labels", "BYTES", texts(b"plum", "größer".encode()))


def test_outputs_as_json() -> None:
    content, behind = written(response_of(PROBABILITIES, LABELS, id="7"))
    assert behind == b""
    data = content["outputs"][0].pop("data")
    np.testing.assert_array_equal(array(data), PROBABILITIES.array.ravel())
    assert content == {
        "id": "7",
        "model_name": "fruit",
        "model_version": "1",
        "parameters": {"queue_ms": 1.5, "modalities_used": "scent"},
        "outputs": [
            {"name": "probabilities", "datatype": "FP32", "shape": [2, 3]},
            {"name": "labels", "datatype": "BYTES", "shape": [2], "data": ["plum", "größer"]},
        ],
    }


def test_outputs_as_bytes_are_those_that_were_wanted_so() -> None:
    raw = PROBABILITIES.array.tobytes()
    lengths = struct.pack("<I", 4) + b"plum" + struct.pack("<I", 8) + "größer".encode()
    response = response_of(PROBABILITIES, LABELS)
    assert written(response, parameters={"binary_data_output": True})[1] == raw + lengths
    content, behind = written(response, output_parameters={"labels": {"binary_data": True}})
    assert behind == lengths
    assert "data" in content["outputs"][0]
    assert content["outputs"][1]["parameters"] == {"binary_data_size": len(lengths)}
    own = {"labels": {"binary_data": False}}
    content, behind = written(response, parameters={"binary_data_output": True}, output_parameters=own)
    assert behind == raw
    assert content["outputs"][1]["data"] == ["plum", "größer"]


def test_no_id_was_given_so_none_is_said() -> None:
    assert "id" not in written(response_of(PROBABILITIES))[0]


@given(st.integers(0, 30_000), st.sampled_from([dtype for dtype in DTYPES if dtype not in ("FP16", "BF16")]))
@settings(max_examples=30, deadline=None)
def test_what_is_written_is_what_was_there(size: int, dtype: str) -> None:
    values = np.arange(size).astype(DTYPES[dtype])
    content, _ = written(response_of(OutputTensor("all", dtype, values)))
    np.testing.assert_array_equal(array(content["outputs"][0]["data"], DTYPES[dtype]), values)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (OutputTensor("half", "FP16", array([1], np.float16)), "output 'half' is FP16, which JSON lacks"),
        (OutputTensor("brain", "BF16", array([1], np.uint16)), "output 'brain' is BF16, which JSON lacks"),
        (OutputTensor("odd", "FP32", array([1, np.nan])), "output 'odd' has nan or infinity, which JSON lacks"),
        (OutputTensor("odd", "FP64", array([np.inf], float)), "output 'odd' has nan or infinity, which JSON lacks"),
    ],
)
def test_what_json_lacks_can_be_had_as_bytes(output: OutputTensor, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}; expected binary_data for it$"):
        written(response_of(output))
    assert written(response_of(output), parameters={"binary_data_output": True})[1] == output.array.tobytes()
