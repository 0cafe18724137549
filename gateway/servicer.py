"""gRPC in front of the gateway's logic: convert, call, convert back."""

import asyncio
import math
import os
import secrets
from collections import Counter
from collections.abc import Mapping
from operator import attrgetter

import grpc

from gateway.jobs import CheckedJob, check_request, reply_from
from gateway.selector_link import SelectorLink, slots_of
from mosel.config import Settings
from mosel.deadline import Deadline
from mosel.errors import MoselError, Overloaded
from mosel.model_package import ModelPackage
from mosel.service import Context, answers_with_status, deadline_of
from mosel.tensors import dtype_value
from mosel.transport import Publisher, SharedMemoryArena
from mosel.v1 import gateway_pb2, gateway_pb2_grpc, selector_pb2, service_pb2

# Above this many elements, checking and copying payloads would hold up other calls.
_OFF_LOOP_ELEMENTS = 256 * 1024


_Prepared = tuple[CheckedJob, selector_pb2.JobDescription, Deadline]


class GatewayServicer(gateway_pb2_grpc.GatewayServicer):
    """Serves `mosel.v1.Gateway`.

    Args:
        settings: limits.
        packages: the models by name.
        arena: where payloads are kept.
        publisher: puts them there.
        link: the stream to the selector.
    """

    def __init__(
        self,
        settings: Settings,
        packages: Mapping[str, ModelPackage],
        arena: SharedMemoryArena,
        publisher: Publisher,
        link: SelectorLink,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._settings, self._packages = settings, packages
        self._arena, self._publisher, self._link = arena, publisher, link

    @answers_with_status
    async def Predict(self, request: gateway_pb2.PredictRequest, context: Context) -> gateway_pb2.PredictReply:
        self.counters["requests"] += 1
        limits = self._settings.gateway
        if self._link.jobs_in_flight >= limits.max_jobs_in_flight:
            raise Overloaded(
                f"{self._link.jobs_in_flight} jobs are in flight, the most that gateway.max_jobs_in_flight allows"
            )
        self._link.check_connected()
        # From the shapes: to ask protobuf for its size makes it serialise everything.
        if sum(math.prod(payload.shape) for payload in request.payloads.values()) > _OFF_LOOP_ELEMENTS:
            job, description, deadline = await self._prepare_off_loop(request, context)
        else:
            try:
                job, description, deadline = self._prepare(request, context, wait_s=0.0)
            except Overloaded:
                # The arena is full: wait for a slot where it holds up nobody.
                job, description, deadline = await self._prepare_off_loop(request, context)
        result = await self._link.predict(description, deadline)
        self.counters.update(answered=1, items=job.size)
        return reply_from(job, result, deadline.remaining * 1000)

    async def _prepare_off_loop(self, request: gateway_pb2.PredictRequest, context: Context) -> _Prepared:
        wait_s = self._settings.transport.full_wait_ms / 1000
        preparing = asyncio.ensure_future(asyncio.to_thread(self._prepare, request, context, wait_s))
        try:
            return await asyncio.shield(preparing)
        except asyncio.CancelledError:
            # The thread goes on, and fills slots that no job will release.
            preparing.add_done_callback(self._give_back)
            raise

    def _give_back(self, preparing: asyncio.Future[_Prepared]) -> None:
        if not preparing.cancelled() and preparing.exception() is None:
            self._publisher.release(slots_of(preparing.result()[1]))

    def _prepare(self, request: gateway_pb2.PredictRequest, context: Context, wait_s: float) -> _Prepared:
        limits = self._settings.gateway
        job = check_request(request, self._packages, limits.max_items_per_job)
        slo_ms = limits.default_deadline_ms if job.latency_slo_ms is None else job.latency_slo_ms
        deadline = min(Deadline.after(slo_ms / 1000), deadline_of(context), key=attrgetter("at"))
        lease_s = deadline.remaining + self._settings.transport.lease_grace_ms / 1000
        description = selector_pb2.JobDescription(
            job_id=secrets.token_bytes(16),
            model=job.package.name,
            size=job.size,
            modalities=job.modalities,
            exact=job.exact,
        )
        try:
            for name in job.modalities:
                dtype, array = job.package.modalities[name].dtype, job.payloads[name]
                ref = self._publisher.publish(dtype, array.shape, array.data.cast("B"), lease_s, wait_s)
                description.payloads[name].CopyFrom(ref)
        except MoselError:
            self._publisher.release(slots_of(description))
            raise
        if job.min_accuracy is not None:
            description.min_accuracy = job.min_accuracy
        description.budget_us = max(round(deadline.remaining * 1e6), 0)
        return job, description, deadline

    @answers_with_status
    async def ListModels(self, request: gateway_pb2.ListModelsRequest, context: Context) -> gateway_pb2.ListModelsReply:
        reply = gateway_pb2.ListModelsReply()
        for name, package in self._packages.items():
            state = self._link.models.get(name, selector_pb2.ModelState())
            model = reply.models.add(
                name=name,
                version=package.version,
                description=package.description,
                metric=package.metric,
                ready=state.ready,
                sets=state.sets,
                labels=package.output.labels,
            )
            for modality, spec in package.modalities.items():
                model.modalities.add(name=modality, dtype=dtype_value(spec.dtype), shape=spec.shape)
        return reply

    @answers_with_status
    async def Status(self, request: service_pb2.StatusRequest, context: Context) -> service_pb2.StatusReply:
        reply = service_pb2.StatusReply()
        counters = dict(self.counters) | self._arena.statistics().as_counters()
        reply.services.add(
            name="gateway",
            address=self._settings.gateway_address,
            ready=not self._link.refused and any(state.ready for state in self._link.models.values()),
            detail=self._link.refused or ("" if self._link.models else "selector is not reachable"),
            pid=os.getpid(),
            counters=counters | {"jobs_in_flight": self._link.jobs_in_flight},
        )
        try:
            reply.services.extend((await self._link.statuses()).services)
        except grpc.RpcError as error:
            reply.services.add(
                name="selector", address=self._settings.selector_address, detail=f"does not answer: {error.code().name}"
            )
        return reply
