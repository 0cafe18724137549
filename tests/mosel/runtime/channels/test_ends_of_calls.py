"""Deadlines and cancelling, inside a process as over a socket."""

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value

from mosel.runtime.service import Context
from tests.mosel.runtime.channels.ends import SOON_S, Ends, data, failure_of, hang, number, soon


async def test_a_handler_knows_how_long_its_caller_waits(ends: Ends) -> None:
    left = list[float | None]()

    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        left.append(context.time_remaining())
        return data(b"")

    await method(number(1), timeout=50)
    await method(number(1))
    assert left[0] is not None
    assert 0 < left[0] <= 50.1
    assert left[1] is None


async def test_at_its_deadline_a_call_ends_and_its_handler_is_cancelled(ends: Ends) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        await hang(begun, cancelled)
        return data(b"")

    started = time.monotonic()
    failed = await failure_of(method(number(1), timeout=SOON_S))
    assert time.monotonic() - started > SOON_S - 0.01
    assert (failed.code(), failed.details()) == (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
    await soon(cancelled)


async def test_a_handler_that_ignores_its_end_holds_nobody_up(ends: Ends) -> None:
    go, over = asyncio.Event(), asyncio.Event()

    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        try:
            await go.wait()
        except asyncio.CancelledError:
            await go.wait()
        over.set()
        return data(b"")

    failed = await failure_of(method(number(1), timeout=SOON_S))
    assert failed.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not over.is_set()
    go.set()
    await soon(over)


@pytest.mark.parametrize("timeout", [-1, -0.001])
async def test_a_deadline_that_is_over_already(ends: Ends, timeout: float) -> None:
    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        return data(b"")

    assert (await failure_of(method(number(1), timeout=timeout))).code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_stream_has_a_deadline_too(ends: Ends) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    @ends.stream_stream
    async def method(requests: AsyncIterator[Int64Value], context: Context) -> None:
        await context.write(data(b"1"))
        await hang(begun, cancelled)

    call = method(timeout=SOON_S)
    assert (await call.read()).value == b"1"
    assert (await failure_of(call.read())).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await soon(cancelled)


async def test_a_call_that_is_cancelled_cancels_its_handler(ends: Ends) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        await hang(begun, cancelled)
        return data(b"")

    call = method(number(1))
    await soon(begun)
    assert call.cancel()
    assert not call.cancel()
    await soon(cancelled)
    with pytest.raises(asyncio.CancelledError):
        await call
    assert call.cancelled()
    assert (await call.code(), await call.details()) == (
        grpc.StatusCode.CANCELLED,
        "Locally cancelled by application!",
    )


async def test_who_is_cancelled_while_waiting_cancels_the_call(ends: Ends) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        await hang(begun, cancelled)
        return data(b"")

    async def ask() -> None:
        await method(number(1))

    asking = asyncio.create_task(ask())
    await soon(begun)
    asking.cancel()
    await soon(cancelled)
    await asyncio.wait([asking])
    assert asking.cancelled()


async def test_cancelled_at_once(ends: Ends) -> None:
    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        return data(b"")

    call = method(number(1))
    assert call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (await method(number(1))).value == b""


@pytest.mark.parametrize("how", ["cancel", "reader"])
async def test_a_stream_that_nobody_reads_any_more_ends_its_handler(ends: Ends, how: str) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    @ends.unary_stream
    async def method(request: Int64Value, context: Context) -> None:
        await context.write(data(b"1"))
        await hang(begun, cancelled)

    call = method(number(1))
    assert (await call.read()).value == b"1"
    await soon(begun)
    if how == "cancel":
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.read()
    else:
        reader = asyncio.ensure_future(call.read())
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.wait([reader])
        assert reader.cancelled()
    await soon(cancelled)


async def test_a_handler_that_waits_for_its_reader_is_cancelled(ends: Ends) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    @ends.unary_stream
    async def method(request: Int64Value, context: Context) -> None:
        begun.set()
        try:
            while True:
                await context.write(data(bytes(100_000)))
        finally:
            cancelled.set()

    call = method(number(1))
    await soon(begun)
    await asyncio.sleep(SOON_S)
    call.cancel()
    await soon(cancelled)


async def test_a_generator_that_answers_is_closed(ends: Ends) -> None:
    begun, closed = asyncio.Event(), asyncio.Event()

    @ends.unary_stream
    async def method(request: Int64Value, context: Context) -> AsyncIterator[BytesValue]:
        try:
            while True:
                yield data(bytes(100_000))
                begun.set()
        finally:
            closed.set()

    call = method(number(1))
    await soon(begun)
    call.cancel()
    await soon(closed)
