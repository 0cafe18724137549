"""The one life of a job: its place comes first, and nothing that it waits for outlives its deadline."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from numpy.typing import NDArray

from gateway import servicer
from gateway.jobs.checks import CheckedJob, Payloads, check_request
from gateway.jobs.store import OFF_LOOP_ELEMENTS
from mosel.config import FREE_PORTS, Settings
from mosel.deadline import Deadline
from mosel.errors import InvalidRequest, JobCancelled, Overloaded, ServiceUnavailable
from mosel.tensors import to_proto
from mosel.transport.host import clock_id, monotonic_ns
from mosel.v1 import gateway_pb2, service_pb2, tensor_pb2
from tests.gateway.conftest import Opened
from tests.gateway.inference.support import infer_request, stub_of
from tests.gateway.scripted import Gateway

Draw = Callable[..., dict[str, NDArray[Any]]]
# More than a process of this machine has threads to spare.
MANY = 40


@pytest.fixture
def settings(settings_with: Callable[..., Settings], tmp_path: Path) -> Settings:
    """Who finds the arena full waits for longer than any test."""
    transport = {
        "gateway_arena_mib": 1,
        "inline_max_kib": 0,
        "inline_when_full_max_kib": 0,
        "max_message_mib": 1,
        "full_wait_ms": 300_000,
    }
    gateway = FREE_PORTS | {"max_jobs_in_flight": MANY}
    return settings_with(selector={"address": f"unix:{tmp_path}/s.sock"}, transport=transport, gateway=gateway)


@pytest.fixture
def full(gateway: Gateway, opened: Opened) -> Iterator[Callable[[], None]]:
    """Takes every slot; the function frees them."""
    taken: list[tensor_pb2.ArenaSlot] = []
    while opened.publisher.has_room(1):
        taken.append(opened.publisher.publish("UINT8", (1,), memoryview(b"x"), lease_s=600).slot)
    release = gateway.data_plane.jobs.store.release
    yield lambda: release(taken)
    release(taken)


@pytest.fixture
def held_checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Checks run in threads, and wait there for this event."""
    event = threading.Event()

    def check(*arguments: Any) -> Any:
        event.wait(60)
        return check_request(*arguments)

    monkeypatch.setattr("gateway.jobs.life.OFF_LOOP_ELEMENTS", 0)
    monkeypatch.setattr(servicer, "check_request", check)
    yield event
    event.set()


async def until(statistic: str, count: int, gateway: Gateway) -> None:
    async with asyncio.timeout(30):
        while await counted(statistic, gateway) != count:
            pass


async def counted(statistic: str, gateway: Gateway) -> int:
    """As the gateway says when it is asked."""
    return (await gateway.stub.Status(service_pb2.StatusRequest())).services[0].counters[statistic]


async def test_a_place_is_taken_before_a_thread_is_waited_for(
    gateway: Gateway, draw: Draw, held_checks: threading.Event
) -> None:
    payloads = draw(1)
    calls = {asyncio.create_task(gateway.client.predict("fruit", payloads)) for _ in range(MANY + 3)}
    refused: set[asyncio.Task[Any]] = set()
    async with asyncio.timeout(30):
        while len(refused) < 3:
            refused |= (await asyncio.wait(calls - refused, return_when=asyncio.FIRST_COMPLETED))[0]
    for call in refused:
        with pytest.raises(Overloaded, match=f"^{MANY} jobs are in flight"):
            await call
    assert gateway.data_plane.statistics()["jobs_in_flight"] == MANY
    for call in calls - refused:
        call.cancel()
    held_checks.set()
    await until("jobs_in_flight", 0, gateway)


async def test_a_job_is_found_and_cancelled_while_it_is_checked(gateway: Gateway) -> None:
    checking, over = asyncio.Event(), threading.Event()

    def check() -> tuple[CheckedJob, Payloads]:
        over.wait(60)
        raise InvalidRequest("nobody waits for it")

    async def serve() -> None:
        with gateway.data_plane.jobs.begin("fruit") as life:
            life.admit(Deadline.after(60))
            ids.append(life.job.id.hex())
            checking.set()
            await life.check(check, OFF_LOOP_ELEMENTS + 1)

    ids: list[str] = []
    serving = asyncio.create_task(serve())
    await checking.wait()
    assert (await gateway.client.job(ids[0])).state == "receiving"
    assert (await gateway.client.cancel(ids[0])).state == "cancelled"
    with pytest.raises(JobCancelled):
        await serving
    over.set()


async def test_what_is_being_checked_ends_with_the_gateway(
    gateway: Gateway, draw: Draw, held_checks: threading.Event
) -> None:
    call = asyncio.create_task(gateway.client.predict("fruit", draw(1)))
    await until("jobs_in_flight", 1, gateway)
    gateway.data_plane.registry.close()
    gateway.data_plane.registry.end_all()
    with pytest.raises(ServiceUnavailable, match="stopping"):
        await call


