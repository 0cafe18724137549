"""gRPC in front of `ModalityEncoder`: convert, call, convert back."""

import asyncio
import os
from functools import partial

from encoders.encoder import ModalityEncoder
from mosel.compute.timing import latency_points
from mosel.compute.workers import Workers
from mosel.config import Settings
from mosel.observability.compute_observer import ComputeObserver
from mosel.observability.metrics import Metrics, show_arenas, show_fetched, single
from mosel.observability.tracing import OFF, Tracing
from mosel.packages.model_package import find_package
from mosel.runtime.service import Context, answers_with_status, deadline_of
from mosel.transport import Reader
from mosel.transport.host import host_identity
from mosel.transport.preflight import preflight
from mosel.transport.torch_exchange import TensorPublisher
from mosel.v1 import arena_pb2, encoder_pb2, encoder_pb2_grpc, service_pb2, tensor_pb2


class EncoderServicer(encoder_pb2_grpc.EncoderServicer):
    """Serves `mosel.v1.Encoder`.

    Args:
        encoder: the networks.
        workers: the threads that they run on.
        reader: opens the arenas of gateways.
        publisher: keeps embeddings, and gives slots back.
        name: how people know this service.
        address: where it listens.
        settings: where models are, how long embeddings are kept, and how long to wait for room.
        tracing: records the steps of calls.
    """

    def __init__(
        self,
        encoder: ModalityEncoder,
        workers: Workers,
        reader: Reader,
        publisher: TensorPublisher,
        name: str,
        address: str,
        settings: Settings,
        tracing: Tracing = OFF,
    ) -> None:
        self._encoder, self._workers, self._reader, self._publisher = encoder, workers, reader, publisher
        self._address, self._models_dir = address, settings.models_dir
        transport = settings.transport
        self._lease_grace_s, self._full_wait_s = transport.lease_grace_ms / 1000, transport.full_wait_ms / 1000
        self._metrics = Metrics(name)
        self._observer = ComputeObserver(self._metrics, tracing, "encode", "modality", workers.statistics)
        text = "Payload bytes that were read: those of the chosen modalities alone."
        read = encoder.counters
        self._metrics.counter("mosel_payload_read_bytes_total", text, (), lambda: single(read, "payload_bytes_read"))
        show_fetched(self._metrics, reader.statistics)
        show_arenas(self._metrics, publisher.statistics)

    @answers_with_status
    async def Announce(self, request: arena_pb2.AnnounceRequest, context: Context) -> arena_pb2.Announcement:
        return self._publisher.announcement()

    @answers_with_status
    async def OpenArena(self, request: arena_pb2.OpenArenaRequest, context: Context) -> arena_pb2.PreflightReport:
        return await asyncio.to_thread(preflight, self._reader, request)

    @answers_with_status
    async def CloseArena(self, request: arena_pb2.CloseArenaRequest, context: Context) -> arena_pb2.CloseArenaReply:
        await asyncio.to_thread(self._reader.close, request.arena_id, request.epoch)
        return arena_pb2.CloseArenaReply()

    @answers_with_status
    async def Encode(self, request: encoder_pb2.EncodeRequest, context: Context) -> encoder_pb2.EncodeReply:
        deadline = deadline_of(context)
        lease_s = deadline.remaining + self._lease_grace_s
        modality = self._encoder.modality
        with self._observer.follow(f"encode {modality}", request, modality) as call:
            ref, call.seconds = await self._workers.run(
                lambda: self._encoder.encode(
                    request.model, request.rows, request.rung, lease_s, self._full_wait_s, deadline
                ),
                deadline,
                "encoding",
            )
            call.items = ref.shape[0]
        return encoder_pb2.EncodeReply(embeddings=ref, compute_us=round(call.seconds * 1e6))

    @answers_with_status
    async def Load(self, request: service_pb2.LoadRequest, context: Context) -> service_pb2.LoadReply:
        hosted = self._encoder.networks
        await self._workers.run_aside(lambda: hosted.load(find_package(self._models_dir, request.model)))
        return service_pb2.LoadReply()

    @answers_with_status
    async def Unload(self, request: service_pb2.UnloadRequest, context: Context) -> service_pb2.UnloadReply:
        await self._workers.run_aside(lambda: self._encoder.networks.unload(request.model))
        return service_pb2.UnloadReply()

    @answers_with_status
    async def Profile(self, request: encoder_pb2.ProfileEncoderRequest, context: Context) -> service_pb2.ProfileReply:
        prepare = partial(self._encoder.ready_call, request.model)
        return await latency_points(
            self._workers, prepare, request.batch_sizes, request.repeats, request.concurrency, deadline_of(context)
        )

    @answers_with_status
    async def Release(self, request: tensor_pb2.ReleaseSlots, context: Context) -> tensor_pb2.ReleaseReply:
        self._publisher.release(request.slots)
        return tensor_pb2.ReleaseReply()

    @answers_with_status
    async def Status(self, request: service_pb2.StatusRequest, context: Context) -> service_pb2.ServiceStatus:
        counters = dict(self._encoder.counters) | self._workers.statistics() | self._publisher.statistics()
        counters |= self._reader.statistics()
        return service_pb2.ServiceStatus(
            name=self._metrics.service,
            address=self._address,
            ready=True,
            pid=os.getpid(),
            counters=counters,
            resource=self._encoder.resource,
            boot_id=host_identity().boot_id,
            models=self._encoder.networks.models,
            forms=self._encoder.networks.forms,
        )

    @answers_with_status
    async def Metrics(self, request: service_pb2.MetricsRequest, context: Context) -> service_pb2.ServiceMetrics:
        return service_pb2.ServiceMetrics(service=self._metrics.service, text=await self._metrics.page())
