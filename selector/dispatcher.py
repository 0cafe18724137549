"""Drives the scheduler core from events: directs chosen payload rows to encoders and embeddings to fusion.

It carries refs and never looks into a payload or an embedding.
"""

import asyncio
import contextlib
import logging
import time
from collections import defaultdict

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
from mosel.runtime.messages import check_message
from mosel.status import error_from_rpc
from mosel.v1 import encoder_pb2, fusion_pb2, gateway_pb2, selector_pb2, tensor_pb2
from selector.conversions import (
    check_payloads,
    failure_from,
    item_group,
    job_from,
    plan_reply,
    slots_in,
)
from selector.core.emission import Emission
from selector.core.jobs import Call, EncodeCall, Ended, FuseCall, Wait
from selector.core.ledger import Ledger
from selector.core.scheduler import Scheduler
from selector.core.stages import service_name
from selector.gateway_session import GatewaySession
from selector.gauges import show_jobs, show_tensors
from selector.in_flight import JobInFlight, encode_request, fuse_request, note_embeddings
from selector.job_observer import JobObserver, SeenCall
from selector.services.compute_services import ComputeServices
from selector.services.model_loader import ModelLoader

# Releases wait this long for company.
_RELEASE_EVERY_S = 0.005

log = logging.getLogger(__name__)


# The producer of a slot, a gateway or the lane of an encoder, and the slot's numbers.
SlotKey = tuple[GatewaySession | str, int, int, int, int]


