"""Listeners from which encoders on other hosts fetch payloads."""

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gateway.fetching import FetchListeners
from mosel.config import Settings
from mosel.errors import ReadNotProven, ServiceUnavailable
from mosel.runtime.channels import open_blocking_channel
from mosel.transport import Publisher, Reader, SharedMemoryArena, open_arenas, slice_rows
from mosel.v1 import tensor_pb2


@pytest.fixture
def settings(settings_with: Callable[..., Settings], tmp_path: Path) -> Settings:
    return settings_with(run_dir=tmp_path, transport={"inline_max_kib": 0})


@pytest.fixture
def opened(settings: Settings) -> Iterator[tuple[SharedMemoryArena, Publisher]]:
    with open_arenas(settings.transport, 1, "transport.gateway_arena_mib") as publisher:
        assert publisher.arena
        publisher.announcement()
        yield publisher.arena, publisher


async def test_payloads_are_fetched_from_the_address_that_leads_to_the_encoder(
    settings: Settings, opened: tuple[SharedMemoryArena, Publisher], tmp_path: Path
) -> None:
    arena, publisher = opened
    publisher.rung = tensor_pb2.FETCH
    payload = np.arange(100_000, dtype=np.uint8)
    ref = publisher.publish("UINT8", payload.shape, payload.data, 60.0)
    description = arena.announcement().arena
    with Reader(tmp_path, partial(open_blocking_channel, settings)) as reader:
        async with FetchListeners(settings, arena) as listeners:
            asked = [listeners.address_for(encoder) for encoder in ("127.0.0.1:7001", "localhost:7002")]
            first, again = await asyncio.gather(*asked)
            assert first == again, "one listener for each own address"
            assert first.startswith("127.0.0.1:")
            description.rung, description.address = tensor_pb2.FETCH, first
            assert await asyncio.to_thread(reader.open, description) == arena.announcement().nonce
            rows = await asyncio.to_thread(reader.gather, [slice_rows(ref, 10, 90_000)], "UINT8", ())
            assert np.array_equal(rows, payload[10:90_010])
        with pytest.raises(ReadNotProven, match="not reachable"):
            await asyncio.to_thread(reader.gather, [slice_rows(ref, 0, 1)], "UINT8", ())


@pytest.mark.parametrize("encoder", ["127.0.0.1", "127.0.0.1:", "no such host:1", ""])
async def test_an_encoder_that_nothing_leads_to_is_named(
    settings: Settings, opened: tuple[SharedMemoryArena, Publisher], encoder: str
) -> None:
    async with FetchListeners(settings, opened[0]) as listeners:
        with pytest.raises(ServiceUnavailable, match=f"^service gateway finds no way to {encoder}: "):
            await listeners.address_for(encoder)


async def test_payloads_that_never_leave_the_process_are_not_fetched(settings: Settings) -> None:
    async with FetchListeners(settings, None) as listeners:
        with pytest.raises(ServiceUnavailable, match="keeps payloads for its own process alone"):
            await listeners.address_for("127.0.0.1:7001")
