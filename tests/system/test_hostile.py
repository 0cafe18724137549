"""Thousands of hostile requests: each is answered for what it is, and the services go on as if nothing had been."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import grpc
import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from gateway.inference.messages import ModelStreamInferResponse
from mosel.client import Client
from mosel.launcher import Launcher
from tests.system.hostile.calls import INVALID, Hostile, calls
from tests.system.hostile.http import HTTP, HostileHttp
from tests.system.hostile.inference import INFERENCE, STREAM
from tests.system.hostile.mosel_v1 import MOSEL, SUBMIT

Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
Directly = Callable[..., NDArray[Any]]
Counters = Callable[[Client], dict[str, dict[str, int]]]
Until = Callable[..., None]
# Calls whose requests and replies are bytes.
Raw: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]"
RawStream: TypeAlias = "grpc.StreamStreamMultiCallable[bytes, bytes]"

_IN_FLIGHT = 64
# Longer than any that a person would read, and well below what a trailer may hold.
_LONGEST = 610


@pytest.fixture(scope="module", autouse=True)
def nothing_happened(
    services: Launcher,
    counters: Counters,
    gateway_holds: Callable[[Client], int],
    until: Until,
    draw: Draw,
    directly: Directly,
) -> Any:
    """Every process is alive, nothing is held, and a good request is answered."""
    before = {child.process.pid for child in services.children.values()}
    yield
    assert services.ended() == []
    with Client(services.address) as client:
        until(lambda: not gateway_holds(client), "nothing is held")
        until(lambda: not counters(client)["selector"]["jobs"], "the selector has no jobs")
        assert {service.pid for service in client.status()} == before
        payloads = draw(3, seed=9)
        output = client.predict("fruit", payloads).output.astype(np.float32)
    np.testing.assert_allclose(output, directly(payloads, payloads), atol=1e-5)


class Caller:
    """Sends calls, many at the same time, and notes what is wrong with their answers."""

    def __init__(self, address: str) -> None:
        options = [("grpc.max_send_message_length", -1)]
        self.answered, self.wrong = 0, list[str]()
        self._channel = grpc.aio.insecure_channel(address, options)
        # Of a stream that is answered before all of it was sent, grpc.aio says INTERNAL whatever the answer was.
        self._stream_channel = grpc.insecure_channel(address, options)
        self._room = asyncio.Semaphore(_IN_FLIGHT)

    async def send_all(self, hostile: Iterable[tuple[str, Hostile]]) -> None:
        """Sends calls with the names of their kinds, and waits for all answers."""
        with self._stream_channel:
            async with self._channel, asyncio.TaskGroup() as group:
                for kind, call in hostile:
                    await self._room.acquire()
                    group.create_task(self._send(kind, call))

    async def _send(self, kind: str, call: Hostile) -> None:
        try:
            status, details = await self._answer(call)
        finally:
            self._room.release()
        self.answered += 1
        if (problem := _problem(call, status, details)) is not None:
            self.wrong.append(f"{kind}: {problem}: {status.name} {details[:200]!r} to {call.messages[0][:200]!r}")

    async def _answer(self, call: Hostile) -> tuple[grpc.StatusCode, str]:
        compression = grpc.Compression.Gzip if call.gzip else None
        try:
            if call.method in (SUBMIT, STREAM):
                return await asyncio.to_thread(self._stream, call)
            unary: Raw = self._channel.unary_unary(call.method)
            await unary(call.messages[0], timeout=call.timeout_s, compression=compression)
        except grpc.RpcError as error:
            return error.code(), error.details() or ""
        return grpc.StatusCode.OK, ""

    def _stream(self, call: Hostile) -> tuple[grpc.StatusCode, str]:
        stream: RawStream = self._stream_channel.stream_stream(call.method)
        answers = [*stream(iter(call.messages), timeout=call.timeout_s)]
        if call.method == STREAM:
            errors = [ModelStreamInferResponse.FromString(answer).error_message for answer in answers]
            if any(errors):
                return INVALID, next(filter(None, errors))
        return grpc.StatusCode.OK, ""


SEED = 20_241_124


@pytest.mark.parametrize("kinds", [MOSEL, INFERENCE], ids=["mosel.v1", "Open Inference Protocol"])
async def test_each_is_answered_for_what_it_is(services: Launcher, kinds: Mapping[Callable[..., Hostile], int]) -> None:
    caller = Caller(services.address)
    await caller.send_all(calls(kinds, SEED))
    assert not caller.wrong, _listed(caller.wrong)
    assert caller.answered == sum(kinds.values())


async def test_each_is_answered_for_what_it_is_over_http(services: Launcher) -> None:
    wrong: list[str] = []
    room = asyncio.Semaphore(_IN_FLIGHT // 4)
    async with httpx.AsyncClient(base_url=f"http://{services.http_address}", timeout=60) as client:

        async def send(kind: str, call: HostileHttp) -> None:
            async with room:
                reply = await client.request(call.method, call.path, content=call.body, headers=dict(call.headers))
            if (problem := _http_problem(call, reply)) is not None:
                wrong.append(f"{kind}: {problem}: {reply.status_code} {reply.text[:200]!r} to {call.body[:200]!r}")

        async with asyncio.TaskGroup() as group:
            for kind, call in calls(HTTP, SEED):
                group.create_task(send(kind, call))
    assert not wrong, _listed(wrong)


def test_they_are_ten_thousand() -> None:
    assert sum(count for kinds in (MOSEL, INFERENCE, HTTP) for count in kinds.values()) >= 10_000


def _listed(wrong: list[str]) -> str:
    """At most about 40 of them, of all kinds."""
    return f"{len(wrong)}:\n" + "\n".join(sorted(wrong)[:: len(wrong) // 40 + 1])


# Of numbers with which no network can do anything, such as 1e38 or NaN: the job fails alone, and is told so.
_NOT_FINITE = "returned numbers that are not finite"


def _problem(call: Hostile, status: grpc.StatusCode, details: str) -> str | None:
    """What is wrong with an answer."""
    if status is grpc.StatusCode.INTERNAL and _NOT_FINITE in details:
        return None
    if status not in call.allowed:
        return f"expected {', '.join(sorted(allowed.name for allowed in call.allowed))}"
    if status is grpc.StatusCode.OK:
        return None
    if call.says is None:
        return None
    return _unclear(details, call.says)


def _http_problem(call: HostileHttp, reply: httpx.Response) -> str | None:
    if reply.status_code == 500 and _NOT_FINITE in reply.text:
        return None
    if reply.status_code not in call.allowed:
        return f"expected {', '.join(map(str, sorted(call.allowed)))}"
    if reply.status_code == 200 or call.says is None:
        return None
    return _unclear(reply.json()["error"], call.says)


def _unclear(message: str, says: str) -> str | None:
    if says not in message:
        return f"expected '{says}' in the message"
    if not message or not message.isprintable() or len(message) > _LONGEST:
        return f"expected one readable line of at most {_LONGEST} characters, got {len(message)}"
    return None
