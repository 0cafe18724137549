"""HTTP's bounds in bytes and time, with callers that are too large, too slow, too many, or gone."""

import asyncio
import contextlib
import json
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.gateway.inference.http_support import INFER, Http, refusal, speaking_http, under_way
from tests.gateway.inference.json_support import infer_body, outputs_of
from tests.gateway.scripted import Gateway, release_of

Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]


async def connect(http: Http) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", http.server.port)


def head(length: int | None, *headers: str) -> bytes:
    """The head of a request to infer; without a length its body comes in chunks."""
    body = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return "\r\n".join((f"POST {INFER} HTTP/1.1", "Host: here", body, *headers, "\r\n")).encode()


async def answered(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], str]:
    """The status, headers and error that come on a connection."""
    async with asyncio.timeout(30):
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:-1])}
        content = json.loads(await reader.readexactly(int(headers["content-length"])))
    return int(lines[0].split()[1]), headers, content["error"]


TOO_LARGE = "expected at most 1048576 bytes (setting transport.max_message_mib): send fewer items"


async def test_a_body_that_is_announced_too_large_is_not_read(gateway: Gateway, http: Http) -> None:
    reader, writer = await connect(http)
    # It would be asked for, had it been waited for.
    writer.write(head(2**40, "Expect: 100-continue"))
    status, _, error = await answered(reader)
    assert (status, error) == (413, f"the body has {2**40} bytes; {TOO_LARGE}")
    writer.close()


async def test_a_client_that_sends_a_body_too_large_reads_why(gateway: Gateway, http: Http) -> None:
    for content in (bytes(3 * 2**20), chunks(3 * 2**20)):
        response = await http.client.post(INFER, content=content)
        assert refusal(response)[0] == 413
        assert refusal(response)[1].endswith(TOO_LARGE)
    await gateway.idle()
    # The connection is as good as before.
    assert (await http.client.get("/v2/health/live")).status_code == 200


async def chunks(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // 2**16):
        yield bytes(2**16)


@pytest.mark.parametrize(("encoding", "window"), [("gzip", 31), ("deflate", 15)])
async def test_a_bomb_is_refused_without_being_unpacked(
    gateway: Gateway, http: Http, encoding: str, window: int
) -> None:
    packer = zlib.compressobj(wbits=window)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(256)) + packer.flush()
    assert len(bomb) < 2**19
    tracemalloc.start()
    response = await http.client.post(INFER, content=bomb, headers={"Content-Encoding": encoding})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    status, error = refusal(response)
    assert (status, error.partition("; ")[2]) == (413, TOO_LARGE)
    assert peak < 16 * 2**20
    await gateway.idle()


async def test_json_has_a_bound_of_its_own(gateway: Gateway) -> None:
    scents = {"scent": np.zeros((1024, 6), np.float32)}
    async with speaking_http(gateway, max_json_mib=0) as http:
        status, error = refusal(await http.infer(infer_body(scents)))
        assert (status, error.partition(" bytes; ")[2]) == (
            413,
            "expected at most 0 (setting gateway.max_json_mib): send tensors as binary data",
        )


async def test_a_body_that_does_not_come_is_not_waited_for(gateway: Gateway) -> None:
    async with speaking_http(gateway, max_body_ms=200) as http:
        reader, writer = await connect(http)
        writer.write(head(1000) + b"{")
        status, _, error = await answered(reader)
        expected = (
            "1 bytes of the body were there after 0.2 s; expected all of it by then (setting gateway.max_body_ms)"
        )
        assert (status, error) == (504, expected)
        writer.close()
        await gateway.idle()


async def arrived(gateway: Gateway, http: Http, nbytes: int) -> None:
    """Returns when so many bytes of bodies are there."""
    async with asyncio.timeout(30):
        while gateway.data_plane.arriving.statistics()["arriving_bytes"] < nbytes:
            await http.client.get("/v2/health/live")


