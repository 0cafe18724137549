"""The gateway's one long-lived stream to the selector: jobs out, answers back, in any order."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable

import grpc

from mosel.config import Settings
from mosel.deadline import Deadline
from mosel.errors import DeadlineExceeded, ServiceUnavailable
from mosel.service import channel_options
from mosel.status import error_from_number
from mosel.v1 import arena_pb2, selector_pb2, selector_pb2_grpc, service_pb2, tensor_pb2

_RECONNECT_S = 0.1
_STATUS_TIMEOUT_S = 2.0

log = logging.getLogger(__name__)


class SelectorLink:
    """Keeps the stream up and matches answers to jobs; a context manager.

    Attributes:
        models: what the selector last said of each model; empty while there is no selector.
        refused: why no job may be sent although the selector is there; empty if it may.

    Args:
        settings: the selector's address.
        announcement: the gateway's arena, told to each selector first.
        release: takes back payload slots that nobody reads any more.
        transport_changed: called when the selector says how payloads reach the encoders.
        models_changed: called when the selector says which models are ready.
    """

    def __init__(
        self,
        settings: Settings,
        announcement: arena_pb2.Announcement,
        release: Callable[[Iterable[tensor_pb2.ArenaSlot]], None],
        transport_changed: Callable[[tensor_pb2.Rung.ValueType], None],
        models_changed: Callable[[], None],
    ) -> None:
        self.models: dict[str, selector_pb2.ModelState] = {}
        self.refused = ""
        self._settings, self._announcement = settings, announcement
        self._release, self._transport_changed, self._models_changed = release, transport_changed, models_changed
        self._outbox: asyncio.Queue[selector_pb2.GatewayMessage] | None = None
        self._answers: dict[bytes, asyncio.Future[selector_pb2.JobResult]] = {}

    async def __aenter__(self) -> "SelectorLink":
        self._channel = grpc.aio.insecure_channel(self._settings.selector_address, channel_options(self._settings))
        self._stub = selector_pb2_grpc.SelectorStub(self._channel)
        self._task = asyncio.create_task(self._stay_connected(), name="selector link")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self._channel.close()

    @property
    def jobs_in_flight(self) -> int:
        """Jobs that wait for their answer."""
        return len(self._answers)

    def check_connected(self) -> None:
        """Raises ServiceUnavailable unless the selector is there and takes jobs."""
        if self._outbox is None:
            raise ServiceUnavailable("service selector is not reachable")
        if self.refused:
            raise ServiceUnavailable(f"service gateway must not send payloads: {self.refused}")

    async def predict(self, description: selector_pb2.JobDescription, deadline: Deadline) -> selector_pb2.JobResult:
        """Sends a job and waits for its answer, at most until the deadline.

        Raises:
            MoselError: whatever the selector refused it with.
            ServiceUnavailable: the selector is away, or went away.
            DeadlineExceeded: there was no answer in time; the job is cancelled.
        """
        try:
            self.check_connected()
        except ServiceUnavailable:
            self._release(slots_of(description))
            raise
        answer: asyncio.Future[selector_pb2.JobResult] = asyncio.get_running_loop().create_future()
        self._answers[description.job_id] = answer
        self._send(selector_pb2.GatewayMessage(job=description))
        try:
            async with asyncio.timeout(deadline.remaining):
                return await answer
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the answer was there") from None
        finally:
            del self._answers[description.job_id]
            if not answer.done() or answer.cancelled():
                cancel = selector_pb2.CancelJob(job_id=description.job_id)
                self._send(selector_pb2.GatewayMessage(cancel=cancel))

    async def statuses(self) -> service_pb2.StatusReply:
        """The state of the selector and of the services behind it; raises grpc.RpcError."""
        return await self._stub.Status(service_pb2.StatusRequest(), timeout=_STATUS_TIMEOUT_S)

    def _send(self, message: selector_pb2.GatewayMessage) -> None:
        if self._outbox is not None:
            self._outbox.put_nowait(message)

    async def _stay_connected(self) -> None:
        while True:
            outbox: asyncio.Queue[selector_pb2.GatewayMessage] = asyncio.Queue()
            outbox.put_nowait(selector_pb2.GatewayMessage(announcement=self._announcement))
            try:
                async for message in self._stub.Connect(_drain(outbox)):
                    # The first message says that the selector is there.
                    self._outbox = outbox
                    self._receive(message)
            except grpc.RpcError as error:
                log.debug("selector not reachable", extra={"reason": error.code().name})
            self._disconnected()
            await asyncio.sleep(_RECONNECT_S)

    def _receive(self, message: selector_pb2.SelectorMessage) -> None:
        kind = message.WhichOneof("message")
        if kind == "result":
            answer = self._answers.get(message.result.job_id)
            if answer is not None and not answer.done():
                answer.set_result(message.result)
        elif kind == "failure":
            failure = message.failure
            answer = self._answers.get(failure.job_id)
            if answer is not None and not answer.done():
                answer.set_exception(error_from_number(failure.status_code, failure.message, failure.retry_after_ms))
        elif kind == "release":
            self._release(message.release.slots)
        elif kind == "transport":
            self.refused = message.transport.refused
            self._transport_changed(message.transport.rung)
        elif kind == "models":
            self.models = {state.model: state for state in message.models.models}
            self._models_changed()

    def _disconnected(self) -> None:
        """Fails what was under way. Payload slots stay until their leases end: encoders may still read them."""
        if self._outbox is not None:
            log.warning("selector went away", extra={"jobs_lost": len(self._answers)})
        self._outbox = None
        # Another selector knows nothing of this gateway's arena yet.
        self._transport_changed(tensor_pb2.INLINE)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ServiceUnavailable("service selector went away"))
        if self.models:
            self.models = {}
            self._models_changed()


def slots_of(description: selector_pb2.JobDescription) -> list[tensor_pb2.ArenaSlot]:
    """The slots that hold a job's payloads."""
    return [ref.slot for ref in description.payloads.values() if ref.HasField("slot")]


async def _drain(
    outbox: "asyncio.Queue[selector_pb2.GatewayMessage]",
) -> AsyncIterator[selector_pb2.GatewayMessage]:
    while True:
        yield await outbox.get()
