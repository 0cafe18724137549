"""The items of a job as they arrive, batch by batch, and what they may take of memory. Knows no gRPC."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import numpy as np

from gateway.jobs.checks import CheckedJob, check_payloads, sent_in, size_of
from gateway.jobs.store import OFF_LOOP_ELEMENTS, elements_of
from mosel.errors import DeadlineExceeded, InvalidRequest, Overloaded, PayloadTooLarge
from mosel.tensors import DTYPES
from mosel.v1 import gateway_pb2

# The next message of a caller; None once it has said that there are no more.
Read = Callable[[], Awaitable[gateway_pb2.SubmitJobRequest | None]]


class JobUpload:
    """Collects the payloads of one job.

    Args:
        job: what was asked for.
        max_items: bound on the items of one batch.

    Attributes:
        received: items that have arrived.
        payloads: arrays [size, *shape] by modality, complete once all have arrived.
    """

    def __init__(self, job: CheckedJob, max_items: int) -> None:
        self.received = 0
        specs = {name: job.package.modalities[name] for name in job.modalities}
        # The system gives memory to the pages that are written, so that what was only announced takes none.
        self.payloads = {name: np.empty((job.size, *spec.shape), DTYPES[spec.dtype]) for name, spec in specs.items()}
        self._job, self._max_items = job, max_items

    @property
    def complete(self) -> bool:
        """Whether all items have arrived."""
        return self.received == self._job.size

    def add(self, batch: gateway_pb2.ItemBatch) -> None:
        """Takes the next items.

        Raises:
            PayloadTooLarge: more items than one job may have.
            InvalidRequest: names the field, what it holds and what was expected.
        """
        sent = sent_in("items.payloads", batch.payloads)
        arrays = check_payloads("items.payloads", sent, self._job.package, self._max_items)
        if tuple(arrays) != self._job.modalities:
            raise InvalidRequest(
                f"items.payloads has {', '.join(arrays)}; expected {', '.join(self._job.modalities)} in each batch"
            )
        end = self.received + size_of(arrays)
        if end > self._job.size:
            raise InvalidRequest(f"items: {end} have arrived; expected {self._job.size}, the size of the job")
        for name, array in arrays.items():
            self.payloads[name][self.received : end] = array
        self.received = end


async def read_spec(read: Read, seconds: float) -> gateway_pb2.JobSpec:
    """The first message of a caller, for which it has so many seconds.

    Raises:
        DeadlineExceeded: it has not come.
        InvalidRequest: it is not what a job asks for.
    """
    try:
        async with asyncio.timeout(seconds):
            message = await read()
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed before the first message") from None
    if message is None or not message.HasField("job"):
        raise InvalidRequest(f"the first message is {_kind(message)}; expected job")
    return message.job


async def read_items(read: Read, upload: JobUpload) -> AsyncIterator[int]:
    """Reads batches until all items have arrived; says how many have after each.

    Raises:
        MoselError: as `read_batch` and `JobUpload.add`.
    """
    while not upload.complete:
        batch = await read_batch(read, upload)
        if elements_of(batch.payloads) > OFF_LOOP_ELEMENTS:
            await asyncio.to_thread(upload.add, batch)
        else:
            upload.add(batch)
        yield upload.received


async def read_batch(read: Read, upload: JobUpload) -> gateway_pb2.ItemBatch:
    """The next message while items are missing.

    Raises:
        InvalidRequest: it brings none.
    """
    message = await read()
    if message is None:
        raise InvalidRequest(f"items: {upload.received} have arrived when the stream ended; expected all of the job")
    if not message.HasField("items"):
        raise InvalidRequest(f"a message is {_kind(message)} when {upload.received} items have arrived; expected items")
    return message.items


async def read_end(read: Read) -> None:
    """Waits for the end of a caller's messages, after all items.

    Raises:
        InvalidRequest: there is another message.
    """
    if (message := await read()) is not None:
        raise InvalidRequest(f"a message is {_kind(message)} after all items; expected no more messages")


def _kind(message: gateway_pb2.SubmitJobRequest | None) -> str:
    return "missing" if message is None else message.WhichOneof("message") or "empty"


class ArrivingBytes:
    """What all jobs, and the bodies of HTTP requests, together may take while they arrive.

    Args:
        largest: bytes that one payload may have.
        limit: bytes that all may have together.
        setting: the setting that states them, for messages.
    """

    def __init__(self, largest: int, limit: int, setting: str) -> None:
        self._largest, self._limit, self._setting = largest, limit, setting
        self._used = 0

    @contextlib.contextmanager
    def reserve(self, job: CheckedJob) -> Iterator[None]:
        """Room for a job's items inside the block.

        Raises:
            PayloadTooLarge: the job is too large, whatever else arrives.
            Overloaded: there is not so much room now.
        """
        payloads = job.payload_bytes()
        name, nbytes, total = *max(payloads.items(), key=lambda pair: pair[1]), sum(payloads.values())
        if nbytes > self._largest:
            raise PayloadTooLarge(
                f"size is {job.size}: {name} would have {nbytes} bytes; expected at most {self._largest} bytes "
                f"({self._setting}): send fewer items"
            )
        if total > self._limit:
            raise PayloadTooLarge(
                f"size is {job.size}: the payloads would have {total} bytes; expected at most {self._limit} bytes "
                f"({self._setting}): send fewer items"
            )
        with self.growing() as take:
            take(total)
            yield

    @contextlib.contextmanager
    def growing(self) -> Iterator[Callable[[int], None]]:
        """Room for what has no known size yet; inside the block, the function takes so many bytes more.

        The function raises as `reserve` does.
        """
        taken = 0

        def take(nbytes: int) -> None:
            nonlocal taken
            if taken + nbytes > self._limit:
                raise PayloadTooLarge(
                    f"what arrives has {taken + nbytes} bytes or more; "
                    f"expected at most {self._limit} bytes ({self._setting}): send fewer items"
                )
            if self._used + nbytes > self._limit:
                raise Overloaded(f"jobs that are arriving take {self._used} of {self._limit} bytes ({self._setting})")
            self._used, taken = self._used + nbytes, taken + nbytes

        try:
            yield take
        finally:
            self._used -= taken

    def statistics(self) -> dict[str, int]:
        """Bytes that are reserved now."""
        return {"arriving_bytes": self._used}
