"""Latencies of models, measured through services that answer as they are told."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from mosel.config import Settings, load_settings
from mosel.packages.model_package import ModelPackage
from mosel.profiles.files import load_profile
from mosel.v1 import encoder_pb2, encoder_pb2_grpc, fusion_pb2, fusion_pb2_grpc, service_pb2
from selector.core.profile import ModelProfile
from selector.services.latency_measurement import Latencies
from selector.services.loaded_model import LoadedModel, lanes_of

Stubs = dict[str, "encoder_pb2_grpc.EncoderAsyncStub"]

SLOW_S = 0.003
TCP = {"addresses": {"photo": "10.0.0.1:9000"}}


def handlers(ms: float, delay_s: float, of: str = "Encoder") -> grpc.GenericRpcHandler:
    """An encoder whose network takes so long; something else on its machine delays what it says of itself."""

    async def status(request: service_pb2.StatusRequest, context: Any) -> service_pb2.ServiceStatus:
        await asyncio.sleep(delay_s)
        return service_pb2.ServiceStatus()

    async def profile(request: encoder_pb2.ProfileEncoderRequest, context: Any) -> service_pb2.ProfileReply:
        points = [service_pb2.LatencyPoint(batch_size=size, p50_ms=ms, p95_ms=ms) for size in request.batch_sizes]
        return service_pb2.ProfileReply(points=points)

    answer = grpc.unary_unary_rpc_method_handler
    asked = fusion_pb2.ProfileFusionRequest if of == "Fusion" else encoder_pb2.ProfileEncoderRequest
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Status": answer(status, service_pb2.StatusRequest.FromString, service_pb2.ServiceStatus.SerializeToString),
        "Profile": answer(profile, asked.FromString, service_pb2.ProfileReply.SerializeToString),
    }
    return grpc.method_handlers_generic_handler(f"mosel.v1.{of}", methods)


@pytest.fixture
async def stubs(tmp_path: Path) -> AsyncIterator[Stubs]:
    """Two encoders: the cheap one was slow to say what an empty call costs."""
    async with contextlib.AsyncExitStack() as entered:
        stubs: Stubs = {}
        for modality, ms, delay_s in (("scent", 0.05, SLOW_S), ("photo", 0.3, 0.0)):
            server, address = grpc.aio.server(), f"unix:{tmp_path}/{modality}"
            server.add_generic_rpc_handlers((handlers(ms, delay_s),))
            server.add_insecure_port(address)
            await server.start()
            entered.push_async_callback(server.stop, None)
            channel = await entered.enter_async_context(grpc.aio.insecure_channel(address))
            stubs[modality] = encoder_pb2_grpc.EncoderStub(channel)
        yield stubs


@pytest.fixture
def latencies(request: pytest.FixtureRequest, settings_with: Callable[..., Settings]) -> Latencies:
    """Of services with some addresses."""
    return Latencies(settings_with(encoders=getattr(request, "param", {})))


@pytest.fixture
def model(fruit: ModelPackage) -> LoadedModel:
    """One that nothing is known of but its accuracies."""
    profile = ModelProfile(fruit.accuracy.sets, fruit.accuracy.samples)
    return LoadedModel(fruit, profile, lanes_of(fruit, load_settings()))


@pytest.fixture
async def measured(stubs: Stubs, latencies: Latencies, model: LoadedModel) -> ModelProfile:
    """What is measured of both."""
    for modality, stub in stubs.items():
        await latencies.of_encoder(modality, stub, [model], {})
    return model.profile


def ms(profile: ModelProfile, modality: str) -> float:
    return profile.encoders[modality].call_ms(1)


async def test_the_way_by_socket_is_the_same_to_all_services(measured: ModelProfile) -> None:
    assert ms(measured, "photo") - ms(measured, "scent") == pytest.approx(0.25)


@pytest.mark.parametrize("latencies", [TCP], indirect=True)
async def test_another_machine_may_be_further_away(measured: ModelProfile) -> None:
    assert ms(measured, "scent") - ms(measured, "photo") > SLOW_S * 1000 / 2


@pytest.fixture
async def fusion(tmp_path: Path) -> AsyncIterator["fusion_pb2_grpc.FusionAsyncStub"]:
    server, address = grpc.aio.server(), f"unix:{tmp_path}/fusion"
    server.add_generic_rpc_handlers((handlers(0.1, 0.0, "Fusion"),))
    server.add_insecure_port(address)
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield fusion_pb2_grpc.FusionStub(channel)
    await server.stop(None)


@pytest.fixture
def kept_settings(settings_with: Callable[..., Settings], tmp_path: Path) -> Settings:
    return settings_with(profiles_dir=tmp_path / "profiles")


async def test_what_was_measured_on_a_busy_machine_says_so_and_is_measured_again_on_a_quiet_one(
    stubs: Stubs,
    fusion: "fusion_pb2_grpc.FusionAsyncStub",
    kept_settings: Settings,
    model: LoadedModel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fruit, share = model.package, 0.5

    async def others_share() -> float:
        return share

    async def start() -> tuple[float, bool, float]:
        """A start of the selector: which share is kept, whether it is busy, and the spread of times."""
        latencies = Latencies(kept_settings, others_share)
        fresh = LoadedModel(fruit, ModelProfile(fruit.accuracy.sets, fruit.accuracy.samples), model.lanes)
        resources = dict.fromkeys(model.lanes, "cpu")
        for modality, stub in stubs.items():
            await latencies.of_encoder(modality, stub, [fresh], resources)
        await latencies.of_fusion(fusion, [fresh], resources)
        assert all(map(fresh.profile.is_measured, fresh.profile.accuracy))
        kept = await asyncio.to_thread(load_profile, fruit, kept_settings)
        assert kept is not None
        return kept.others_share, kept.busy, kept.spread

    with caplog.at_level(logging.INFO):
        assert await start() == (0.5, True, 1.0)
        (warned,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert "busy machine" in vars(warned)["reason"]
        # Others still use the machine: that it was measured so is better than nothing.
        assert await start() == (0.5, True, 1.0)
        share = 0.02
        assert await start() == (0.02, False, 1.0)
        caplog.clear()
        assert await start() == (0.02, False, 1.0)
        assert [record.message for record in caplog.records if record.name.endswith("latency_measurement")] == [
            "profile"
        ]
