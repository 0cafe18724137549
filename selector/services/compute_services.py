"""The services that compute: one record of each, and what each can be asked."""

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import grpc

from mosel.config import Settings
from mosel.errors import PackageError, ServiceUnavailable, Unreachable
from mosel.modality import FUSION, modality_of
from mosel.runtime.background import Background
from mosel.runtime.channels import open_channel
from mosel.status import error_from_rpc
from mosel.v1 import encoder_pb2_grpc, fusion_pb2_grpc, service_pb2, tensor_pb2
from selector.core.stages import service_name

STATUS_TIMEOUT_S = 1.0
_LOAD_TIMEOUT_S = 600.0
_UNLOAD_TIMEOUT_S = 5.0
_AGAIN_S = 0.1

log = logging.getLogger(__name__)


@dataclass(eq=False)
class ComputeService:
    """An encoder, or fusion.

    Attributes:
        lane: its name in the core.
        address: where it listens.
        channel: to it.
        stub: calls it.
        wanted: whether it is to be followed; otherwise no model needs it any more.
        serving: whether its health stream says so, and it has said what it computes on.
        resource: what it computes on, by a name that no other host has; empty until it has said so.
        joined: of fusion: the modalities whose encoders it calls itself.
        up: set while jobs may use it.
        refused: why jobs may not use it although it serves; empty if there is nothing to say.
        health: its health stream.
        released: its slots that nobody reads any more, and that it was not told of yet.
        releasing: whether it is being told.
    """

    lane: str
    address: str
    channel: grpc.aio.Channel
    stub: "encoder_pb2_grpc.EncoderAsyncStub | fusion_pb2_grpc.FusionAsyncStub"
    wanted: bool = True
    serving: bool = False
    resource: str = ""
    joined: frozenset[str] = frozenset()
    up: asyncio.Event = field(default_factory=asyncio.Event)
    refused: str = ""
    health: grpc.aio.UnaryStreamCall[Any, Any] | None = None
    released: list[tensor_pb2.ArenaSlot] = field(default_factory=list)
    releasing: bool = False

    @property
    def name(self) -> str:
        """How people know it."""
        return service_name(self.lane)

    def mark_suspect(self) -> None:
        """It did not answer: it counts as away until its health was asked for anew."""
        if self.health is not None:
            self.health.cancel()


