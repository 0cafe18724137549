"""Limits of messages, interceptors, and servers that come and go, inside a process as over a socket."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value

from mosel.errors import PayloadTooLarge, ServiceUnavailable
from mosel.runtime.service import Context, RefuseUnread
from mosel.status import error_from_rpc
from tests.mosel.runtime.channels.ends import LATE_S, SOON_S, Ends, data, failure_of, hang, number, open_ends, soon


@pytest.mark.parametrize("option", ["grpc.max_send_message_length", "grpc.max_receive_message_length"])
async def test_messages_have_limits(kind: str, option: str) -> None:
    async with open_ends(kind, [(option, 1000)]) as ends, ends.served([(option, 1000)]):

        @ends.unary_unary
        async def method(request: Int64Value, context: Context) -> BytesValue:
            return data(bytes(request.value))

        @ends.unary_stream
        async def streams(request: Int64Value, context: Context) -> None:
            await context.write(data(b"1"))
            await context.write(data(bytes(request.value)))

        assert len((await method(number(997))).value) == 997
        failed = await failure_of(method(number(998)))
        assert failed.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert isinstance(error_from_rpc(failed, "encoder"), PayloadTooLarge)
        call = streams(number(998))
        assert (await call.read()).value == b"1"
        failed = await failure_of(call.read())
        assert isinstance(error_from_rpc(failed, "encoder"), PayloadTooLarge)


async def test_requests_have_limits(kind: str) -> None:
    async with open_ends(kind) as ends, ends.served([("grpc.max_receive_message_length", 4)]):

        @ends.unary_unary
        async def method(request: Int64Value, context: Context) -> BytesValue:
            return data(b"")

        @ends.stream_unary
        async def streams(requests: AsyncIterator[Int64Value], context: Context) -> BytesValue:
            return data(b"%d" % len([request async for request in requests]))

        await method(number(1))
        failed = await failure_of(method(number(1 << 40)))
        assert isinstance(error_from_rpc(failed, "encoder"), PayloadTooLarge)
        assert (await streams([number(1), number(2)])).value == b"2"
        failed = await failure_of(streams([number(1), number(1 << 40)]))
        assert isinstance(error_from_rpc(failed, "encoder"), PayloadTooLarge)


async def test_where_no_option_says_so_4_mib_are_received(ends: Ends) -> None:
    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        return data(bytes(request.value))

    assert len((await method(number(4 * 1024 * 1024 - 5))).value) == 4 * 1024 * 1024 - 5
    failed = await failure_of(method(number(4 * 1024 * 1024)))
    assert isinstance(error_from_rpc(failed, "encoder"), PayloadTooLarge)


class Sees(grpc.aio.ServerInterceptor):
    """Notes what it sees, and lets one caller through."""

    def __init__(self) -> None:
        self.seen = list[tuple[str, str]]()

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        who = dict(handler_call_details.invocation_metadata)["who"]
        self.seen.append((handler_call_details.method, who))
        if who == "me":
            return await continuation(handler_call_details)

        async def refuse(request: object, context: Context) -> None:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"not {who}")

        return grpc.unary_unary_rpc_method_handler(refuse)


async def test_interceptors_see_each_call_first(unserved: Ends) -> None:
    outer, inner = Sees(), Sees()

    @unserved.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        return data(b"reply")

    async with unserved.served(interceptors=(outer, inner)):
        assert (await method(number(1), metadata=(("who", "me"),))).value == b"reply"
        assert (await failure_of(method(number(1), metadata=(("who", "you"),)))).details() == "not you"
    assert [who for _, who in outer.seen] == ["me", "you"]
    assert inner.seen == outer.seen[:1]


async def test_an_interceptor_may_ask_for_bytes(unserved: Ends) -> None:
    @unserved.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        return data(b"%d" % request.value)

    async with unserved.served(interceptors=(RefuseUnread(),)):
        assert (await method(number(70))).value == b"70"
        sends = unserved.channel.unary_unary(method_name := "/test.Ends/0", response_deserializer=BytesValue.FromString)
        assert method_name.startswith("/test")
        assert (await sends(number(71).SerializeToString())).value == b"71"
        assert (await failure_of(sends(b"\xff"))).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_bytes_that_are_no_message(ends: Ends) -> None:
    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        return data(b"")

    sends = ends.channel.unary_unary("/test.Ends/0")
    assert await sends(number(1).SerializeToString()) == b""
    assert (await failure_of(sends(b"\xff"))).code() is grpc.StatusCode.UNKNOWN


async def test_where_nobody_serves(unserved: Ends) -> None:
    failed = await failure_of(unserved.method("unary_unary", "/test.Ends/0")(number(1), timeout=LATE_S))
    assert failed.code() is grpc.StatusCode.UNAVAILABLE
    assert str(error_from_rpc(failed, "encoder")) == "service encoder is not reachable"
    failed = await failure_of(unserved.method("unary_stream", "/test.Ends/0")(number(1)).read())
    assert failed.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_call_may_wait_for_its_server(unserved: Ends) -> None:
    @unserved.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        return data(b"reply")

    failed = await failure_of(method(number(1), wait_for_ready=True, timeout=SOON_S))
    assert failed.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    given_up = method(number(1), wait_for_ready=True)
    call = method(number(1), wait_for_ready=True, timeout=LATE_S)
    given_up.cancel()
    assert not call.done()
    async with unserved.served():
        assert (await call).value == b"reply"


async def test_a_server_that_stops_lets_calls_finish(unserved: Ends) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    @unserved.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        begun.set()
        await go.wait()
        return data(b"reply")

    async with unserved.served() as server:
        call = method(number(1))
        await soon(begun)
        stopping = asyncio.create_task(server.stop(LATE_S))
        # Those that come before it stops end at their deadline.
        while (await failure_of(method(number(1), timeout=0.02))).code() is not grpc.StatusCode.UNAVAILABLE:
            pass
        assert not stopping.done()
        go.set()
        assert (await call).value == b"reply"
        await stopping


@pytest.mark.parametrize("grace", [None, SOON_S])
async def test_a_server_that_stops_breaks_off_what_is_not_over(unserved: Ends, grace: float | None) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    @unserved.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        await hang(begun, cancelled)
        return data(b"")

    @unserved.unary_stream
    async def streams(request: Int64Value, context: Context) -> None:
        await context.write(data(b"1"))
        await asyncio.Event().wait()

    async with unserved.served() as server:
        call, stream = method(number(1)), streams(number(1))
        assert (await stream.read()).value == b"1"
        await soon(begun)
        await server.stop(grace)
        await soon(cancelled)
        for failed in (await failure_of(call), await failure_of(stream.read())):
            assert (failed.code(), failed.details()) == (grpc.StatusCode.UNAVAILABLE, "Cancelling all calls")
            assert isinstance(error_from_rpc(failed, "encoder"), ServiceUnavailable)


async def test_a_channel_outlives_servers(unserved: Ends) -> None:
    @unserved.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        return data(b"reply")

    for _ in range(3):
        async with unserved.served():
            assert (await method(number(1), wait_for_ready=True, timeout=LATE_S)).value == b"reply"
        assert (await failure_of(method(number(1)))).code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("grace", [None, SOON_S])
async def test_a_channel_that_is_closed_cancels_its_calls(ends: Ends, grace: float | None) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        await hang(begun, cancelled)
        return data(b"")

    async def ask() -> None:
        await method(number(1))

    asking = asyncio.create_task(ask())
    await soon(begun)
    await ends.channel.close(grace)
    await soon(cancelled)
    await asyncio.wait([asking])
    assert asking.cancelled()
    with pytest.raises(grpc.aio.UsageError):
        await method(number(1))