class Dispatcher:
    """Owns the jobs that are under way.

    Args:
        scheduler: the core.
        models: those that are loaded.
        max_answer_bytes: what the outputs of one job may have in a message.
        observer: is told what happens.
    """

    def __init__(self, scheduler: Scheduler, models: ModelLoader, max_answer_bytes: int, observer: JobObserver) -> None:
        self._scheduler, self._models, self._observer = scheduler, models, observer
        self._max_answer_bytes = max_answer_bytes
        self._ledger: Ledger[SlotKey] = Ledger()
        self._jobs: dict[bytes, JobInFlight] = {}
        self._sessions: set[GatewaySession] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        # Where one fails on a bug, the jobs inside fail at their deadline.
        self._calls = Background()
        self._timer: asyncio.TimerHandle | None = None
        self._flush: asyncio.TimerHandle | None = None
        self._peers: ComputeServices | None = None

    def use(self, peers: ComputeServices) -> None:
        """Sets the services that compute; before that, every job is refused."""
        self._peers = peers
        show_jobs(self._observer, self._scheduler)
        show_tensors(self._observer, self._ledger, peers.attachments)

    # Events from gateways

    def connect(self, session: GatewaySession) -> None:
        """A gateway is there."""
        self._sessions.add(session)
        self._models.gateway_came(session.name)
        session.send(models=self._models.states())

    def disconnect(self, session: GatewaySession) -> None:
        """A gateway is gone, and with it whoever waited for its jobs."""
        self._sessions.discard(session)
        for job_id in [job_id for job_id, job in self._jobs.items() if job.session is session]:
            self.cancel(job_id)
        self._models.gateway_went(session.name)

    def submit(self, session: GatewaySession, description: selector_pb2.JobDescription) -> None:
        """A job arrived; its answer or failure is sent to the session."""
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
            session.send(release=tensor_pb2.ReleaseSlots(slots=slots_in(description.payloads.values())))
            return
        self._observer.admitted(work, description.traceparent)
        self._idle.clear()
        emission = Emission[selector_pb2.ItemGroup](work.floor) if description.stream else None
        payloads = dict(description.payloads)
        self._jobs[job_id] = JobInFlight(session, work, payloads, emission, description.traceparent)
        self._ledger.open(job_id, (_key(session, slot) for slot in slots_in(payloads.values())))
        self._advance()

    def plan(self, description: selector_pb2.JobDescription) -> gateway_pb2.PlanReply:
        """What a job would get now.

        Raises:
            ModelNotFound, InvalidRequest, ServiceUnavailable.
        """
        self._models.check_loaded(description.model)
        now = time.monotonic()
        return plan_reply(self._scheduler.plan(job_from(description, now), now))

    def cancel(self, job_id: bytes) -> None:
        """Nobody waits for a job any more."""
        self._scheduler.unwanted(job_id, time.monotonic())
        if job := self._forget(job_id):
            self._observer.failed(job.work, JobCancelled("nobody waits for it any more"), job.traceparent)
            self._scheduler.cancelled(job_id)
            self._advance()

    # Events from the services that compute

    def lane_changed(self, name: str, up: bool, resource: str) -> None:
        """A service came or went; `resource` is what it computes on."""
        for job_id in self._scheduler.lane(name, up, resource):
            self._fail(job_id, ServiceUnavailable(f"service {service_name(name)} went away"))
        self.models_changed()
        self._advance()

    async def let_go(self, name: str) -> None:
        """A service is about to end: new jobs do without it; returns when those that may need it are over."""
        self._scheduler.leaving(name)
        self.models_changed()
        for job in list(self._jobs.values()):
            await job.over.wait()

    def models_changed(self) -> None:
        """Tells gateways which models are loaded and ready."""
        for session in self._sessions:
            session.send(models=self._models.states())

    def statistics(self) -> dict[str, int]:
        """Counts since the start, what is held now, and how calls differ from their profiles."""
        counts = self._observer.statistics() | self._scheduler.statistics() | self._ledger.statistics()
        for (model, lane), (overhead_ms, factor) in self._scheduler.corrections(time.monotonic()).items():
            if name := self._models.current_name(model):
                counts[f"correction.{name}.{lane}.overhead_us"] = max(round(overhead_ms * 1000), 0)
                counts[f"correction.{name}.{lane}.factor_permille"] = round(factor * 1000)
        return counts

    async def drain(self, grace: Deadline) -> None:
        """Admits nothing more, waits for what is under way, and ends what is left when the grace is over."""
        self._stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(grace.remaining, 0.0)):
                await self._idle.wait()
        for job_id in list(self._jobs):
            self._fail(job_id, ServiceUnavailable("service selector is stopping"))
        for session in self._sessions:
            session.outbox.put_nowait(None)
        await self._calls.close()
        await self._models.close()

    # What the scheduler decides

    def _advance(self) -> None:
        """Does whatever there is to do now."""
        while not isinstance(action := self._scheduler.next(time.monotonic()), Wait):
            if isinstance(action, Ended):
                self._fail(action.job_id, action.error)
            elif isinstance(action, EncodeCall):
                rung = self._peer().attachments.rung(action.lane, FUSION)
                self._calls.start(self._encode(action, encode_request(action, self._jobs, rung), self._begin(action)))
            else:
                self._calls.start(self._fuse(action, fuse_request(action, self._jobs), self._begin(action)))
        self._models.free_drained()
        if self._timer is not None:
            self._timer.cancel()
        delay = None if action.until is None else max(action.until - time.monotonic(), 0.0)
        self._timer = None if delay is None else asyncio.get_running_loop().call_later(delay, self._advance)
        if self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(_RELEASE_EVERY_S, self._send_releases)

    async def _encode(self, call: EncodeCall, request: encoder_pb2.EncodeRequest, timeout: float) -> None:
        seen = self._observer.began(call, request, self._traceparents(call))
        try:
            reply = await self._peer().encoders[call.lane].Encode(request, timeout=timeout)
        except Exception as error:  # noqa: BLE001 (whatever it is, the call must leave its lane)
            self._lose(seen, error)
        else:
            self._observer.returned(seen, reply.compute_us)
            self._keep(call, reply.embeddings)
            self._scheduler.completed(call, time.monotonic())
        finally:
            self._end(call)

    async def _fuse(self, call: FuseCall, request: fusion_pb2.FuseRequest, timeout: float) -> None:
        seen = self._observer.began(call, request, self._traceparents(call))
        try:
            reply = await self._peer().fusion.Fuse(request, timeout=timeout)
            outputs = list(zip(call.rows, reply.outputs, strict=True))
        except Exception as error:  # noqa: BLE001 (whatever it is, the call must leave its lane)
            self._lose(seen, error)
        else:
            self._observer.returned(seen, reply.compute_us)
            for rows, output in outputs:
                self._done(rows.job_id, item_group(call.modality_set, rows.items, output), call)
            for job_id in self._scheduler.completed(call, time.monotonic()):
                self._answer(job_id)
        finally:
            self._end(call)

    def _traceparents(self, call: Call) -> list[str]:
        return [self._jobs[rows.job_id].traceparent for rows in call.rows if rows.job_id in self._jobs]

    def _begin(self, call: Call) -> float:
        """Marks a call as reading for its jobs; returns the seconds until nobody waits for any of them."""
        for rows in call.rows:
            self._ledger.call_started(rows.job_id)
        works = [self._scheduler.work_of(rows.job_id) for rows in call.rows]
        return max((work.job.ends for work in works if work is not None), default=0.0) - time.monotonic()

    def _end(self, call: Call) -> None:
        for rows in call.rows:
            self._ledger.call_returned(rows.job_id)
        self._advance()

    def _keep(self, call: EncodeCall, embeddings: tensor_pb2.TensorRef) -> None:
        """Notes where the embeddings of each item in a call are."""
        for rows in call.rows:
            for slot in slots_in([embeddings]):
                self._ledger.hold(rows.job_id, _key(call.lane, slot))
        note_embeddings(call, embeddings, self._jobs)

    def _lose(self, seen: SeenCall, error: Exception) -> None:
        call = seen.call
        peer, jobs = service_name(call.lane), job_field(rows.job_id for rows in call.rows)
        if isinstance(error, grpc.RpcError):
            reason = error_from_rpc(error, peer, {Unreachable: InternalError, ReadNotProven: ServiceUnavailable})
            log.warning("call failed", extra={"peer": peer, "reason": str(reason)} | jobs)
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                # Before the health stream says so: what failed must not be sent there again.
                self._peer().doubt(call.lane)
        else:
            reason = InternalError(f"service selector could not use the answer of {peer}")
            log.error("unexpected error", exc_info=error, extra={"peer": peer} | jobs)
        self._observer.lost(seen, reason)
        for job_id in self._scheduler.failed(call, time.monotonic()):
            self._fail(job_id, reason)

    # How a job ends

    def _done(self, job_id: bytes, group: selector_pb2.ItemGroup, call: FuseCall) -> None:
        """Some items of a job are done."""
        job = self._jobs.get(job_id)
        if job is None:
            return
        self._observer.predicted(call, len(group.items))
        if job.emission is None:
            job.done.append(group)
            return
        accuracy = job.work.profile.accuracy[call.modality_set]
        for part in job.emission.add(accuracy, len(group.items), group):
            job.session.send(part=selector_pb2.JobPart(job_id=job_id, group=part))

    def _answer(self, job_id: bytes) -> None:
        """All items of a job are done."""
        job, now = self._jobs.get(job_id), time.monotonic()
        if job is None:
            return
        work, strategy = job.work, job.work.strategy
        started_at = now if work.started_at is None else work.started_at
        groups = job.done if job.emission is None else job.emission.rest()
        try:
            check_message("the outputs have", sum(len(group.output.data) for group in groups), self._max_answer_bytes)
        except PayloadTooLarge as error:
            self._fail(job_id, error)
            return
        result = selector_pb2.JobResult(
            job_id=job_id,
            groups=groups,
            expected_accuracy=strategy.accuracy,
            queue_us=round((started_at - work.submitted_at) * 1e6),
            compute_us=round((now - started_at) * 1e6),
            unavailable_modalities=sorted(work.without),
        )
        job.session.send(result=result)
        self._observer.answered(work, strategy, job.traceparent, now)
        self._forget(job_id)

    def _fail(self, job_id: bytes, error: MoselError) -> None:
        job = self._jobs.get(job_id)
        if job is not None:
            self._observer.failed(job.work, error, job.traceparent)
            job.session.send(failure=failure_from(job_id, error))
            self._forget(job_id)

    def _forget(self, job_id: bytes) -> JobInFlight | None:
        known = self._jobs.pop(job_id, None)
        if known:
            known.over.set()
        self._ledger.close(job_id)
        if not self._jobs:
            self._idle.set()
        return known

    def _send_releases(self) -> None:
        self._flush = None
        by_producer: dict[GatewaySession | str, list[tensor_pb2.ArenaSlot]] = defaultdict(list)
        for producer, arena_id, epoch, slot, generation in self._ledger.take_released():
            by_producer[producer].append(
                tensor_pb2.ArenaSlot(arena_id=arena_id, epoch=epoch, slot=slot, generation=generation)
            )
        for producer, slots in by_producer.items():
            if isinstance(producer, GatewaySession):
                producer.send(release=tensor_pb2.ReleaseSlots(slots=slots))
            else:
                self._calls.start(self._peer().release(producer, slots))

    def _peer(self) -> ComputeServices:
        assert self._peers is not None, "use() comes before the first lane is up"
        return self._peers


def _key(producer: GatewaySession | str, slot: tensor_pb2.ArenaSlot) -> SlotKey:
    return producer, slot.arena_id, slot.epoch, slot.slot, slot.generation
