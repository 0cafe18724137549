"""Follows the health of the services that compute: prepares each that comes, and says when jobs may use it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NoReturn

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mosel.errors import ServiceUnavailable
from mosel.modality import FUSION
from mosel.runtime.background import Background
from mosel.transport.host import host_identity
from mosel.v1 import service_pb2
from selector.events import Event, LaneDown, LaneLeaving, LaneRemoved, LaneUp
from selector.services.compute_services import STATUS_TIMEOUT_S, ComputeService, ComputeServices
from selector.services.tensor_paths import TensorPaths

# How long the first measurement waits for services that are still starting, so that they do not disturb it.
_ALL_THERE_S = 30.0
_RECONNECT_S = 0.1

log = logging.getLogger(__name__)


class HealthWatch:
    """One loop for each service; a context manager.

    Args:
        services: those that compute.
        paths: of tensors to and from them.
        prepare: makes a service ready that has come; called with its lane and the models that it has.
        handle: takes the events of lanes.
    """

    def __init__(
        self,
        services: ComputeServices,
        paths: TensorPaths,
        prepare: Callable[[str, Sequence[str]], Awaitable[None]],
        handle: Callable[[Event], None],
    ) -> None:
        self._services, self._paths, self._prepare, self._handle = services, paths, prepare, handle
        self._work = Background()
        # One for each service.
        self._loops: dict[str, Background] = {}
        self._all_known = asyncio.Event()

    async def __aenter__(self) -> "HealthWatch":
        # It reads files.
        self._boot_id = (await asyncio.to_thread(host_identity)).boot_id
        self._work.forever(self._keep_up, "services")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._work.close()
        for loop in self._loops.values():
            await loop.close()

    async def _keep_up(self) -> NoReturn:
        """Begins and ends the loops of services that are added and removed."""
        while True:
            service = await self._services.changes.get()
            if service.wanted:
                loop = self._loops[service.lane] = Background()
                loop.forever(partial(self._follow, service), f"watch {service.lane}")
            else:
                await self._loops.pop(service.lane).close()
                await self._went(service)
                self._handle(LaneRemoved(service.lane))
                await service.channel.close()

    async def _follow(self, service: ComputeService) -> NoReturn:
        """Follows a service's health for as long as it is wanted."""
        while True:
            await self._went(service)
            await asyncio.sleep(_RECONNECT_S)
            try:
                await self._stay_with(service)
            except grpc.RpcError as error:
                log.debug("not reachable", extra={"peer": service.lane, "reason": error.code().name})
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                log.info("suspect", extra={"peer": service.lane})
            except ServiceUnavailable as error:
                log.info("went away", extra={"peer": service.lane, "reason": str(error)})

    async def _stay_with(self, service: ComputeService) -> None:
        """From when a service says that it serves until it does not any more."""
        stub = health_pb2_grpc.HealthStub(service.channel)
        name = "mosel.v1.Fusion" if service.lane == FUSION else "mosel.v1.Encoder"
        health = stub.Watch(health_pb2.HealthCheckRequest(service=name))  # type: ignore[attr-defined]
        service.health = health
        try:
            async for reply in (replies := aiter(health)):
                if reply.status != health_pb2.HealthCheckResponse.SERVING:
                    if service.up.is_set():
                        leaving = LaneLeaving(service.lane)
                        self._handle(leaving)
                        await _first(leaving.drained.wait(), anext(replies, None))
                    return
                if not service.serving:
                    await self._came(service)
        finally:
            # Leaving the loop does not end the stream, and a service that stops waits for it.
            health.cancel()

    async def _came(self, service: ComputeService) -> None:
        status = await self._identified(service)
        service.resource, service.serving = self._resource_in(status), True
        service.joined = frozenset(status.joined_modalities)
        log.info("peer", extra={"peer": service.lane, "serving": True})
        if all(other.resource for other in self._services):
            self._all_known.set()
        if not await self._paths.attach(service):
            raise ServiceUnavailable(f"service {service.name} is not attached")
        await self._all_there()
        await self._prepare(service.lane, status.models)
        # First: what it cannot reach in an arena must not be sent to it as a ref.
        self._paths.tell_gateways()
        if service.lane == FUSION:
            # It may have come to where other embeddings reach it than before.
            for encoder in self._services.encoders:
                if encoder.up.is_set() or encoder.refused:
                    self._use_or_refuse(encoder)
        self._use_or_refuse(service)

    async def _identified(self, service: ComputeService) -> service_pb2.ServiceStatus:
        """What a service says of itself: it is asked until it answers, or is not there any more."""
        while True:
            try:
                status = await service.stub.Status(service_pb2.StatusRequest(), timeout=STATUS_TIMEOUT_S)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise
                log.info("asked again", extra={"peer": service.lane, "reason": "it did not say what it computes on"})
                continue
            if not status.resource:
                raise ServiceUnavailable(f"service {service.name} does not say what it computes on")
            return status

    def _resource_in(self, status: service_pb2.ServiceStatus) -> str:
        """What a service computes on, by a name that no other host has."""
        if status.resource == "cpu" and status.boot_id not in ("", self._boot_id):
            return f"cpu of {status.boot_id}"
        return status.resource

    def _use_or_refuse(self, service: ComputeService) -> None:
        """Has jobs use a service that is prepared, but not if its embeddings travel worse than is required."""
        service.refused = self._paths.why_not(service)
        if service.refused:
            log.error("refused", extra={"peer": service.lane, "reason": service.refused})
            self._down(service)
        elif not service.up.is_set():
            self._handle(LaneUp(service.lane, service.resource, service.joined))
            service.up.set()

    async def _went(self, service: ComputeService) -> None:
        """Nothing is left of what a service was, if it was there."""
        service.refused = ""
        self._down(service)
        if service.serving:
            service.serving = False
            log.info("peer", extra={"peer": service.lane, "serving": False})
            await self._paths.detach(service.lane)
            self._paths.tell_gateways()

    def _down(self, service: ComputeService) -> None:
        if service.up.is_set():
            service.up.clear()
            self._handle(LaneDown(service.lane))

    async def _all_there(self) -> None:
        """Waits for services that are still starting: what they do would disturb the first measurements."""
        try:
            async with asyncio.timeout(_ALL_THERE_S):
                await self._all_known.wait()
        except TimeoutError:
            log.warning("measuring while services are missing", extra={"missing": self._services.missing()})
            # What did not come by now may never come: whatever starts again must not wait for it once more.
            self._all_known.set()


async def _first(*ways: Awaitable[object]) -> None:
    """Waits until one is over, however it ends, and cancels the others."""
    tasks = [asyncio.ensure_future(way) for way in ways]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
