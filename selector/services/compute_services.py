"""The services that compute: channels to them, and whether they are there."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mosel.config import Settings
from mosel.errors import PackageError, ServiceUnavailable, Unreachable
from mosel.modality import FUSION, modality_of
from mosel.runtime.background import Background
from mosel.runtime.channels import open_channel
from mosel.status import error_from_rpc
from mosel.transport.host import host_identity
from mosel.v1 import (
    arena_pb2,
    encoder_pb2_grpc,
    fusion_pb2_grpc,
    selector_pb2,
    service_pb2,
    tensor_pb2,
)
from selector.core.stages import service_name
from selector.gateway_session import GatewaySession
from selector.services.attachments import Attachments, Edge, Rung

# How long the first measurement waits for services that are still starting, so that they do not disturb it.
_ALL_THERE_S = 30.0
_STATUS_TIMEOUT_S = 1.0
_ATTACH_TIMEOUT_S = 5.0
_LOAD_TIMEOUT_S = 600.0
_UNLOAD_TIMEOUT_S = 5.0
_RECONNECT_S = 0.1

log = logging.getLogger(__name__)


class ComputeServices:
    """Encoders and fusion, by lane; a context manager that owns their channels.

    Args:
        settings: the effective settings.
        modalities: those whose encoders are followed from the start.
        prepare: makes a service ready that has come; called with its lane and the models that it has.
        changed: called with a lane's name, whether it is up and what it computes on, each time that changes.
        let_go: called with a lane's name when it is about to end; returns when nobody needs it any more.

    Attributes:
        attachments: how tensors get from each producer to each consumer.
        encoders, fusion: to call them.
    """

    def __init__(
        self,
        settings: Settings,
        modalities: Iterable[str],
        prepare: Callable[[str, Sequence[str]], Awaitable[None]],
        changed: Callable[[str, bool, str], None],
        let_go: Callable[[str], Coroutine[None, None, None]],
    ) -> None:
        self._settings, self._prepare, self._changed, self._let_go = settings, prepare, changed, let_go
        self._required = tensor_pb2.Rung.Value(settings.transport.require.upper())
        encoders = [settings.encoder_addresses(modality) for modality in sorted(modalities)]
        self._addresses = {lane: at for of_one in encoders for lane, at in of_one.items()}
        self._addresses[FUSION] = settings.fusion_address
        self._serving: dict[str, bool] = dict.fromkeys(self._addresses, False)
        # Those that `changed` has called up.
        self._up: dict[str, asyncio.Event] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self.encoders: dict[str, encoder_pb2_grpc.EncoderAsyncStub] = {}
        self._resources: dict[str, str] = {}
        self._all_known = asyncio.Event()
        self._work = Background()
        # Their health streams.
        self._watches: dict[str, grpc.aio.UnaryStreamCall[Any, Any]] = {}
        self._refused: dict[str, str] = {}
        self._gateways: dict[str, GatewaySession] = {}
        self.attachments = Attachments(self._open_arena, self._fetch_from)

    async def __aenter__(self) -> "ComputeServices":
        for name in self._addresses:
            self._follow(name)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._work.close()
        for channel in self._channels.values():
            await channel.close()

    @property
    def resources(self) -> Mapping[str, str]:
        """What each service computes on, by lane, as far as it is known."""
        return self._resources

    async def check_up(self, name: str, seconds: float) -> None:
        """Waits for a service for so long; an encoder of a modality that no model had so far is followed from now on.

        Raises:
            ServiceUnavailable: it is not there.
        """
        if name not in self._addresses:
            self._addresses[name] = self._settings.encoder_addresses(modality_of(name))[name]
            self._serving[name] = False
            self._follow(name)
        try:
            async with asyncio.timeout(seconds):
                await self._up[name].wait()
        except TimeoutError:
            reason = self._refused.get(name, f"does not answer at {self._addresses[name]}")
            raise ServiceUnavailable(f"service {service_name(name)} {reason}") from None

    async def load(self, name: str, model: str) -> None:
        """Has a service load a model, `name@revision`; where it has it already, nothing happens.

        Raises:
            PackageError: the package is wrong, or is of another revision there.
            MoselError: whatever else went wrong; ServiceUnavailable if the service went away.
        """
        try:
            await self._stub(name).Load(service_pb2.LoadRequest(model=model), timeout=_LOAD_TIMEOUT_S)
        except grpc.RpcError as error:
            raise error_from_rpc(error, service_name(name), {Unreachable: PackageError}) from None

    async def unload(self, name: str, model: str) -> None:
        """Has a service free a model's networks; one that is away has none."""
        try:
            await self._stub(name).Unload(service_pb2.UnloadRequest(model=model), timeout=_UNLOAD_TIMEOUT_S)
        except grpc.RpcError as error:
            log.info("not unloaded", extra={"peer": name, "model": model, "reason": error.code().name})

    def missing(self) -> list[str]:
        """The lanes that are not serving now."""
        return [name for name, serving in self._serving.items() if not serving]

    async def release(self, name: str, slots: list[tensor_pb2.ArenaSlot]) -> None:
        """Tells an encoder that nobody reads these slots any more; if it is away, they expire there."""
        try:
            await self.encoders[name].Release(tensor_pb2.ReleaseSlots(slots=slots), timeout=_STATUS_TIMEOUT_S)
        except grpc.RpcError as error:
            log.info("release not delivered", extra={"peer": name, "reason": error.code().name})

    async def gateway_came(self, gateway: GatewaySession, announcement: arena_pb2.Announcement) -> None:
        """Has every encoder open a gateway's arena; the gateway is told how payloads travel, now and at each change."""
        self.attachments.announce(gateway.name, announcement)
        self._gateways[gateway.name] = gateway
        for encoder in self._serving_encoders():
            await self.attachments.attach(gateway.name, encoder)
        self._tell_gateways()

    def gateway_went(self, name: str) -> None:
        """Has every encoder close a gateway's arena."""
        self._gateways.pop(name, None)
        # By itself: whoever followed the gateway may be cancelled for the same reason, in the middle of it.
        self._work.start(self._close_arenas(name), f"close arenas of {name}")

    async def statuses(self) -> list[service_pb2.ServiceStatus]:
        """The state of every service that computes; one that does not answer is not ready."""
        return list(await asyncio.gather(*(self._status(name) for name in self._addresses)))

    async def metrics(self) -> list[service_pb2.ServiceMetrics]:
        """The metrics of every service that computes; those of one that does not answer have no text."""
        return list(await asyncio.gather(*(self._metrics(name) for name in self._addresses)))

    def edges(self) -> list[service_pb2.EdgeStatus]:
        """How tensors travel, from every producer to every consumer."""
        edges = self.attachments.statuses()
        for edge in edges:
            edge.consumer = service_name(edge.consumer)
            if edge.producer in self._addresses:
                edge.producer = service_name(edge.producer)
        return edges

    async def _status(self, name: str) -> service_pb2.ServiceStatus:
        try:
            status = await self._stub(name).Status(service_pb2.StatusRequest(), timeout=_STATUS_TIMEOUT_S)
            if name in self._refused:
                status.ready, status.detail = False, self._refused[name]
            return status
        except grpc.RpcError as error:
            detail = f"does not answer: {error.code().name}"
            return service_pb2.ServiceStatus(name=service_name(name), address=self._addresses[name], detail=detail)

    def _follow(self, name: str) -> None:
        channel = self._channels[name] = open_channel(self._settings, self._addresses[name])
        if name == FUSION:
            self.fusion = fusion_pb2_grpc.FusionStub(channel)
        else:
            self.encoders[name] = encoder_pb2_grpc.EncoderStub(channel)
        self._up[name] = asyncio.Event()
        self._work.start(self._watch(name), f"watch {name}")

    async def _metrics(self, name: str) -> service_pb2.ServiceMetrics:
        try:
            return await self._stub(name).Metrics(service_pb2.MetricsRequest(), timeout=_STATUS_TIMEOUT_S)
        except grpc.RpcError:
            return service_pb2.ServiceMetrics(service=service_name(name))

    def doubt(self, name: str) -> None:
        """A call could not reach a service: it is away from now on, until its health was asked for anew."""
        if self._up[name].is_set():
            self._watches[name].cancel()
            self._went(name)

    async def _watch(self, name: str) -> None:
        """Follows a service's health for as long as this object lives."""
        stub = health_pb2_grpc.HealthStub(self._channels[name])
        while True:
            service = "mosel.v1.Fusion" if name == FUSION else "mosel.v1.Encoder"
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=service))  # type: ignore[attr-defined]
            self._watches[name] = watch
            try:
                async for reply in (replies := aiter(watch)):
                    if reply.status != health_pb2.HealthCheckResponse.SERVING:
                        if self._serving[name]:
                            await _first(self._let_go(name), anext(replies, None))
                        # Leaving the loop does not end the stream, and a service that stops waits for it.
                        watch.cancel()
                        break
                    await self._note(name, serving=True)
            except grpc.RpcError as error:
                log.debug("not reachable", extra={"peer": name, "reason": error.code().name})
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                log.info("doubted", extra={"peer": name})
            except ServiceUnavailable as error:
                watch.cancel()
                log.info("went away", extra={"peer": name, "reason": str(error)})
            await self._note(name, serving=False)
            await asyncio.sleep(_RECONNECT_S)

    async def _note(self, name: str, serving: bool) -> None:
        if serving == self._serving[name]:
            return
        self._serving[name] = serving
        log.info("peer", extra={"peer": name, "serving": serving})
        if serving:
            status = await self._status(name)
            self._resources[name] = _resource_in(status)
            if self._resources.keys() == self._addresses.keys():
                self._all_known.set()
            await self._attach(name)
            await self._all_there()
            await self._prepare(name, status.models)
            # First: what it cannot reach in an arena must not be sent to it as a ref.
            self._tell_gateways()
            if name == FUSION:
                # It may have come to where other embeddings reach it than before.
                for encoder in [lane for lane in self.encoders if self._up[lane].is_set() or lane in self._refused]:
                    self._use_or_refuse(encoder)
            self._use_or_refuse(name)
        else:
            self._went(name)
            self._refused.pop(name, None)
            await self._close_arenas(name)
            self._tell_gateways()

    def _went(self, name: str) -> None:
        """A service is used no more, if it was."""
        if self._up[name].is_set():
            self._up[name].clear()
            self._changed(name, False, "")

    async def _attach(self, name: str) -> None:
        """Proves the paths to and from a service before anything is sent along them."""
        if name == FUSION:
            for encoder in self._serving_encoders():
                await self.attachments.attach(encoder, FUSION)
            return
        announcement = await self.encoders[name].Announce(arena_pb2.AnnounceRequest(), timeout=_STATUS_TIMEOUT_S)
        self.attachments.announce(name, announcement)
        if self._serving[FUSION]:
            await self.attachments.attach(name, FUSION)
        for gateway in list(self._gateways):
            await self.attachments.attach(gateway, name)

    def _use_or_refuse(self, name: str) -> None:
        """Takes a service that is prepared into use, but not if its embeddings travel worse than is required."""
        reason = ""
        if name != FUSION and self._serving[FUSION]:
            reason = self._why_too_slow("embeddings", self.attachments.worst(name, [FUSION]))
        if reason:
            self._refused[name] = reason
            log.error("refused", extra={"peer": name, "reason": reason})
            self._went(name)
            return
        self._refused.pop(name, None)
        if not self._up[name].is_set():
            self._changed(name, True, self._resources[name] or "cpu")
            self._up[name].set()

    def _tell_gateways(self) -> None:
        for name, gateway in self._gateways.items():
            edge = self.attachments.worst(name, self._serving_encoders())
            # Payloads are in host memory.
            refused = self._why_too_slow("payloads", edge, tensor_pb2.POSIX_SHM)
            gateway.send(transport=selector_pb2.PayloadTransport(rung=edge.rung, refused=refused))

    def _why_too_slow(self, tensors: str, edge: Edge, best: Rung = tensor_pb2.CUDA_IPC) -> str:
        """Why an edge is not what `transport.require` asks for, or not `best` where that is less; empty if it is."""
        if edge.rung >= min(self._required, best):
            return ""
        required, rung = (tensor_pb2.Rung.Name(rung).lower() for rung in (self._required, edge.rung))
        return f"transport.require is {required}, but {tensors} travel {rung}: {edge.reason}"

    def _stub(self, name: str) -> "encoder_pb2_grpc.EncoderAsyncStub | fusion_pb2_grpc.FusionAsyncStub":
        """For what every service that computes can be asked."""
        return self.fusion if name == FUSION else self.encoders[name]

    def _serving_encoders(self) -> list[str]:
        return [name for name, serving in self._serving.items() if serving and name != FUSION]

    async def _open_arena(self, consumer: str, arena: arena_pb2.ArenaDescription) -> arena_pb2.PreflightReport:
        try:
            return await self._stub(consumer).OpenArena(
                arena_pb2.OpenArenaRequest(arena=arena), timeout=_ATTACH_TIMEOUT_S
            )
        except grpc.RpcError as error:
            return arena_pb2.PreflightReport(reason=f"the consumer does not answer: {error.code().name}")

    async def _fetch_from(self, producer: str, consumer: str) -> selector_pb2.FetchAddress:
        if self._required > tensor_pb2.FETCH:
            return selector_pb2.FetchAddress(reason=f"transport.require is {self._settings.transport.require}")
        if producer in self._addresses:
            return selector_pb2.FetchAddress(address=self._addresses[producer])
        address = self._addresses[consumer]
        if producer not in self._gateways or address.startswith("unix:"):
            return selector_pb2.FetchAddress()
        return await self._gateways[producer].fetch_address(address)

    async def _close_arenas(self, producer: str) -> None:
        for consumer, arena in self.attachments.forget(producer):
            request = arena_pb2.CloseArenaRequest(arena_id=arena.arena_id, epoch=arena.epoch)
            with contextlib.suppress(grpc.RpcError):
                await self._stub(consumer).CloseArena(request, timeout=_STATUS_TIMEOUT_S)

    async def _all_there(self) -> None:
        """Waits for services that are still starting: what they do would disturb the first measurements."""
        try:
            async with asyncio.timeout(_ALL_THERE_S):
                await self._all_known.wait()
        except TimeoutError:
            log.warning("measuring while services are missing", extra={"missing": self.missing()})
            # What did not come by now may never come: whatever starts again must not wait for it once more.
            self._all_known.set()


def _resource_in(status: service_pb2.ServiceStatus) -> str:
    """What a service computes on, by a name that no other host has; empty if it is not known."""
    if status.resource == "cpu" and status.boot_id not in ("", host_identity().boot_id):
        return f"cpu of {status.boot_id}"
    return status.resource


async def _first(*ways: Awaitable[object]) -> None:
    """Waits until one is over, however it ends, and cancels the others."""
    tasks = [asyncio.ensure_future(way) for way in ways]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
