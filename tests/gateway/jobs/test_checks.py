"""From request to checked job, without any service."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gateway.jobs.checks import CheckedJob, check_request, check_spec
from gateway.jobs.job import Job
from mosel.deadline import Deadline
from mosel.errors import InvalidRequest, ModelNotFound, MoselError, PayloadTooLarge
from mosel.packages.manifest import ModalitySpec
from mosel.packages.model_package import ModelPackage
from mosel.tensors import to_proto
from mosel.v1 import gateway_pb2, tensor_pb2

Draw = Callable[..., dict[str, NDArray[Any]]]


def request_of(payloads: dict[str, NDArray[Any]], **fields: Any) -> gateway_pb2.PredictRequest:
    messages = {name: to_proto(array) for name, array in payloads.items()}
    return gateway_pb2.PredictRequest(model="fruit", payloads=messages, **fields)


def test_a_sound_request_becomes_a_job(fruit: ModelPackage, draw: Draw) -> None:
    payloads = draw(3)
    request = request_of(
        payloads,
        min_accuracy=0.5,
        latency_slo_ms=20.0,
        modalities=["scent", "scent"],
        effort=gateway_pb2.BEST,
        late_ok=True,
    )
    job, checked = check_request(request, {"fruit": fruit}, max_items=3)
    assert (job.size, job.modalities, job.min_accuracy, job.latency_slo_ms) == (3, ("scent",), 0.5, 20.0)
    assert (job.exact, job.effort, job.late_ok) == (False, gateway_pb2.BEST, True)
    for name, array in payloads.items():
        np.testing.assert_array_equal(checked[name], array)


def test_what_is_not_given_is_none(fruit: ModelPackage, draw: Draw) -> None:
    job, _ = check_request(request_of(draw(1)), {"fruit": fruit}, max_items=3)
    assert (job.modalities, job.min_accuracy, job.latency_slo_ms) == (("photo", "scent"), None, None)
    assert (job.exact, job.effort, job.late_ok) == (False, gateway_pb2.EFFORT_UNSPECIFIED, False)
    assert check_request(request_of(draw(1), min_accuracy=0.0), {"fruit": fruit}, 3)[0].min_accuracy == 0.0


def test_bounds_are_inclusive(fruit: ModelPackage, draw: Draw) -> None:
    assert check_request(request_of(draw(3), min_accuracy=1.0), {"fruit": fruit}, max_items=3)[0].size == 3
    with pytest.raises(PayloadTooLarge, match="4 items; expected at most 3 in one job"):
        check_request(request_of(draw(4)), {"fruit": fruit}, max_items=3)


def test_an_unknown_model_is_told_the_known_ones(fruit: ModelPackage, draw: Draw) -> None:
    with pytest.raises(ModelNotFound, match="model is 'fruit'; expected one of apple, pear"):
        check_request(request_of(draw(1)), {"pear": fruit, "apple": fruit}, max_items=3)


def package_with(fruit: ModelPackage, dtype: str, *shape: int) -> ModelPackage:
    return replace(fruit, modalities={"x": ModalitySpec(dtype, shape, "networks:X", (1,))})


@pytest.mark.parametrize(
    ("dtype", "value"), [("FP16", np.nan), ("FP32", np.inf), ("FP64", -np.inf), ("BF16", np.nan), ("BF16", np.inf)]
)
def test_floats_must_be_finite(fruit: ModelPackage, dtype: str, value: float) -> None:
    arrays = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64, "BF16": np.float32}
    array = np.full((3, 2), 1.5, arrays[dtype])
    request = gateway_pb2.PredictRequest(model="x")

    def send() -> None:
        # The upper half of an FP32 is a BF16.
        data = (array.view(np.uint32) >> 16).astype("<u2").tobytes() if dtype == "BF16" else array.tobytes()
        number = tensor_pb2.DataType.Value(dtype)
        request.payloads["x"].CopyFrom(tensor_pb2.Tensor(dtype=number, shape=array.shape, data=data))
        check_request(request, {"x": package_with(fruit, dtype, 2)}, max_items=9)

    send()
    array[1, 1] = value
    with pytest.raises(InvalidRequest, match=r"payloads\.x has .* in item 1; expected finite numbers"):
        send()


@pytest.mark.parametrize(("dtype", "kind"), [("BOOL", np.bool_), ("INT64", np.int64), ("UINT8", np.uint8)])
def test_other_types_and_items_that_are_scalars(fruit: ModelPackage, dtype: str, kind: type[np.generic]) -> None:
    request = gateway_pb2.PredictRequest(model="x", payloads={"x": to_proto(np.ones(4, kind))})
    _, payloads = check_request(request, {"x": package_with(fruit, dtype)}, max_items=9)
    np.testing.assert_array_equal(payloads["x"], np.ones(4, kind))


def spec(**fields: Any) -> gateway_pb2.JobSpec:
    return gateway_pb2.JobSpec(**{"model": "fruit", "size": 3, **fields})


def test_a_job_without_its_items_is_checked_as_one_with_them(fruit: ModelPackage) -> None:
    job = check_spec(spec(modalities=["scent"], min_accuracy=0.5, late_ok=True), {"fruit": fruit}, max_items=3)
    assert (job.size, job.modalities, job.min_accuracy, job.late_ok) == (3, ("scent",), 0.5, True)
    assert job.payload_bytes() == {"scent": 3 * 6 * 4}
    assert check_spec(spec(), {"fruit": fruit}, max_items=3).modalities == ("photo", "scent")


BAD_SPECS: dict[str, tuple[dict[str, Any], type[MoselError], str]] = {
    "model": ({"model": "pear"}, ModelNotFound, "model is 'pear'; expected one of fruit"),
    "no items": ({"size": 0}, InvalidRequest, "size is 0; expected at least one item"),
    "many items": ({"size": 4}, PayloadTooLarge, "size is 4; expected at most 3 in one job"),
    "modality": ({"modalities": ["taste"]}, InvalidRequest, "modalities has 'taste'; expected some of photo, scent"),
    "floor": ({"min_accuracy": 1.5}, InvalidRequest, "min_accuracy is 1.5; expected a number from 0 to 1"),
    "loss": ({"max_accuracy_loss": float("nan")}, InvalidRequest, "max_accuracy_loss is nan; expected a number from 0"),
    "two floors": (
        {"min_accuracy": 0.5, "max_accuracy_loss": 0.0},
        InvalidRequest,
        "min_accuracy and max_accuracy_loss; expected one of them",
    ),
    "deadline": ({"latency_slo_ms": -1.0}, InvalidRequest, "latency_slo_ms is -1.0; expected a positive number"),
    "effort": ({"effort": 9}, InvalidRequest, "effort is 9; expected CHEAPEST, BEST or none"),
}


@pytest.mark.parametrize(("fields", "kind", "message"), BAD_SPECS.values(), ids=BAD_SPECS.keys())
def test_a_bad_job_is_refused(
    fruit: ModelPackage, fields: dict[str, Any], kind: type[MoselError], message: str
) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        check_spec(spec(**fields), {"fruit": fruit}, max_items=3)


@pytest.mark.parametrize("late_ok", [False, True])
@pytest.mark.parametrize(("slo_ms", "call_s", "due_s"), [(20_000.0, 40, 20), (40_000.0, 20, 20), (None, 40, 30)])
def test_the_smaller_deadline_wins_and_late_answers_may_take_as_long_as_the_call(
    fruit: ModelPackage, late_ok: bool, slo_ms: float | None, call_s: float, due_s: float
) -> None:
    job: CheckedJob = replace(check_spec(spec(), {"fruit": fruit}, 3), latency_slo_ms=slo_ms, late_ok=late_ok)
    times = Job(bytes(16), ends=Deadline.after(call_s))
    times.sound_as(job, default_s=30)
    assert times.deadline.remaining == pytest.approx(due_s, abs=5)
    assert times.ends.remaining == pytest.approx(call_s if late_ok else due_s, abs=5)
