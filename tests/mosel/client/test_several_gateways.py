"""Clients of several gateways behind one name: calls are spread, and old connections make way for new gateways."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest

from gateway.jobs.job import Job
from gateway.jobs.registry import JobRegistry
from mosel.client import AsyncClient, Client, Retry
from mosel.config import FREE_PORTS, Settings, load_settings
from mosel.deadline import Deadline
from mosel.errors import JobCancelled, JobNotFound
from mosel.runtime.service import Context, Service, answers_with_status
from mosel.v1 import gateway_pb2, gateway_pb2_grpc, service_pb2


class Counting:
    """As much of a gateway as clients need to ask for its status."""

    def __init__(self, calls: Counter[int], number: int) -> None:
        self._calls, self._number = calls, number
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    def handlers(self) -> "dict[str, grpc.RpcMethodHandler[Any, Any]]":
        handler = grpc.unary_unary_rpc_method_handler(
            self._status, service_pb2.StatusRequest.FromString, service_pb2.StatusReply.SerializeToString
        )
        return {"Status": handler}

    async def _status(self, request: service_pb2.StatusRequest, context: Context) -> service_pb2.StatusReply:
        self._calls[self._number] += 1
        await self.may_answer.wait()
        return service_pb2.StatusReply()


@pytest.fixture
def settings() -> Settings:
    return load_settings(gateway=FREE_PORTS)


@pytest.fixture
def impatient() -> Settings:
    return load_settings(gateway=FREE_PORTS | {"max_connection_age_s": 0.2})


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


class HavingJobs:
    """As much of a gateway as clients need to ask for its jobs."""

    def __init__(self) -> None:
        self.jobs, self.asked = JobRegistry(max_open=9), 0

    def handlers(self) -> "dict[str, grpc.RpcMethodHandler[Any, Any]]":
        reply = gateway_pb2.JobStatus.SerializeToString
        return {
            "GetJob": grpc.unary_unary_rpc_method_handler(self._get, gateway_pb2.GetJobRequest.FromString, reply),
            "CancelJob": grpc.unary_unary_rpc_method_handler(
                self._cancel, gateway_pb2.CancelJobRequest.FromString, reply
            ),
        }

    @answers_with_status
    async def _get(self, request: gateway_pb2.GetJobRequest, context: Context) -> gateway_pb2.JobStatus:
        self.asked += 1
        return self.jobs.status(request.job_id)

    @answers_with_status
    async def _cancel(self, request: gateway_pb2.CancelJobRequest, context: Context) -> gateway_pb2.JobStatus:
        return self.jobs.cancel(request.job_id)


async def served(
    stack: AsyncExitStack, servicer: Counting | HavingJobs, settings: Settings, public: bool = True
) -> str:
    def register(server: grpc.aio.Server) -> None:
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("mosel.v1.Gateway", servicer.handlers()),)
        )

    service = Service(settings, "127.0.0.1:0", "--grpc-port", register, public=public)
    return (await stack.enter_async_context(service)).address


async def test_calls_are_spread_over_all_of_them(stack: AsyncExitStack, settings: Settings) -> None:
    calls: Counter[int] = Counter()
    addresses = [await served(stack, Counting(calls, number), settings) for number in range(3)]
    client = await stack.enter_async_context(AsyncClient(f"ipv4:{','.join(addresses)}"))
    while len(calls) < 3:
        await client.status()
    calls.clear()
    for _ in range(30):
        await client.status()
    assert calls == {0: 10, 1: 10, 2: 10}


async def run(jobs: JobRegistry, begun: "asyncio.Queue[Job]") -> None:
    """Serves a job until somebody ends it."""
    job = Job(jobs.new_id())
    jobs.admit(job, Deadline.after(60))
    begun.put_nowait(job)
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError as error:
        jobs.leave(job, error)


@pytest.mark.parametrize("retries", [Retry(), None])
async def test_a_job_is_found_and_cancelled_whichever_gateway_has_it(
    stack: AsyncExitStack, settings: Settings, retries: Retry | None
) -> None:
    gateways = [HavingJobs() for _ in range(3)]
    addresses = [await served(stack, gateway, settings) for gateway in gateways]
    client = await stack.enter_async_context(AsyncClient(f"ipv4:{','.join(addresses)}", retries=retries))
    begun: asyncio.Queue[Job] = asyncio.Queue()
    tasks = [asyncio.create_task(run(gateway.jobs, begun)) for gateway in gateways]
    ids = [(await begun.get()).id.hex() for _ in gateways]
    for job_id in ids * 3:
        assert (await client.job(job_id)).state == "receiving"
    for job_id in ids:
        assert (await client.cancel(job_id)).state == "cancelled"
    async with asyncio.timeout(30):
        assert [type(ended) for ended in await asyncio.gather(*tasks, return_exceptions=True)] == [JobCancelled] * 3


async def test_a_client_without_asyncio_asks_all_of_them_too(stack: AsyncExitStack, settings: Settings) -> None:
    gateways = [HavingJobs() for _ in range(2)]
    address = f"ipv4:{','.join([await served(stack, gateway, settings) for gateway in gateways])}"

    def ask() -> None:
        with Client(address) as client, pytest.raises(JobNotFound, match="expected a job under way"):
            client.job("0" * 32)

    await asyncio.to_thread(ask)
    assert all(gateway.asked for gateway in gateways)


async def test_a_job_that_its_own_gateway_forgot_is_asked_for_no_further(
    stack: AsyncExitStack, settings: Settings
) -> None:
    gateway = HavingJobs()
    client = await stack.enter_async_context(AsyncClient(await served(stack, gateway, settings)))
    with pytest.raises(JobNotFound, match=r"expected a job under way or one of the last 1024$"):
        await client.job(gateway.jobs.new_id().hex())
    assert gateway.asked == 1


async def test_a_job_that_nobody_has_is_asked_for_no_longer_than_the_caller_waits(
    stack: AsyncExitStack, settings: Settings
) -> None:
    gateway = HavingJobs()
    client = await stack.enter_async_context(AsyncClient(await served(stack, gateway, settings)))
    with pytest.raises(JobNotFound, match=f"of gateway {gateway.jobs.gateway.hex()}; that one is of gateway 00000000$"):
        await client.job("0" * 32)
    assert 1 < gateway.asked < 9


async def test_a_gateway_that_goes_is_left_out(stack: AsyncExitStack, settings: Settings) -> None:
    calls: Counter[int] = Counter()
    stays = await served(stack, Counting(calls, 0), settings)
    async with AsyncExitStack() as shorter:
        goes = await served(shorter, Counting(calls, 1), settings)
        client = await stack.enter_async_context(AsyncClient(f"ipv4:{stays},{goes}"))
        while len(calls) < 2:
            await client.status()
    calls.clear()
    for _ in range(10):
        await client.status()
    assert calls == {0: 10}


async def test_an_old_connection_ends_when_its_last_call_has(stack: AsyncExitStack, impatient: Settings) -> None:
    servicer = Counting(Counter(), 0)
    address = await served(stack, servicer, impatient)
    servicer.may_answer.clear()
    async with grpc.aio.insecure_channel(address) as channel:
        under_way = gateway_pb2_grpc.GatewayStub(channel).Status(service_pb2.StatusRequest())
        await channel.channel_ready()
        # Well beyond the age of the connection, which varies by a tenth.
        await asyncio.sleep(0.6)
        assert not under_way.done()
        servicer.may_answer.set()
        assert isinstance(await under_way, service_pb2.StatusReply)
        async with asyncio.timeout(60):
            await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)


async def test_connections_between_services_stay(stack: AsyncExitStack, impatient: Settings) -> None:
    address = await served(stack, Counting(Counter(), 0), impatient, public=False)
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.channel_ready()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
