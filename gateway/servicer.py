"""gRPC in front of the gateway's logic: convert, call, convert back."""

import asyncio
import contextlib
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial

import grpc
from google.protobuf.message import DecodeError

from gateway.answers import accepted_event, reply_from, results_event, summary_event
from gateway.intake import Intake, description_of, is_large
from gateway.jobs import CheckedJob, Times, check_spec, times_of
from gateway.registry import JobRegistry, OpenJob
from gateway.selector_link import SelectorLink
from gateway.upload import ArrivingBytes, Read, Upload, read_batch, read_end, read_spec
from mosel.config import Settings
from mosel.deadline import Deadline
from mosel.errors import InvalidRequest, MoselError
from mosel.model_package import ModelPackage
from mosel.service import MAX_DEADLINE_S, Context, answers_with_status, deadline_of
from mosel.tensors import dtype_value
from mosel.transport import Publisher, SharedMemoryArena
from mosel.v1 import gateway_pb2, gateway_pb2_grpc, selector_pb2, service_pb2

_CANCELLED_WITHIN_S = 0.02


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
        self._settings, self._packages, self._arena, self._link = settings, packages, arena, link
        self._intake = Intake(settings, packages, publisher)
        self._registry = JobRegistry(settings.gateway.max_jobs_in_flight)
        limit = settings.transport.gateway_arena_mib * 1024 * 1024
        self._arriving = ArrivingBytes(arena.largest_slot, limit, "transport.gateway_arena_mib")

    @answers_with_status
    async def Predict(self, request: gateway_pb2.PredictRequest, context: Context) -> gateway_pb2.PredictReply:
        self._admit()
        prepared = await self._intake.request(request, deadline_of(context))
        job, times = prepared.job, prepared.times
        with (
            self._registry.open(prepared.description.job_id, job.package.name, job.size, times.ends) as entry,
            self._link.submit(prepared.description) as answers,
        ):
            entry.under_way()
            groups = [group async for finished in answers for group in finished]
            reply = reply_from(job, groups, answers.result, times.deadline.remaining * 1000)
            entry.status.items_done = job.size
        self.counters.update(answered=1, items=job.size)
        return reply

    @answers_with_status
    async def SubmitJob(  # type: ignore[override] # a coroutine that writes, so that cancelling it always reaches it
        self, request_iterator: object, context: Context
    ) -> None:
        limits, read = self._settings.gateway, partial(_read, context)
        spec = await read_spec(read, limits.default_deadline_ms / 1000)
        self._admit()
        job = check_spec(spec, self._packages, limits.max_items_per_job)
        times = times_of(job, deadline_of(context), limits.default_deadline_ms / 1000)
        job_id = secrets.token_bytes(16)
        with self._registry.open(job_id, job.package.name, job.size, times.ends) as entry:
            await context.write(accepted_event(job_id))
            description = await self._receive(job_id, job, times, read, entry)
            with self._link.submit(description) as answers, _no_more(read, entry):
                entry.under_way()
                groups = []
                async for finished in answers:
                    for group in finished:
                        groups.append(group)
                        entry.status.items_done += len(group.items)
                        await context.write(results_event(job, group, entry.status.items_done))
            summary = summary_event(job, groups, answers.result, times.deadline.remaining * 1000)
        self.counters.update(answered=1, items=job.size)
        await context.write(summary)

    @answers_with_status
    async def Plan(self, request: gateway_pb2.PlanRequest, context: Context) -> gateway_pb2.PlanReply:
        limits = self._settings.gateway
        job = check_spec(request.job, self._packages, limits.max_items_per_job)
        # How long the caller waits for the plan says nothing about the job.
        times = times_of(job, Deadline.after(MAX_DEADLINE_S), limits.default_deadline_ms / 1000)
        return await self._link.plan(description_of(secrets.token_bytes(16), job, times), deadline_of(context))

    @answers_with_status
    async def GetJob(self, request: gateway_pb2.GetJobRequest, context: Context) -> gateway_pb2.JobStatus:
        return self._registry.status(request.job_id)

    @answers_with_status
    async def CancelJob(self, request: gateway_pb2.CancelJobRequest, context: Context) -> gateway_pb2.JobStatus:
        return self._registry.cancel(request.job_id)

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
        counters = dict(self.counters) | self._arena.statistics().as_counters() | self._registry.statistics()
        reply.services.add(
            name="gateway",
            address=self._settings.gateway_address,
            ready=not self._link.refused and any(state.ready for state in self._link.models.values()),
            detail=self._link.refused or ("" if self._link.models else "selector is not reachable"),
            pid=os.getpid(),
            counters=counters | self._arriving.statistics() | self._link.statistics(),
        )
        try:
            reply.services.extend((await self._link.statuses()).services)
        except grpc.RpcError as error:
            reply.services.add(
                name="selector", address=self._settings.selector_address, detail=f"does not answer: {error.code().name}"
            )
        return reply

    def _admit(self) -> None:
        """Raises ServiceError if no job can be taken now."""
        self.counters["requests"] += 1
        self._registry.check_room()
        self._link.check_connected()

    async def _receive(
        self, job_id: bytes, job: CheckedJob, times: Times, read: Read, entry: OpenJob
    ) -> selector_pb2.JobDescription:
        """The description of a job once its items are there."""
        with self._arriving.reserve(job):
            upload = Upload(job, self._settings.gateway.max_items_per_job)
            while not upload.complete:
                batch = await read_batch(read, upload)
                if is_large(batch.payloads):
                    await asyncio.to_thread(upload.add, batch)
                else:
                    upload.add(batch)
                entry.status.items_received = upload.received
            prepared = await self._intake.upload(job_id, job, upload.payloads, times)
            return prepared.description


async def _read(context: Context) -> gateway_pb2.SubmitJobRequest | None:
    try:
        message = await context.read()
    except DecodeError:
        raise InvalidRequest("the stream has bytes that are no message that SubmitJob knows") from None
    if message is grpc.aio.EOF:
        # A call that its caller cancels ends its messages, too, and grpc says a moment later that it was cancelled.
        await asyncio.sleep(_CANCELLED_WITHIN_S)
    return None if message is grpc.aio.EOF else message


@contextlib.contextmanager
def _no_more(read: Read, entry: OpenJob) -> Iterator[None]:
    """Ends the job if the caller sends another message inside the block."""

    async def watch() -> None:
        try:
            await read_end(read)
        except MoselError as error:
            entry.end(error)

    watching = asyncio.create_task(watch(), name="end of a job's messages")
    try:
        yield
    finally:
        watching.cancel()
