"""From request to checked job, and from result to reply, without any service."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gateway.jobs import check_request, reply_from
from mosel.errors import InvalidRequest, ModelNotFound, PayloadTooLarge
from mosel.model_package import ModalitySpec, ModelPackage
from mosel.tensors import to_proto
from mosel.v1 import gateway_pb2, selector_pb2, tensor_pb2

Draw = Callable[..., dict[str, NDArray[Any]]]


def request_of(payloads: dict[str, NDArray[Any]], **fields: Any) -> gateway_pb2.PredictRequest:
    messages = {name: to_proto(array) for name, array in payloads.items()}
    return gateway_pb2.PredictRequest(model="fruit", payloads=messages, **fields)


def test_a_sound_request_becomes_a_job(fruit: ModelPackage, draw: Draw) -> None:
    payloads = draw(3)
    request = request_of(payloads, min_accuracy=0.5, latency_slo_ms=20.0, modalities=["scent", "scent"])
    job = check_request(request, {"fruit": fruit}, max_items=3)
    assert (job.size, job.modalities, job.min_accuracy, job.latency_slo_ms) == (3, ("scent",), 0.5, 20.0)
    for name, array in payloads.items():
        np.testing.assert_array_equal(job.payloads[name], array)


def test_what_is_not_given_is_none(fruit: ModelPackage, draw: Draw) -> None:
    job = check_request(request_of(draw(1)), {"fruit": fruit}, max_items=3)
    assert (job.modalities, job.min_accuracy, job.latency_slo_ms) == (("photo", "scent"), None, None)
    assert check_request(request_of(draw(1), min_accuracy=0.0), {"fruit": fruit}, 3).min_accuracy == 0.0


def test_bounds_are_inclusive(fruit: ModelPackage, draw: Draw) -> None:
    assert check_request(request_of(draw(3), min_accuracy=1.0), {"fruit": fruit}, max_items=3).size == 3
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
    job = check_request(request, {"x": package_with(fruit, dtype)}, max_items=9)
    np.testing.assert_array_equal(job.payloads["x"], np.ones(4, kind))


def test_groups_are_joined_in_the_order_of_their_rows(fruit: ModelPackage, draw: Draw) -> None:
    job = check_request(request_of(draw(3)), {"fruit": fruit}, max_items=3)
    rows = np.array([[0.1, 0.2, 0.7], [0.8, 0.1, 0.1], [0.2, 0.6, 0.2]], np.float32)
    result = selector_pb2.JobResult(job_id=bytes(range(16)), expected_accuracy=0.9, queue_us=1500, compute_us=250)
    result.groups.add(modality_set="scent", row_start=2, row_count=1, output=to_proto(rows[2:]))
    result.groups.add(modality_set="photo", row_start=0, row_count=2, output=to_proto(rows[:2]))
    reply = reply_from(job, result, slack_ms=4.0)
    assert reply.job_id == "000102030405060708090a0b0c0d0e0f"
    assert list(reply.output.shape) == [3, 3]
    np.testing.assert_array_equal(np.frombuffer(reply.output.data, np.float32).reshape(3, 3), rows)
    assert list(reply.labels) == ["plum", "apple", "lemon"]
    assert list(reply.modality_sets) == ["photo", "photo", "scent"]
    assert (reply.expected_accuracy, reply.queue_ms, reply.compute_ms, reply.deadline_slack_ms) == (0.9, 1.5, 0.25, 4.0)


def test_a_model_without_labels_names_none(fruit: ModelPackage, draw: Draw) -> None:
    unnamed = replace(fruit, output=replace(fruit.output, labels=()))
    job = check_request(request_of(draw(1)), {"fruit": unnamed}, max_items=3)
    result = selector_pb2.JobResult(job_id=bytes(16))
    result.groups.add(modality_set="photo", row_count=1, output=to_proto(np.zeros((1, 3), np.float32)))
    assert list(reply_from(job, result, 0.0).labels) == []
