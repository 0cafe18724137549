"""The jobs of this gateway: those that are under way, and the last that are over. Knows no gRPC."""

import re
import secrets
from typing import NoReturn

from gateway.access.caller import caller
from gateway.jobs.job import Job
from mosel.deadline import Deadline
from mosel.errors import InvalidRequest, JobCancelled, JobElsewhere, JobNotFound, Overloaded, ServiceUnavailable
from mosel.v1 import gateway_pb2

_JOB_ID = re.compile("[0-9a-fA-F]{32}")
_ID_BYTES, _GATEWAY_BYTES = 16, 4
# As much of a text from outside is repeated.
_SHOWN_ID = 40


class JobRegistry:
    """Finds jobs by their id, and bounds how many there are.

    Args:
        max_open: jobs that are not over.
        max_over: jobs that are over and remembered; beyond it the oldest is forgotten.

    Attributes:
        gateway: 4 random bytes that name this gateway; its jobs' ids begin with them.
    """

    def __init__(self, max_open: int, max_over: int = 1024) -> None:
        self.gateway = secrets.token_bytes(_GATEWAY_BYTES)
        self._max_open, self._max_over = max_open, max_over
        self._closed = False
        self._open: dict[str, Job] = {}
        self._over: dict[str, tuple[gateway_pb2.JobStatus, str | None]] = {}

    def new_id(self) -> bytes:
        """An id of no other job: this gateway's name, and 12 random bytes."""
        return self.gateway + secrets.token_bytes(_ID_BYTES - _GATEWAY_BYTES)

    def check_room(self) -> None:
        """Raises Overloaded, or ServiceUnavailable at the end, if no further job is admitted."""
        if self._closed:
            raise _stopping()
        if len(self._open) >= self._max_open:
            raise Overloaded(f"{len(self._open)} jobs are in flight, the most that gateway.max_jobs_in_flight allows")

    def close(self) -> None:
        """No further job is admitted; those that are open go on."""
        self._closed = True

    def end_all(self) -> None:
        """Ends what is still open because this gateway is about to end."""
        for job in list(self._open.values()):
            job.end(_stopping())

    def admit(self, job: Job, ends: Deadline) -> None:
        """A place for a job that the current task serves until it calls `leave`.

        Args:
            job: the job, with an id of no other.
            ends: when nobody waits any more, until the job says more.

        Raises:
            Overloaded, ServiceUnavailable: there is no place.
        """
        self.check_room()
        job.admit(ends)
        self._open[job.status.job_id] = job

    def leave(self, job: Job, error: BaseException | None) -> None:
        """A job that has a place is over; one that was found to be unsound is not remembered.

        Args:
            job: the job.
            error: what ended it; None: it is answered.

        Raises:
            DeadlineExceeded: nobody waits any more.
            JobCancelled: somebody cancelled it.
            MoselError: `Job.end` was called with it.
        """
        try:
            job.over(error)
        finally:
            del self._open[job.status.job_id]
            if job.checked is not None:
                self._remember(job)

    def status(self, job_id: str) -> gateway_pb2.JobStatus:
        """Where a job is.

        Args:
            job_id: 32 hexadecimal digits.

        Raises:
            InvalidRequest: the id is none.
            JobElsewhere: another gateway had it.
            JobNotFound: there is no such job, it is forgotten, or it is another tenant's.
        """
        if not _JOB_ID.fullmatch(job_id):
            raise InvalidRequest(f"job_id is {job_id[:_SHOWN_ID]!r}; expected 32 hexadecimal digits")
        name = job_id.lower()
        status, owner = self._over.get(name, (None, None))
        if (job := self._open.get(name)) is not None:
            status, owner = job.status, job.owner
        # Another tenant's job is none.
        if status is None or caller() not in (None, owner):
            self._not_found(name)
        return status

    def cancel(self, job_id: str) -> gateway_pb2.JobStatus:
        """Ends a job unless it is over, and says where it is then; arguments and errors as of `status`."""
        status = self.status(job_id)
        if status.job_id in self._open:
            self._open[status.job_id].end(JobCancelled(f"job {status.job_id} was cancelled"))
        return status

    def statistics(self) -> dict[str, int]:
        """Jobs that are under way, and jobs that are remembered."""
        return {"jobs_in_flight": len(self._open), "jobs_remembered": len(self._over)}

    def _remember(self, job: Job) -> None:
        self._over[job.status.job_id] = job.status, job.owner
        if len(self._over) > self._max_over:
            del self._over[next(iter(self._over))]

    def _not_found(self, name: str) -> NoReturn:
        expected = f"job_id is '{name}'; expected a job under way or one of the last {self._max_over}"
        own, theirs = self.gateway.hex(), name[: 2 * _GATEWAY_BYTES]
        if theirs == own:
            raise JobNotFound(expected)
        raise JobElsewhere(f"{expected} of gateway {own}; that one is of gateway {theirs}", own)


def _stopping() -> ServiceUnavailable:
    return ServiceUnavailable("service gateway is stopping")
