"""Services and the channels to them, in one process or over a socket: health, errors, how they come and go."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mosel.config import Settings, load_settings
from mosel.deadline import Deadline
from mosel.errors import ModelNotFound
from mosel.runtime.channels import open_channel
from mosel.runtime.in_process import local_services
from mosel.runtime.service import Context, Service, answers_with_status, socket_path
from mosel.v1 import fusion_pb2, fusion_pb2_grpc, service_pb2
from tests.mosel.runtime.channels.ends import LATE_S, failure_of

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
FUSION = "mosel.v1.Fusion"


class FusionServicer(fusion_pb2_grpc.FusionServicer):
    @answers_with_status
    async def Fuse(self, request: fusion_pb2.FuseRequest, context: Context) -> fusion_pb2.FuseReply:  # noqa: N802
        if request.model == "missing":
            raise ModelNotFound("model missing is not loaded")
        return fusion_pb2.FuseReply(compute_us=7)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(run_dir=tmp_path / "run", transport={"max_message_mib": 1})


@pytest.fixture
def address(settings: Settings, kind: str) -> Iterator[str]:
    with local_services.expect([settings.fusion_address]) if kind == "in_process" else nullcontext():
        yield settings.fusion_address


@pytest.fixture
async def channel(settings: Settings, address: str) -> AsyncIterator[grpc.aio.Channel]:
    channel = open_channel(settings, address)
    yield channel
    await channel.close()


def service(settings: Settings, address: str) -> Service:
    register = partial(fusion_pb2_grpc.add_FusionServicer_to_server, FusionServicer())  # type: ignore[abstract]
    return Service(settings, address, "fusion.address", register, names=[FUSION])


async def watch(channel: grpc.aio.Channel, name: str = FUSION) -> AsyncIterator[int]:
    """What a watcher is told, from when the service is there."""
    stub = health_pb2_grpc.HealthStub(channel)
    call = stub.Watch(health_pb2.HealthCheckRequest(service=name), wait_for_ready=True)  # type: ignore[attr-defined]
    try:
        async for reply in call:
            yield reply.status
    finally:
        call.cancel()


async def test_a_service_answers_and_its_errors_arrive(
    settings: Settings, address: str, channel: grpc.aio.Channel
) -> None:
    stub = fusion_pb2_grpc.FusionStub(channel)
    async with service(settings, address):
        assert (await stub.Fuse(fusion_pb2.FuseRequest(), timeout=LATE_S)).compute_us == 7
        failed = await failure_of(stub.Fuse(fusion_pb2.FuseRequest(model="missing")))
        assert (failed.code(), failed.details()) == (grpc.StatusCode.NOT_FOUND, "model missing is not loaded")
        failed = await failure_of(stub.Unload(service_pb2.UnloadRequest()))
        assert failed.code() is grpc.StatusCode.UNIMPLEMENTED
        failed = await failure_of(stub.Fuse(fusion_pb2.FuseRequest(model="m" * 1024 * 1024)))
        assert failed.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_only_others_need_a_socket(settings: Settings, address: str, kind: str) -> None:
    path = socket_path(address)
    assert path is not None
    async with service(settings, address):
        assert path.exists() == (kind == "unix_socket")
    assert not path.exists()


async def test_watchers_follow_a_service_until_it_ends(
    settings: Settings, address: str, channel: grpc.aio.Channel
) -> None:
    told = watch(channel)
    waiting = asyncio.ensure_future(anext(told))
    for _ in range(2):
        async with service(settings, address) as served:
            assert await waiting == NOT_SERVING
            served.set_ready(True)
            assert await anext(told) == SERVING
            await served.stop(Deadline.after(LATE_S))
            assert await anext(told) == NOT_SERVING
            assert await anext(told, None) is None
        stub = health_pb2_grpc.HealthStub(channel)
        failed = await failure_of(stub.Check(health_pb2.HealthCheckRequest()))  # type: ignore[attr-defined]
        assert failed.code() is grpc.StatusCode.UNAVAILABLE
        told = watch(channel)
        waiting = asyncio.ensure_future(anext(told))
    waiting.cancel()
    await asyncio.wait([waiting])


async def test_a_service_finishes_when_who_needs_it_has_left(
    settings: Settings, address: str, channel: grpc.aio.Channel
) -> None:
    async with service(settings, address) as served:
        served.set_ready(True)
        told = watch(channel)
        assert await anext(told) == SERVING
        finishing = asyncio.create_task(served.finish())
        assert await anext(told) == NOT_SERVING
        stub = fusion_pb2_grpc.FusionStub(channel)
        assert (await stub.Fuse(fusion_pb2.FuseRequest(), timeout=LATE_S)).compute_us == 7
        assert not finishing.done()
        await told.aclose()  # type: ignore[attr-defined]
        async with asyncio.timeout(LATE_S):
            await finishing


async def test_whoever_dies_is_missed(settings: Settings, address: str, channel: grpc.aio.Channel) -> None:
    """A service that ends without a word breaks the streams of its watchers."""
    async with service(settings, address) as served:
        served.set_ready(True)
        told = watch(channel)
        assert await anext(told) == SERVING
        await served._server.stop(None)
        failed = await failure_of(anext(told))
        assert failed.code() is grpc.StatusCode.UNAVAILABLE
