"""The jobs of this gateway: those that are under way, and the last that are over. Knows no gRPC."""

import asyncio
import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from gateway.access.caller import caller
from mosel.deadline import Deadline
from mosel.errors import (
    DeadlineExceeded,
    InvalidRequest,
    JobCancelled,
    JobNotFound,
    MoselError,
    Overloaded,
    ServiceUnavailable,
)
from mosel.v1 import gateway_pb2

_JOB_ID = re.compile("[0-9a-fA-F]{32}")
# As much of a text from outside is repeated and remembered.
_SHOWN_ID, _SHOWN_ERROR = 40, 400


@dataclass(eq=False)
class OpenJob:
    """A job that is not over.

    Attributes:
        status: where it is; whoever serves the job keeps it up to date.
        owner: the tenant that sent it; None: nobody has to say who it is.
    """

    status: gateway_pb2.JobStatus
    owner: str | None
    _task: "asyncio.Task[object]"
    _reason: MoselError | None = None

    def under_way(self) -> None:
        """All items are there, and the selector has the job."""
        self.status.state, self.status.items_received = gateway_pb2.UNDER_WAY, self.status.size

    def expire(self) -> None:
        """Ends the job because nobody waits any more."""
        received, size = self.status.items_received, self.status.size
        arriving = f"when {received} of {size} items had arrived"
        step = arriving if self.status.state == gateway_pb2.RECEIVING else "before the answer was there"
        self.end(DeadlineExceeded(f"the deadline passed {step}"))

    def end(self, reason: MoselError) -> None:
        """Ends the job from outside: the task that serves it gets the reason as an error. The first reason counts."""
        if self._reason is None:
            self._reason = reason
            self._close(reason)
            self._task.cancel()

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Notes how the body ends; what `end` interrupts raises its reason."""
        try:
            yield
        except asyncio.CancelledError:
            if self._reason is None:
                self._close(JobCancelled("the caller went away"))
                raise
            self._task.uncancel()
            raise self._reason from None
        except Exception as error:
            self._close(error)
            raise
        self.status.state = gateway_pb2.ANSWERED

    def _close(self, error: Exception) -> None:
        if isinstance(error, JobCancelled):
            self.status.state = gateway_pb2.CANCELLED
        else:
            self.status.state = gateway_pb2.FAILED
            self.status.error = str(error)[:_SHOWN_ERROR] if isinstance(error, MoselError) else "internal error"


@dataclass(frozen=True)
class _OverJob:
    """What is remembered of a job that is over."""

    status: gateway_pb2.JobStatus
    owner: str | None


class JobRegistry:
    """Finds jobs by their id, and bounds how many there are.

    Args:
        max_open: jobs that are not over.
        max_over: jobs that are over and remembered; beyond it the oldest is forgotten.
    """

    def __init__(self, max_open: int, max_over: int = 1024) -> None:
        self._max_open, self._max_over = max_open, max_over
        self._closed = False
        self._open: dict[str, OpenJob] = {}
        self._over: dict[str, _OverJob] = {}

    def check_room(self) -> None:
        """Raises Overloaded, or ServiceUnavailable at the end, if no further job may be opened."""
        if self._closed:
            raise _stopping()
        if len(self._open) >= self._max_open:
            raise Overloaded(f"{len(self._open)} jobs are in flight, the most that gateway.max_jobs_in_flight allows")

    def close(self) -> None:
        """No further job may be opened; those that are open go on."""
        self._closed = True

    def end_all(self) -> None:
        """Ends what is still open because this gateway is about to end."""
        for job in list(self._open.values()):
            job.end(_stopping())

    @contextlib.contextmanager
    def open(self, job_id: bytes, model: str, size: int, ends: Deadline) -> Iterator[OpenJob]:
        """A job that the current task serves inside the block, and the caller's; how the block ends is how it ends.

        Args:
            job_id: 16 bytes, of no other job.
            model: the model's name.
            size: items.
            ends: when nobody waits any more.

        Raises:
            DeadlineExceeded: nobody waits any more.
            JobCancelled: somebody cancelled it.
            MoselError: `OpenJob.end` was called with it.
        """
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        name = job_id.hex()
        status = gateway_pb2.JobStatus(job_id=name, model=model, state=gateway_pb2.RECEIVING, size=size)
        job = self._open[name] = OpenJob(status, caller(), task)
        expiry = asyncio.get_running_loop().call_later(ends.remaining, job.expire)
        try:
            with job.following():
                yield job
        finally:
            expiry.cancel()
            del self._open[name]
            self._over[name] = _OverJob(job.status, job.owner)
            if len(self._over) > self._max_over:
                del self._over[next(iter(self._over))]

    def status(self, job_id: str) -> gateway_pb2.JobStatus:
        """Where a job is.

        Args:
            job_id: 32 hexadecimal digits.

        Raises:
            InvalidRequest: the id is none.
            JobNotFound: there is no such job, it is forgotten, or it is another tenant's.
        """
        if not _JOB_ID.fullmatch(job_id):
            raise InvalidRequest(f"job_id is {job_id[:_SHOWN_ID]!r}; expected 32 hexadecimal digits")
        name = job_id.lower()
        job = self._open.get(name) or self._over.get(name)
        # Another tenant's job is none.
        if job is None or caller() not in (None, job.owner):
            raise JobNotFound(f"job_id is '{name}'; expected a job under way or one of the last {self._max_over}")
        return job.status

    def cancel(self, job_id: str) -> gateway_pb2.JobStatus:
        """Ends a job unless it is over, and says where it is then; arguments and errors as of `status`."""
        status = self.status(job_id)
        if status.job_id in self._open:
            self._open[status.job_id].end(JobCancelled(f"job {status.job_id} was cancelled"))
        return status

    def statistics(self) -> dict[str, int]:
        """Jobs that are under way, and jobs that are remembered."""
        return {"jobs_in_flight": len(self._open), "jobs_remembered": len(self._over)}


def _stopping() -> ServiceUnavailable:
    return ServiceUnavailable("service gateway is stopping")
