"""`grpc.health.v1` over a real server."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mosel.runtime.health import Context, Health

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@dataclass
class Watcher:
    """A call of Watch."""

    call: "grpc.aio.UnaryStreamCall[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]"

    async def next(self) -> int:
        reply = await self.call.read()
        assert isinstance(reply, health_pb2.HealthCheckResponse)
        return reply.status


@dataclass
class Served:
    health: Health
    stub: health_pb2_grpc.HealthStub
    server: grpc.aio.Server

    def watch(self, name: str) -> Watcher:
        return Watcher(self.stub.Watch(health_pb2.HealthCheckRequest(service=name)))  # type: ignore[attr-defined]

    async def check(self, name: str) -> int:
        request = health_pb2.HealthCheckRequest(service=name)
        return int((await self.stub.Check(request)).status)  # type: ignore[attr-defined]


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    health, server = Health(), grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Served(health, health_pb2_grpc.HealthStub(channel), server)
    await server.stop(None)


async def test_check(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await served.check("digits")
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    served.health.set("digits", False)
    assert await served.check("digits") == NOT_SERVING
    served.health.set("digits", True)
    assert await served.check("digits") == SERVING


async def test_watch_tells_changes_and_nothing_else(served: Served) -> None:
    watcher = served.watch("digits")
    assert await watcher.next() == UNKNOWN
    served.health.set("digits", False)
    assert await watcher.next() == NOT_SERVING
    served.health.set("other", True)
    served.health.set("digits", False)
    served.health.set("digits", True)
    assert await watcher.next() == SERVING


async def test_a_watcher_that_leaves_takes_nothing_from_the_others(served: Served) -> None:
    served.health.set("digits", True)
    watchers = [served.watch("digits") for _ in range(3)]
    assert [await watcher.next() for watcher in watchers] == [SERVING] * 3
    watchers[1].call.cancel()
    # The server has noticed once another call of the same client is answered.
    assert await served.check("digits") == SERVING
    served.health.set("digits", False)
    assert [await watchers[i].next() for i in (0, 2)] == [NOT_SERVING] * 2


async def test_whoever_relies_on_a_name_is_waited_for(served: Served) -> None:
    served.health.set("digits", True)
    watcher, other = served.watch("digits"), served.watch("other")
    assert [await watcher.next(), await other.next()] == [SERVING, UNKNOWN]
    waiting = asyncio.create_task(served.health.unwatched(["digits"]))
    served.health.set("digits", False)
    assert await watcher.next() == NOT_SERVING
    assert not waiting.done()
    watcher.call.cancel()
    await asyncio.wait_for(waiting, 20)


async def test_the_end_is_told_and_not_held_up_by_watchers(served: Served) -> None:
    served.health.set("", True)
    served.health.set("digits", False)
    watchers = [served.watch(""), served.watch("digits")]
    assert [await watcher.next() for watcher in watchers] == [SERVING, NOT_SERVING]
    served.health.stop()
    assert await watchers[0].next() == NOT_SERVING
    assert await watchers[0].call.read() is grpc.aio.EOF
    assert await watchers[1].call.read() is grpc.aio.EOF
    served.health.set("digits", True)
    assert await served.check("digits") == NOT_SERVING


async def test_an_end_that_comes_while_a_change_is_being_sent_is_told() -> None:
    health, told = Health(), list[int]()

    class EndsMeanwhile:
        """A call whose first message is on its way when the service stops."""

        async def write(self, message: health_pb2.HealthCheckResponse) -> None:
            told.append(message.status)
            health.stop()

    health.set("digits", True)
    await health.Watch(health_pb2.HealthCheckRequest(service="digits"), cast(Context, EndsMeanwhile()))
    assert told == [SERVING, NOT_SERVING]
