"""What callers and handlers rely on, inside a process as over a socket: a request, a reply, and errors."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value

from mosel.errors import Overloaded, ServiceUnavailable
from mosel.runtime.service import Context, answers_with_status
from mosel.status import error_from_rpc
from tests.mosel.runtime.channels.ends import LATE_S, SOON_S, Ends, data, failure_of, number


async def test_a_request_a_reply_and_what_goes_with_them(ends: Ends) -> None:
    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        await context.send_initial_metadata((("begins", "yes"),))
        context.set_trailing_metadata((("ends", "yes"),))
        who = [value for name, value in context.invocation_metadata() or () if name == "who"]
        return data(f"{request.value} {who} {bool(context.peer())}".encode())

    call = method(number(7), metadata=(("who", "me"),))
    assert (await call).value == b"7 ['me'] True"
    assert await call == await call
    assert ("begins", "yes") in list(await call.initial_metadata())
    assert ("ends", "yes") in list(await call.trailing_metadata())
    assert (await call.code(), await call.details()) == (grpc.StatusCode.OK, "")
    assert call.done()
    assert not call.cancelled()
    assert not call.cancel()


async def test_calls_at_once_get_each_their_reply(ends: Ends) -> None:
    held = asyncio.Event()

    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        if request.value == 9:
            held.set()
        await held.wait()
        return data(bytes([request.value]))

    replies = await asyncio.gather(*(method(number(n)) for n in range(10)))
    assert [reply.value for reply in replies] == [bytes([n]) for n in range(10)]


async def test_the_same_message_may_be_sent_again(ends: Ends) -> None:
    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        return data(bytes([request.value]))

    request = number(3)
    assert [(await method(request)).value for _ in range(3)] == [b"\3"] * 3


async def test_what_is_asked_of_a_call_under_way_is_waited_for(ends: Ends) -> None:
    go, told = asyncio.Event(), list[object]()

    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        await go.wait()
        return data(b"")

    call = method(number(1), timeout=LATE_S)
    call.add_done_callback(told.append)
    waiting = [asyncio.ensure_future(asked) for asked in (call.code(), call.details(), call.trailing_metadata(), call)]
    assert not (await asyncio.wait(waiting, timeout=0.05))[0]
    assert not call.done()
    assert told == []
    assert 0 < call.time_remaining() <= LATE_S
    go.set()
    assert await waiting[0] is grpc.StatusCode.OK
    await asyncio.wait(waiting)
    await asyncio.sleep(0)
    assert told == [call]


async def test_abort_ends_the_call_with_all_that_it_says(ends: Ends) -> None:
    raised, go = list[type[BaseException]](), asyncio.Event()

    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        try:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "later", (("retry-after-ms", "70"),))
        except BaseException as error:
            raised.append(type(error))
            # The caller is told at once.
            await go.wait()
            raise

    failed = await failure_of(method(number(1)))
    go.set()
    assert raised == [grpc.aio.AbortError]
    assert (failed.code(), failed.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "later")
    error = error_from_rpc(failed, "encoder")
    assert isinstance(error, Overloaded)
    assert error.retry_after_ms == 70


async def test_errors_of_the_product_arrive(ends: Ends) -> None:
    @ends.unary_unary
    @answers_with_status
    async def method(request: Int64Value, context: Context) -> BytesValue:
        raise Overloaded("too many", 5)

    error = error_from_rpc(await failure_of(method(number(1))), "encoder")
    assert (type(error), str(error), getattr(error, "retry_after_ms", 0)) == (Overloaded, "too many", 5)


async def test_a_handler_that_goes_on_after_it_has_aborted_changes_nothing(ends: Ends) -> None:
    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        with pytest.raises(grpc.aio.AbortError):
            await context.abort(grpc.StatusCode.NOT_FOUND, "gone")
        return data(b"reply")

    failed = await failure_of(method(number(1)))
    assert (failed.code(), failed.details()) == (grpc.StatusCode.NOT_FOUND, "gone")


async def test_a_status_that_is_set_counts_more_than_the_reply(ends: Ends) -> None:
    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        context.set_code(grpc.StatusCode.DATA_LOSS)
        context.set_details("half of it")
        context.set_trailing_metadata((("which", "left"),))
        return data(b"reply")

    failed = await failure_of(method(number(1)))
    assert (failed.code(), failed.details()) == (grpc.StatusCode.DATA_LOSS, "half of it")
    assert ("which", "left") in list(failed.trailing_metadata() or ())


async def test_a_status_that_is_set_counts_for_streams(ends: Ends) -> None:
    @ends.unary_stream
    async def method(request: Int64Value, context: Context) -> AsyncIterator[BytesValue]:
        yield data(b"1")
        context.set_code(grpc.StatusCode.DATA_LOSS)

    call = method(number(1))
    assert (await call.read()).value == b"1"
    assert (await failure_of(call.read())).code() is grpc.StatusCode.DATA_LOSS


@pytest.mark.parametrize("set_before", [False, True])
async def test_what_a_handler_raises_unexpectedly(ends: Ends, set_before: bool) -> None:
    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        if set_before:
            context.set_code(grpc.StatusCode.UNIMPLEMENTED)
        raise ValueError("seven")

    failed = await failure_of(method(number(1)))
    expected = grpc.StatusCode.UNIMPLEMENTED if set_before else grpc.StatusCode.UNKNOWN
    assert (failed.code(), failed.details()) == (expected, "Unexpected <class 'ValueError'>: seven")


async def test_a_handler_that_cancels_itself(ends: Ends) -> None:
    @ends.unary_unary
    async def method(request: Int64Value, context: Context) -> BytesValue:
        raise asyncio.CancelledError

    # Over a socket, nobody tells the caller.
    expected = grpc.StatusCode.CANCELLED if ends.kind == "in_process" else grpc.StatusCode.DEADLINE_EXCEEDED
    failed = await failure_of(method(number(1), timeout=SOON_S))
    assert failed.code() is expected
    if ends.kind == "in_process":
        assert isinstance(error_from_rpc(failed, "encoder"), ServiceUnavailable)


async def test_a_method_that_nobody_has(ends: Ends) -> None:
    failed = await failure_of(ends.method("unary_unary", "/test.Ends/Missing")(number(1)))
    assert (failed.code(), failed.details()) == (grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    failed = await failure_of(ends.method("stream_stream", "/test.Ends/Missing")().read())
    assert failed.code() is grpc.StatusCode.UNIMPLEMENTED
