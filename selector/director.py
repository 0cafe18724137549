"""Drives the scheduler core from events: directs chosen payload rows to encoders and embeddings to fusion.

It carries refs and never looks into a payload or an embedding.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter

import grpc

from mosel.errors import DeadlineExceeded, InternalError, InvalidRequest, MoselError, ServiceUnavailable
from mosel.modality import format_set
from mosel.status import error_from_rpc, retry_after_ms, status_number
from mosel.transport import slice_rows
from mosel.v1 import encoder_pb2, fusion_pb2, gateway_pb2, selector_pb2, tensor_pb2
from selector.ledger import Ledger
from selector.peers import Peers
from selector.profile import ModelProfile
from selector.scheduler import FUSION, EncodeCall, Expired, FuseCall, Job, Scheduler, Wait, service_name

# Releases wait this long for company.
_RELEASE_EVERY_S = 0.005

log = logging.getLogger(__name__)


class Session:
    """One connected gateway: its name, and what is to be sent to it; None ends the stream."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.outbox: asyncio.Queue[selector_pb2.SelectorMessage | None] = asyncio.Queue()

    def send(self, **message: object) -> None:
        """Queues a message for the gateway."""
        self.outbox.put_nowait(selector_pb2.SelectorMessage(**message))  # type: ignore[arg-type]


# The producer of a slot, a gateway or the encoder of a modality, and the slot's numbers.
SlotKey = tuple[Session | str, int, int, int, int]


@dataclass(eq=False)
class _JobInFlight:
    session: Session
    payloads: Mapping[str, tensor_pb2.TensorRef]
    embeddings: dict[str, list[tuple[int, tensor_pb2.RowSlice]]] = field(default_factory=lambda: defaultdict(list))


