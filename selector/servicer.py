"""gRPC in front of the dispatcher and the model loader: convert, call, convert back."""

import asyncio
import os
from collections.abc import AsyncIterator

import grpc

from mosel.observability.metrics import Metrics
from mosel.runtime.service import Context, answers_with_status
from mosel.v1 import gateway_pb2, selector_pb2, selector_pb2_grpc, service_pb2
from selector.dispatcher import Dispatcher
from selector.events import GatewayGone, JobSubmitted, JobUnwanted, TimePassed
from selector.gateway_session import Gateways, GatewaySession
from selector.services.compute_services import ComputeServices
from selector.services.model_loader import ModelLoader
from selector.services.tensor_paths import TensorPaths


class SelectorServicer(selector_pb2_grpc.SelectorServicer):
    """Serves `mosel.v1.Selector`.

    Args:
        dispatcher: owns the jobs.
        models: those that are loaded.
        services: those that compute.
        paths: of tensors between them.
        gateways: those that are connected.
        address: where this service listens.
        metrics: of this process.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        models: ModelLoader,
        services: ComputeServices,
        paths: TensorPaths,
        gateways: Gateways,
        address: str,
        metrics: Metrics,
    ) -> None:
        self._dispatcher, self._models, self._services = dispatcher, models, services
        self._paths, self._gateways = paths, gateways
        self._address, self._metrics = address, metrics

    @answers_with_status
    async def Connect(  # type: ignore[override]  # it writes by itself: what it writes may have to be given up
        self, request_iterator: AsyncIterator[selector_pb2.GatewayMessage], context: Context
    ) -> None:
        session = self._gateways.open()
        self._models.gateway_came(session)
        reading = asyncio.create_task(self._read(session, request_iterator))
        writing = asyncio.create_task(_write(session, context))
        overflow = asyncio.create_task(session.overflowed.wait())
        tasks = (reading, writing, overflow)
        try:
            await asyncio.wait((writing, overflow), return_when=asyncio.FIRST_COMPLETED)
            if session.overflowed.is_set():
                self._forget(session)
                # grpc loses a status that overtakes a message on its way (issue 36066): the gateway reads that first.
                await asyncio.wait([writing])
        finally:
            for task in tasks:
                task.cancel()
            # Nothing that the gateway said may have effects once it is forgotten.
            await asyncio.wait(tasks)
            self._forget(session)
        if session.overflowed.is_set():
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the gateway does not read what the selector says")
        for task in (reading, writing):
            if not task.cancelled():
                task.result()

    def _forget(self, session: GatewaySession) -> None:
        """A gateway is gone, or is treated so."""
        if self._gateways.get(session.name) is session:
            self._dispatcher.handle(GatewayGone(session))
            self._models.gateway_went(session)
            self._paths.gateway_went(session)
            self._gateways.close(session)

    async def _read(self, session: GatewaySession, messages: AsyncIterator[selector_pb2.GatewayMessage]) -> None:
        """Follows each message at once: none waits for another, and gRPC holds back a gateway that sends too fast."""
        try:
            async for message in messages:
                if session.overflowed.is_set():
                    # It is forgotten; it must be able to go on writing until it reads that.
                    continue
                if message.HasField("job"):
                    self._dispatcher.handle(JobSubmitted(session, message.job))
                elif message.HasField("cancel"):
                    self._dispatcher.handle(JobUnwanted(message.cancel.job_id))
                elif message.HasField("models"):
                    self._models.gateway_names(session, message.models.models)
                elif message.HasField("announcement"):
                    self._paths.gateway_came(session, message.announcement)
                elif message.HasField("fetch_address"):
                    session.heard(message.fetch_address)
        finally:
            session.end()

    @answers_with_status
    async def Plan(self, request: selector_pb2.JobDescription, context: Context) -> gateway_pb2.PlanReply:
        return self._dispatcher.plan(request)

    @answers_with_status
    async def LoadModel(self, request: gateway_pb2.LoadModelRequest, context: Context) -> selector_pb2.ModelState:
        return await self._models.load(request.model)

    @answers_with_status
    async def UnloadModel(
        self, request: gateway_pb2.UnloadModelRequest, context: Context
    ) -> gateway_pb2.UnloadModelReply:
        await self._models.unload(request.model)
        return gateway_pb2.UnloadModelReply()

    @answers_with_status
    async def Observe(  # type: ignore[override] # a coroutine that writes, so that cancelling it always reaches it
        self, request: gateway_pb2.ObserveRequest, context: Context
    ) -> None:
        self._models.check_loaded(request.model)
        with self._dispatcher.observations.of(request.model, request.share) as observed:
            while True:
                await context.write(observed.event())
                await observed.wait()
                # Samples are given up in time, whatever else happens or does not.
                self._dispatcher.handle(TimePassed())

    @answers_with_status
    async def Status(self, request: service_pb2.StatusRequest, context: Context) -> service_pb2.StatusReply:
        own = service_pb2.ServiceStatus(
            name="selector",
            address=self._address,
            ready=True,
            pid=os.getpid(),
            counters=self._dispatcher.statistics() | self._paths.attachments.statistics(),
            edges=self._paths.edges(),
        )
        return service_pb2.StatusReply(services=[own, *await self._services.statuses()])

    @answers_with_status
    async def Metrics(self, request: service_pb2.MetricsRequest, context: Context) -> service_pb2.MetricsReply:
        own, others = await asyncio.gather(self._metrics.page(), self._services.metrics())
        return service_pb2.MetricsReply(
            services=[service_pb2.ServiceMetrics(service=self._metrics.service, text=own), *others]
        )


async def _write(session: GatewaySession, context: Context) -> None:
    async for message in session.outgoing():
        await context.write(message)
