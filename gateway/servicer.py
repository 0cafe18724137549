"""gRPC in front of the data plane, as `mosel.v1`: convert, call, convert back."""

import asyncio
import contextlib
import secrets
from collections.abc import Iterator
from functools import partial

import grpc
from google.protobuf.message import DecodeError

from gateway.data_plane import DataPlane
from gateway.jobs.answers import accepted_event, predict_reply, results_event, summary_event
from gateway.jobs.checks import CheckedJob, Times, check_request, check_spec, times_of
from gateway.jobs.intake import OFF_LOOP_ELEMENTS, description_of, elements_of
from gateway.jobs.registry import OpenJob
from gateway.jobs.upload import Read, Upload, read_batch, read_end, read_spec
from gateway.observer import Request
from mosel.deadline import Deadline
from mosel.errors import InvalidRequest, MoselError
from mosel.runtime.service import MAX_DEADLINE_S, Context, answers_with_status, deadline_of
from mosel.tensors import dtype_value
from mosel.v1 import gateway_pb2, gateway_pb2_grpc, selector_pb2, service_pb2

_CANCELLED_WITHIN_S = 0.02


class GatewayServicer(gateway_pb2_grpc.GatewayServicer):
    """Serves `mosel.v1.Gateway`."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane, self._limits = plane, plane.settings.gateway

    @answers_with_status
    async def Predict(self, request: gateway_pb2.PredictRequest, context: Context) -> gateway_pb2.PredictReply:
        check = partial(check_request, request, self._plane.packages, self._limits.max_items_per_job)
        elements = elements_of(request.payloads)
        return predict_reply(await self._plane.predict(request.model, check, elements, deadline_of(context)))

    @answers_with_status
    async def SubmitJob(  # type: ignore[override] # a coroutine that writes, so that cancelling it always reaches it
        self, request_iterator: object, context: Context
    ) -> None:
        # Before anything can interrupt it: half sent, it would keep grpc from sending how the call ended.
        await context.send_initial_metadata(())
        with self._plane.observer.following("") as request:
            summary = await self._run(request, partial(_read, context), context)
        await context.write(summary)

    async def _run(self, request: Request, read: Read, context: Context) -> gateway_pb2.JobEvent:
        """Reads a job, writes what becomes of its items, and returns how it ended."""
        plane, limits, job_id = self._plane, self._limits, request.job_id
        spec = await read_spec(read, limits.default_deadline_ms / 1000)
        request.model = spec.model
        plane.admit()
        with plane.models.checking() as sent:
            job = check_spec(spec, plane.packages, limits.max_items_per_job)
            times = times_of(job, deadline_of(context), limits.default_deadline_ms / 1000)
            request.checked(job, times)
            plane.refusals.check(job, times)
            with plane.registry.open(job_id, job.package.name, job.size, times.ends) as entry:
                await context.write(accepted_event(job_id))
                description = await self._receive(job_id, job, times, read, entry)
                request.sent(description)
                with plane.submit(job, times, description) as answers, _no_more(read, entry):
                    sent()
                    entry.under_way()
                    groups = []
                    async for finished in answers:
                        for group in finished:
                            groups.append(group)
                            entry.status.items_done += len(group.items)
                            await context.write(results_event(job, group, entry.status.items_done))
                summary = summary_event(job, groups, answers.result, times.deadline.remaining * 1000)
                request.answered(summary.summary.strategy, answers.result, summary.summary.deadline_slack_ms)
        plane.counters.update(answered=1, items=job.size)
        return summary

    @answers_with_status
    async def Plan(self, request: gateway_pb2.PlanRequest, context: Context) -> gateway_pb2.PlanReply:
        limits = self._limits
        with self._plane.models.checking():
            job = check_spec(request.job, self._plane.packages, limits.max_items_per_job)
            # How long the caller waits for the plan says nothing about the job.
            times = times_of(job, Deadline.after(MAX_DEADLINE_S), limits.default_deadline_ms / 1000)
            description = description_of(secrets.token_bytes(16), job, times)
            return await self._plane.link.plan(description, deadline_of(context))

    @answers_with_status
    async def GetJob(self, request: gateway_pb2.GetJobRequest, context: Context) -> gateway_pb2.JobStatus:
        return self._plane.registry.status(request.job_id)

    @answers_with_status
    async def CancelJob(self, request: gateway_pb2.CancelJobRequest, context: Context) -> gateway_pb2.JobStatus:
        return self._plane.registry.cancel(request.job_id)

    @answers_with_status
    async def ListModels(self, request: gateway_pb2.ListModelsRequest, context: Context) -> gateway_pb2.ListModelsReply:
        return gateway_pb2.ListModelsReply(models=map(self._model, self._plane.packages))

    @answers_with_status
    async def LoadModel(self, request: gateway_pb2.LoadModelRequest, context: Context) -> gateway_pb2.Model:
        await self._plane.load(request.model)
        return self._model(request.model)

    @answers_with_status
    async def UnloadModel(
        self, request: gateway_pb2.UnloadModelRequest, context: Context
    ) -> gateway_pb2.UnloadModelReply:
        await self._plane.unload(request.model)
        return gateway_pb2.UnloadModelReply()

    @answers_with_status
    async def Status(self, request: service_pb2.StatusRequest, context: Context) -> service_pb2.StatusReply:
        return service_pb2.StatusReply(services=await self._plane.statuses())

    def _model(self, name: str) -> gateway_pb2.Model:
        package, state = self._plane.packages[name], self._plane.state_of(name)
        model = gateway_pb2.Model(
            name=name,
            version=package.version,
            description=package.description,
            metric=package.metric,
            ready=self._plane.is_ready(name),
            sets=state.sets,
            labels=package.output.labels,
            revision=package.revision,
            reason=state.reason,
        )
        for modality, spec in package.modalities.items():
            model.modalities.add(name=modality, dtype=dtype_value(spec.dtype), shape=spec.shape)
        return model

    async def _receive(
        self, job_id: bytes, job: CheckedJob, times: Times, read: Read, entry: OpenJob
    ) -> selector_pb2.JobDescription:
        """The description of a job once its items are there."""
        with self._plane.arriving.reserve(job):
            upload = Upload(job, self._limits.max_items_per_job)
            while not upload.complete:
                batch = await read_batch(read, upload)
                if elements_of(batch.payloads) > OFF_LOOP_ELEMENTS:
                    await asyncio.to_thread(upload.add, batch)
                else:
                    upload.add(batch)
                entry.status.items_received = upload.received
            prepared = await self._plane.intake.upload(job_id, job, upload.payloads, times)
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
