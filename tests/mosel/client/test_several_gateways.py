"""Clients of several gateways behind one name: calls are spread, and old connections make way for new gateways."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import grpc
import pytest

from mosel.client import AsyncClient
from mosel.config import FREE_PORTS, Settings, load_settings
from mosel.runtime.service import Context, Service
from mosel.v1 import gateway_pb2_grpc, service_pb2


class Counting:
    """As much of a gateway as clients need to ask for its status."""

    def __init__(self, calls: Counter[int], number: int) -> None:
        self._calls, self._number = calls, number
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def status(self, request: service_pb2.StatusRequest, context: Context) -> service_pb2.StatusReply:
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


async def served(stack: AsyncExitStack, servicer: Counting, settings: Settings, public: bool = True) -> str:
    def register(server: grpc.aio.Server) -> None:
        handler = grpc.unary_unary_rpc_method_handler(
            servicer.status, service_pb2.StatusRequest.FromString, service_pb2.StatusReply.SerializeToString
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("mosel.v1.Gateway", {"Status": handler}),)
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
