"""Requests of the Open Inference Protocol, before anything is run."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gateway.inference.requests import call_deadline, check, elements_of
from gateway.inference.words import InferRequest, InputTensor
from gateway.jobs.checks import CheckedJob, Payloads
from mosel.config import Settings
from mosel.deadline import Deadline
from mosel.errors import InvalidRequest, ModelNotFound, MoselError, PayloadTooLarge
from mosel.packages.manifest import ModalitySpec
from mosel.packages.model_package import ModelPackage
from mosel.tensors import DTYPES, name_of
from mosel.v1 import gateway_pb2

Draw = Callable[..., dict[str, NDArray[Any]]]
Check = Callable[..., tuple[CheckedJob, Payloads]]


def inputs_of(payloads: dict[str, NDArray[Any]]) -> list[InputTensor]:
    return [InputTensor(n, name_of(a.dtype) or "", a.shape, raw=a.tobytes()) for n, a in payloads.items()]


@pytest.fixture
def checked(fruit: ModelPackage, settings_with: Callable[..., Settings]) -> Check:
    """Checks a request for `fruit`, of at most 4 items."""
    settings = settings_with(gateway={"max_items_per_job": 4})

    def run(*inputs: InputTensor, **fields: Any) -> tuple[CheckedJob, Payloads]:
        return check(InferRequest(fields.pop("model", "fruit"), inputs=inputs, **fields), {"fruit": fruit}, settings)

    return run


def test_a_sound_request_becomes_a_job(checked: Check, draw: Draw) -> None:
    payloads = draw(3)
    parameters = {
        "min_accuracy": 0.5,
        "latency_slo_ms": 20,
        "modalities": "scent, photo",
        "priority": 2,
        "effort": "best",
        "late_ok": True,
        "policy": "mosel",
    }
    job, arrays = checked(*inputs_of(payloads), parameters=parameters, version="1", id="7")
    assert (job.size, job.modalities, job.min_accuracy, job.latency_slo_ms) == (3, ("photo", "scent"), 0.5, 20.0)
    assert (job.priority, job.effort, job.late_ok, job.exact) == (2, gateway_pb2.BEST, True, False)
    for name, array in payloads.items():
        np.testing.assert_array_equal(arrays[name], array)


def test_what_is_not_given_is_none(checked: Check, draw: Draw) -> None:
    job, _ = checked(*inputs_of(draw(1)))
    assert (job.modalities, job.min_accuracy, job.latency_slo_ms) == (("photo", "scent"), None, None)
    assert (job.priority, job.effort, job.late_ok, job.exact) == (0, gateway_pb2.EFFORT_UNSPECIFIED, False, False)


def test_any_subset_of_the_inputs_may_be_sent(checked: Check, draw: Draw) -> None:
    job, arrays = checked(*inputs_of({"scent": draw(2)["scent"]}))
    assert (job.modalities, list(arrays)) == (("scent",), ["scent"])


@pytest.mark.parametrize("floor", [0.8, "0.8", 1, "1", 0])
def test_numbers_may_come_as_text(checked: Check, draw: Draw, floor: float | str) -> None:
    assert checked(*inputs_of(draw(1)), parameters={"min_accuracy": floor})[0].min_accuracy == float(floor)


@pytest.mark.parametrize("floor", [{}, {"min_accuracy": 0.7}])
def test_the_policy_all_runs_exactly_what_was_sent(checked: Check, draw: Draw, floor: dict[str, Any]) -> None:
    job, _ = checked(*inputs_of(draw(1)), parameters={"policy": "all", **floor})
    assert (job.exact, job.modalities, job.min_accuracy) == (True, ("photo", "scent"), floor.get("min_accuracy"))


@pytest.mark.parametrize("loss", [0.02, "0.02", 1, 0])
def test_a_loss_is_a_floor_with_which_modalities_may_be_left_out(checked: Check, draw: Draw, loss: float | str) -> None:
    parameters = {"max_accuracy_loss": loss, "modalities": "scent,photo"}
    job, _ = checked(*inputs_of(draw(1)), parameters=parameters)
    assert (job.max_accuracy_loss, job.min_accuracy, job.exact) == (float(loss), None, False)


def test_what_the_protocol_allows_and_means_nothing_here_is_ignored(checked: Check, draw: Draw) -> None:
    harmless = {
        "sequence_id": 0,
        "sequence_start": False,
        "sequence_end": False,
        "binary_data_output": True,
        "triton_enable_empty_final_response": True,
    }
    tensor = replace(inputs_of({"scent": draw(1)["scent"]})[0], parameters={"binary_data_size": 24})
    outputs = {"output_parameters": {"probabilities": {"binary_data": True}}, "outputs": ["probabilities"]}
    assert checked(tensor, parameters=harmless, **outputs)[0].size == 1


BAD_PARAMETERS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": (
        {"min_acuracy": 0.5},
        "parameters has 'min_acuracy'; expected some of min_accuracy, latency_slo_ms, modalities, policy, priority, ",
    ),
    "floor above one": ({"min_accuracy": 60}, "min_accuracy is 60.0; expected a number from 0 to 1"),
    "floor that is no number": ({"min_accuracy": "nan"}, "min_accuracy is nan; expected a number from 0 to 1"),
    "floor of words": ({"min_accuracy": "high"}, "min_accuracy is 'high'; expected a number"),
    "true floor": ({"min_accuracy": True}, "min_accuracy is True; expected a number"),
    "huge floor": ({"min_accuracy": 10**400}, "min_accuracy is 1000"),
    "loss above one": ({"max_accuracy_loss": 2}, "max_accuracy_loss is 2.0; expected a number from 0 to 1"),
    "loss of words": ({"max_accuracy_loss": "little"}, "max_accuracy_loss is 'little'; expected a number"),
    "true loss": ({"max_accuracy_loss": True}, "max_accuracy_loss is True; expected a number"),
    "two floors": (
        {"max_accuracy_loss": 0, "min_accuracy": 0},
        "min_accuracy and max_accuracy_loss; expected one of them",
    ),
    "negative deadline": ({"latency_slo_ms": -5}, "latency_slo_ms is -5.0; expected a positive number of milliseconds"),
    "endless deadline": ({"latency_slo_ms": "inf"}, "latency_slo_ms is inf; expected a positive number"),
    "modality that was not sent": (
        {"modalities": "scent,taste"},
        "modalities has 'taste'; expected some of the inputs: photo, scent",
    ),
    "no modality": ({"modalities": ""}, "modalities is ''; expected names separated by commas"),
    "modalities as a number": ({"modalities": 3}, "modalities is 3; expected names separated by commas"),
    "policy of others": ({"policy": "greedy"}, "policy is 'greedy'; expected all or mosel"),
    "policy that is none": ({"policy": True}, "policy is True; expected all or mosel"),
    "priority": ({"priority": 10}, "priority is 10; expected 1 to 9, or 0 for the default"),
    "negative priority": ({"priority": -1}, "priority is -1; expected 1 to 9, or 0 for the default"),
    "huge priority": ({"priority": 2**64 - 1}, "priority is 18446744073709551615; expected 1 to 9"),
    "half a priority": ({"priority": 1.5}, "priority is 1.5; expected a whole number"),
    "effort": ({"effort": "most"}, "effort is 'most'; expected cheapest or best"),
    "late": ({"late_ok": "perhaps"}, "late_ok is 'perhaps'; expected true or false"),
    "sequence": ({"sequence_id": 4}, "sequence_id is 4; expected none: requests here are not parts of a sequence"),
    "sequence start": ({"sequence_start": True}, "sequence_start is True; expected none"),
}


@pytest.mark.parametrize(("parameters", "message"), BAD_PARAMETERS.values(), ids=BAD_PARAMETERS.keys())
def test_bad_parameters_are_named(checked: Check, draw: Draw, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        checked(*inputs_of(draw(1)), parameters=parameters)
    assert str(refused.value).startswith(message)


def scent(**fields: Any) -> InputTensor:
    return replace(InputTensor("scent", "FP32", (2, 6), raw=bytes(48)), **fields)


PHOTO = InputTensor("photo", "UINT8", (2, 24, 24, 3), raw=bytes(2 * 24 * 24 * 3))
BAD_INPUTS: dict[str, tuple[list[InputTensor], type[MoselError], str]] = {
    "none": ([], InvalidRequest, "inputs is empty; expected some of photo, scent"),
    "unknown": ([scent(name="taste")], InvalidRequest, "inputs has 'taste'; expected some of photo, scent"),
    "twice": (
        [PHOTO, scent(), scent()],
        InvalidRequest,
        "inputs[2] 'scent' was sent as inputs[1] already; expected each input once",
    ),
    "datatype": ([PHOTO, scent(datatype="FP64")], InvalidRequest, "inputs[1] 'scent'.datatype is FP64; expected FP32"),
    "bytes for numbers": ([scent(datatype="BYTES")], InvalidRequest, "inputs[0] 'scent'.datatype is BYTES; expected"),
    "no datatype": ([scent(datatype="")], InvalidRequest, "inputs[0] 'scent'.datatype is missing; expected FP32"),
    "shape": ([scent(shape=(2, 7))], InvalidRequest, "inputs[0] 'scent'.shape is [2, 7]; expected [items, 6]"),
    "no batch": ([scent(shape=(6,))], InvalidRequest, "inputs[0] 'scent'.shape is [6]; expected [items, 6]"),
    "no shape": ([scent(shape=())], InvalidRequest, "inputs[0] 'scent'.shape is []; expected [items, 6]"),
    "empty batch": ([scent(shape=(0, 6), raw=b"")], InvalidRequest, "inputs[0] 'scent'.shape is [0, 6], a batch of no"),
    "negative batch": ([scent(shape=(-1, 6))], InvalidRequest, "inputs[0] 'scent'.shape is [-1, 6], a batch of no"),
    "too many items": (
        [scent(shape=(5, 6), raw=bytes(120))],
        PayloadTooLarge,
        "inputs[0] 'scent'.shape is [5, 6]: 5 items; expected at most 4 in one job (setting gateway.max_items_per_job)",
    ),
    "other numbers of items": (
        [PHOTO, scent(shape=(1, 6), raw=bytes(24))],
        InvalidRequest,
        "inputs have different numbers of items (photo 2, scent 1); expected the same in all",
    ),
    "few bytes": (
        [scent(raw=bytes(47))],
        InvalidRequest,
        "inputs[0] 'scent' has 47 bytes; FP32 [2, 6] expects 48 bytes",
    ),
    "many bytes": (
        [scent(raw=bytes(49))],
        InvalidRequest,
        "inputs[0] 'scent' has 49 bytes; FP32 [2, 6] expects 48 bytes",
    ),
    "NaN": (
        [scent(raw=np.full((2, 6), np.nan, np.float32).tobytes())],
        InvalidRequest,
        "inputs[0] 'scent' has nan in item 0; expected finite numbers",
    ),
    "no data": ([scent(raw=None)], InvalidRequest, "inputs[0] 'scent' has 0 values; FP32 [2, 6] expects 12"),
    "few values": (
        [scent(raw=None, values=[1.0] * 11)],
        InvalidRequest,
        "inputs[0] 'scent' has 11 values; FP32 [2, 6]",
    ),
    "texts": ([scent(raw=None, values=["1"] * 12)], InvalidRequest, "inputs[0] 'scent' has values that are no FP32"),
    "nothing": ([scent(raw=None, values=[None] * 12)], InvalidRequest, "inputs[0] 'scent' has values that are no FP32"),
    "flags": ([scent(raw=None, values=[True] * 12)], InvalidRequest, "inputs[0] 'scent' has values that are no FP32"),
    "lists": ([scent(raw=None, values=[[1]] * 12)], InvalidRequest, "inputs[0] 'scent' has values that are no FP32"),
    "ragged": ([scent(raw=None, values=[[1], 2] * 6)], InvalidRequest, "inputs[0] 'scent' has values that are no FP32"),
    "too large": ([scent(raw=None, values=[1e300] * 12)], InvalidRequest, "inputs[0] 'scent' has inf in item 0"),
    "shared memory": (
        [scent(raw=None, parameters={"shared_memory_region": "mine"})],
        InvalidRequest,
        "inputs[0] 'scent' has the parameter 'shared_memory_region'; expected its data in the request, and none",
    ),
}


@pytest.mark.parametrize(("inputs", "kind", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_inputs_are_named(checked: Check, inputs: list[InputTensor], kind: type[MoselError], message: str) -> None:
    with pytest.raises(kind) as refused:
        checked(*inputs)
    assert str(refused.value).startswith(message)


BAD_OUTPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": (
        {"outputs": ["probabilities", "colour"]},
        "outputs[1] 'colour' is no output of 'fruit'; expected some of probabilities, labels, modalities",
    ),
    "twice": (
        {"outputs": ["labels", "labels"]},
        "outputs[1] 'labels' was asked for already; expected each output once",
    ),
    "shared memory": (
        {"outputs": ["probabilities"], "output_parameters": {"probabilities": {"shared_memory_region": "mine"}}},
        "outputs[0] 'probabilities' has the parameter 'shared_memory_region'; expected none",
    ),
    "no classes": (
        {"outputs": ["probabilities"], "output_parameters": {"probabilities": {"classification": 0}}},
        "outputs[0] 'probabilities' has classification 0; expected a whole number of at least 1",
    ),
    "classes of texts": (
        {"outputs": ["labels"], "output_parameters": {"labels": {"classification": 2}}},
        "outputs[0] 'labels' has the parameter 'classification'; expected none",
    ),
}


@pytest.mark.parametrize(("fields", "message"), BAD_OUTPUTS.values(), ids=BAD_OUTPUTS.keys())
def test_bad_outputs_are_named(checked: Check, draw: Draw, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        checked(*inputs_of(draw(1)), **fields)
    assert str(refused.value) == message


def test_a_model_or_version_that_is_not_served(checked: Check, draw: Draw) -> None:
    with pytest.raises(ModelNotFound, match=r"^model is 'pear'; expected one of fruit$"):
        checked(*inputs_of(draw(1)), model="pear")
    with pytest.raises(ModelNotFound, match=r"^version of model 'fruit' is '9'; expected '1' or none$"):
        checked(*inputs_of(draw(1)), version="9")


def only(fruit: ModelPackage, dtype: str, *shape: int) -> ModelPackage:
    """A model with one input."""
    return replace(fruit, modalities={"x": ModalitySpec(dtype, shape, "networks:X", (1,))})


def read(package: ModelPackage, settings: Settings, dtype: str, shape: tuple[int, ...], **data: Any) -> NDArray[Any]:
    request = InferRequest("x", inputs=[InputTensor("x", dtype, shape, **data)])
    return check(request, {"x": package}, settings)[1]["x"]


@pytest.mark.parametrize("dtype", [*DTYPES])
def test_every_datatype_comes_as_bytes(fruit: ModelPackage, settings: Settings, dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(DTYPES[dtype])
    back = read(only(fruit, dtype, 3), settings, dtype, (2, 3), raw=array.tobytes())
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name not in ("FP16", "BF16")])
def test_every_datatype_but_the_short_floats_comes_as_values(
    fruit: ModelPackage, settings: Settings, dtype: str
) -> None:
    array = np.arange(6).reshape(2, 3).astype(DTYPES[dtype])
    back = read(only(fruit, dtype, 3), settings, dtype, (2, 3), values=array.ravel().tolist())
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype


@pytest.mark.parametrize("dtype", ["FP16", "BF16"])
def test_short_floats_come_as_bytes_only(fruit: ModelPackage, settings: Settings, dtype: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^inputs\[0\] 'x' has no bytes; {dtype} can be sent as raw bytes only$"):
        read(only(fruit, dtype, 1), settings, dtype, (1, 1), values=[1.0])


@pytest.mark.parametrize("value", [-129, 128, 2**70])
def test_whole_numbers_must_fit_their_datatype(fruit: ModelPackage, settings: Settings, value: int) -> None:
    expected = "no INT8" if value > 2**64 else rf"the value {value}; INT8 expects -128 to 127"
    with pytest.raises(InvalidRequest, match=expected):
        read(only(fruit, "INT8", 2), settings, "INT8", (1, 2), values=[1, value])
    with pytest.raises(InvalidRequest, match="values that are no INT8"):
        read(only(fruit, "INT8", 2), settings, "INT8", (1, 2), values=[1, 1.5])


def test_items_may_be_scalars(fruit: ModelPackage, settings: Settings) -> None:
    assert read(only(fruit, "INT64"), settings, "INT64", (3,), values=[1, 2, 3]).tolist() == [1, 2, 3]
    with pytest.raises(InvalidRequest, match=r"shape is \[3, 1\]; expected \[items\]$"):
        read(only(fruit, "INT64"), settings, "INT64", (3, 1), values=[1, 2, 3])


@pytest.mark.parametrize(
    ("timeout", "seconds"), [(2_000_000, 2), ("2000000", 2), (0, 60), (90_000_000, 60), (2**64, 60)]
)
def test_the_sooner_of_timeout_and_call_counts(timeout: int | str, seconds: float) -> None:
    deadline = call_deadline(
        InferRequest("fruit", parameters={"timeout": timeout}), Deadline.after(60), time.monotonic()
    )
    assert deadline.remaining == pytest.approx(seconds, abs=1)


@pytest.mark.parametrize(
    ("timeout", "message"),
    [
        (-1, "timeout is -1; expected microseconds, at least 0"),
        (1.5, "timeout is 1.5; expected a whole number"),
        (True, "timeout is True; expected a whole number"),
        ("soon", "timeout is 'soon'; expected a whole number"),
    ],
)
def test_a_timeout_is_a_whole_number_of_microseconds(timeout: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        call_deadline(InferRequest("fruit", parameters={"timeout": timeout}), Deadline.after(60), time.monotonic())
    assert str(refused.value) == message


def test_elements_are_counted_from_the_shapes() -> None:
    assert elements_of(InferRequest("fruit", inputs=[PHOTO, scent()])) == 2 * 24 * 24 * 3 + 12
