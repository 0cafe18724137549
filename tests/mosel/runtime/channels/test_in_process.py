"""What holds inside a process alone: nothing is serialised, nothing leaks between the ends, nothing is left behind."""

import asyncio
import contextlib
import gc
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value

from mosel.errors import ConfigError
from mosel.runtime.in_process import LocalServices
from mosel.runtime.in_process.calls import StreamStreamCall, StreamUnaryCall, UnaryStreamCall, UnaryUnaryCall
from mosel.runtime.in_process.context import InProcessContext
from mosel.runtime.in_process.message_queue import MOST_WAITING
from mosel.runtime.in_process.rpc import Rpc
from mosel.runtime.in_process.unchanged import MessageChanged, Unchanged
from mosel.runtime.service import Context
from tests.mosel.runtime.channels.ends import SOON_S, Ends, data, failure_of, hang, number, open_ends, soon

OF_A_CALL = (Rpc, InProcessContext, UnaryUnaryCall, UnaryStreamCall, StreamUnaryCall, StreamStreamCall)
who: ContextVar[str] = ContextVar("who", default="nobody")
asked: ContextVar[Callable[[], object]] = ContextVar("asked")


@pytest.fixture
async def unserved() -> AsyncIterator[Ends]:
    async with open_ends("in_process") as ends:
        yield ends


@pytest.fixture
async def ends(unserved: Ends) -> AsyncIterator[Ends]:
    async with unserved.served():
        yield unserved


async def test_messages_are_handed_over_as_they_are(ends: Ends) -> None:
    seen = list[object]()

    @ends.stream_stream
    async def streams(requests: AsyncIterator[Int64Value], context: Context) -> AsyncIterator[BytesValue]:
        async for request in requests:
            seen.append(request)
            yield reply

    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        seen.append(request)
        return reply

    request, reply = number(1), data(b"reply")
    assert await method(request) is reply
    assert await streams([request]).read() is reply
    assert all(message is request for message in seen)
    assert len(seen) == 2


async def test_one_end_sees_nothing_of_the_others_context(unserved: Ends) -> None:
    seen = list[str]()

    @unserved.unary_stream
    async def streams(request: Int64Value, context: Context) -> AsyncIterator[BytesValue]:
        seen.append(who.get())
        who.set("handler")
        yield data(b"")

    @unserved.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        seen.append(who.get())
        who.set("handler")
        return data(b"")

    who.set("service")
    async with unserved.served():
        who.set("caller")
        over = asyncio.Event()
        call = method(number(1))
        call.add_done_callback(lambda _: seen.append(who.get()))
        call.add_done_callback(lambda _: over.set())
        await call
        await soon(over)
        await method(number(1))
        assert len([reply async for reply in streams(number(1))]) == 1
        assert who.get() == "caller"
    # Handlers see what their service set before it started, and nothing of each other.
    assert seen == ["service", "caller", "service", "service"]


async def test_a_handler_that_cancels_itself_ends_its_call_at_once(ends: Ends) -> None:
    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        raise asyncio.CancelledError

    failed = await failure_of(method(number(1)))
    assert (failed.code(), failed.details()) == (grpc.StatusCode.CANCELLED, "CANCELLED")


async def test_a_call_without_time_never_reaches_its_handler(ends: Ends) -> None:
    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        raise AssertionError

    assert (await failure_of(method(number(1), timeout=0))).code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("thread", ["this", "another"])
async def test_a_stream_that_nobody_holds_any_more_ends_its_handler(ends: Ends, thread: str) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    @ends.stream_stream
    async def method(requests: object, context: Context) -> None:
        await hang(begun, cancelled)

    async def numbers() -> AsyncIterator[Int64Value]:
        await asyncio.Event().wait()
        yield number(1)

    calls = [method(numbers())]
    await soon(begun)
    if thread == "this":
        calls.clear()
    else:
        # By then, the loop has nothing to do.
        threading.Timer(SOON_S, calls.clear).start()
    await soon(cancelled)


async def test_a_writer_is_as_far_ahead_as_a_queue_holds(ends: Ends) -> None:
    written, full = list[int](), asyncio.Event()

    @ends.unary_stream
    async def method(request: Int64Value, context: Context) -> None:
        for n in range(5 * MOST_WAITING):
            if n == MOST_WAITING:
                full.set()
            await context.write(data(b"%d" % n))
            written.append(n)

    call = method(number(1))
    await soon(full)
    for n in range(4 * MOST_WAITING):
        assert len(written) == MOST_WAITING + n
        assert int((await call.read()).value) == n
        await asyncio.sleep(0)
    assert len([reply async for reply in call]) == MOST_WAITING


async def test_a_generated_method_that_a_servicer_does_not_have(ends: Ends) -> None:
    @ends.unary_unary
    def method(request: Int64Value, context: Any) -> BytesValue:
        context.set_code(grpc.StatusCode.UNIMPLEMENTED)
        raise NotImplementedError

    assert (await failure_of(method(number(1)))).code() is grpc.StatusCode.UNIMPLEMENTED


# Addresses


async def test_an_address_is_served_by_one(ends: Ends) -> None:
    with pytest.raises(ConfigError, match="is taken by another service of this process"):
        async with ends.served():
            pass
    assert ends.services.at(ends.address) is not None


