"""The record of one job in the gateway, from its request until its answer. Knows no gRPC and no sockets."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from gateway.access.caller import caller
from gateway.jobs.checks import CheckedJob
from mosel.deadline import Deadline
from mosel.errors import Cancelled, DeadlineExceeded, JobCancelled, MoselError
from mosel.observability.metrics import MIXED
from mosel.observability.tracing import NO_SPAN, Span
from mosel.v1 import gateway_pb2, selector_pb2

# As much of an error is remembered.
_SHOWN_ERROR = 400
_NEVER = Deadline(float("inf"))


@dataclass(eq=False)
class Job:
    """One job, as far as it got; a request that is refused before it is one, too.

    Attributes:
        id: 16 bytes.
        model: its name, as the caller says.
        method: what was called.
        span: of the whole request.
        owner: the tenant that sent it; None: nobody has to say who it is.
        came: when its request came, in seconds of `time.monotonic()`.
        admitted: since when it has its place, and its deadline counts.
        ends: when nobody waits any more; until it is checked, when the caller's own call ends.
        deadline: what it is planned for; the same as `ends` unless a late answer is wanted.
        status: where it is, for GetJob.
        checked: what was asked for, once that is known to be sound.
        description: what the selector gets.
        sent: when it got it; 0: it has not.
        sets: items by modality set, once it is answered.
        result: what the selector said of it at the end.
        slack_ms: milliseconds left then; negative if it was late.
    """

    id: bytes
    model: str = ""
    method: str = ""
    span: Span = NO_SPAN
    owner: str | None = field(default_factory=caller)
    came: float = field(default_factory=time.monotonic)
    admitted: float = field(default_factory=time.monotonic)
    ends: Deadline = _NEVER
    deadline: Deadline = _NEVER
    status: gateway_pb2.JobStatus = field(default_factory=gateway_pb2.JobStatus)
    checked: CheckedJob | None = None
    description: selector_pb2.JobDescription = field(default_factory=selector_pb2.JobDescription)
    sent: float = 0.0
    sets: Mapping[str, int] = field(default_factory=dict)
    result: selector_pb2.JobResult = field(default_factory=selector_pb2.JobResult)
    slack_ms: float = 0.0
    _task: "asyncio.Task[object] | None" = None
    _expiry: asyncio.TimerHandle | None = None
    _reason: MoselError | None = None

    @property
    def sound(self) -> CheckedJob:
        """What was asked for; it was checked."""
        assert self.checked is not None, "a job is checked before it goes on"
        return self.checked

    @property
    def size(self) -> int:
        """Items; 0 if that is not known."""
        return 0 if self.checked is None else self.checked.size

    @property
    def modality_set(self) -> str:
        """The set that its items used."""
        return next(iter(self.sets)) if len(self.sets) == 1 else MIXED

    def admit(self, ends: Deadline) -> None:
        """It has a place; the current task serves it, and is interrupted when nobody waits any more."""
        self._task = asyncio.current_task()
        self.admitted = time.monotonic()
        self.status.job_id, self.status.state = self.id.hex(), gateway_pb2.RECEIVING
        self.deadline = self.ends = ends
        self._expiry = asyncio.get_running_loop().call_later(ends.remaining, self.expire)

    def end_by(self, ends: Deadline) -> None:
        """Nobody waits longer than until then, and no longer than it was."""
        self.deadline = min(self.deadline, ends, key=attrgetter("at"))
        self._wait_until(min(self.ends, ends, key=attrgetter("at")))

    def sound_as(self, checked: CheckedJob, default_s: float) -> None:
        """It is sound, and due as it says, or so many seconds after it was admitted if it does not say."""
        self.checked, self.model = checked, checked.package.name
        self.status.model, self.status.size = self.model, checked.size
        slo_s = default_s if checked.latency_slo_ms is None else checked.latency_slo_ms / 1000
        self.deadline = min(Deadline(self.admitted + slo_s), self.ends, key=attrgetter("at"))
        self._wait_until(self.ends if checked.late_ok else self.deadline)

    def under_way(self) -> None:
        """All items are there, and the selector has the job."""
        self.status.state, self.status.items_received = gateway_pb2.UNDER_WAY, self.status.size
        self.sent = time.monotonic()

    def answered(self, sets: Mapping[str, int], result: selector_pb2.JobResult) -> None:
        """All of it is answered."""
        self.sets, self.result, self.slack_ms = sets, result, self.deadline.remaining * 1000
        self.status.items_done = self.size

    def expire(self) -> None:
        """Ends the job because nobody waits any more."""
        self.end(DeadlineExceeded(f"the deadline passed {self._step()}"))

    def end(self, reason: MoselError) -> None:
        """Ends the job from outside: the task that serves it gets the reason as an error. The first reason counts."""
        assert self._task is not None, "only jobs with a place are ended"
        if self._reason is None:
            self._reason = reason
            self._close(reason)
            self._task.cancel()

    def over(self, error: BaseException | None) -> None:
        """Notes how it ended, in the task that serves it.

        Args:
            error: what ended it; None: it is answered.

        Raises:
            MoselError: what `end` was called with, if that is what the task was cancelled for.
        """
        if self._expiry is not None:
            self._expiry.cancel()
        if error is None:
            self.status.state = gateway_pb2.ANSWERED
        elif isinstance(error, asyncio.CancelledError):
            if self._reason is None:
                self._close(JobCancelled("the caller went away"))
                return
            if self._task is not None:
                self._task.uncancel()
            raise self._reason from None
        elif isinstance(error, Exception):
            self._close(error)

    def _wait_until(self, ends: Deadline) -> None:
        if self._expiry is not None and ends.at != self.ends.at:
            self._expiry.cancel()
            self._expiry = asyncio.get_running_loop().call_later(ends.remaining, self.expire)
        self.ends = ends

    def _step(self) -> str:
        """What the job has not got to."""
        if self.status.state != gateway_pb2.RECEIVING:
            return "before the answer was there"
        if self.checked is None:
            return "before the request was checked"
        if self.status.items_received < self.size:
            return f"when {self.status.items_received} of {self.size} items had arrived"
        return "before the payloads were stored"

    def _close(self, error: Exception) -> None:
        if isinstance(error, JobCancelled | Cancelled):
            self.status.state = gateway_pb2.CANCELLED
        else:
            self.status.state = gateway_pb2.FAILED
            self.status.error = str(error)[:_SHOWN_ERROR] if isinstance(error, MoselError) else "internal error"
