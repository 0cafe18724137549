"""Which calls are made again."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import pytest

from mosel import AsyncClient, Client, Retry
from mosel.client.retry import Attempts
from mosel.errors import DeadlineUnreachable, InvalidRequest, MoselError, Overloaded, ServiceUnavailable
from tests.mosel.refusing import Refusing

PAYLOADS = {"pen": np.zeros((2, 3), np.float32)}


@pytest.fixture
async def refusing() -> AsyncIterator[tuple[Refusing, str]]:
    servicer = Refusing()
    async with servicer.served() as address:
        yield servicer, address


async def predict(address: str, retries: Retry | None, kind: str, **demand: Any) -> str:
    """With either client."""
    if kind == "async":
        async with AsyncClient(address, retries=retries) as client:
            return (await client.predict("digits", PAYLOADS, **demand)).job_id
    with Client(address, retries=retries) as blocking:
        return (await asyncio.to_thread(lambda: blocking.predict("digits", PAYLOADS, **demand))).job_id


KINDS = pytest.mark.parametrize("kind", ["sync", "async"])


@KINDS
async def test_a_call_that_was_refused_is_made_again_when_the_server_says(
    refusing: tuple[Refusing, str], kind: str
) -> None:
    servicer, address = refusing
    servicer.errors = [Overloaded("full", 120), Overloaded("full", 60)]
    started = time.monotonic()
    assert await predict(address, Retry(), kind) == "well"
    assert time.monotonic() - started >= 0.18
    assert len(servicer.requests) == 3
    assert servicer.requests[0] == servicer.requests[2]


@KINDS
@pytest.mark.parametrize(("retries", "attempts"), [(None, 1), (Retry(max_attempts=1), 1), (Retry(max_attempts=2), 2)])
async def test_there_are_no_more_attempts_than_were_asked_for(
    refusing: tuple[Refusing, str], kind: str, retries: Retry | None, attempts: int
) -> None:
    servicer, address = refusing
    servicer.errors = [Overloaded(f"full {i}", 1) for i in range(5)]
    with pytest.raises(Overloaded, match=f"^full {attempts - 1}$"):
        await predict(address, retries, kind)
    assert len(servicer.requests) == attempts


@KINDS
@pytest.mark.parametrize(
    "error",
    [
        ServiceUnavailable("service encoder/pen went away"),
        ServiceUnavailable("failed to connect to nobody"),
        InvalidRequest("no"),
        DeadlineUnreachable("no"),
    ],
)
async def test_what_the_server_may_have_begun_is_not_repeated(
    refusing: tuple[Refusing, str], kind: str, error: MoselError
) -> None:
    servicer, address = refusing
    servicer.errors = [error]
    with pytest.raises(MoselError):
        await predict(address, Retry(), kind)
    assert len(servicer.requests) == 1


@KINDS
async def test_there_is_no_attempt_that_would_be_too_late(refusing: tuple[Refusing, str], kind: str) -> None:
    servicer, address = refusing
    for demand in ({"timeout_s": 20}, {"latency_slo_ms": 20_000}):
        servicer.errors, servicer.requests = [Overloaded("full", 50_000)], []
        started = time.monotonic()
        with pytest.raises(Overloaded):
            await predict(address, Retry(), kind, **demand)
        assert time.monotonic() - started < 20
        assert len(servicer.requests) == 1


@KINDS
async def test_a_deadline_counts_from_the_first_attempt(refusing: tuple[Refusing, str], kind: str) -> None:
    servicer, address = refusing
    servicer.errors = [Overloaded("full", 50), Overloaded("full", 50)]
    assert await predict(address, Retry(), kind, latency_slo_ms=20_000) == "well"
    asked = [request.latency_slo_ms for request in servicer.requests]
    assert asked[0] == 20_000
    assert asked[1] <= asked[0] - 50
    assert asked[2] <= asked[1] - 50


async def test_a_job_that_may_be_late_is_tried_again_after_its_deadline(refusing: tuple[Refusing, str]) -> None:
    servicer, address = refusing
    servicer.errors = [Overloaded("full", 80)]
    assert await predict(address, Retry(), "async", latency_slo_ms=20, late_ok=True) == "well"
    assert 0 < servicer.requests[1].latency_slo_ms < 1


@KINDS
async def test_a_call_that_found_no_server_is_sent_once_there_is_one(kind: str) -> None:
    servicer = Refusing()
    server = servicer.server()
    port = server.add_insecure_port("127.0.0.1:0")
    calling = asyncio.create_task(predict(f"127.0.0.1:{port}", Retry(max_attempts=12, wait_ms=50), kind))
    await asyncio.sleep(0.3)
    assert not calling.done()
    await server.start()
    assert await calling == "well"
    assert len(servicer.requests) == 1
    await server.stop(None)


@KINDS
async def test_without_a_server_it_says_so_after_the_last_attempt(kind: str) -> None:
    with pytest.raises(ServiceUnavailable, match=r"^service gateway at 127\.0\.0\.1:1 is not reachable$"):
        await predict("127.0.0.1:1", Retry(max_attempts=2, wait_ms=1), kind)


def failure(details: str, status: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> grpc.RpcError:
    return grpc.aio.AioRpcError(status, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


@pytest.mark.parametrize("details", ["Socket closed", "recvmsg:Connection reset by peer", "GOAWAY received", ""])
def test_a_connection_that_broke_may_have_carried_the_call(details: str) -> None:
    attempts = Attempts(Retry(), object(), 30)
    assert attempts.begin() == 30
    assert attempts.wait_s(failure(details)) is None


def test_waits_double_where_the_server_says_nothing() -> None:
    attempts, waits = Attempts(Retry(max_attempts=4, wait_ms=100), object(), 30), []
    for _ in range(4):
        attempts.begin()
        waits.append(attempts.wait_s(failure("failed to connect to all addresses; last error: x")))
    assert waits.pop() is None
    for wait, least in zip(waits, (0.1, 0.2, 0.4), strict=True):
        assert wait is not None
        assert least <= wait <= least * 1.25


def test_too_much_for_one_message_is_not_tried_again() -> None:
    attempts = Attempts(Retry(), object(), 30)
    attempts.begin()
    too_large = "CLIENT: Received message larger than max (5 vs. 4)"
    assert attempts.wait_s(failure(too_large, grpc.StatusCode.RESOURCE_EXHAUSTED)) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Retry(max_attempts=0), "max_attempts is 0; expected at least 1"),
        (lambda: Retry(wait_ms=0), "wait_ms is 0; expected a positive number of milliseconds"),
        (lambda: Retry(wait_ms=float("nan")), "wait_ms is nan; expected a positive number of milliseconds"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(make: Callable[[], Retry], message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}$"):
        make()