class Director:
    """Owns the jobs that are under way.

    Args:
        scheduler: the core.
        profiles: by model name.
    """

    def __init__(self, scheduler: Scheduler, profiles: Mapping[str, ModelProfile]) -> None:
        self.counters: Counter[str] = Counter()
        self._scheduler, self._profiles = scheduler, profiles
        self._ledger: Ledger[SlotKey] = Ledger()
        self._jobs: dict[bytes, _JobInFlight] = {}
        self._sessions: set[Session] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._flush: asyncio.TimerHandle | None = None
        self._peers: Peers | None = None

    def use(self, peers: Peers) -> None:
        """Sets the services that compute; before that, every job is refused."""
        self._peers = peers

    # Events from gateways

    def connect(self, session: Session) -> None:
        """A gateway is there."""
        self._sessions.add(session)
        session.send(models=self.model_states())

    def disconnect(self, session: Session) -> None:
        """A gateway is gone, and with it whoever waited for its jobs."""
        self._sessions.discard(session)
        for job_id in [job_id for job_id, job in self._jobs.items() if job.session is session]:
            self.cancel(job_id)

    def submit(self, session: Session, description: selector_pb2.JobDescription) -> None:
        """A job arrived; its answer or failure is sent to the session."""
        job_id = description.job_id
        try:
            if self._stopping:
                raise ServiceUnavailable("service selector is stopping")
            job = _job(description)
            if job_id in self._jobs:
                raise InvalidRequest("job_id is already under way")
            progress = self._scheduler.submit(job, time.monotonic())
        except MoselError as error:
            self.counters["jobs_refused"] += 1
            _send_failure(session, job_id, error)
            session.send(release=tensor_pb2.ReleaseSlots(slots=_slots(description.payloads.values())))
            return
        self.counters["jobs_admitted"] += 1
        self.counters[f"items.{format_set(progress.modality_set)}"] += job.size
        self._idle.clear()
        self._jobs[job_id] = _JobInFlight(session, dict(description.payloads))
        self._ledger.open(job_id, (_key(session, slot) for slot in _slots(description.payloads.values())))
        self._advance()

    def cancel(self, job_id: bytes) -> None:
        """Nobody waits for a job any more."""
        if self._forget(job_id):
            self.counters["jobs_cancelled"] += 1
            self._scheduler.cancelled(job_id)
            self._advance()

    # Events from the services that compute

    def lane_changed(self, name: str, up: bool) -> None:
        """A service came or went."""
        for job_id in self._scheduler.lane(name, up):
            self._fail(job_id, ServiceUnavailable(f"service {service_name(name)} went away"))
        for session in self._sessions:
            session.send(models=self.model_states())
        self._advance()

    def model_states(self) -> selector_pb2.ModelStates:
        """Which models are ready, and what is known of their modality sets."""
        states = selector_pb2.ModelStates()
        for name, profile in self._profiles.items():
            measured = all(profile.is_measured(s) for s in profile.accuracy)
            state = states.models.add(model=name, ready=measured and any(map(self._scheduler.is_up, profile.accuracy)))
            for modality_set, accuracy in profile.accuracy.items():
                state.sets.append(self._set_profile(profile, modality_set, accuracy))
        return states

    def statistics(self) -> dict[str, int]:
        """Counts since the start, and what is held now."""
        return dict(self.counters) | self._scheduler.statistics() | self._ledger.statistics()

    async def drain(self, seconds: float) -> None:
        """Admits nothing more, waits at most so long for what is under way, and ends what is left."""
        self._stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        for job_id in list(self._jobs):
            self._fail(job_id, ServiceUnavailable("service selector is stopping"))
        for session in self._sessions:
            session.outbox.put_nowait(None)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # What the scheduler decides

    def _advance(self) -> None:
        """Does whatever there is to do now."""
        while not isinstance(action := self._scheduler.next(time.monotonic()), Wait):
            if isinstance(action, Expired):
                self._fail(action.job_id, DeadlineExceeded("the deadline passed before the answer was there"))
            elif isinstance(action, EncodeCall):
                timeout = self._begin([rows.job_id for rows in action.rows])
                self._start(self._encode(action, self._encode_request(action), timeout))
            else:
                timeout = self._begin([job_id for job_id, _ in action.jobs])
                self._start(self._fuse(action, self._fuse_request(action), timeout))
        if self._timer is not None:
            self._timer.cancel()
        delay = None if action.until is None else max(action.until - time.monotonic(), 0.0)
        self._timer = None if delay is None else asyncio.get_running_loop().call_later(delay, self._advance)
        if self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(_RELEASE_EVERY_S, self._send_releases)

    async def _encode(self, call: EncodeCall, request: encoder_pb2.EncodeRequest, timeout: float) -> None:
        try:
            reply = await self._peer().encoders[call.modality].Encode(request, timeout=timeout)
        except Exception as error:  # noqa: BLE001 (whatever it is, the call must leave its lane)
            self._lose(call, error, service_name(call.modality))
        else:
            self._keep(call, reply.embeddings)
            self._scheduler.completed(call, time.monotonic())
        finally:
            self._end([rows.job_id for rows in call.rows])

    async def _fuse(self, call: FuseCall, request: fusion_pb2.FuseRequest, timeout: float) -> None:
        job_ids = [job_id for job_id, _ in call.jobs]
        try:
            reply = await self._peer().fusion.Fuse(request, timeout=timeout)
        except Exception as error:  # noqa: BLE001 (whatever it is, the call must leave its lane)
            self._lose(call, error, FUSION)
        else:
            for job_id, output in zip(job_ids, reply.outputs, strict=True):
                self._answer(job_id, output)
            self._scheduler.completed(call, time.monotonic())
        finally:
            self._end(job_ids)

    def _encode_request(self, call: EncodeCall) -> encoder_pb2.EncodeRequest:
        rung = self._peer().attachments.rung(call.modality, FUSION)
        request = encoder_pb2.EncodeRequest(model=call.model, rung=rung)
        for rows in call.rows:
            payload = self._jobs[rows.job_id].payloads[call.modality]
            request.rows.append(slice_rows(payload, rows.start, rows.count))
        return request

    def _fuse_request(self, call: FuseCall) -> fusion_pb2.FuseRequest:
        request = fusion_pb2.FuseRequest(model=call.model)
        for job_id, _ in call.jobs:
            group = request.groups.add()
            for modality, parts in self._jobs[job_id].embeddings.items():
                group.embeddings[modality].rows.extend(part for _, part in sorted(parts, key=itemgetter(0)))
        return request

    def _begin(self, job_ids: list[bytes]) -> float:
        """Marks a call as reading for its jobs; returns the seconds until the last of their deadlines."""
        for job_id in job_ids:
            self._ledger.call_started(job_id)
        jobs = [progress.job for job_id in job_ids if (progress := self._scheduler.progress_of(job_id))]
        return max((job.deadline for job in jobs), default=0.0) - time.monotonic()

    def _end(self, job_ids: list[bytes]) -> None:
        for job_id in job_ids:
            self._ledger.call_returned(job_id)
        self._advance()

    def _keep(self, call: EncodeCall, embeddings: tensor_pb2.TensorRef) -> None:
        """Notes where the embeddings of each job in a call are."""
        start = 0
        for rows in call.rows:
            for slot in _slots([embeddings]):
                self._ledger.hold(rows.job_id, _key(call.modality, slot))
            if rows.job_id in self._jobs:
                part = slice_rows(embeddings, start, rows.count)
                self._jobs[rows.job_id].embeddings[call.modality].append((rows.start, part))
            start += rows.count

    def _lose(self, call: EncodeCall | FuseCall, error: Exception, peer: str) -> None:
        if isinstance(error, grpc.RpcError):
            reason = error_from_rpc(error, peer)
            log.warning("call failed", extra={"peer": peer, "reason": str(reason)})
        else:
            reason = InternalError(f"service selector could not use the answer of {peer}")
            log.error("unexpected error", exc_info=error, extra={"peer": peer})
        for job_id in self._scheduler.failed(call, time.monotonic()):
            self._fail(job_id, reason)

    # How a job ends

    def _answer(self, job_id: bytes, output: tensor_pb2.Tensor) -> None:
        progress, job = self._scheduler.progress_of(job_id), self._jobs.get(job_id)
        if progress is None or job is None or progress.started_at is None:
            return
        now = time.monotonic()
        result = selector_pb2.JobResult(
            job_id=job_id,
            expected_accuracy=progress.expected_accuracy,
            queue_us=round((progress.started_at - progress.submitted_at) * 1e6),
            compute_us=round((now - progress.started_at) * 1e6),
        )
        result.groups.add(
            modality_set=format_set(progress.modality_set), row_start=0, row_count=progress.job.size, output=output
        )
        job.session.send(result=result)
        self.counters["jobs_answered"] += 1
        self._forget(job_id)

    def _fail(self, job_id: bytes, error: MoselError) -> None:
        job = self._jobs.get(job_id)
        if job is not None:
            self.counters["jobs_failed"] += 1
            _send_failure(job.session, job_id, error)
            self._forget(job_id)

    def _forget(self, job_id: bytes) -> bool:
        known = self._jobs.pop(job_id, None) is not None
        self._ledger.close(job_id)
        if not self._jobs:
            self._idle.set()
        return known

    def _send_releases(self) -> None:
        self._flush = None
        by_producer: dict[Session | str, list[tensor_pb2.ArenaSlot]] = defaultdict(list)
        for producer, arena_id, epoch, slot, generation in self._ledger.take_released():
            by_producer[producer].append(
                tensor_pb2.ArenaSlot(arena_id=arena_id, epoch=epoch, slot=slot, generation=generation)
            )
        for producer, slots in by_producer.items():
            if isinstance(producer, Session):
                producer.send(release=tensor_pb2.ReleaseSlots(slots=slots))
            else:
                self._start(self._peer().release(producer, slots))

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # A bug: the jobs inside fail at their deadline.
            log.error("unexpected error", exc_info=task.exception())

    def _peer(self) -> Peers:
        assert self._peers is not None, "use() comes before the first lane is up"
        return self._peers

    def _set_profile(
        self, profile: ModelProfile, modality_set: frozenset[str], accuracy: float
    ) -> gateway_pb2.SetProfile:
        measured = profile.is_measured(modality_set)
        return gateway_pb2.SetProfile(
            modality_set=format_set(modality_set),
            accuracy=accuracy,
            samples=profile.samples,
            latency_ms=profile.idle_latency_ms(modality_set, 1) if measured else 0.0,
            available=measured and self._scheduler.is_up(modality_set),
        )


