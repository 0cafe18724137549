"""A gateway in this process, with its own arena and a scripted selector."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from gateway.data_plane import DataPlane
from gateway.inference.servicer import InferenceServicer, handlers
from gateway.jobs.store import PayloadStore
from gateway.selector_link import SelectorLink
from gateway.servicer import GatewayServicer
from mosel.config import FREE_PORTS, Settings
from mosel.packages.model_package import ModelPackage
from mosel.runtime.service import RefuseUnread
from mosel.transport import Publisher, SharedMemoryArena, open_arenas
from mosel.v1 import arena_pb2, gateway_pb2_grpc, tensor_pb2
from tests.gateway.scripted import Gateway, nowhere, serving


@pytest.fixture
def settings(settings_with: Callable[..., Settings], tmp_path: Path) -> Settings:
    transport = {"gateway_arena_mib": 1, "inline_max_kib": 0, "max_message_mib": 1}
    gateway = FREE_PORTS | {"max_jobs_in_flight": 3}
    return settings_with(selector={"address": f"unix:{tmp_path}/s.sock"}, transport=transport, gateway=gateway)


@dataclass
class Opened:
    """A gateway's arena, opened and described before there is a loop that it would block."""

    arena: SharedMemoryArena
    publisher: Publisher
    announcement: arena_pb2.Announcement


@pytest.fixture
def opened(settings: Settings) -> Iterator[Opened]:
    transport = settings.transport
    with open_arenas(transport, transport.gateway_arena_mib, "transport.gateway_arena_mib") as publisher:
        assert publisher.arena
        yield Opened(publisher.arena, publisher, publisher.announcement())


@pytest.fixture
async def gateway(settings: Settings, fruit: ModelPackage, opened: Opened) -> AsyncIterator[Gateway]:
    publisher, rungs = opened.publisher, asyncio.Queue[int]()

    def changed(rung: tensor_pb2.Rung.ValueType) -> None:
        publisher.rung = rung
        rungs.put_nowait(rung)

    store = PayloadStore(settings.transport, publisher)
    link = SelectorLink(settings, opened.announcement, store.release, changed, lambda: None, nowhere)
    async with serving(settings) as selector, link:
        data_plane = DataPlane(settings, {"fruit": fruit}, opened.arena.largest_slot, store, link)
        server = grpc.aio.server(
            interceptors=(RefuseUnread(data_plane.jobs.check_unread, data_plane.jobs.refused_unread),)
        )
        gateway_pb2_grpc.add_GatewayServicer_to_server(GatewayServicer(data_plane), server)
        server.add_generic_rpc_handlers((handlers(InferenceServicer(data_plane)),))
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        gateway = Gateway(address, selector, rungs, data_plane)
        await gateway.told(tensor_pb2.POSIX_SHM)
        async with gateway.client, gateway.channel:
            yield gateway
        await server.stop(None)
