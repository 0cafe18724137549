"""gRPC in front of the data plane, as `mosel.v1`: convert, call, convert back."""

import asyncio
import contextlib
from collections.abc import Iterator
from functools import partial

import grpc
from google.protobuf.message import DecodeError

from gateway.data_plane import DataPlane
from gateway.jobs.answers import accepted_event, predict_reply, results_event, sets_of, summary_event
from gateway.jobs.checks import check_request, check_spec
from gateway.jobs.description import describe
from gateway.jobs.job import Job
from gateway.jobs.store import elements_of
from gateway.jobs.upload import Read, read_end, read_spec
from mosel.deadline import Deadline
from mosel.errors import InvalidRequest, MoselError
from mosel.runtime.service import MAX_DEADLINE_S, Context, answers_with_status, deadline_of
from mosel.tensors import dtype_value
from mosel.v1 import gateway_pb2, gateway_pb2_grpc, service_pb2

_CANCELLED_WITHIN_S = 0.02


class GatewayServicer(gateway_pb2_grpc.GatewayServicer):
    """Serves `mosel.v1.Gateway`."""

    def __init__(self, data_plane: DataPlane) -> None:
        self._data_plane, self._limits = data_plane, data_plane.settings.gateway

    @answers_with_status
    async def Predict(self, request: gateway_pb2.PredictRequest, context: Context) -> gateway_pb2.PredictReply:
        with self._data_plane.jobs.begin(request.model) as life:
            life.admit(deadline_of(context))
            check = partial(check_request, request, self._data_plane.packages, self._limits.max_items_per_job)
            return predict_reply(await life.predict(check, elements_of(request.payloads)))

    @answers_with_status
    async def SubmitJob(  # type: ignore[override] # a coroutine that writes, so that cancelling it always reaches it
        self, request_iterator: object, context: Context
    ) -> None:
        # Before anything can interrupt it: half sent, it would keep grpc from sending how the call ended.
        await context.send_initial_metadata(())
        read = partial(_read, context)
        with self._data_plane.jobs.begin("") as life:
            spec = await read_spec(read, self._limits.default_deadline_ms / 1000)
            life.job.model = spec.model
            life.admit(deadline_of(context))
            life.sound(check_spec(spec, self._data_plane.packages, self._limits.max_items_per_job))
            await context.write(accepted_event(life.job.id))
            await life.receive(read)
            with life.submit() as answers, _no_more(read, life.job):
                groups = []
                async for finished in answers:
                    for group in finished:
                        groups.append(group)
                        life.job.status.items_done += len(group.items)
                        await context.write(results_event(life.job.sound, group, life.job.status.items_done))
            life.answered(sets_of(life.job.sound, groups), answers)
            summary = summary_event(life.job)
        await context.write(summary)

    @answers_with_status
    async def Plan(self, request: gateway_pb2.PlanRequest, context: Context) -> gateway_pb2.PlanReply:
        # How long the caller waits for the plan says nothing about the job.
        job = Job(self._data_plane.registry.new_id(), ends=Deadline.after(MAX_DEADLINE_S))
        self._data_plane.served.begin_checking(job)
        try:
            checked = check_spec(request.job, self._data_plane.packages, self._limits.max_items_per_job)
            self._data_plane.jobs.sound(job, checked)
            return await self._data_plane.link.plan(describe(job), deadline_of(context))
        finally:
            self._data_plane.served.checked(job)

    @answers_with_status
    async def GetJob(self, request: gateway_pb2.GetJobRequest, context: Context) -> gateway_pb2.JobStatus:
        return self._data_plane.registry.status(request.job_id)

    @answers_with_status
    async def CancelJob(self, request: gateway_pb2.CancelJobRequest, context: Context) -> gateway_pb2.JobStatus:
        return self._data_plane.registry.cancel(request.job_id)

    @answers_with_status
    async def ListModels(self, request: gateway_pb2.ListModelsRequest, context: Context) -> gateway_pb2.ListModelsReply:
        return gateway_pb2.ListModelsReply(models=[await self._model(name) for name in list(self._data_plane.packages)])

    @answers_with_status
    async def LoadModel(self, request: gateway_pb2.LoadModelRequest, context: Context) -> gateway_pb2.Model:
        await self._data_plane.load(request.model)
        return await self._model(request.model)

    @answers_with_status
    async def UnloadModel(
        self, request: gateway_pb2.UnloadModelRequest, context: Context
    ) -> gateway_pb2.UnloadModelReply:
        await self._data_plane.unload(request.model)
        return gateway_pb2.UnloadModelReply()

    @answers_with_status
    async def Observe(  # type: ignore[override] # a coroutine that writes, so that cancelling it always reaches it
        self, request: gateway_pb2.ObserveRequest, context: Context
    ) -> None:
        await self._data_plane.observe(request.model, request.share, context.write)

    @answers_with_status
    async def Status(self, request: service_pb2.StatusRequest, context: Context) -> service_pb2.StatusReply:
        return service_pb2.StatusReply(services=await self._data_plane.statuses())

    async def _model(self, name: str) -> gateway_pb2.Model:
        package = self._data_plane.packages[name]
        weaknesses = await self._data_plane.weaknesses.of(package)
        state = self._data_plane.state_of(name)
        model = gateway_pb2.Model(
            name=name,
            version=package.version,
            description=package.description,
            metric=package.metric,
            ready=self._data_plane.is_ready(name),
            sets=state.sets,
            labels=package.output.labels,
            revision=package.revision,
            reason=state.reason,
            latencies=state.latencies,
        )
        for modality, spec in package.modalities.items():
            model.modalities.add(name=modality, dtype=dtype_value(spec.dtype), shape=spec.shape)
        for known in model.sets:
            if (weakest := weaknesses.get(known.modality_set)) is not None:
                known.MergeFrom(gateway_pb2.SetProfile(worst_label=weakest.label, worst_group=weakest.group))
        return model


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
def _no_more(read: Read, job: Job) -> Iterator[None]:
    """Ends the job if the caller sends another message inside the block."""

    async def watch() -> None:
        try:
            await read_end(read)
        except MoselError as error:
            job.end(error)

    watching = asyncio.create_task(watch(), name="end of a job's messages")
    try:
        yield
    finally:
        watching.cancel()
