"""The Open Inference Protocol over gRPC, with a selector that does what the test says."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from gateway.inference import servicer
from gateway.inference.messages import ModelInferRequest, ModelStreamInferResponse, message
from gateway.jobs.store import OFF_LOOP_ELEMENTS
from mosel.v1 import selector_pb2
from tests.gateway.inference.support import array_of, infer_request, parameters_of, stub_of
from tests.gateway.scripted import Gateway, group, release_of

Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def stub(gateway: Gateway) -> Any:
    return stub_of(gateway.channel)


def answer(gateway: Gateway, description: selector_pb2.JobDescription, **result: Any) -> None:
    """Lets the selector answer a job, and forget it."""
    groups = [group("photo+scent", *range(description.size))]
    gateway.selector.say(result=selector_pb2.JobResult(job_id=description.job_id, groups=groups, **result))
    gateway.selector.say(release=release_of(description))


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), error.value.details() or ""


async def test_a_request_becomes_a_job_and_its_result_the_response(gateway: Gateway, stub: Any, draw: Draw) -> None:
    payloads = draw(3)
    parameters: dict[str, Any] = {
        "min_accuracy": 0.5,
        "latency_slo_ms": 9_000,
        "priority": 3,
        "effort": "best",
        "policy": "all",
    }
    outputs = ("modalities", "probabilities", "labels")
    call = stub.ModelInfer(infer_request(payloads, id="7", outputs=outputs, **parameters), timeout=30)
    description = await gateway.job_at_selector()
    assert (description.size, list(description.modalities)) == (3, ["photo", "scent"])
    assert (description.min_accuracy, description.exact, description.priority) == (0.5, True, 3)
    assert 8_000_000 < description.budget_us <= 9_000_000
    gateway.selector.say(part=selector_pb2.JobPart(job_id=description.job_id, group=group("scent", 1)))
    result = selector_pb2.JobResult(job_id=description.job_id, expected_accuracy=0.875, queue_us=1500, compute_us=2500)
    result.groups.append(group("photo+scent", 0, 2))
    gateway.selector.say(result=result)
    gateway.selector.say(release=release_of(description))
    response = await call
    assert (response.model_name, response.model_version, response.id) == ("fruit", "1", "7")
    assert [output.name for output in response.outputs] == [*outputs]
    assert array_of(response, "modalities").tolist() == ["photo+scent", "scent", "photo+scent"]
    np.testing.assert_array_equal(array_of(response, "probabilities")[:, 1], [1, 2, 3])
    assert array_of(response, "labels").tolist() == ["lemon"] * 3
    said = parameters_of(response)
    assert 0 < said.pop("deadline_slack_ms") < 9_000
    assert said == {
        "job_id": description.job_id.hex(),
        "modalities_used": "photo+scent,scent",
        "expected_accuracy": 0.875,
        "queue_ms": 1.5,
        "compute_ms": 2.5,
    }
    await gateway.idle()


async def test_typed_contents_are_the_same_request(gateway: Gateway, stub: Any, draw: Draw) -> None:
    scents = draw(2)["scent"]
    request = ModelInferRequest(model_name="fruit")
    tensor = request.inputs.add(name="scent", datatype="FP32", shape=scents.shape)
    tensor.contents.fp32_contents.extend(scents.ravel().tolist())
    call = stub.ModelInfer(request, timeout=30)
    description = await gateway.job_at_selector()
    assert list(description.modalities) == ["scent"]
    answer(gateway, description)
    assert array_of(await call, "probabilities").shape == (2, 3)


@pytest.mark.parametrize(
    ("parameters", "timeout", "budget_us"),
    [
        ({"timeout": 5_000_000}, 30, 5_000_000),
        ({"timeout": 9_000_000, "latency_slo_ms": 5_000}, 30, 5_000_000),
        ({"timeout": 9_000_000}, 5, 5_000_000),
        ({"timeout": 5_000_000, "latency_slo_ms": 9_000}, 30, 5_000_000),
    ],
)
async def test_the_smallest_of_all_deadlines_wins(
    gateway: Gateway, stub: Any, draw: Draw, parameters: dict[str, Any], timeout: float, budget_us: int
) -> None:
    call = stub.ModelInfer(infer_request(draw(1), **parameters), timeout=timeout)
    description = await gateway.job_at_selector()
    # gRPC counts a call's own deadline from when it has arrived.
    assert budget_us / 2 < description.budget_us < budget_us * 1.2
    answer(gateway, description)
    assert 0 < parameters_of(await call)["deadline_slack_ms"] < budget_us / 1000 * 1.2


async def test_a_job_ends_with_its_timeout(gateway: Gateway, stub: Any, draw: Draw) -> None:
    call = stub.ModelInfer(infer_request(draw(1), timeout=200_000), timeout=30)
    description = await gateway.job_at_selector()
    assert await refused(call) == (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "the deadline passed before the answer was there",
    )
    assert await gateway.cancelled_at_selector() == description.job_id
    gateway.selector.say(release=release_of(description))
    await gateway.idle()


async def test_what_the_selector_refuses_with_is_the_status(gateway: Gateway, stub: Any, draw: Draw) -> None:
    call = stub.ModelInfer(infer_request(draw(1)), timeout=30)
    description = await gateway.job_at_selector()
    number = int(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    failure = selector_pb2.JobFailure(job_id=description.job_id, status_code=number, message="full", retry_after_ms=70)
    gateway.selector.say(failure=failure)
    assert await refused(call) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    assert (await call.trailing_metadata())["retry-after-ms"] == "70"


async def test_a_wrong_request_is_refused_before_anything_is_run(gateway: Gateway, stub: Any, draw: Draw) -> None:
    request = infer_request(draw(1), accuracy=0.5)
    assert (await refused(stub.ModelInfer(request, timeout=30)))[0] is INVALID
    assert (await refused(stub.ModelInfer(infer_request(draw(1), model="pear"), timeout=30)))[0] is (
        grpc.StatusCode.NOT_FOUND
    )
    assert gateway.selector.received.empty()
    await gateway.idle()


async def test_large_payloads_are_converted_off_the_loop(gateway: Gateway, stub: Any, draw: Draw) -> None:
    payloads = draw(152)
    assert payloads["photo"].size > OFF_LOOP_ELEMENTS
    call = stub.ModelInfer(infer_request(payloads), timeout=30)
    # Checked, and larger than a slot of this small arena.
    status, details = await refused(call)
    assert status is INVALID
    assert details.startswith("a tensor of 262656 bytes is larger than the largest slot")


async def stream_of(stub: Any, *requests: Any) -> Any:
    """A stream with requests in it, which stays open."""
    stream = stub.ModelStreamInfer(timeout=30)
    for request in requests:
        await stream.write(request)
    return stream


async def test_a_stream_answers_in_order_whatever_is_done_first(gateway: Gateway, stub: Any, draw: Draw) -> None:
    stream = await stream_of(stub, *(infer_request(draw(1, seed), id=str(seed)) for seed in range(3)))
    descriptions = [await gateway.job_at_selector() for _ in range(3)]
    for description in reversed(descriptions):
        answer(gateway, description)
    for index, description in enumerate(descriptions):
        response = await stream.read()
        assert (response.error_message, response.infer_response.id) == ("", str(index))
        said = parameters_of(response.infer_response)
        assert (said["job_id"], said["triton_final_response"]) == (description.job_id.hex(), True)
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF
    assert await stream.code() is grpc.StatusCode.OK
    await gateway.idle()


async def test_what_is_wrong_with_one_request_is_told_inside_the_stream(
    gateway: Gateway, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = infer_request(draw(1), id="good").SerializeToString()
    bad = [
        infer_request(draw(1), id="floor", min_accuracy=2).SerializeToString(),
        infer_request(draw(1), id="model", model="pear").SerializeToString(),
        b"\xff\xff no message",
    ]
    raw: Any = gateway.channel.stream_stream(STREAM)
    stream = raw(timeout=30)
    for data in (*bad, good):
        await stream.write(data)
    description = await gateway.job_at_selector()
    answer(gateway, description)
    told = [ModelStreamInferResponse.FromString(await stream.read()) for _ in range(4)]
    assert [(response.infer_response.id, response.error_message) for response in told] == [
        ("floor", "min_accuracy is 2.0; expected a number from 0 to 1"),
        ("model", "model is 'pear'; expected one of fruit"),
        ("", "a request's bytes are no message that ModelStreamInfer knows"),
        ("good", ""),
    ]

    async def broken(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(servicer, "infer", broken)
    await stream.write(good)
    response = ModelStreamInferResponse.FromString(await stream.read())
    assert response.error_message == "internal error in ModelStreamInfer; the log has more"
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF
    await gateway.idle()


async def test_a_stream_that_ends_is_answered_in_full(gateway: Gateway, stub: Any, draw: Draw) -> None:
    stream = await stream_of(stub, infer_request(draw(1)), infer_request(draw(1)))
    await stream.done_writing()
    for _ in range(2):
        answer(gateway, await gateway.job_at_selector())
    assert [response.error_message async for response in stream] == ["", ""]
    await gateway.idle()


async def test_a_stream_reads_no_more_than_so_many_requests_ahead(
    gateway: Gateway, stub: Any, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One waits to be written, one in the queue, one for the queue: as many as the gateway takes.
    monkeypatch.setattr(servicer, "_IN_FLIGHT", 1)
    stream = await stream_of(stub, *(infer_request(draw(1, seed), id=str(seed)) for seed in range(8)))
    descriptions = [await gateway.job_at_selector() for _ in range(3)]
    await asyncio.sleep(0.2)
    assert gateway.selector.received.empty()
    for index in range(8):
        answer(gateway, descriptions.pop(0))
        response = await stream.read()
        assert (response.error_message, response.infer_response.id) == ("", str(index))
        if index < 5:
            descriptions.append(await gateway.job_at_selector())
    stream.cancel()


async def test_ending_a_stream_cancels_what_is_under_way(gateway: Gateway, stub: Any, draw: Draw) -> None:
    stream = await stream_of(stub, *(infer_request(draw(1)) for _ in range(3)))
    descriptions = [await gateway.job_at_selector() for _ in range(3)]
    stream.cancel()
    cancelled = {await gateway.cancelled_at_selector() for _ in range(3)}
    assert cancelled == {description.job_id for description in descriptions}
    for description in descriptions:
        gateway.selector.say(release=release_of(description))
    await gateway.idle()


async def test_each_request_of_a_stream_has_its_own_deadline(gateway: Gateway, stub: Any, draw: Draw) -> None:
    stream = await stream_of(stub, infer_request(draw(1), timeout=100_000), infer_request(draw(1)))
    first, second = [await gateway.job_at_selector() for _ in range(2)]
    assert first.budget_us <= 100_000 < second.budget_us
    response = await stream.read()
    assert response.error_message == "the deadline passed before the answer was there"
    assert await gateway.cancelled_at_selector() == first.job_id
    gateway.selector.say(release=release_of(first))
    answer(gateway, second)
    assert (await stream.read()).error_message == ""
    stream.cancel()
    await gateway.idle()


async def test_repositories_have_no_name_and_models_no_other_configuration(stub: Any) -> None:
    named = "repository_name is 'mine'; expected none: there is one repository"
    for method in ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"):
        request = message(f"{method}Request", {"repository_name": "mine"})
        assert await refused(getattr(stub, method)(request, timeout=30)) == (INVALID, named)
    configured = {"model_name": "fruit", "parameters": {"config": {"string_param": "{}"}}}
    status, details = await refused(
        stub.RepositoryModelLoad(message("RepositoryModelLoadRequest", configured), timeout=30)
    )
    assert (status, details) == (INVALID, "parameters has 'config'; expected none: a model's folder says all")