def test_addresses_are_local_as_long_as_somebody_says_so() -> None:
    services = LocalServices()
    with services.expect(["a", "b"]):
        with services.expect(["b", "c"]):
            assert [services.expects(address) for address in "abcd"] == [True, True, True, False]
        assert [services.expects(address) for address in "abc"] == [True, True, False]
    assert not services.expects("a")


# Messages are not changed any more


@pytest.fixture
async def watched() -> AsyncIterator[Ends]:
    async with open_ends("in_process") as ends:
        ends.services.unchanged = Unchanged()
        yield ends


async def changes_request(request: Int64Value, context: Context) -> BytesValue:
    request.value += 1
    return data(b"")


async def test_a_handler_that_changes_its_request_is_found(watched: Ends) -> None:
    method = watched.unary_unary(changes_request)
    with pytest.raises(MessageChanged, match=r"a message of /test\.Ends/0 was changed"):
        async with watched.served():
            await method(number(1))


async def test_a_caller_that_changes_a_reply_is_found(watched: Ends) -> None:
    @watched.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        return data(b"")

    with pytest.raises(MessageChanged):
        async with watched.served():
            (await method(number(1))).value = b"mine"


async def test_a_caller_that_sends_one_message_again_and_again_is_found(watched: Ends) -> None:
    @watched.stream_unary
    async def method(requests: AsyncIterator[Int64Value], context: Context) -> BytesValue:
        return data(bytes([request.value async for request in requests]))

    request = number(0)

    def numbers() -> Iterator[Int64Value]:
        for n in range(3):
            request.value = n
            yield request

    with pytest.raises(MessageChanged):
        async with watched.served():
            await method(numbers())


async def test_it_is_found_while_others_are_sent(watched: Ends) -> None:
    method = watched.unary_unary(changes_request)

    async def goes_on() -> None:
        while True:
            await method(number(1))

    failed = list[grpc.aio.AioRpcError]()
    with pytest.raises(MessageChanged):
        async with watched.served():
            failed.append(await failure_of(goes_on()))
    assert "was changed after it was handed over" in str(failed[0])


async def test_who_changes_nothing_hears_nothing(watched: Ends) -> None:
    @watched.stream_stream
    async def method(requests: AsyncIterator[Int64Value], context: Context) -> AsyncIterator[BytesValue]:
        async for request in requests:
            yield data(b"%d" % request.value)

    async with watched.served():
        for _ in range(3):
            assert len([reply async for reply in method(map(number, range(1000)))]) == 1000


# Nothing is left behind


async def answers(request: Int64Value, context: Context) -> BytesValue:
    return data(b"")


async def aborts(request: Int64Value, context: Context) -> BytesValue:
    await context.abort(grpc.StatusCode.NOT_FOUND, "gone")


async def raises(request: Int64Value, context: Context) -> BytesValue:
    raise ValueError("seven")


async def hangs(request: Int64Value, context: Context) -> BytesValue:
    await asyncio.Event().wait()
    raise AssertionError


async def streams(requests: AsyncIterator[Int64Value], context: Context) -> AsyncIterator[BytesValue]:
    asked.set(context.peer)
    async for _ in requests:
        yield data(b"")


async def waits(ends: Ends) -> None:
    await ends.unary_unary(answers)(number(1), timeout=60)


async def is_refused(ends: Ends) -> None:
    await ends.unary_unary(aborts)(number(1), timeout=60)


async def is_told_of_a_bug(ends: Ends) -> None:
    await ends.unary_unary(raises)(number(1))


async def runs_out_of_time(ends: Ends) -> None:
    await ends.unary_unary(hangs)(number(1), timeout=0.0001)


async def cancels_at_once(ends: Ends) -> None:
    ends.unary_unary(answers)(number(1), timeout=60).cancel()


async def cancels_later(ends: Ends) -> None:
    call = ends.unary_unary(hangs)(number(1), timeout=60)
    await asyncio.sleep(0)
    call.cancel()
    await call


async def converses(ends: Ends) -> None:
    call = ends.stream_stream(streams)(map(number, range(3)), timeout=60)
    call.add_done_callback(lambda _: None)
    assert len([reply async for reply in call]) == 3


async def leaves(ends: Ends) -> None:
    call = ends.stream_stream(streams)()
    await call.write(number(1))
    await call.read()


async def finds_nobody(ends: Ends) -> None:
    await ends.method("unary_unary", "/test.Ends/Missing")(number(1), timeout=60)


@pytest.mark.parametrize(
    "caller",
    [
        waits, is_refused, is_told_of_a_bug, runs_out_of_time, cancels_at_once, cancels_later, converses, leaves,
        finds_nobody,
    ],
)  # fmt: skip
async def test_nothing_is_left_of_calls(
    ends: Ends, caller: Callable[[Ends], Awaitable[None]], caplog: pytest.LogCaptureFixture
) -> None:
    # What is captured of a log keeps what it is about.
    caplog.set_level(logging.CRITICAL + 1)
    gc.collect()
    gc.disable()
    try:
        for _ in range(1000):
            with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
                await caller(ends)
        # Those that end their handlers do not wait for that.
        for _ in range(5):
            await asyncio.sleep(0)
        left = [thing for thing in gc.get_objects() if type(thing) in OF_A_CALL]
        tasks = asyncio.all_tasks()
    finally:
        gc.enable()
    assert left == []
    assert tasks == {asyncio.current_task()}
    assert ends.channel.under_way == set()
