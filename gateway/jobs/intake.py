"""From checked job to the description that the selector gets, with the payloads in the arena. Knows no gRPC."""

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from gateway.jobs.checks import CheckedJob, Payloads, Times, times_of
from gateway.selector_link import slots_of
from mosel.config import Settings
from mosel.deadline import Deadline
from mosel.errors import MoselError, Overloaded
from mosel.runtime.messages import ENVELOPE_BYTES, check_message, limit_bytes
from mosel.transport import Publisher
from mosel.v1 import selector_pb2, tensor_pb2

# Above this many elements, checking and copying payloads would hold up other calls.
OFF_LOOP_ELEMENTS = 256 * 1024

Check = Callable[[], tuple[CheckedJob, Payloads]]
# Raises an error for a job that need not be tried.
Admit = Callable[[CheckedJob, Times], None]


@dataclass(frozen=True)
class Prepared:
    """A job that is ready for the selector; who has it must see to its slots."""

    job: CheckedJob
    times: Times
    description: selector_pb2.JobDescription


class Intake:
    """Puts payloads into the arena.

    Args:
        settings: limits.
        publisher: puts payloads there.
        admit: asked before they are put there.
    """

    def __init__(self, settings: Settings, publisher: Publisher, admit: Admit) -> None:
        self._settings, self._publisher, self._admit = settings, publisher, admit

    async def request(self, job_id: bytes, check: Check, elements: int, call: Deadline) -> Prepared:
        """Checks a request and publishes its payloads; cancelling leaves no slot behind.

        Args:
            job_id: 16 bytes, of no other job.
            check: what the caller sent, as a function that checks it; runs in a thread if there is much of it.
            elements: of all payloads together, as the caller says.
            call: when the caller's own call ends.

        Raises:
            MoselError: whatever `check` and `admit` raise, and as `Publisher.publish`.
        """
        large = elements > OFF_LOOP_ELEMENTS
        job, payloads = await asyncio.to_thread(check) if large else check()
        times = times_of(job, call, self._settings.gateway.default_deadline_ms / 1000)
        self._admit(job, times)
        return await self._prepared(job_id, job, payloads, times, large)

    async def upload(self, job_id: bytes, job: CheckedJob, payloads: Payloads, times: Times) -> Prepared:
        """Publishes payloads that were checked as they came, for results as they finish; as `request` otherwise."""
        large = sum(array.size for array in payloads.values()) > OFF_LOOP_ELEMENTS
        prepared = await self._prepared(job_id, job, payloads, times, large)
        prepared.description.stream = True
        return prepared

    async def _prepared(
        self, job_id: bytes, job: CheckedJob, payloads: Payloads, times: Times, large: bool
    ) -> Prepared:
        publish = partial(self._published, job_id, job, payloads, times)
        if not large:
            try:
                return publish(0.0)
            except Overloaded:
                # The arena is full: wait for a slot where it holds up nobody.
                pass
        publishing = asyncio.ensure_future(asyncio.to_thread(publish, self._settings.transport.full_wait_ms / 1000))
        try:
            return await asyncio.shield(publishing)
        except asyncio.CancelledError:
            # The thread goes on, and fills slots that no job will release.
            publishing.add_done_callback(self._give_back)
            raise

    def _give_back(self, publishing: "asyncio.Future[Prepared]") -> None:
        if not publishing.cancelled() and publishing.exception() is None:
            self._publisher.release(slots_of(publishing.result().description))

    def _published(self, job_id: bytes, job: CheckedJob, payloads: Payloads, times: Times, wait_s: float) -> Prepared:
        description = description_of(job_id, job, times)
        lease_s = times.ends.remaining + self._settings.transport.lease_grace_ms / 1000
        try:
            for name in job.modalities:
                dtype, array = job.package.modalities[name].dtype, payloads[name]
                ref = self._publisher.publish(dtype, array.shape, array.data.cast("B"), lease_s, wait_s)
                description.payloads[name].CopyFrom(ref)
            self._check_message(description)
        except MoselError:
            self._publisher.release(slots_of(description))
            raise
        return Prepared(job, times, description)

    def _check_message(self, description: selector_pb2.JobDescription) -> None:
        """A message beyond the limit would take the stream down, and every other job with it."""
        inline = sum(ref.nbytes for ref in description.payloads.values() if ref.WhichOneof("place") == "inline")
        limit = limit_bytes(self._settings.transport.max_message_mib) - ENVELOPE_BYTES
        check_message("payloads that must travel inside a message have", inline, limit)


def description_of(job_id: bytes, job: CheckedJob, times: Times) -> selector_pb2.JobDescription:
    """A job without its payloads."""
    budget_us = max(round(times.deadline.remaining * 1e6), 0)
    late_us = round((times.ends.at - times.deadline.at) * 1e6)
    return selector_pb2.JobDescription(
        job_id=job_id,
        model=job.package.id,
        size=job.size,
        modalities=job.modalities,
        min_accuracy=job.min_accuracy,
        exact=job.exact,
        effort=job.effort,
        late_ok=job.late_ok,
        priority=job.priority,
        budget_us=budget_us,
        expiry_us=budget_us + late_us,
    )


def elements_of(tensors: Mapping[str, tensor_pb2.Tensor]) -> int:
    """How many elements tensors have, as they say."""
    # From the shapes: to ask protobuf for its size makes it serialise everything.
    return sum(math.prod(tensor.shape) for tensor in tensors.values())
