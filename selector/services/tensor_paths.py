"""Has consumers open the arenas of producers, and tells gateways how their payloads travel."""

import asyncio
import contextlib
import logging
from collections.abc import Iterable

import grpc

from mosel.config import Settings
from mosel.errors import ServiceUnavailable
from mosel.modality import FUSION
from mosel.runtime.background import Background
from mosel.v1 import arena_pb2, selector_pb2, service_pb2, tensor_pb2
from selector.core.stages import service_name
from selector.gateway_session import Gateways, GatewaySession
from selector.services.attachments import Attachments, Edge, Rung
from selector.services.compute_services import STATUS_TIMEOUT_S, ComputeService, ComputeServices

_ATTACH_TIMEOUT_S = 5.0
# What a service answers that is not there, or is stopped.
_NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

log = logging.getLogger(__name__)


class TensorPaths:
    """The paths of tensors between gateways, encoders and fusion; a context manager.

    A consumer that does not open an arena in time counts as away (`mark_suspect`), so that it holds up nobody else.

    Args:
        settings: the effective settings.
        services: those that compute.
        gateways: those that are connected.

    Attributes:
        attachments: how tensors get from each producer to each consumer.
    """

    def __init__(self, settings: Settings, services: ComputeServices, gateways: Gateways) -> None:
        self._require, self._services, self._gateways = settings.transport.require, services, gateways
        self._required = tensor_pb2.Rung.Value(self._require.upper())
        self._work = Background()
        self.attachments = Attachments(self._open_arena, self._fetch_from)

    async def __aenter__(self) -> "TensorPaths":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._work.close()

    def gateway_came(self, gateway: GatewaySession, announcement: arena_pb2.Announcement) -> None:
        """Begins to have every encoder open a gateway's arena; then the gateway is told how payloads travel."""
        gateway.announced = True
        self.attachments.announce(gateway.name, announcement)
        self._tell(gateway)
        for encoder in self._serving_encoders():
            self._work.start(self._attach_gateway(gateway, encoder), f"attach {gateway.name} to {encoder.lane}")

    def gateway_went(self, gateway: GatewaySession) -> None:
        """Has every encoder close a gateway's arena."""
        self._work.start(self.detach(gateway.name), f"close arenas of {gateway.name}")

    async def attach(self, service: ComputeService) -> bool:
        """Proves the paths to and from a service before anything is sent along them; False if one does not answer.

        Raises:
            grpc.RpcError: the service does not answer.
        """
        if service.lane == FUSION:
            pairs = [(encoder.lane, service) for encoder in self._serving_encoders()]
        else:
            stub = self._services.encoder(service.lane)
            announcement = await stub.Announce(arena_pb2.AnnounceRequest(), timeout=STATUS_TIMEOUT_S)
            self.attachments.announce(service.lane, announcement)
            # What it was before has no slots any more.
            epochs = {announced.arena.epoch for announced in announcement.arenas}
            service.released = [slot for slot in service.released if slot.epoch in epochs]
            pairs = [(gateway.name, service) for gateway in self._gateways.announced()]
            fusion = self._services[FUSION]
            pairs += [(service.lane, fusion)] if fusion.serving else []
        return all(await asyncio.gather(*(self._attach(producer, consumer) for producer, consumer in pairs)))

    async def detach(self, name: str) -> None:
        """A gateway or a service is gone: consumers close its arenas."""
        await asyncio.gather(*(self._close_arena(*closed) for closed in self.attachments.forget(name)))

    def why_not(self, service: ComputeService) -> str:
        """Why an encoder must not be used: its embeddings travel worse than is required; empty if it may be."""
        if service.lane == FUSION or not self._services[FUSION].serving:
            return ""
        return self._why_too_slow("embeddings", self.attachments.worst(service.lane, [FUSION]))

    def tell_gateways(self) -> None:
        """Tells each gateway how payloads reach the encoders, if that has changed."""
        for gateway in self._gateways.announced():
            self._tell(gateway)

    def edges(self) -> list[service_pb2.EdgeStatus]:
        """How tensors travel, from every producer to every consumer."""
        edges = self.attachments.statuses()
        for edge in edges:
            edge.consumer = service_name(edge.consumer)
            if self._services.get(edge.producer) is not None:
                edge.producer = service_name(edge.producer)
        return edges

    async def _attach_gateway(self, gateway: GatewaySession, encoder: ComputeService) -> None:
        if await self._attach(gateway.name, encoder):
            self._tell(gateway)

    async def _attach(self, producer: str, consumer: ComputeService) -> bool:
        """Whether the consumer answered."""
        try:
            await self.attachments.attach(producer, consumer.lane)
        except ServiceUnavailable as error:
            log.warning("not attached", extra={"peer": consumer.lane, "producer": producer, "reason": str(error)})
            consumer.mark_suspect()
            return False
        return True

    def _tell(self, gateway: GatewaySession) -> None:
        is_attached = self.attachments.is_attached
        serving = self._serving_encoders()
        if any(encoder.up.is_set() and not is_attached(gateway.name, encoder.lane) for encoder in serving):
            # Jobs go on as the gateway was told before: at first inline, which every encoder understands.
            return
        edge = self.attachments.worst(gateway.name, self._attached(gateway, serving))
        # Payloads are in host memory.
        refused = self._why_too_slow("payloads", edge, tensor_pb2.POSIX_SHM)
        transport = selector_pb2.PayloadTransport(rung=edge.rung, refused=refused)
        if transport != gateway.transport:
            gateway.transport = transport
            gateway.send(transport=transport)

    def _attached(self, gateway: GatewaySession, encoders: Iterable[ComputeService]) -> list[str]:
        return [e.lane for e in encoders if self.attachments.is_attached(gateway.name, e.lane)]

    def _why_too_slow(self, tensors: str, edge: Edge, best: Rung = tensor_pb2.IN_PROCESS) -> str:
        """Why an edge is not what `transport.require` asks for, or not `best` where that is less; empty if it is."""
        if edge.rung >= min(self._required, best):
            return ""
        required, rung = (tensor_pb2.Rung.Name(rung).lower() for rung in (self._required, edge.rung))
        return f"transport.require is {required}, but {tensors} travel {rung}: {edge.reason}"

    def _serving_encoders(self) -> list[ComputeService]:
        return [encoder for encoder in self._services.encoders if encoder.serving]

    async def _open_arena(self, consumer: str, arena: arena_pb2.ArenaDescription) -> arena_pb2.PreflightReport:
        service = self._services.get(consumer)
        if service is None:
            raise ServiceUnavailable(f"service {service_name(consumer)} is not needed any more")
        try:
            return await service.stub.OpenArena(arena_pb2.OpenArenaRequest(arena=arena), timeout=_ATTACH_TIMEOUT_S)
        except grpc.RpcError as error:
            reason = f"the consumer does not answer: {error.code().name}"
            if error.code() in _NO_ANSWER:
                raise ServiceUnavailable(reason) from None
            return arena_pb2.PreflightReport(reason=reason)

    async def _fetch_from(self, producer: str, consumer: str) -> selector_pb2.FetchAddress:
        if self._required > tensor_pb2.FETCH:
            return selector_pb2.FetchAddress(reason=f"transport.require is {self._require}")
        encoder, gateway, reader = (
            self._services.get(producer), self._gateways.get(producer), self._services.get(consumer),
        )  # fmt: skip
        if encoder is not None:
            return selector_pb2.FetchAddress(address=encoder.address)
        if gateway is None or reader is None or reader.address.startswith("unix:"):
            return selector_pb2.FetchAddress()
        return await gateway.fetch_address(reader.address)

    async def _close_arena(self, consumer: str, arena: arena_pb2.ArenaDescription) -> None:
        if (service := self._services.get(consumer)) is not None:
            request = arena_pb2.CloseArenaRequest(arena_id=arena.arena_id, epoch=arena.epoch)
            with contextlib.suppress(grpc.RpcError):
                await service.stub.CloseArena(request, timeout=STATUS_TIMEOUT_S)
