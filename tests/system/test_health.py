"""`grpc.health.v1` of every service: alive, able to serve, and which models are ready."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray

from mosel.client import Client
from mosel.config import Settings
from mosel.launcher import Launcher

PLACEMENTS = ("single", "services")
Draw = Callable[..., dict[str, NDArray[Any]]]
Until = Callable[..., None]
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def addresses(launcher: Launcher) -> dict[str, tuple[str, str]]:
    """Where each service listens, and the name of its gRPC service."""
    settings = launcher.settings
    encoders = {f"encoder/{m}": (settings.encoder_address(m), "mosel.v1.Encoder") for m in ("photo", "scent")}
    return encoders | {
        "gateway": (settings.gateway_address, "mosel.v1.Gateway"),
        "selector": (settings.selector_address, "mosel.v1.Selector"),
        "fusion": (settings.fusion_address, "mosel.v1.Fusion"),
    }


@pytest.mark.parametrize(
    ("services", "service"),
    [
        ("single", "gateway"),
        *(("services", name) for name in ("gateway", "selector", "encoder/photo", "encoder/scent", "fusion")),
    ],
    indirect=["services"],
)
def test_check_and_watch_by_service_name(services: Launcher, service: str) -> None:
    address, name = addresses(services)[service]
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for known in ("", name):
            request = health_pb2.HealthCheckRequest(service=known)
            assert stub.Check(request, timeout=30).status == SERVING  # type: ignore[attr-defined]
            watch = stub.Watch(request, timeout=30)  # type: ignore[attr-defined]
            assert next(watch).status == SERVING
            watch.cancel()
        unknown = health_pb2.HealthCheckRequest(service="mosel.v1.Nothing")
        with pytest.raises(grpc.RpcError) as refused:
            stub.Check(unknown, timeout=30)  # type: ignore[attr-defined]
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(unknown, timeout=30)  # type: ignore[attr-defined]
        assert next(watch).status == UNKNOWN
        watch.cancel()


@pytest.mark.parametrize("services", ["single"], indirect=True)
def test_a_caller_who_asks_each_second_whether_the_gateway_is_there_is_not_cut_off(services: Launcher) -> None:
    options = [
        ("grpc.keepalive_time_ms", 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    with grpc.insecure_channel(services.address, options) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=5)  # type: ignore[attr-defined]
        assert next(watch).status == SERVING
        # gRPC's own limit of two needless pings is passed in the fourth second.
        with pytest.raises(grpc.RpcError) as ended:
            next(watch)
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


class Watched:
    """What Watch says of a name, as it says it."""

    def __init__(self, address: str, name: str) -> None:
        self.seen: list[int] = []
        self._channel = grpc.insecure_channel(address)
        stub = health_pb2_grpc.HealthStub(self._channel)
        self._call = stub.Watch(health_pb2.HealthCheckRequest(service=name))  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._read)

    def last(self) -> int:
        return self.seen[-1]

    def _read(self) -> None:
        try:
            self.seen.extend(reply.status for reply in self._call)
        except grpc.RpcError:
            return

    def __enter__(self) -> "Watched":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._call.cancel()
        self._thread.join()
        self._channel.close()


@pytest.fixture(scope="module")
def launcher(settings_with: Callable[..., Settings]) -> Iterator[Launcher]:
    with Launcher(settings_with()) as launcher:
        launcher.wait_ready(120)
        yield launcher


@pytest.mark.slow
def test_a_model_is_ready_once_every_encoder_has_been_warm(launcher: Launcher, draw: Draw, until: Until) -> None:
    with Watched(launcher.address, "fruit") as model, Watched(launcher.address, "") as gateway:
        until(lambda: model.seen == [SERVING], "the model is ready")
        for name in ("encoder/scent", "selector"):
            launcher.children[name].process.kill()
            launcher.children[name].process.wait()
        until(lambda: model.last() == NOT_SERVING, "the selector is missed")
        launcher.start_again("selector")
        with Client(launcher.address) as client:

            def photos_are_served() -> bool:
                models = client.models()
                return any(info.available for model in models for info in model.sets.values())

            until(photos_are_served, "what needs one encoder is served again")
            # And yet: an encoder has not come up.
            assert client.predict("fruit", {"photo": draw(1)["photo"]}).modality_sets == ("photo",)
            assert not client.models()[0].ready
            assert model.last() == NOT_SERVING
            launcher.start_again("encoder/scent")
            until(lambda: model.last() == SERVING, "the model is ready again")
        assert model.seen == [SERVING, NOT_SERVING, SERVING]
        assert gateway.seen == [SERVING]
        # One that goes later takes nothing from those who can do without it.
        launcher.children["encoder/scent"].process.kill()
        launcher.children["encoder/scent"].process.wait()
        with Client(launcher.address) as client:
            until(lambda: not client.models()[0].sets["scent"].available, "the encoder is missed")
            assert client.models()[0].ready
        launcher.start_again("encoder/scent")


def test_those_who_watch_are_told_the_end_and_do_not_hold_it_up(launcher: Launcher, until: Until) -> None:
    with Watched(launcher.address, "mosel.v1.Gateway") as watched:
        until(lambda: watched.seen == [SERVING], "it is watched")
        launcher.children["gateway"].process.terminate()
        assert launcher.children["gateway"].process.wait(60) == 0
        assert watched.seen == [SERVING, NOT_SERVING]
