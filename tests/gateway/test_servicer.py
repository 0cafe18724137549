"""The gateway over gRPC, with a selector that does what the test says."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from mosel.client import AsyncClient, ItemResults, JobAccepted, JobInfo, JobSummary
from mosel.errors import (
    DeadlineExceeded,
    InvalidRequest,
    JobCancelled,
    JobNotFound,
    Overloaded,
    PayloadTooLarge,
)
from mosel.tensors import to_proto
from mosel.v1 import gateway_pb2, selector_pb2, service_pb2, tensor_pb2
from tests.gateway.scripted import Gateway, group, release_of

Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
# A call whose requests and replies are bytes.
RawStream: TypeAlias = "grpc.aio.StreamStreamMultiCallable[bytes, bytes]"


def batches(payloads: Payloads, step: int) -> Iterator[Payloads]:
    size = len(next(iter(payloads.values())))
    for start in range(0, size, step):
        yield {name: array[start : start + step] for name, array in payloads.items()}


async def test_a_job_comes_in_batches_and_goes_in_parts(gateway: Gateway, draw: Draw) -> None:
    payloads = draw(5)
    demand = {"min_accuracy": 0.5, "latency_slo_ms": 20_000.0, "effort": "best", "late_ok": True}
    events = gateway.client.submit_job("fruit", batches(payloads, 2), size=5, **demand)  # type: ignore[arg-type]
    async with aclosing(events):
        accepted = await anext(events)
        assert isinstance(accepted, JobAccepted)
        description = await gateway.job_at_selector()
        assert description.job_id.hex() == accepted.job_id
        assert (description.size, list(description.modalities)) == (5, ["photo", "scent"])
        assert (description.stream, description.late_ok, description.effort) == (True, True, gateway_pb2.BEST)
        assert 0 < description.budget_us <= 20_000_000 < description.expiry_us < 35_000_000
        assert {name: list(ref.shape) for name, ref in description.payloads.items()} == {
            "photo": [5, 24, 24, 3],
            "scent": [5, 6],
        }
        assert await gateway.client.job(accepted.job_id) == JobInfo(
            accepted.job_id, "fruit", "under_way", size=5, items_received=5, items_done=0, error=""
        )
        part = selector_pb2.JobPart(job_id=description.job_id, group=group("scent", 1, 4))
        gateway.selector.say(part=part)
        first = await anext(events)
        assert isinstance(first, ItemResults)
        assert (first.modality_set, first.items, first.items_done) == ("scent", (1, 4), 2)
        np.testing.assert_array_equal(first.output[:, 1], [2, 5])
        assert first.labels == ("lemon", "lemon")
        assert (await gateway.client.job(accepted.job_id)).items_done == 2
        groups = [group("photo", 0), group("photo+scent", 2, 3)]
        result = selector_pb2.JobResult(job_id=description.job_id, groups=groups, expected_accuracy=0.8)
        gateway.selector.say(result=result)
        rest = [event async for event in events]
    assert [e.items_done for e in rest if isinstance(e, ItemResults)] == [3, 5]
    assert isinstance(rest[-1], JobSummary)
    assert rest[-1].strategy == {"scent": 2, "photo": 1, "photo+scent": 2}
    assert (rest[-1].expected_accuracy, rest[-1].deadline_met) == (0.8, True)
    info = await gateway.client.job(accepted.job_id)
    assert (info.state, info.items_received, info.items_done) == ("answered", 5, 5)
    gateway.selector.say(release=release_of(description))
    await gateway.idle()


def job_message(size: int = 4, **fields: Any) -> gateway_pb2.SubmitJobRequest:
    return gateway_pb2.SubmitJobRequest(job=gateway_pb2.JobSpec(model="fruit", size=size, **fields))


def items_message(items: int, *modalities: str) -> gateway_pb2.SubmitJobRequest:
    arrays: Payloads = {"photo": np.zeros((items, 24, 24, 3), np.uint8), "scent": np.zeros((items, 6), np.float32)}
    payloads = {name: to_proto(arrays[name]) for name in modalities or arrays}
    return gateway_pb2.SubmitJobRequest(items=gateway_pb2.ItemBatch(payloads=payloads))


INVALID = grpc.StatusCode.INVALID_ARGUMENT
BAD_STREAMS: dict[str, tuple[list[gateway_pb2.SubmitJobRequest], grpc.StatusCode, str]] = {
    "nothing": ([], INVALID, "the first message is missing; expected job"),
    "items first": ([items_message(1)], INVALID, "the first message is items; expected job"),
    "empty first": ([gateway_pb2.SubmitJobRequest()], INVALID, "the first message is empty; expected job"),
    "unknown model": (
        [gateway_pb2.SubmitJobRequest(job=gateway_pb2.JobSpec(model="pear", size=1))],
        grpc.StatusCode.NOT_FOUND,
        "model is 'pear'; expected one of fruit",
    ),
    "no items asked for": ([job_message(0)], INVALID, "size is 0; expected at least one item"),
    "too large": (
        [job_message(500)],
        INVALID,
        "size is 500: photo would have 864000 bytes; expected at most 262144 bytes",
    ),
    "another job": (
        [job_message(), items_message(1), job_message()],
        INVALID,
        "a message is job when 1 items have arrived; expected items",
    ),
    "empty message": (
        [job_message(), gateway_pb2.SubmitJobRequest()],
        INVALID,
        "a message is empty when 0 items have arrived; expected items",
    ),
    "too few": (
        [job_message(), items_message(3)],
        INVALID,
        "items: 3 have arrived when the stream ended; expected all of the job",
    ),
    "too many": (
        [job_message(), items_message(3), items_message(2)],
        INVALID,
        "items: 5 have arrived; expected 4, the size of the job",
    ),
    "other modalities": (
        [job_message(), items_message(1), items_message(1, "scent")],
        INVALID,
        "items.payloads has scent; expected photo, scent in each batch",
    ),
    "modalities that were not announced": (
        [job_message(modalities=["scent"]), items_message(1)],
        INVALID,
        "items.payloads has photo, scent; expected scent in each batch",
    ),
    "items after all items": (
        [job_message(), items_message(4), items_message(1)],
        INVALID,
        "a message is items after all items; expected no more messages",
    ),
}


@pytest.mark.parametrize(("messages", "status", "message"), BAD_STREAMS.values(), ids=BAD_STREAMS.keys())
async def test_a_bad_stream_is_refused_with_one_line_and_leaves_nothing_behind(
    gateway: Gateway, messages: list[gateway_pb2.SubmitJobRequest], status: grpc.StatusCode, message: str
) -> None:
    releasing = asyncio.create_task(release_whatever_comes(gateway))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async for _ in gateway.stub.SubmitJob(iter(messages), timeout=30):
            pass
    assert refused.value.code() is status
    details = refused.value.details() or ""
    assert details.startswith(message), details
    assert "\n" not in details
    await gateway.idle()
    releasing.cancel()


async def release_whatever_comes(gateway: Gateway) -> None:
    """As the selector does when a job is refused or cancelled."""
    while True:
        message = await gateway.selector.received.get()
        if message.HasField("job"):
            gateway.selector.say(release=release_of(message.job))


async def test_bytes_that_are_no_message(gateway: Gateway) -> None:
    method: RawStream = gateway.channel.stream_stream("/mosel.v1.Gateway/SubmitJob")
    call = method(iter([b"\xff\xff not a message"]), timeout=30)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()
    assert refused.value.code() is INVALID
    assert refused.value.details() == "the stream has bytes that are no message that SubmitJob knows"


async def slowly(payloads: Payloads, first: int) -> AsyncIterator[Payloads]:
    """Sends some items, and the others never."""
    yield {name: array[:first] for name, array in payloads.items()}
    await asyncio.Event().wait()


async def test_the_deadline_counts_while_items_arrive(gateway: Gateway, draw: Draw) -> None:
    events = gateway.client.submit_job("fruit", slowly(draw(3), 2), size=5, latency_slo_ms=1000)
    accepted = await anext(events)
    assert isinstance(accepted, JobAccepted)
    with pytest.raises(DeadlineExceeded, match=r"^the deadline passed when 2 of 5 items had arrived$"):
        await anext(events)
    info = await gateway.client.job(accepted.job_id)
    assert (info.state, info.items_received) == ("failed", 2)
    assert info.error == "the deadline passed when 2 of 5 items had arrived"
    await gateway.idle()


async def test_a_job_is_cancelled_from_elsewhere_while_its_items_arrive(gateway: Gateway, draw: Draw) -> None:
    events = gateway.client.submit_job("fruit", slowly(draw(3), 2), size=5)
    accepted = await anext(events)
    assert isinstance(accepted, JobAccepted)
    assert (await gateway.reached(accepted.job_id, "receiving")).size == 5
    async with AsyncClient(gateway.address) as other:
        assert (await other.cancel(accepted.job_id)).state == "cancelled"
    with pytest.raises(JobCancelled, match=f"^job {accepted.job_id} was cancelled$"):
        await anext(events)
    await gateway.idle()
    assert gateway.selector.received.empty()


async def test_a_job_is_cancelled_from_elsewhere_while_it_is_under_way(gateway: Gateway, draw: Draw) -> None:
    events = gateway.client.submit_job("fruit", draw(5))
    accepted = await anext(events)
    assert isinstance(accepted, JobAccepted)
    description = await gateway.job_at_selector()
    assert (await gateway.client.cancel(accepted.job_id)).state == "cancelled"
    with pytest.raises(JobCancelled):
        await anext(events)
    assert await gateway.cancelled_at_selector() == description.job_id
    gateway.selector.say(release=release_of(description))
    await gateway.idle()
    assert (await gateway.client.cancel(accepted.job_id)).state == "cancelled"


async def test_ending_the_call_cancels_the_job(gateway: Gateway, draw: Draw) -> None:
    async with aclosing(gateway.client.submit_job("fruit", draw(5))) as events:
        accepted = await anext(events)
        description = await gateway.job_at_selector()
    assert isinstance(accepted, JobAccepted)
    assert await gateway.cancelled_at_selector() == description.job_id
    assert (await gateway.reached(accepted.job_id, "cancelled")).error == ""
    gateway.selector.say(release=release_of(description))
    await gateway.idle()


async def test_a_job_that_waits_for_its_prediction_is_cancelled_from_elsewhere(gateway: Gateway, draw: Draw) -> None:
    call = asyncio.create_task(gateway.client.predict("fruit", draw(2)))
    description = await gateway.job_at_selector()
    job_id = description.job_id.hex()
    assert not description.stream
    info = await gateway.client.job(job_id)
    assert (info.state, info.size, info.items_received) == ("under_way", 2, 2)
    async with AsyncClient(gateway.address) as other:
        assert (await other.cancel(job_id)).state == "cancelled"
    with pytest.raises(JobCancelled, match=f"^job {job_id} was cancelled$"):
        await call
    assert await gateway.cancelled_at_selector() == description.job_id
    gateway.selector.say(release=release_of(description))
    await gateway.idle()


async def test_a_prediction_may_come_in_parts_and_late(gateway: Gateway, draw: Draw) -> None:
    call = asyncio.create_task(gateway.client.predict("fruit", draw(3), latency_slo_ms=1, late_ok=True))
    description = await gateway.job_at_selector()
    assert description.budget_us <= 1_000 < 5_000_000 < description.expiry_us
    await asyncio.sleep(0.01)
    gateway.selector.say(part=selector_pb2.JobPart(job_id=description.job_id, group=group("scent", 1)))
    result = selector_pb2.JobResult(job_id=description.job_id, groups=[group("photo", 0, 2)])
    gateway.selector.say(result=result)
    prediction = await call
    assert prediction.modality_sets == ("photo", "scent", "photo")
    np.testing.assert_array_equal(prediction.output[:, 1], [1, 2, 3])
    assert prediction.deadline_slack_ms < 0
    assert not prediction.deadline_met
    assert (await gateway.client.job(prediction.job_id)).items_done == 3


async def test_what_the_selector_refuses_with_ends_the_job(gateway: Gateway, draw: Draw) -> None:
    events = gateway.client.submit_job("fruit", draw(5))
    accepted = await anext(events)
    assert isinstance(accepted, JobAccepted)
    description = await gateway.job_at_selector()
    number = int(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    failure = selector_pb2.JobFailure(
        job_id=description.job_id, status_code=number, message="the queue is full", retry_after_ms=70
    )
    gateway.selector.say(failure=failure, release=release_of(description))
    gateway.selector.say(failure=failure)
    with pytest.raises(Overloaded, match=r"^the queue is full$") as refused:
        await anext(events)
    assert refused.value.retry_after_ms == 70
    info = await gateway.client.job(accepted.job_id)
    assert (info.state, info.error) == ("failed", "the queue is full")


async def test_so_many_jobs_and_no_more(gateway: Gateway, draw: Draw) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(3):
            events = gateway.client.submit_job("fruit", slowly(draw(1), 1), size=2)
            await stack.enter_async_context(aclosing(events))
            await anext(events)
        for refused in (gateway.client.predict("fruit", draw(1)), anext(gateway.client.submit_job("fruit", draw(1)))):
            with pytest.raises(Overloaded, match=r"^3 jobs are in flight"):
                await refused
    await gateway.idle()


async def test_items_that_are_announced_count_against_the_arena(gateway: Gateway, draw: Draw) -> None:
    # Each of these jobs would take 249 KiB of the 1 MiB that may arrive; three jobs may be there at once.
    large = 146
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            events = gateway.client.submit_job("fruit", slowly(draw(1), 1), size=large)
            await stack.enter_async_context(aclosing(events))
            await anext(events)
        reply = await gateway.stub.Status(service_pb2.StatusRequest())
        assert reply.services[0].counters["arriving_bytes"] == 2 * large * (24 * 24 * 3 + 6 * 4)
    await gateway.idle()


async def test_payloads_that_must_travel_inside_a_message_are_bounded_by_it(gateway: Gateway, draw: Draw) -> None:
    await gateway.told(tensor_pb2.INLINE)
    payloads = {name: to_proto(array) for name, array in draw(600).items()}
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.stub.Predict(gateway_pb2.PredictRequest(model="fruit", payloads=payloads), timeout=30)
    assert refused.value.code() is INVALID
    assert (refused.value.details() or "").startswith(
        "payloads that must travel inside a message have 1051200 bytes; expected at most 983040 bytes"
    )
    await gateway.idle()


async def test_a_plan_runs_nothing(gateway: Gateway) -> None:
    plan = await gateway.client.plan("fruit", 7, min_accuracy=0.5, latency_slo_ms=40, modalities=["scent"])
    assert (plan.frontier, plan.chosen, plan.refusal) == ((), None, "as scripted for 7 items")
    (description,) = gateway.selector.planned
    assert description.model == f"fruit@{gateway.selector.fruit.revision}"
    assert (description.size, list(description.modalities)) == (7, ["scent"])
    assert (len(description.payloads), len(description.job_id), description.min_accuracy) == (0, 16, 0.5)
    assert 0 < description.budget_us <= 40_000
    with pytest.raises(InvalidRequest, match="size is 0; expected at least one item"):
        await gateway.client.plan("fruit", 0)
    with pytest.raises(InvalidRequest, match=r"min_accuracy is 2\.0"):
        await gateway.client.plan("fruit", 1, min_accuracy=2.0)
    assert await gateway.held() == 0


async def test_jobs_that_nobody_knows(gateway: Gateway) -> None:
    for ask in (gateway.client.job, gateway.client.cancel):
        with pytest.raises(JobNotFound, match=f"^job_id is '{'0' * 32}'; expected a job under way"):
            await ask("0" * 32)
        with pytest.raises(InvalidRequest, match=r"^job_id is 'digits'; expected 32 hexadecimal digits$"):
            await ask("digits")


@pytest.mark.parametrize(
    ("broken", "kind", "message"),
    [
        (lambda p: {"scent": np.array(["a"])}, InvalidRequest, "payloads.scent: dtype <U1 cannot be sent"),
        (lambda p: {"scent": np.zeros((2, 10**6))}, PayloadTooLarge, "the payloads have 15.3 MiB"),
        (lambda p: 1 / 0, ZeroDivisionError, "division by zero"),
    ],
)
async def test_the_caller_s_own_mistake_in_a_batch_is_what_it_gets(
    gateway: Gateway, draw: Draw, broken: Callable[[Payloads], Any], kind: type[Exception], message: str
) -> None:
    def mistaken() -> Iterator[Mapping[str, Any]]:
        yield draw(2)
        yield broken(draw(2))

    async with AsyncClient(gateway.address, max_message_mib=1) as client:
        events = client.submit_job("fruit", mistaken(), size=4)
        assert isinstance(await anext(events), JobAccepted)
        with pytest.raises(kind, match=f"^{message}"):
            await anext(events)
    await gateway.idle()