def _job(description: selector_pb2.JobDescription) -> Job:
    """The job behind a description.

    Raises:
        InvalidRequest: names the field that is wrong.
    """
    modalities = frozenset(description.modalities)
    if len(description.job_id) != 16:
        raise InvalidRequest(f"job_id has {len(description.job_id)} bytes; expected 16")
    if description.size < 1:
        raise InvalidRequest("size is 0; expected at least one item")
    if not modalities or not modalities <= description.payloads.keys():
        raise InvalidRequest(f"modalities are {sorted(modalities)}; expected some of {sorted(description.payloads)}")
    return Job(
        id=description.job_id,
        model=description.model,
        size=description.size,
        modalities=modalities,
        min_accuracy=description.min_accuracy if description.HasField("min_accuracy") else None,
        deadline=time.monotonic() + description.budget_us / 1e6,
        exact=description.exact,
    )


def _send_failure(session: Session, job_id: bytes, error: MoselError) -> None:
    failure = selector_pb2.JobFailure(
        job_id=job_id,
        status_code=status_number(error),
        message=str(error),
        retry_after_ms=retry_after_ms(error),
    )
    session.send(failure=failure)


def _slots(refs: Iterable[tensor_pb2.TensorRef]) -> list[tensor_pb2.ArenaSlot]:
    return [ref.slot for ref in refs if ref.WhichOneof("place") == "slot"]


def _key(producer: Session | str, slot: tensor_pb2.ArenaSlot) -> SlotKey:
    return producer, slot.arena_id, slot.epoch, slot.slot, slot.generation
