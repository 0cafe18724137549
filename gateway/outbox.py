"""What waits to be sent to the selector: what is urgent goes first, jobs have a bound. Knows no gRPC."""

import asyncio
from collections import deque

from mosel.errors import Overloaded
from mosel.transport.host import monotonic_ns
from mosel.v1 import selector_pb2, tensor_pb2

# More wait only where the selector does not read.
_MOST_JOBS = 128
# Under which the models in use wait among the jobs; no job has that id.
_MODELS = b""


class Outbox:
    """Two lanes of one stream; iterating, once, gives what is to be sent until the box is closed.

    Cancels and answers overtake jobs, and are never refused: there are no more cancels than jobs that were sent, and no
    more answers than questions. The models in use stay in line with the jobs, which they are about.

    Args:
        most_jobs: that may wait.
    """

    def __init__(self, most_jobs: int = _MOST_JOBS) -> None:
        self._most_jobs = most_jobs
        self._urgent: deque[selector_pb2.GatewayMessage] = deque()
        self._jobs: dict[bytes, selector_pb2.GatewayMessage] = {}
        self._changed, self._closed = asyncio.Event(), False

    def put(self, message: selector_pb2.GatewayMessage) -> None:
        """Sends a message before all jobs."""
        self._urgent.append(message)
        self._changed.set()

    def put_models(self, models: selector_pb2.ModelsInUse) -> None:
        """Sends the models in use after the jobs that wait; what was to be said of them before is void."""
        self._jobs.pop(_MODELS, None)
        self._jobs[_MODELS] = selector_pb2.GatewayMessage(models=models)
        self._changed.set()

    def put_job(self, description: selector_pb2.JobDescription) -> None:
        """Sends a job.

        Raises:
            Overloaded: too many wait.
        """
        if len(self._jobs) >= self._most_jobs:
            raise Overloaded(f"{len(self._jobs)} jobs wait to be sent to service selector, which does not read")
        self._jobs[description.job_id] = selector_pb2.GatewayMessage(job=description)
        self._changed.set()

    def cancel(self, job_id: bytes) -> bool:
        """Takes back a job that waits, or sends its cancel; returns whether it was taken back."""
        if self._jobs.pop(job_id, None) is not None:
            return True
        self.put(selector_pb2.GatewayMessage(cancel=selector_pb2.CancelJob(job_id=job_id)))
        return False

    def close(self) -> list[selector_pb2.JobDescription]:
        """Nothing more is sent; returns the jobs that were not."""
        self._closed = True
        self._changed.set()
        return [message.job for message in self._jobs.values() if message.HasField("job")]

    def statistics(self) -> dict[str, int]:
        """Messages that wait, by lane."""
        return {"outbox.urgent": len(self._urgent), "outbox.jobs": len(self._jobs)}

    def __aiter__(self) -> "Outbox":
        return self

    async def __anext__(self) -> selector_pb2.GatewayMessage:
        while not self._closed:
            if self._urgent:
                return self._urgent.popleft()
            if self._jobs:
                message = self._jobs.pop(next(iter(self._jobs)))
                if message.HasField("job"):
                    stamp(message.job)
                return message
            self._changed.clear()
            await self._changed.wait()
        raise StopAsyncIteration


def stamp(description: selector_pb2.JobDescription) -> None:
    """Says what is left of a job's time at the moment when it is sent, for a selector that has another clock."""
    late_us = description.expiry_us - description.budget_us
    description.budget_us = max((description.deadline_ns - monotonic_ns()) // 1000, 0)
    description.expiry_us = description.budget_us + late_us


def slots_of(description: selector_pb2.JobDescription) -> list[tensor_pb2.ArenaSlot]:
    """The slots that hold a job's payloads."""
    return [ref.slot for ref in description.payloads.values() if ref.HasField("slot")]
