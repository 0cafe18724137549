"""Answers that are larger than a message may be are refused, and calls that fail leave nothing behind."""

import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from mosel.config import Settings, load_settings
from mosel.errors import ReadNotProven
from mosel.runtime.service import Context, RefuseHugeAnswers, RefuseUnread, answers_with_status

LIMIT = 1024 * 1024
# What protobuf needs beside a long value.
ENVELOPE = 4


async def answer(request: BytesValue, context: Context) -> BytesValue:
    return BytesValue(value=bytes(int(request.value)))


@answers_with_status
async def write(request: BytesValue, context: Context) -> None:
    await context.write(BytesValue(value=b"first"))
    await context.write(BytesValue(value=bytes(int(request.value))))


class Arena:
    """Something large that a call uses."""


used: list[weakref.ref[Arena]] = []


@answers_with_status
async def fail(request: BytesValue, context: Context) -> BytesValue:
    arena = Arena()
    used.append(weakref.ref(arena))
    try:
        raise KeyError(arena)
    except KeyError as error:
        raise ReadNotProven("the arena is not there") from error


@pytest.fixture
def settings() -> Settings:
    return load_settings(transport={"max_message_mib": 1})


@pytest.fixture
async def channel(settings: Settings) -> AsyncIterator[grpc.aio.Channel]:
    codec: dict[str, Any] = {
        "request_deserializer": BytesValue.FromString,
        "response_serializer": BytesValue.SerializeToString,
    }
    handlers: Any = {
        "Fail": grpc.unary_unary_rpc_method_handler(fail, **codec),
        "Answer": grpc.unary_unary_rpc_method_handler(answer, **codec),
        "Write": grpc.unary_stream_rpc_method_handler(write, **codec),
    }
    server = grpc.aio.server(
        options=[("grpc.max_send_message_length", LIMIT)], interceptors=(RefuseUnread(), RefuseHugeAnswers(settings))
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Sized", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


def calls(channel: grpc.aio.Channel, kind: str, method: str) -> Any:
    return getattr(channel, kind)(f"/test.Sized/{method}", BytesValue.SerializeToString, BytesValue.FromString)


def asking_for(nbytes: int) -> BytesValue:
    return BytesValue(value=str(nbytes).encode())


async def test_answers_up_to_the_limit_are_sent_and_none_beyond(channel: grpc.aio.Channel) -> None:
    ask = calls(channel, "unary_unary", "Answer")
    assert len((await ask(asking_for(LIMIT - ENVELOPE))).value) == LIMIT - ENVELOPE
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask(asking_for(LIMIT - ENVELOPE + 1))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details() == (
        f"the answer has {LIMIT + 1} bytes; expected at most {LIMIT} bytes (setting transport.max_message_mib): "
        "send fewer items"
    )
    assert (await ask(asking_for(1))).value == b"\0"


async def test_in_a_stream_those_before_it_arrive(channel: grpc.aio.Channel) -> None:
    answers = aiter(calls(channel, "unary_stream", "Write")(asking_for(LIMIT)))
    assert (await anext(answers)).value == b"first"
    with pytest.raises(grpc.aio.AioRpcError, match=r"expected at most 1048576 bytes \(setting transport"):
        await anext(answers)


async def test_what_a_failed_call_used_is_free_at_once(channel: grpc.aio.Channel) -> None:
    gc.disable()
    try:
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError, match="the arena is not there"):
                await calls(channel, "unary_unary", "Fail")(BytesValue())
        assert used[0]() is None
    finally:
        gc.enable()