class ComputeServices:
    """Encoders and fusion, by lane; a context manager that owns their channels.

    Args:
        settings: the effective settings.
        modalities: those whose encoders are wanted from the start.

    Attributes:
        changes: each service that was added or removed, for who follows them.
    """

    def __init__(self, settings: Settings, modalities: Iterable[str]) -> None:
        self._settings = settings
        self._services: dict[str, ComputeService] = {}
        self._work = Background()
        # As many as there are lanes, and those are read as they come.
        self.changes: asyncio.Queue[ComputeService] = asyncio.Queue()
        for modality in sorted(modalities):
            for lane in settings.encoder_addresses(modality):
                self.add(lane)
        self.add(FUSION)

    async def __aenter__(self) -> "ComputeServices":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._work.close()
        for service in self:
            await service.channel.close()

    def __iter__(self) -> Iterator[ComputeService]:
        return iter(list(self._services.values()))

    def __getitem__(self, lane: str) -> ComputeService:
        return self._services[lane]

    def get(self, lane: str) -> ComputeService | None:
        """A service, None if it is none of those that are followed."""
        return self._services.get(lane)

    def add(self, lane: str) -> bool:
        """Has a service followed from now on; whether it was not before."""
        if lane in self._services:
            return False
        is_fusion = lane == FUSION
        at = self._settings.fusion_address if is_fusion else self._settings.encoder_addresses(modality_of(lane))[lane]
        channel = open_channel(self._settings, at)
        stub = fusion_pb2_grpc.FusionStub(channel) if is_fusion else encoder_pb2_grpc.EncoderStub(channel)
        service = self._services[lane] = ComputeService(lane, at, channel, stub)
        self.changes.put_nowait(service)
        return True

    def remove(self, lane: str) -> None:
        """A service is followed no more."""
        service = self._services.pop(lane)
        service.wanted = False
        self.changes.put_nowait(service)

    @property
    def encoders(self) -> list[ComputeService]:
        """All that are followed."""
        return [service for service in self if service.lane != FUSION]

    def encoder(self, lane: str) -> "encoder_pb2_grpc.EncoderAsyncStub":
        """To call an encoder."""
        return cast("encoder_pb2_grpc.EncoderAsyncStub", self._services[lane].stub)

    @property
    def fusion(self) -> "fusion_pb2_grpc.FusionAsyncStub":
        """To call fusion."""
        return cast("fusion_pb2_grpc.FusionAsyncStub", self._services[FUSION].stub)

    @property
    def resources(self) -> Mapping[str, str]:
        """What each service computes on, by lane, as far as it is known."""
        return {service.lane: service.resource for service in self if service.resource}

    def missing(self) -> list[str]:
        """The lanes that are not serving now."""
        return [service.lane for service in self if not service.serving]

    async def check_up(self, lane: str, seconds: float) -> None:
        """Waits for a service for so long.

        Raises:
            ServiceUnavailable: it is not there.
        """
        service = self._services[lane]
        try:
            async with asyncio.timeout(seconds):
                await service.up.wait()
        except TimeoutError:
            reason = service.refused or f"does not answer at {service.address}"
            raise ServiceUnavailable(f"service {service.name} {reason}") from None

    async def load(self, lane: str, model: str) -> None:
        """Has a service load a model, `name@revision`; where it has it already, nothing happens.

        Raises:
            PackageError: the package is wrong, or is of another revision there.
            MoselError: whatever else went wrong; ServiceUnavailable if the service went away.
        """
        service = self._services[lane]
        try:
            await service.stub.Load(service_pb2.LoadRequest(model=model), timeout=_LOAD_TIMEOUT_S)
        except grpc.RpcError as error:
            raise error_from_rpc(error, service.name, {Unreachable: PackageError}) from None

    async def unload(self, lane: str, model: str) -> None:
        """Has a service free a model's networks; one that is away, or is followed no more, has none."""
        service = self._services.get(lane)
        if service is None:
            return
        try:
            await service.stub.Unload(service_pb2.UnloadRequest(model=model), timeout=_UNLOAD_TIMEOUT_S)
        except grpc.RpcError as error:
            log.info("not unloaded", extra={"peer": lane, "model": model, "reason": error.code().name})

    def release(self, lane: str, slots: Sequence[tensor_pb2.ArenaSlot]) -> None:
        """Tells an encoder that nobody reads these slots any more: one call at a time, and again until it answers."""
        service = self._services[lane]
        service.released += slots
        if not service.releasing:
            service.releasing = True
            self._work.start(self._release(service), f"release {lane}")

    async def _release(self, service: ComputeService) -> None:
        try:
            while slots := service.released:
                service.released = []
                request = tensor_pb2.ReleaseSlots(slots=slots)
                try:
                    await self.encoder(service.lane).Release(request, timeout=STATUS_TIMEOUT_S)
                except grpc.RpcError as error:
                    log.info("release not delivered", extra={"peer": service.lane, "reason": error.code().name})
                    service.released = [*slots, *service.released]
                    await asyncio.sleep(_AGAIN_S)
                    await service.up.wait()
        finally:
            service.releasing = False

    def statistics(self) -> dict[str, int]:
        """Slots that encoders were not told of yet."""
        return {"released_slots_waiting": sum(len(service.released) for service in self)}

    async def statuses(self) -> list[service_pb2.ServiceStatus]:
        """The state of every service that computes; one that does not answer is not ready."""
        return list(await asyncio.gather(*map(_status, self)))

    async def metrics(self) -> list[service_pb2.ServiceMetrics]:
        """The metrics of every service that computes; those of one that does not answer have no text."""
        return list(await asyncio.gather(*map(_metrics, self)))


async def _status(service: ComputeService) -> service_pb2.ServiceStatus:
    try:
        said = await service.stub.Status(service_pb2.StatusRequest(), timeout=STATUS_TIMEOUT_S)
    except grpc.RpcError as error:
        detail = f"does not answer: {error.code().name}"
        return service_pb2.ServiceStatus(name=service.name, address=service.address, detail=detail)
    if not service.refused:
        return said
    # What it said is its own.
    status = service_pb2.ServiceStatus()
    status.CopyFrom(said)
    status.ready, status.detail = False, service.refused
    return status


async def _metrics(service: ComputeService) -> service_pb2.ServiceMetrics:
    try:
        return await service.stub.Metrics(service_pb2.MetricsRequest(), timeout=STATUS_TIMEOUT_S)
    except grpc.RpcError:
        return service_pb2.ServiceMetrics(service=service.name)