@contextmanager
def expiring(step: str) -> Iterator[None]:
    with pytest.raises(grpc.aio.AioRpcError) as expired:
        yield
    assert expired.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert expired.value.details() == f"the deadline passed before {step}"


async def test_a_deadline_counts_while_the_request_is_checked(
    gateway: Gateway, draw: Draw, held_checks: threading.Event
) -> None:
    call = asyncio.create_task(predict(gateway, draw(1)))
    await until("jobs_in_flight", 1, gateway)
    # The check is what takes longer than the deadline.
    await asyncio.sleep(0.15)
    held_checks.set()
    with expiring("the request was checked"):
        await call
    assert gateway.selector.received.empty()


async def predict(gateway: Gateway, payloads: Payloads) -> None:
    await gateway.stub.Predict(
        gateway_pb2.PredictRequest(model="fruit", payloads=tensors(payloads), latency_slo_ms=100)
    )


async def submit(gateway: Gateway, payloads: Payloads) -> None:
    spec = gateway_pb2.JobSpec(model="fruit", size=1, latency_slo_ms=100)
    batch = gateway_pb2.ItemBatch(payloads=tensors(payloads))
    messages = [gateway_pb2.SubmitJobRequest(job=spec), gateway_pb2.SubmitJobRequest(items=batch)]
    async for _ in gateway.stub.SubmitJob(iter(messages)):
        pass


async def infer(gateway: Gateway, payloads: Payloads) -> None:
    await stub_of(gateway.channel).ModelInfer(infer_request(payloads, latency_slo_ms=100))


def tensors(payloads: Payloads) -> dict[str, tensor_pb2.Tensor]:
    return {name: to_proto(array) for name, array in payloads.items()}


@pytest.mark.parametrize("call", [predict, submit, infer])
async def test_a_full_arena_is_not_waited_for_beyond_the_deadline(
    gateway: Gateway, draw: Draw, full: Callable[[], None], call: Callable[[Gateway, Payloads], Awaitable[None]]
) -> None:
    # Long before the wait for a slot is over.
    async with asyncio.timeout(60):
        with expiring("the payloads were stored"):
            await call(gateway, draw(1))
    assert gateway.data_plane.statistics()["jobs_waiting_for_slots"] == 0
    assert gateway.selector.received.empty()


async def test_a_job_that_had_to_wait_goes_on_with_the_deadline_that_it_came_with(
    gateway: Gateway, draw: Draw, full: Callable[[], None]
) -> None:
    slo_ns, began = 20_000_000_000, monotonic_ns()
    call = asyncio.create_task(gateway.client.predict("fruit", draw(1), latency_slo_ms=slo_ns / 1e6))
    await until("jobs_waiting_for_slots", 1, gateway)
    waited = monotonic_ns()
    full()
    description = await gateway.job_at_selector()
    assert description.clock == clock_id()
    assert began + slo_ns <= description.deadline_ns <= waited + slo_ns
    assert 0 < description.budget_us * 1000 <= description.deadline_ns - waited
    gateway.answer(description)
    await call
    await gateway.idle()


async def test_those_who_wait_for_slots_hold_no_threads(gateway: Gateway, draw: Draw, full: Callable[[], None]) -> None:
    payloads = draw(1)
    calls = [asyncio.create_task(gateway.client.predict("fruit", payloads)) for _ in range(MANY)]
    await until("jobs_waiting_for_slots", MANY, gateway)
    async with asyncio.timeout(30):
        assert await asyncio.to_thread(threading.get_ident) != threading.get_ident()
    for call in calls:
        call.cancel()
    await until("jobs_waiting_for_slots", 0, gateway)


async def test_a_job_that_got_only_some_of_its_slots_leaves_none_behind(
    gateway: Gateway, draw: Draw, full: Callable[[], None], opened: Opened
) -> None:
    # One is free: for the photo, and so none for the scent.
    opened.arena.release(0, 1)
    held = gateway.data_plane.statistics()["slots_published"]
    call = asyncio.create_task(gateway.client.predict("fruit", draw(1)))
    await until("slots_published", held + 1, gateway)
    call.cancel()
    await until("slots_published", held, gateway)
    assert opened.publisher.has_room(1)
    await until("jobs_waiting_for_slots", 0, gateway)


async def test_a_refused_job_is_not_remembered(gateway: Gateway) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await gateway.stub.Predict(gateway_pb2.PredictRequest(model="fruit"))
    assert gateway.data_plane.statistics()["jobs_remembered"] == 0
