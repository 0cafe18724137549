"""Starts the gateway: `python -m gateway`."""

import argparse
import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import NoReturn

import grpc
from grpc_health.v1 import health_pb2

from gateway.access.guarding import guarding
from gateway.access.handshakes import handshakes_watched
from gateway.access.interceptor import OnlyTenants
from gateway.access.middleware import OnlyTenantsHttp
from gateway.data_plane import DataPlane
from gateway.fetching import FetchListeners
from gateway.inference.http import InferenceHttp
from gateway.inference.messages import SERVICE
from gateway.inference.servicer import InferenceServicer, handlers
from gateway.jobs.store import PayloadStore
from gateway.metrics_page import MetricsPage
from gateway.reflection import add_reflection
from gateway.selector_link import SelectorLink
from gateway.servicer import GatewayServicer
from mosel.config import Settings
from mosel.deadline import Deadline
from mosel.packages.model_package import find_packages
from mosel.runtime.background import Background
from mosel.runtime.exposure import check_public, public_tls
from mosel.runtime.http import HttpServer
from mosel.runtime.service import RefuseHugeAnswers, RefuseUnread, Service, run_service
from mosel.runtime.tracing import open_tracing
from mosel.tls import handshake_refused
from mosel.transport import SHARED, ArenaKinds, open_arenas
from mosel.v1 import gateway_pb2, gateway_pb2_grpc, tensor_pb2

# For health.
_NAMES = ("mosel.v1.Gateway", SERVICE.full_name)


def main() -> NoReturn:
    """Serves until a signal, and ends the process."""
    parser = argparse.ArgumentParser(prog="python -m gateway", description=__doc__)
    parser.add_argument("--listen", default="", help="address to listen on (default: gateway.host and grpc_port)")
    arguments = parser.parse_args()
    run_service("gateway", partial(serve, arguments.listen))


async def serve(listen: str, settings: Settings, stop: asyncio.Event, arenas: ArenaKinds = SHARED) -> None:
    """Listens, and finishes what was admitted once `stop` is set.

    Args:
        listen: the address, empty for that of the settings.
        settings: the effective settings.
        stop: ends it.
        arenas: what payloads are kept in: that depends on where the encoders are.

    Raises:
        ConfigError: a setting is wrong, or the port is taken.
        PackageError: a model package is wrong.
    """
    address = listen or settings.gateway_address
    check_public(settings, address, "--listen" if listen else "--host")
    packages = find_packages(settings.models_dir, settings.models)
    models_changed = asyncio.Event()
    transport = settings.transport
    with (
        open_tracing(settings, "gateway") as tracing,
        open_arenas(transport, transport.gateway_arena_mib, "transport.gateway_arena_mib", arenas) as publisher,
    ):
        store = PayloadStore(transport, publisher)

        def transport_changed(rung: tensor_pb2.Rung.ValueType) -> None:
            publisher.rung = rung
            models_changed.set()

        async with (
            # Around everything: until the last job is over, encoders may fetch its payloads.
            FetchListeners(settings, publisher.arena) as listeners,
            SelectorLink(
                settings,
                publisher.announcement(),
                store.release,
                transport_changed,
                models_changed.set,
                listeners.address_for,
            ) as link,
        ):
            data_plane = DataPlane(settings, packages, publisher.largest_slot, store, link, tracing)
            register = partial(_register, data_plane)
            checks = (
                RefuseUnread(data_plane.jobs.check_unread, data_plane.jobs.refused_unread),
                RefuseHugeAnswers(settings),
            )
            refused = partial(_handshake_refused, data_plane)
            async with guarding(settings.gateway.tokens_file, data_plane.counters) as guard:
                data_plane.guard = guard
                first = checks if guard is None else (OnlyTenants(guard), *checks)
                async with (
                    handshakes_watched(refused) if settings.tls.certificate else contextlib.nullcontext(),
                    _showing_metrics(settings, data_plane, refused),
                    _speaking_http(settings, data_plane, refused) as http,
                    Service(settings, address, "--grpc-port", register, first, _NAMES, public=True) as public,
                    # For this user alone, who needs no token there.
                    Service(settings, settings.local_gateway_address, "run_dir", register, checks, _NAMES) as local,
                    _following_models((public, local), data_plane, models_changed),
                ):
                    public.set_ready(True)
                    local.set_ready(True)
                    await stop.wait()
                    await _finish(settings, data_plane, http, public, local)


async def _finish(settings: Settings, data_plane: DataPlane, http: HttpServer, *services: Service) -> None:
    """Takes no more jobs, on any way in, and waits for those under way; ends what is left when the grace is over."""
    grace_s = settings.stop_grace_ms / 1000
    data_plane.registry.close()
    data_plane.stopping.set()
    http.stop()
    asyncio.get_running_loop().call_later(grace_s, data_plane.registry.end_all)
    grace = Deadline.after(grace_s)
    await asyncio.gather(*(service.stop(grace) for service in services))


def _handshake_refused(data_plane: DataPlane, reason: str) -> None:
    data_plane.counters["refused.handshake"] += 1
    handshake_refused(reason)


@contextlib.asynccontextmanager
async def _showing_metrics(
    settings: Settings, data_plane: DataPlane, refused: Callable[[str], None]
) -> AsyncIterator[None]:
    """Serves the metrics of all services."""
    host, port, grace_s = settings.gateway.host, settings.gateway.metrics_port, settings.stop_grace_ms / 1000
    page = MetricsPage(data_plane.metrics, data_plane.link).app()
    app = page if data_plane.guard is None else OnlyTenantsHttp(page, data_plane.guard)
    tls, idle_s = public_tls(settings), settings.gateway.http_idle_s
    async with HttpServer(app, host, port, "--metrics-port", grace_s, tls, refused, idle_s):
        yield


@contextlib.asynccontextmanager
async def _speaking_http(
    settings: Settings, data_plane: DataPlane, refused: Callable[[str], None]
) -> AsyncIterator[HttpServer]:
    """Serves the Open Inference Protocol over HTTP."""
    host, port, grace_s = settings.gateway.host, settings.gateway.http_port, settings.stop_grace_ms / 1000
    with InferenceHttp(data_plane) as inference:
        app = inference.app() if data_plane.guard is None else OnlyTenantsHttp(inference.app(), data_plane.guard)
        tls, idle_s = public_tls(settings), settings.gateway.http_idle_s
        async with HttpServer(app, host, port, "--http-port", grace_s, tls, refused, idle_s) as server:
            yield server


def _register(data_plane: DataPlane, server: grpc.aio.Server) -> None:
    gateway_pb2_grpc.add_GatewayServicer_to_server(GatewayServicer(data_plane), server)
    server.add_generic_rpc_handlers((handlers(InferenceServicer(data_plane)),))
    names = [
        SERVICE.full_name,
        gateway_pb2.DESCRIPTOR.services_by_name["Gateway"].full_name,
        health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
    ]
    add_reflection(server, names)


@contextlib.asynccontextmanager
async def _following_models(
    services: Sequence[Service], data_plane: DataPlane, changed: asyncio.Event
) -> AsyncIterator[None]:
    """Keeps the health of each model's name in step with what the selector says."""

    async def follow() -> NoReturn:
        while True:
            await data_plane.served.follow()
            for model, service in itertools.product(list(data_plane.packages), services):
                service.set_ready(data_plane.is_ready(model), model)
            await changed.wait()
            changed.clear()

    background = Background()
    background.forever(follow, "health of models")
    try:
        yield
    finally:
        await background.close()


if __name__ == "__main__":
    main()
