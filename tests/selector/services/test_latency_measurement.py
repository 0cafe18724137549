"""Latencies of models, measured through services that answer as they are told."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from mosel.config import Settings, load_settings
from mosel.packages.model_package import ModelPackage
from mosel.v1 import encoder_pb2, encoder_pb2_grpc, service_pb2
from selector.core.profile import ModelProfile
from selector.services.latency_measurement import Latencies
from selector.services.loaded_model import LoadedModel, lanes_of

Stubs = dict[str, "encoder_pb2_grpc.EncoderAsyncStub"]

SLOW_S = 0.003
TCP = {"addresses": {"photo": "10.0.0.1:9000"}}


def handlers(ms: float, delay_s: float) -> grpc.GenericRpcHandler:
    """An encoder whose network takes so long; something else on its machine delays what it says of itself."""

    async def status(request: service_pb2.StatusRequest, context: Any) -> service_pb2.ServiceStatus:
        await asyncio.sleep(delay_s)
        return service_pb2.ServiceStatus()

    async def profile(request: encoder_pb2.ProfileEncoderRequest, context: Any) -> service_pb2.ProfileReply:
        points = [service_pb2.LatencyPoint(batch_size=size, p50_ms=ms, p95_ms=ms) for size in request.batch_sizes]
        return service_pb2.ProfileReply(points=points)

    answer = grpc.unary_unary_rpc_method_handler
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Status": answer(status, service_pb2.StatusRequest.FromString, service_pb2.ServiceStatus.SerializeToString),
        "Profile": answer(
            profile, encoder_pb2.ProfileEncoderRequest.FromString, service_pb2.ProfileReply.SerializeToString
        ),
    }
    return grpc.method_handlers_generic_handler("mosel.v1.Encoder", methods)


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
