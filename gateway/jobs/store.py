"""The arena as jobs see it: their payloads go in, and wait for room there. Knows no gRPC."""

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from operator import attrgetter

from gateway.jobs.checks import Payloads
from gateway.jobs.job import Job
from gateway.outbox import slots_of
from mosel.config import TransportSettings
from mosel.deadline import Deadline
from mosel.errors import Overloaded
from mosel.runtime.messages import ENVELOPE_BYTES, check_message, limit_bytes
from mosel.transport import Publisher
from mosel.v1 import tensor_pb2

# Above this many elements, checking and copying payloads would hold up other calls.
OFF_LOOP_ELEMENTS = 256 * 1024
# Leases end by themselves, too, and nobody says so.
_LOOK_AGAIN_S = 0.02

Publish = Callable[[], tensor_pb2.TensorRef]


class PayloadStore:
    """Puts the payloads of jobs into the arena. Waiting for a slot holds no thread; all belongs to one loop.

    Args:
        settings: the transport's limits.
        publisher: puts payloads there.
    """

    def __init__(self, settings: TransportSettings, publisher: Publisher) -> None:
        self._settings, self._publisher = settings, publisher
        self._freed, self._waiting = asyncio.Event(), 0

    async def store(self, job: Job, payloads: Payloads) -> None:
        """Publishes the payloads of a job, and lets its description say where; if that fails, no slot is left behind.

        Waits for slots for `transport.full_wait_ms` at most, all payloads together, and never beyond the job's end.

        Raises:
            DeadlineExceeded: the job's end came first.
            MoselError: as of `Publisher.publish`.
        """
        until = min(job.ends, Deadline.after(self._settings.full_wait_ms / 1000), key=attrgetter("at"))
        try:
            for name in job.sound.modalities:
                dtype, array = job.sound.package.modalities[name].dtype, payloads[name]
                publish = partial(self._publish, job, dtype, array.shape, array.data.cast("B"))
                ref = await self._stored(publish, array.size, array.nbytes, until)
                job.description.payloads[name].CopyFrom(ref)
            self._check_message(job)
        except BaseException as error:
            self.release(slots_of(job.description))
            if isinstance(error, Overloaded):
                job.ends.check("a slot for the payloads was free")
            raise

    def release(self, slots: Iterable[tensor_pb2.ArenaSlot]) -> None:
        """Takes back slots that nobody reads any more; who waits for one may have it."""
        self._publisher.release(slots)
        self._freed.set()
        self._freed = asyncio.Event()

    def statistics(self) -> dict[str, int]:
        """Slots of the arena and what was published, and jobs that wait for a slot."""
        return self._publisher.statistics() | {"jobs_waiting_for_slots": self._waiting}

    def _publish(self, job: Job, dtype: str, shape: tuple[int, ...], data: memoryview) -> tensor_pb2.TensorRef:
        lease_s = job.ends.remaining + self._settings.lease_grace_ms / 1000
        return self._publisher.publish(dtype, shape, data, lease_s)

    async def _stored(self, publish: Publish, elements: int, nbytes: int, until: Deadline) -> tensor_pb2.TensorRef:
        while True:
            takes_long = elements > OFF_LOOP_ELEMENTS and self._publisher.copies
            try:
                return await self._off_loop(publish) if takes_long else publish()
            except Overloaded:
                if not await self._room_for(nbytes, until):
                    raise

    async def _room_for(self, nbytes: int, until: Deadline) -> bool:
        """Whether there is room before a deadline; returns when there is."""
        self._waiting += 1
        try:
            while (left_s := until.remaining) > 0:
                if self._publisher.has_room(nbytes):
                    return True
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left_s, _LOOK_AGAIN_S)):
                        await self._freed.wait()
            return False
        finally:
            self._waiting -= 1

    async def _off_loop(self, publish: Publish) -> tensor_pb2.TensorRef:
        copying = asyncio.ensure_future(asyncio.to_thread(publish))
        try:
            return await asyncio.shield(copying)
        except asyncio.CancelledError:
            # The thread goes on, and fills a slot that no job will release.
            copying.add_done_callback(self._give_back)
            raise

    def _give_back(self, copying: "asyncio.Future[tensor_pb2.TensorRef]") -> None:
        if not copying.cancelled() and copying.exception() is None and copying.result().HasField("slot"):
            self.release([copying.result().slot])

    def _check_message(self, job: Job) -> None:
        """A message beyond the limit would take the stream down, and every other job with it."""
        inline = sum(ref.nbytes for ref in job.description.payloads.values() if ref.WhichOneof("place") == "inline")
        limit = limit_bytes(self._settings.max_message_mib) - ENVELOPE_BYTES
        check_message("payloads that must travel inside a message have", inline, limit)


def elements_of(tensors: Mapping[str, tensor_pb2.Tensor]) -> int:
    """How many elements tensors have, as they say."""
    # From the shapes: to ask protobuf for its size makes it serialise everything.
    return sum(math.prod(tensor.shape) for tensor in tensors.values())
