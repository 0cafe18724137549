"""gRPC in front of `Dispatcher`: convert, call, convert back."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator

from mosel.observability.metrics import Metrics
from mosel.runtime.service import Context, answers_with_status
from mosel.v1 import gateway_pb2, selector_pb2, selector_pb2_grpc, service_pb2
from selector.dispatcher import Dispatcher
from selector.gateway_session import GatewaySession
from selector.services.compute_services import ComputeServices
from selector.services.model_loader import ModelLoader


class SelectorServicer(selector_pb2_grpc.SelectorServicer):
    """Serves `mosel.v1.Selector`.

    Args:
        director: owns the jobs.
        models: those that are loaded.
        peers: the services that compute.
        address: where this service listens.
        metrics: of this process.
    """

    def __init__(
        self, director: Dispatcher, models: ModelLoader, peers: ComputeServices, address: str, metrics: Metrics
    ) -> None:
        self._director, self._models, self._peers = director, models, peers
        self._address, self._metrics = address, metrics
        self._numbers = itertools.count(1)

    async def Connect(
        self, request_iterator: AsyncIterator[selector_pb2.GatewayMessage], context: Context
    ) -> AsyncIterator[selector_pb2.SelectorMessage]:
        session = GatewaySession(f"gateway-{next(self._numbers)}")
        self._director.connect(session)
        reading = asyncio.create_task(self._read(session, request_iterator))
        try:
            while (message := await session.outbox.get()) is not None:
                yield message
        finally:
            reading.cancel()
            # Nothing that the gateway said may have effects once it is forgotten.
            await asyncio.wait([reading])
            self._director.disconnect(session)
            self._peers.gateway_went(session.name)

    async def _read(self, session: GatewaySession, messages: AsyncIterator[selector_pb2.GatewayMessage]) -> None:
        """Answers are heard at once, for what else was said may wait for them; the rest is followed in its order."""
        rest: asyncio.Queue[selector_pb2.GatewayMessage] = asyncio.Queue()
        try:
            async with asyncio.TaskGroup() as tasks:
                following = tasks.create_task(self._follow(session, rest))
                async for message in messages:
                    if message.HasField("fetch_address"):
                        session.heard(message.fetch_address)
                    else:
                        rest.put_nowait(message)
                following.cancel()
        finally:
            session.outbox.put_nowait(None)

    async def _follow(self, session: GatewaySession, messages: "asyncio.Queue[selector_pb2.GatewayMessage]") -> None:
        while True:
            message = await messages.get()
            if message.HasField("job"):
                self._director.submit(session, message.job)
            elif message.HasField("cancel"):
                self._director.cancel(message.cancel.job_id)
            elif message.HasField("models"):
                self._models.gateway_names(session.name, message.models.models)
            elif message.HasField("announcement"):
                await self._peers.gateway_came(session, message.announcement)

    @answers_with_status
    async def Plan(self, request: selector_pb2.JobDescription, context: Context) -> gateway_pb2.PlanReply:
        return self._director.plan(request)

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
    async def Status(self, request: service_pb2.StatusRequest, context: Context) -> service_pb2.StatusReply:
        own = service_pb2.ServiceStatus(
            name="selector",
            address=self._address,
            ready=True,
            pid=os.getpid(),
            counters=self._director.statistics() | self._peers.attachments.statistics(),
            edges=self._peers.edges(),
        )
        return service_pb2.StatusReply(services=[own, *await self._peers.statuses()])

    @answers_with_status
    async def Metrics(self, request: service_pb2.MetricsRequest, context: Context) -> service_pb2.MetricsReply:
        own, others = await asyncio.gather(self._metrics.page(), self._peers.metrics())
        return service_pb2.MetricsReply(
            services=[service_pb2.ServiceMetrics(service=self._metrics.service, text=own), *others]
        )
