"""The guard in front of a real gRPC server whose methods are of every kind."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from gateway.access.caller import caller
from gateway.access.guard import Guard
from gateway.access.interceptor import OnlyTenants
from gateway.access.methods import METHODS, Access
from mosel.errors import InvalidRequest
from mosel.runtime.service import Context, RefuseUnread, answers_with_status

MakeGuard = Callable[..., Guard]
SERVICE = "test.Echo"
LIMIT = 16 * 1024 * 1024
# Not all: a method that somebody forgot to list is there, too.
ECHO = {f"/{SERVICE}/{name}": Access.TENANTS for name in ["One", "Fail", "Wait", "Twice", "Join", "Each", "Written"]}


class Echo:
    """Methods of every kind that answer what they get, and who sent it."""

    def __init__(self) -> None:
        self.callers: list[str | None] = []
        self.entered = asyncio.Semaphore(0)

    async def One(self, request: BytesValue, context: Context) -> BytesValue:  # noqa: N802
        self.callers.append(await asyncio.to_thread(caller))
        return request

    @answers_with_status
    async def Fail(self, request: BytesValue, context: Context) -> BytesValue:  # noqa: N802
        raise InvalidRequest("as asked for")

    async def Wait(self, request: BytesValue, context: Context) -> BytesValue:  # noqa: N802
        self.entered.release()
        await asyncio.Event().wait()
        return request

    async def Twice(self, request: BytesValue, context: Context) -> AsyncIterator[BytesValue]:  # noqa: N802
        self.callers.append(caller())
        for _ in range(2):
            yield request

    async def Join(self, requests: AsyncIterator[BytesValue], context: Context) -> BytesValue:  # noqa: N802
        self.callers.append(caller())
        return BytesValue(value=b"".join([request.value async for request in requests]))

    async def Each(self, requests: AsyncIterator[BytesValue], context: Context) -> AsyncIterator[BytesValue]:  # noqa: N802
        self.callers.append(caller())
        async for request in requests:
            yield request

    @answers_with_status
    async def Written(self, requests: AsyncIterator[BytesValue], context: Context) -> None:  # noqa: N802
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(request)

    def handlers(self) -> dict[str, dict[str, Any]]:
        codec: dict[str, Any] = {
            "request_deserializer": BytesValue.FromString,
            "response_serializer": BytesValue.SerializeToString,
        }
        one: Any = grpc.unary_unary_rpc_method_handler
        each: Any = grpc.stream_stream_rpc_method_handler(self.Each, **codec)
        echo = {
            "One": one(self.One, **codec),
            "Fail": one(self.Fail, **codec),
            "Wait": one(self.Wait, **codec),
            "Forgotten": one(self.One, **codec),
            "Twice": grpc.unary_stream_rpc_method_handler(self.Twice, **codec),
            "Join": grpc.stream_unary_rpc_method_handler(self.Join, **codec),
            "Each": each,
            "Written": grpc.stream_stream_rpc_method_handler(self.Written, **codec),
        }
        return {SERVICE: echo, "inference.GRPCInferenceService": {"ModelStreamInfer": each}}


class Served:
    """The server, and calls of its methods as a tenant."""

    def __init__(self, channel: grpc.aio.Channel, echo: Echo, guard: Guard, tokens: dict[str, str]) -> None:
        self.channel, self.echo, self.guard, self._tokens = channel, echo, guard, tokens

    def method(self, kind: str, name: str, tenant: str | None = "alice", service: str = SERVICE) -> Callable[..., Any]:
        make = getattr(self.channel, kind)
        multi = make(f"/{service}/{name}", BytesValue.SerializeToString, BytesValue.FromString)
        metadata = () if tenant is None else (("authorization", f"Bearer {self._tokens.get(tenant, tenant)}"),)
        return lambda request=None, **more: multi(request, **{"metadata": metadata, "timeout": 30, **more})

    async def one(self, value: bytes = b"a", tenant: str | None = "alice", **more: Any) -> bytes:
        answer: BytesValue = await self.method("unary_unary", "One", tenant)(BytesValue(value=value), **more)
        return answer.value


@pytest.fixture
async def serve(make_guard: MakeGuard, tokens: dict[str, str]) -> Callable[..., Any]:
    @asynccontextmanager
    async def serving(**limits: float) -> AsyncIterator[Served]:
        echo, guard, size = Echo(), make_guard(**limits), ("grpc.max_receive_message_length", LIMIT)
        server = grpc.aio.server(options=[size], interceptors=(OnlyTenants(guard, {**ECHO, **METHODS}), RefuseUnread()))
        for service, methods in echo.handlers().items():
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[size]) as channel:
            yield Served(channel, echo, guard, tokens)
        await server.stop(None)

    return serving


async def messages(*values: bytes) -> AsyncIterator[BytesValue]:
    for value in values:
        yield BytesValue(value=value)


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value


async def test_a_tenant_s_calls_of_every_kind_go_through_and_are_known_to_be_its(serve: Any) -> None:
    async with serve() as served:
        assert await served.one() == b"a"
        twice = served.method("unary_stream", "Twice")(BytesValue(value=b"b"))
        assert [answer.value async for answer in twice] == [b"b", b"b"]
        assert (await served.method("stream_unary", "Join")(messages(b"c", b"d"))).value == b"cd"
        each = served.method("stream_stream", "Each")(messages(b"e", b"f"))
        assert [answer.value async for answer in each] == [b"e", b"f"]
        written = served.method("stream_stream", "Written")(messages(b"g", b"h"))
        assert [answer.value async for answer in written] == [b"g", b"h"]
        assert served.echo.callers == ["alice"] * 4
        assert await served.one(tenant="bob") == b"a"
        assert served.echo.callers[-1] == "bob"
        assert served.guard.statistics() == {"under_way.alice": 0, "under_way.bob": 0}


async def test_errors_of_the_methods_and_of_their_callers_stay_what_they_are(serve: Any) -> None:
    async with serve() as served:
        failed = await refusal(served.method("unary_unary", "Fail")(BytesValue()))
        assert (failed.code(), failed.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "as asked for")
        raw = served.channel.unary_unary(f"/{SERVICE}/One")
        garbage = await refusal(raw(b"\xff", metadata=(("authorization", f"Bearer {served._tokens['alice']}"),)))
        assert garbage.code() is grpc.StatusCode.INVALID_ARGUMENT
        unknown = await refusal(served.method("unary_unary", "Nothing")(BytesValue()))
        assert unknown.code() is grpc.StatusCode.UNIMPLEMENTED
        assert served.guard.statistics() == {"under_way.alice": 0}


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
@pytest.mark.parametrize("tenant", [None, "wrong"])
async def test_without_a_known_token_nothing_answers(
    serve: Any, counters: Counter[str], caplog: pytest.LogCaptureFixture, kind: str, tenant: str | None
) -> None:
    name = {"unary_unary": "One", "unary_stream": "Twice", "stream_unary": "Join", "stream_stream": "Each"}[kind]
    async with serve() as served:
        for method in (name, "Nothing"):
            # A stream is refused before it sends: grpc.aio loses a status that comes while it does (grpc issue 36066).
            request = None if kind.startswith("stream") else BytesValue(value=b"a")
            call = served.method(kind, method, tenant)(request)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await (anext(aiter(call)) if kind.endswith("stream") else call)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert str(refused.value.details()).startswith("header authorization ")
        assert served.echo.callers == []
        assert served.guard.statistics() == {}
    assert counters == {"refused.unauthenticated": 2}
    records = [vars(record) for record in caplog.records if record.message == "refused"]
    assert [record["method"] for record in records] == [f"/{SERVICE}/{name}", f"/{SERVICE}/Nothing"]
    assert all(record["peer"].startswith("ipv4:127.0.0.1:") and record["tenant"] is None for record in records)


async def test_neither_tokens_nor_headers_are_logged(
    serve: Any, caplog: pytest.LogCaptureFixture, tokens: dict[str, str]
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serve(requests_per_s=0.001) as served:
        await served.one()
        for tenant in ("alice", "wrong-token-of-somebody", None):
            await refusal(served.one(tenant=tenant))
        await refusal(served.method("unary_unary", "LoadModel")(BytesValue()))
    told = "".join(str(vars(record)) for record in caplog.records)
    assert "refused" in told
    for secret in (*tokens.values(), "wrong-token-of-somebody", "Bearer m"):
        assert secret not in told


async def test_what_is_refused_is_not_read_first(serve: Any) -> None:
    async with serve() as served:
        large = await refusal(served.one(b"x" * (LIMIT * 2), tenant=None))
        # Had the server read the message, it would have said that this is too large.
        assert large.code() is grpc.StatusCode.UNAUTHENTICATED
        assert await served.one(b"x" * (LIMIT // 2)) == b"x" * (LIMIT // 2)


async def test_health_needs_no_token(serve: Any) -> None:
    async with serve() as served:
        stub: Any = health_pb2_grpc.HealthStub(served.channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert (await anext(aiter(watch))).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


async def test_a_method_that_is_not_listed_is_for_admins_alone(serve: Any, counters: Counter[str]) -> None:
    async with serve() as served:
        denied = await refusal(served.method("unary_unary", "Forgotten")(BytesValue()))
        assert denied.code() is grpc.StatusCode.PERMISSION_DENIED
        assert denied.details() == f"tenant alice is no admin; expected the token of one for /{SERVICE}/Forgotten"
        allowed = await served.method("unary_unary", "Forgotten", "bob")(BytesValue(value=b"a"))
        assert allowed.value == b"a"
    assert counters == {"refused.permission": 1}


async def test_a_method_that_does_not_exist_is_not_a_matter_of_rights(serve: Any, counters: Counter[str]) -> None:
    async with serve() as served:
        unknown = await refusal(served.method("unary_unary", "LoadModell")(BytesValue()))
        assert unknown.code() is grpc.StatusCode.UNIMPLEMENTED
        stranger = await refusal(served.method("unary_unary", "LoadModell", None)(BytesValue()))
        assert stranger.code() is grpc.StatusCode.UNAUTHENTICATED
    assert counters == {"refused.unauthenticated": 1}


def retry_after(error: grpc.aio.AioRpcError) -> int:
    return int(dict(error.trailing_metadata())["retry-after-ms"])


async def test_beyond_the_request_rate_a_caller_is_told_when_to_come_back(serve: Any, counters: Counter[str]) -> None:
    async with serve(requests_per_s=0.01, burst=2) as served:
        await served.one()
        await served.one()
        error = await refusal(served.one())
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(error.details()).startswith("tenant alice is beyond its requests_per_s of 0.01; try again in ")
        assert 90_000 < retry_after(error) <= 100_000
        assert await served.one(tenant="bob") == b"a"
    assert counters == {"refused.quota.alice": 1}


async def test_payload_bytes_count_for_single_requests_and_for_streams(serve: Any, counters: Counter[str]) -> None:
    async with serve(payload_bytes_per_s=1000) as served:
        await served.one(b"x" * 100_000)
        error = await refusal(served.one())
        assert str(error.details()).startswith("tenant alice is beyond its payload_bytes_per_s of 1000; ")
        assert 90_000 < retry_after(error) <= 100_000
    for name in ("Each", "Written"):
        async with serve(payload_bytes_per_s=1000) as served:
            answers = aiter(served.method("stream_stream", name)(messages(b"x" * 100_000, b"more")))
            assert len((await anext(answers)).value) == 100_000
            stream = await refusal(anext(answers))
            assert stream.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert retry_after(stream) > 90_000
            await nobody_inside(served)
    assert counters == {"refused.quota.alice": 3}


async def test_each_inference_of_a_stream_is_a_request(serve: Any) -> None:
    async with serve(requests_per_s=0.01, burst=3) as served:
        infer = served.method("stream_stream", "ModelStreamInfer", service="inference.GRPCInferenceService")
        answers = aiter(infer(messages(b"a", b"b", b"c")))
        # One for the call, two for what it brings.
        assert [(await anext(answers)).value for _ in range(2)] == [b"a", b"b"]
        error = await refusal(anext(answers))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def nobody_inside(served: Any) -> None:
    """Waits until every call is over at the server, which its caller knows a moment earlier."""
    async with asyncio.timeout(30):
        while served.guard.statistics()["under_way.alice"]:  # noqa: ASYNC110 (the server cannot tell)
            await asyncio.sleep(0.001)


async def test_slots_come_back_from_calls_that_end_fail_or_are_cancelled(serve: Any, counters: Counter[str]) -> None:
    async with serve(max_concurrent=2) as served:
        for _ in range(5):
            waiting = [served.method("unary_unary", "Wait")(BytesValue()) for _ in range(2)]
            for _ in waiting:
                await served.echo.entered.acquire()
            error = await refusal(served.one())
            assert error.details() == "tenant alice has reached its max_concurrent of 2 calls"
            assert retry_after(error) == 100
            for call in waiting:
                call.cancel()
            await nobody_inside(served)
            await served.one()
            await refusal(served.method("unary_unary", "Fail")(BytesValue()))
        await nobody_inside(served)
    assert counters == {"refused.quota.alice": 5}


async def test_many_calls_that_are_cut_off_at_any_moment_leave_no_slot_behind(serve: Any) -> None:
    async with serve(max_concurrent=50) as served:

        async def one(number: int) -> None:
            name, kind = [("One", "unary_unary"), ("Wait", "unary_unary"), ("Each", "stream_stream")][number % 3]
            stream = kind == "stream_stream"
            call = served.method(kind, name)(messages(b"x" * 1000) if stream else BytesValue(value=b"x" * 1000))
            await asyncio.sleep(number % 17 * 0.0005)
            call.cancel()

        for _ in range(5):
            await asyncio.gather(*map(one, range(40)))
        async with asyncio.timeout(30):
            while any(served.guard.statistics().values()):  # noqa: ASYNC110 (the server cannot tell)
                await asyncio.sleep(0.001)
        assert await served.one() == b"a"
