"""Requests whose callers have more than they send, in every protocol, with a selector that does what the test says."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from numpy.typing import NDArray

from gateway.jobs.checks import check_request
from mosel.errors import InputsNeeded, InvalidRequest
from mosel.packages.model_package import ModelPackage
from mosel.tensors import to_proto
from mosel.v1 import gateway_pb2, selector_pb2, service_pb2
from tests.gateway.inference.support import infer_request, parameters_of, stub_of
from tests.gateway.scripted import Gateway, group, release_of

Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
HAS = ["photo", "scent"]
ADVICE = gateway_pb2.UploadAdvice(modalities=["scent"], valid_s=5.0, valid_jobs=7)


def request_of(payloads: Payloads, **fields: Any) -> gateway_pb2.PredictRequest:
    messages = {name: to_proto(array) for name, array in payloads.items()}
    return gateway_pb2.PredictRequest(model="fruit", payloads=messages, **fields)


def scents(draw: Draw) -> Payloads:
    return {"scent": draw(2)["scent"]}


SOUND: list[tuple[dict[str, Any], tuple[Any, ...]]] = [
    ({}, (("scent",), (), False)),
    ({"available": HAS}, (("scent",), ("photo", "scent"), False)),
    ({"available": ["scent"]}, (("scent",), ("scent",), False)),
    ({"available": HAS, "modalities": ["scent"], "min_accuracy": 0.5}, (("scent",), ("scent",), False)),
    ({"available": HAS, "modalities": HAS}, (("scent",), ("photo", "scent"), True)),
]


@pytest.mark.parametrize(("fields", "expected"), SOUND)
def test_what_is_sent_and_what_there_is(
    fruit: ModelPackage, draw: Draw, fields: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    job, _ = check_request(request_of(scents(draw), **fields), {"fruit": fruit}, 8)
    assert (job.modalities, job.available, job.exact) == expected
    # Only what was sent is stored.
    assert job.payload_bytes() == {"scent": 2 * 6 * 4}


BAD = {
    "unknown": ({"available": ["scent", "taste"]}, "available has 'taste'; expected some of photo, scent"),
    "not all": ({"available": ["photo"]}, "available lacks 'scent'; expected all of the payloads: scent"),
    "none may be run": (
        {"available": HAS, "modalities": ["photo"]},
        "payloads are scent; expected some of the modalities: photo",
    ),
    "others": (
        {"available": ["scent"], "modalities": ["photo"]},
        "modalities has 'photo'; expected some of 'available': scent",
    ),
}


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_wrong_is_named(fruit: ModelPackage, draw: Draw, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}"):
        check_request(request_of(scents(draw), **fields), {"fruit": fruit}, 8)


async def test_an_answer_says_what_the_next_job_brings(gateway: Gateway, draw: Draw) -> None:
    call = gateway.stub.Predict(request_of(scents(draw), available=HAS))
    description = await gateway.job_at_selector()
    assert (list(description.modalities), list(description.available)) == (["scent"], HAS)
    assert description.payloads.keys() == {"scent"}
    result = selector_pb2.JobResult(job_id=description.job_id, groups=[group("scent", 0, 1)], upload=ADVICE)
    gateway.selector.say(result=result)
    gateway.selector.say(release=release_of(description))
    assert (await call).upload == ADVICE
    status = await gateway.stub.Status(service_pb2.StatusRequest())
    assert status.services[0].counters["payload_bytes"] == 2 * 6 * 4


async def test_who_does_not_ask_is_not_told(gateway: Gateway, draw: Draw) -> None:
    call = gateway.stub.Predict(request_of(draw(1)))
    description = await gateway.job_at_selector()
    assert list(description.available) == []
    gateway.answer(description)
    assert not (await call).HasField("upload")


async def test_a_job_that_needs_more_is_told_what_to_send(gateway: Gateway, draw: Draw) -> None:
    predicting = asyncio.create_task(gateway.client.predict("fruit", scents(draw)))
    description = await gateway.job_at_selector()
    failure = selector_pb2.JobFailure(job_id=description.job_id, status_code=9, message="send both", send=HAS)
    gateway.selector.say(failure=failure)
    gateway.selector.say(release=release_of(description))
    with pytest.raises(InputsNeeded, match=r"^send both$") as refused:
        await predicting
    assert refused.value.modalities == ("photo", "scent")


async def test_the_open_inference_protocol_says_the_same(gateway: Gateway, draw: Draw) -> None:
    stub = stub_of(gateway.channel)
    call = stub.ModelInfer(infer_request(scents(draw), available="photo, scent"), timeout=30)
    description = await gateway.job_at_selector()
    assert (list(description.modalities), list(description.available)) == (["scent"], HAS)
    result = selector_pb2.JobResult(job_id=description.job_id, groups=[group("scent", 0, 1)], upload=ADVICE)
    gateway.selector.say(result=result)
    gateway.selector.say(release=release_of(description))
    assert parameters_of(await call)["upload"] == "scent"

    call = stub.ModelInfer(infer_request(scents(draw), available="photo,scent"), timeout=30)
    description = await gateway.job_at_selector()
    failure = selector_pb2.JobFailure(job_id=description.job_id, status_code=9, message="send both", send=HAS)
    gateway.selector.say(failure=failure)
    gateway.selector.say(release=release_of(description))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert dict(refused.value.trailing_metadata() or ())["mosel-send"] == "photo,scent"


async def test_a_plan_says_what_jobs_like_it_bring(gateway: Gateway) -> None:
    gateway.selector.upload = ADVICE
    plan = await gateway.client.plan("fruit", 2, min_accuracy=0.5)
    assert plan.upload == ("scent",)
