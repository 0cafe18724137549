"""Drives the scheduler core from events: directs chosen payload rows to encoders and embeddings to fusion.

It carries refs and never looks into a payload or an embedding.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Iterable

import grpc

from mosel.deadline import Deadline
from mosel.errors import (
    InternalError,
    InvalidRequest,
    JobCancelled,
    MoselError,
    PayloadTooLarge,
    ReadNotProven,
    ServiceUnavailable,
    Unreachable,
)
from mosel.modality import FUSION
from mosel.observability.logs import job_field
from mosel.runtime.background import Background
from mosel.runtime.coalescing import Coalesced
from mosel.runtime.messages import check_message
from mosel.status import error_from_rpc
from mosel.v1 import encoder_pb2, fusion_pb2, gateway_pb2, selector_pb2, tensor_pb2
from selector.conversions import (
    assurance_message,
    check_payloads,
    failure_from,
    item_group,
    job_from,
    plan_reply,
    slots_in,
    upload_advice,
)
from selector.core.emission import Emission
from selector.core.jobs import Call, EncodeCall, Ended, FuseCall, Wait
from selector.core.ledger import Ledger
from selector.core.scheduler import Scheduler
from selector.core.stages import service_name
from selector.events import (
    CallFailed,
    EncodeReturned,
    Event,
    FuseReturned,
    GatewayGone,
    JobSubmitted,
    JobUnwanted,
    LaneDown,
    LaneLeaving,
    LaneRemoved,
    LaneUp,
    SampleFused,
    TimePassed,
)
from selector.gateway_session import Gateways, GatewaySession
from selector.gauges import show_jobs, show_queues, show_tensors
from selector.in_flight import CallInFlight, JobInFlight, SlotKey, encode_request, fuse_request, note_embeddings
from selector.job_observer import JobObserver
from selector.observations import Observations
from selector.releases import Releases
from selector.services.compute_services import ComputeServices
from selector.services.model_loader import ModelLoader
from selector.services.tensor_paths import TensorPaths

# Within so many rounds of the event loop, jobs arrive that are on their way through this process: a busy one makes one
# plan and one call for them, where there would be several.
_ROUNDS = 6
# After a bug in the core, jobs still end in time.
_LONGEST_WAIT_S = 1.0

log = logging.getLogger(__name__)


class Dispatcher:
    """Owns the jobs that are under way. Whatever changes one is an event, and `handle` takes it.

    Args:
        scheduler: the core.
        services: those that compute.
        paths: of tensors between them.
        models: those that are loaded.
        gateways: those that are connected.
        max_answer_bytes: what the outputs of one job may have in a message.
        observer: is told what happens.

    Attributes:
        observations: of models, that administrators make.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        services: ComputeServices,
        paths: TensorPaths,
        models: ModelLoader,
        gateways: Gateways,
        max_answer_bytes: int,
        observer: JobObserver,
    ) -> None:
        self._scheduler, self._services, self._paths, self._models = scheduler, services, paths, models
        self._gateways, self._max_answer_bytes, self._observer = gateways, max_answer_bytes, observer
        self._jobs: dict[bytes, JobInFlight] = {}
        self._ledger: Ledger[SlotKey] = Ledger()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        # Where one fails on a bug, the jobs inside fail at their deadline.
        self._work = Background()
        self._soon = Coalesced(self._advance, _ROUNDS)
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = 0.0
        self._releases = Releases(self._ledger, services)
        self.observations = Observations(scheduler, services, self._ledger, self._work, self.handle)
        show_jobs(observer, scheduler)
        show_tensors(observer, self._ledger, paths.attachments)
        show_queues(observer, gateways, services)

    def handle(self, event: Event) -> None:
        """Takes in what happened; what there is to do then is done a moment later, at once for all of it."""
        match event:
            case JobSubmitted():
                self._submit(event.session, event.description)
            case JobUnwanted():
                self._cancel(event.job_id)
            case EncodeReturned() | FuseReturned() | CallFailed():
                try:
                    self._call_over(event)
                finally:
                    for job in event.call.jobs:
                        self._ledger.call_returned(job)
            case SampleFused():
                self.observations.fused(event)
            case GatewayGone():
                for job in [job for job in self._jobs.values() if job.session is event.session]:
                    self._cancel(job.id)
            case LaneUp() | LaneDown() | LaneLeaving() | LaneRemoved():
                self._lane_changed(event)
            case TimePassed():
                pass
        self._soon.ask()

    def plan(self, description: selector_pb2.JobDescription) -> gateway_pb2.PlanReply:
        """What a job would get now.

        Raises:
            ModelNotFound, InvalidRequest, ServiceUnavailable.
        """
        self._models.check_loaded(description.model)
        now = time.monotonic()
        return plan_reply(self._scheduler.plan(job_from(description, now), now), description.floor_source)

    def statistics(self) -> dict[str, int]:
        """Counts since the start, what is held now, and how calls differ from their profiles."""
        counts = self._observer.statistics() | self._scheduler.statistics() | self._ledger.statistics()
        counts |= self._gateways.statistics() | self._services.statistics() | self.observations.statistics()
        for (model, lane), (overhead_ms, factor) in self._scheduler.corrections(time.monotonic()).items():
            if name := self._models.current_name(model):
                counts[f"correction.{name}.{lane}.overhead_us"] = max(round(overhead_ms * 1000), 0)
                counts[f"correction.{name}.{lane}.factor_permille"] = round(factor * 1000)
        return counts

    async def drain(self, grace: Deadline) -> None:
        """Admits nothing more, waits for what is under way, and ends what is left when the grace is over."""
        self._stopping = True
        self.observations.end_all(ServiceUnavailable("service selector is stopping"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(grace.remaining, 0.0)):
                await self._idle.wait()
        for job in list(self._jobs.values()):
            self._fail(job, ServiceUnavailable("service selector is stopping"))
        for session in self._gateways:
            session.end()
        await self._work.close()
        await self._models.close()

    # What happened

    def _submit(self, session: GatewaySession, description: selector_pb2.JobDescription) -> None:
        job_id, now = description.job_id, time.monotonic()
        try:
            if self._stopping:
                raise ServiceUnavailable("service selector is stopping")
            check_payloads(description)
            self._models.check_loaded(description.model)
            if job_id in self._jobs:
                raise InvalidRequest("job_id is already under way")
            work = self._scheduler.submit(job_from(description, now), now)
        except MoselError as error:
            self._observer.refused(description, error, now)
            session.send(failure=failure_from(job_id, error))
            session.release(slots_in(description.payloads.values()))
            return
        job = self._jobs[job_id] = JobInFlight(
            session=session,
            work=work,
            payloads=dict(description.payloads),
            # Nothing that is done meets an infinite floor before the rest is.
            emission=Emission(work.floor.least if description.stream else math.inf),
            traceparent=description.traceparent,
            floor_source=description.floor_source,
        )
        self._idle.clear()
        self._ledger.open(job, (_key(session, slot) for slot in slots_in(job.payloads.values())))
        self._observer.admitted(job)

    def _cancel(self, job_id: bytes) -> None:
        self._scheduler.unwanted(job_id, time.monotonic())
        if job := self._jobs.get(job_id):
            self._observer.failed(job, JobCancelled("nobody waits for it any more"))
            self._scheduler.cancelled(job_id)
            self._forget(job)

    def _lane_changed(self, event: LaneUp | LaneDown | LaneLeaving | LaneRemoved) -> None:
        match event:
            case LaneUp():
                self._scheduler.lane(event.lane, True, event.resource, event.joined)
            case LaneDown():
                for job_id in self._scheduler.lane(event.lane, False):
                    self._lose(self._jobs[job_id], ServiceUnavailable(f"service {service_name(event.lane)} went away"))
            case LaneLeaving():
                self._scheduler.leaving(event.lane)
                self._work.start(_drained(event, list(self._jobs.values())), f"drain {event.lane}")
            case LaneRemoved():
                self._scheduler.remove_lane(event.lane)
        self._models.tell_gateways()

    def _call_over(self, event: EncodeReturned | FuseReturned | CallFailed) -> None:
        call, now = event.call, time.monotonic()
        if isinstance(event, CallFailed):
            reason = self._reason_of(call.call, event.error)
            self._observer.lost(call, reason)
            for job_id in self._scheduler.failed(call.call, now):
                self._lose(self._jobs[job_id], reason)
            return
        self._observer.returned(call, event.reply.compute_us)
        self.observations.computed(call.call.model, event.reply.compute_us)
        if isinstance(event, EncodeReturned):
            self._keep(event.call, event.reply.embeddings)
        else:
            self._emit(event.call, event.reply.outputs)
        for job_id in self._scheduler.completed(call.call, now):
            self._answer(self._jobs[job_id])

    def _keep(self, call: CallInFlight[EncodeCall], embeddings: tensor_pb2.TensorRef) -> None:
        """Notes where the embeddings of each item in a call are."""
        for slot in slots_in([embeddings]):
            for job in call.jobs:
                self._ledger.hold(job, _key(call.call.lane, slot))
        note_embeddings(call.call, call.jobs, embeddings)

    def _emit(self, call: CallInFlight[FuseCall], outputs: Iterable[tensor_pb2.Tensor]) -> None:
        """Some items of the jobs in a call are done."""
        modality_set = call.call.modality_set
        for job, rows, output in zip(call.jobs, call.call.rows, outputs, strict=True):
            if job.closed:
                continue
            self._observer.predicted(call.call, len(rows.items))
            group, score = item_group(modality_set, rows.items, output), job.work.floor.scores[modality_set]
            for part in job.emission.add(score, len(rows.items), group):
                job.session.send(part=selector_pb2.JobPart(job_id=job.id, group=part))

    def _reason_of(self, call: Call, error: Exception) -> MoselError:
        """Why a call failed; a service that cannot be reached is away from now on, before its health stream says so."""
        name, jobs = service_name(call.lane), job_field(rows.job_id for rows in call.rows)
        if not isinstance(error, grpc.RpcError):
            log.error("unexpected error", exc_info=error, extra={"peer": name} | jobs)
            return InternalError(f"service selector could not use the answer of {name}")
        reason = error_from_rpc(error, name, {Unreachable: InternalError, ReadNotProven: ServiceUnavailable})
        log.warning("call failed", extra={"peer": name, "reason": str(reason)} | jobs)
        if error.code() is grpc.StatusCode.UNAVAILABLE and self._services[call.lane].up.is_set():
            self._services[call.lane].mark_suspect()
            self._lane_changed(LaneDown(call.lane))
        return reason

    # What the scheduler decides

    def _advance(self) -> None:
        """Does whatever there is to do now."""
        self.observations.advance(only_behind=True)
        while not isinstance(action := self._scheduler.next(time.monotonic()), Wait):
            if isinstance(action, Ended):
                self._fail(self._jobs[action.job_id], action.error)
            else:
                self._start(action)
        self.observations.advance()
        self._models.free_drained()
        if action.until is not None:
            self._wake_by(action.until)
        self._releases.soon()

    def _wake_by(self, at: float) -> None:
        """Looks again at that time; where it would do so before, that is soon enough to learn when to look next."""
        if self._timer is None or at < self._wakes_at:
            if self._timer is not None:
                self._timer.cancel()
            delay = max(at - time.monotonic(), 0.0)
            self._wakes_at, self._timer = at, asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        # Whatever goes wrong, the clock goes on: jobs end in time.
        self._wake_by(time.monotonic() + _LONGEST_WAIT_S)
        self.handle(TimePassed())

    def _start(self, call: Call) -> None:
        """Makes a call; it takes no longer than the last of its jobs is wanted."""
        jobs = [self._jobs[rows.job_id] for rows in call.rows]
        for job in jobs:
            self._ledger.call_started(job)
        timeout = max(job.work.job.ends for job in jobs) - time.monotonic()
        if isinstance(call, EncodeCall):
            encode = encode_request(call, jobs, self._paths.attachments.rung(call.lane, FUSION))
            self._work.start(self._encode(self._observer.began(call, jobs, encode), encode, timeout))
        else:
            fuse = fuse_request(call, jobs)
            self._work.start(self._fuse(self._observer.began(call, jobs, fuse), fuse, timeout))

    async def _encode(self, call: CallInFlight[EncodeCall], request: encoder_pb2.EncodeRequest, timeout: float) -> None:
        try:
            reply = await self._services.encoder(call.call.lane).Encode(request, timeout=timeout)
        except Exception as error:  # noqa: BLE001 (whatever it is, the call must leave its lane)
            self.handle(CallFailed(call, error))
        else:
            self.handle(EncodeReturned(call, reply))

    async def _fuse(self, call: CallInFlight[FuseCall], request: fusion_pb2.FuseRequest, timeout: float) -> None:
        try:
            reply = await self._services.fusion.Fuse(request, timeout=timeout)
            if len(reply.outputs) != len(call.jobs):
                raise ValueError(f"fusion answered with {len(reply.outputs)} outputs; expected {len(call.jobs)}")
        except Exception as error:  # noqa: BLE001 (whatever it is, the call must leave its lane)
            self.handle(CallFailed(call, error))
        else:
            self.handle(FuseReturned(call, reply))

    # How a job ends

    def _answer(self, job: JobInFlight) -> None:
        """All items of a job are done."""
        work, outcome, now = job.work, job.work.outcome, time.monotonic()
        started_at = now if work.started_at is None else work.started_at
        groups = job.emission.rest()
        try:
            check_message("the outputs have", sum(len(group.output.data) for group in groups), self._max_answer_bytes)
        except PayloadTooLarge as error:
            self._fail(job, error)
            return
        result = selector_pb2.JobResult(
            job_id=job.id,
            groups=groups,
            expected_accuracy=outcome.expected_accuracy,
            queue_us=round((started_at - work.submitted_at) * 1e6),
            compute_us=round((now - started_at) * 1e6),
            unavailable_modalities=sorted(work.without),
            assurance=assurance_message(outcome.assurance, outcome.saved, job.floor_source),
            upload=upload_advice(self._scheduler.wanted(work)) if work.job.available else None,
        )
        job.session.send(result=result)
        self._observer.answered(job, now)
        self.observations.answered(job)
        self._forget(job)

    def _lose(self, job: JobInFlight, error: MoselError) -> None:
        self._fail(job, self._scheduler.lost(job.work, error))

    def _fail(self, job: JobInFlight, error: MoselError) -> None:
        self._observer.failed(job, error)
        job.session.send(failure=failure_from(job.id, error))
        self._forget(job)

    def _forget(self, job: JobInFlight) -> None:
        del self._jobs[job.id]
        job.over.set()
        self._ledger.close(job)
        if not self._jobs:
            self._idle.set()


def _key(producer: GatewaySession | str, slot: tensor_pb2.ArenaSlot) -> SlotKey:
    return producer, slot.arena_id, slot.epoch, slot.slot, slot.generation


async def _drained(leaving: LaneLeaving, jobs: Iterable[JobInFlight]) -> None:
    """Tells a service that leaves when the jobs are over that may need it."""
    for job in jobs:
        await job.over.wait()
    leaving.drained.set()