async def test_bodies_that_arrive_take_no_more_than_they_may(gateway: Gateway, http: Http) -> None:
    _, writer = await connect(http)
    writer.write(head(900_000) + bytes(800_000))
    await arrived(gateway, http, 800_000)
    response = await http.client.post(INFER, content=bytes(900_000))
    status, error = refusal(response)
    assert (status, error.endswith("of 1048576 bytes (transport.gateway_arena_mib)")) == (429, True)
    assert int(response.headers["retry-after"]) >= 1
    writer.close()
    await gateway.idle()


async def test_a_gateway_that_is_full_says_so_before_it_reads(gateway: Gateway, http: Http, draw: Draw) -> None:
    calls = [await under_way(gateway, http.infer(infer_body(draw(1)))) for _ in range(3)]
    reader, writer = await connect(http)
    writer.write(head(1000))
    status, headers, error = await answered(reader)
    assert (status, error) == (429, "3 jobs are in flight, the most that gateway.max_jobs_in_flight allows")
    assert int(headers["retry-after"]) >= 1
    assert int(headers["retry-after-ms"]) >= 1
    writer.close()
    assert gateway.data_plane.inferences_of("fruit").fail.count == 1
    for call, description in calls:
        gateway.answer(description)
        assert (await call).status_code == 200
    await gateway.idle()


@pytest.mark.parametrize("abort", [False, True])
async def test_a_caller_that_goes_away_ends_its_job(gateway: Gateway, http: Http, draw: Draw, abort: bool) -> None:
    _, writer = await connect(http)
    # Nothing else would end it before the test gives up.
    body = infer_body(draw(2), latency_slo_ms=600_000)
    writer.write(head(len(body.content)) + body.content)
    description = await gateway.job_at_selector()
    if abort:
        writer.transport.abort()
    else:
        writer.close()
    async with asyncio.timeout(60):
        assert await gateway.cancelled_at_selector() == description.job_id
    gateway.selector.say(release=release_of(description))
    await gateway.idle()
    fruit = gateway.data_plane.inferences_of("fruit")
    assert (fruit.success.count, fruit.fail.count) == (0, 1)


async def test_a_caller_that_goes_away_while_it_sends_leaves_nothing(gateway: Gateway, http: Http) -> None:
    _, writer = await connect(http)
    writer.write(head(1000) + b"{")
    await arrived(gateway, http, 1)
    writer.close()
    await gateway.idle()


@pytest.mark.parametrize("first", [b"", b"GET /v2/health/live HTTP/1.1\r\n", head(1_000_000)])
async def test_a_connection_that_brings_no_request_is_closed(gateway: Gateway, first: bytes) -> None:
    async with speaking_http(gateway, idle_s=0.3, max_body_ms=100) as http:
        reader, writer = await connect(http)
        writer.write(first)

        async def dribble() -> None:
            with contextlib.suppress(OSError):
                while first:
                    writer.write(b"x: y\r\n")
                    await writer.drain()
                    await asyncio.sleep(0.02)

        dribbling = asyncio.create_task(dribble())
        with contextlib.suppress(ConnectionResetError):
            async with asyncio.timeout(30):
                await reader.read()
        dribbling.cancel()
        writer.close()


async def test_a_connection_serves_many_requests(gateway: Gateway) -> None:
    async with speaking_http(gateway, idle_s=1) as http:
        reader, writer = await connect(http)
        for _ in range(20):
            writer.write(b"GET /v2/health/live HTTP/1.1\r\nHost: here\r\n\r\n")
            async with asyncio.timeout(30):
                assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(len(b'{"live":true}'))
            await asyncio.sleep(0.1)
        writer.close()


async def listens(http: Http) -> bool:
    try:
        (await connect(http))[1].close()
    except OSError:
        return False
    return True


async def test_requests_under_way_are_answered_before_it_stops(gateway: Gateway, http: Http, draw: Draw) -> None:
    call, description = await under_way(gateway, http.infer(infer_body(draw(1))))
    http.server.stop()
    async with asyncio.timeout(30):
        while await listens(http):
            pass
    gateway.answer(description)
    assert outputs_of(await call)["probabilities"].shape == (1, 3)
