"""gRPC in front of `Predictor`: convert, call, convert back."""

import asyncio
import os
from functools import partial
from pathlib import Path

from fusion.predictor import Predictor, answers_of
from mosel.compute.timing import latency_points
from mosel.compute.workers import Workers
from mosel.modality import format_set
from mosel.observability.compute_observer import ComputeObserver
from mosel.observability.metrics import MIXED, Metrics, show_fetched
from mosel.observability.tracing import OFF, Tracing
from mosel.packages.model_package import find_package
from mosel.runtime.service import Context, answers_with_status, deadline_of
from mosel.transport.host import host_identity
from mosel.transport.preflight import preflight
from mosel.transport.torch_exchange import TensorReader
from mosel.v1 import arena_pb2, fusion_pb2, fusion_pb2_grpc, service_pb2


class FusionServicer(fusion_pb2_grpc.FusionServicer):
    """Serves `mosel.v1.Fusion`.

    Args:
        predictor: the networks.
        workers: the threads that they run on.
        reader: opens the arenas of encoders.
        address: where this service listens.
        models_dir: where models are.
        tracing: records the steps of calls.
    """

    def __init__(
        self,
        predictor: Predictor,
        workers: Workers,
        reader: TensorReader,
        address: str,
        models_dir: Path,
        tracing: Tracing = OFF,
    ) -> None:
        self._predictor, self._workers, self._reader = predictor, workers, reader
        self._address, self._models_dir = address, models_dir
        self._metrics = Metrics("fusion")
        self._observer = ComputeObserver(self._metrics, tracing, "fuse", "modality_set", workers.statistics)
        text = "Embedding bytes that were read."
        self._metrics.counter("mosel_embedding_read_bytes_total", text, (), lambda: {(): reader.bytes_read})
        show_fetched(self._metrics, reader.statistics)

    @answers_with_status
    async def Fuse(self, request: fusion_pb2.FuseRequest, context: Context) -> fusion_pb2.FuseReply:
        groups = [{name: rows.rows for name, rows in group.rows.items()} for group in request.groups]
        sets = {format_set(group) for group in groups}
        with self._observer.follow("fuse", request, sets.pop() if len(sets) == 1 else MIXED) as call:
            deadline = deadline_of(context)
            outputs, call.seconds = await self._workers.run(
                lambda: self._predictor.fuse(request.model, groups, deadline, from_payloads=request.from_payloads),
                deadline,
                "fusing",
            )
            call.items = sum(output.shape[0] for output in outputs)
        compute_us = round(call.seconds * 1e6)
        if request.answers_only:
            return fusion_pb2.FuseReply(answers=answers_of(outputs), compute_us=compute_us)
        return fusion_pb2.FuseReply(outputs=outputs, compute_us=compute_us)

    @answers_with_status
    async def OpenArena(self, request: arena_pb2.OpenArenaRequest, context: Context) -> arena_pb2.PreflightReport:
        return await asyncio.to_thread(preflight, self._reader, request)

    @answers_with_status
    async def CloseArena(self, request: arena_pb2.CloseArenaRequest, context: Context) -> arena_pb2.CloseArenaReply:
        await asyncio.to_thread(self._reader.close, request.arena_id, request.epoch)
        return arena_pb2.CloseArenaReply()

    @answers_with_status
    async def Load(self, request: service_pb2.LoadRequest, context: Context) -> service_pb2.LoadReply:
        hosted = self._predictor.networks
        await self._workers.run_aside(lambda: hosted.load(find_package(self._models_dir, request.model)))
        return service_pb2.LoadReply()

    @answers_with_status
    async def Unload(self, request: service_pb2.UnloadRequest, context: Context) -> service_pb2.UnloadReply:
        await self._workers.run_aside(lambda: self._predictor.networks.unload(request.model))
        return service_pb2.UnloadReply()

    @answers_with_status
    async def Profile(self, request: fusion_pb2.ProfileFusionRequest, context: Context) -> service_pb2.ProfileReply:
        prepare = partial(self._predictor.ready_call, request.model, request.modality_set)
        return await latency_points(
            self._workers, prepare, request.batch_sizes, request.repeats, request.concurrency, deadline_of(context)
        )

    @answers_with_status
    async def Status(self, request: service_pb2.StatusRequest, context: Context) -> service_pb2.ServiceStatus:
        counters = dict(self._predictor.counters) | self._workers.statistics()
        counters |= self._reader.statistics()
        return service_pb2.ServiceStatus(
            name="fusion",
            address=self._address,
            ready=True,
            pid=os.getpid(),
            counters=counters,
            resource=self._predictor.resource,
            boot_id=host_identity().boot_id,
            models=self._predictor.networks.models,
            forms=self._predictor.networks.forms,
            joined_modalities=self._predictor.joined.modalities,
        )

    @answers_with_status
    async def Metrics(self, request: service_pb2.MetricsRequest, context: Context) -> service_pb2.ServiceMetrics:
        return service_pb2.ServiceMetrics(service=self._metrics.service, text=await self._metrics.page())
