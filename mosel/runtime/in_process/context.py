"""What a handler gets beside its request: the server's end of a call."""

from typing import Any, NoReturn

import grpc

from mosel.runtime.in_process.handing_over import Deserializer, Serializer, TooLarge, hand_over
from mosel.runtime.in_process.message_queue import ReadByIterating
from mosel.runtime.in_process.rpc import Metadata, Rpc, Status

_OVER = "RPC already finished."


class InProcessContext(ReadByIterating):
    """Stands for a `grpc.aio.ServicerContext`; iterating gives the caller's messages.

    Args:
        rpc: the call.
        handler: its method's.
        limits: the most bytes of a message that the server sends, and of one that it receives.
    """

    def __init__(self, rpc: Rpc, handler: Any, limits: tuple[int, int]) -> None:
        self._rpc, self._handler = rpc, handler
        self._limits = min(limits[0], rpc.limits[1]), min(limits[1], rpc.limits[0])
        self._code, self._details = grpc.StatusCode.OK, ""
        self._trailing: Metadata = ()
        self._aborted = False

    def request(self) -> Any:
        """The message of a caller that sends one only."""
        request, self._rpc.request = self._rpc.request, None
        return self._incoming(request)

    async def read(self) -> Any:
        """The caller's next message, EOF after the last."""
        self._check_open()
        assert self._rpc.requests is not None, "its stub streams requests"
        message = await self._rpc.requests.get()
        if message is grpc.aio.EOF:
            return message
        return self._incoming(message)

    async def write(self, message: Any) -> None:
        """Sends a message, once the caller has read enough of those before."""
        self._check_open()
        assert self._rpc.replies is not None, "its stub streams replies"
        message = self._outgoing(message)
        self._rpc.begin_replies()
        if not await self._rpc.replies.put(message):
            raise grpc.aio.UsageError(_OVER)

    def end(self, reply: Any) -> None:
        """The handler has returned, and with it the only reply, or None after a stream of them."""
        if self._aborted:
            return
        if self._code is grpc.StatusCode.OK and self._rpc.replies is None:
            self._rpc.reply = self._outgoing(reply)
        self._rpc.finish(Status(self._code, self._details, self._trailing))

    def fail(self, code: grpc.StatusCode, details: str) -> None:
        """The handler has raised something; a status that it has set before counts."""
        if self._code is not grpc.StatusCode.OK:
            code = self._code
        self._rpc.finish(Status(code, details, self._trailing))

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """Ends the call at once, and the handler by what it raises."""
        if self._aborted:
            raise grpc.aio.UsageError("Abort already called!")
        self._aborted = True
        trailing = tuple(trailing_metadata) or self._trailing
        self._rpc.finish(Status(code, details or self._details, trailing))
        raise grpc.aio.AbortError("Locally aborted.")

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        """Sends what comes before the first message; once."""
        self._check_open()
        if self._rpc.initial is not None:
            raise grpc.aio.UsageError("Send initial metadata failed: already sent")
        self._rpc.begin_replies(tuple(metadata))

    def invocation_metadata(self) -> Metadata:
        """What the caller sent before its first message."""
        return self._rpc.metadata

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        """What is sent with the status."""
        self._trailing = tuple(metadata)

    def trailing_metadata(self) -> Metadata:
        """What was set."""
        return self._trailing

    def set_code(self, code: grpc.StatusCode) -> None:
        """The status to end with; a reply counts for nothing beside one that is not OK."""
        self._code = code

    def code(self) -> grpc.StatusCode:
        """What was set."""
        return self._code

    def set_details(self, details: str) -> None:
        """What is said beside the status."""
        self._details = details

    def details(self) -> str:
        """What was set."""
        return self._details

    def peer(self) -> str:
        """Who calls."""
        return "in-process"

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline, 0 from then on; None if there is none."""
        return self._rpc.time_remaining

    def done(self) -> bool:
        """Whether the call is over."""
        return self._rpc.status is not None

    def cancelled(self) -> bool:
        """Whether the call was cancelled."""
        return self._rpc.status is not None and self._rpc.status.code is grpc.StatusCode.CANCELLED

    def _incoming(self, message: Any) -> Any:
        return self._within(self._limits[1], message, self._rpc.serialize, self._handler.request_deserializer)

    def _outgoing(self, message: Any) -> Any:
        return self._within(self._limits[0], message, self._handler.response_serializer, self._rpc.deserialize)

    def _within(self, limit: int, message: Any, serialize: Serializer, deserialize: Deserializer) -> Any:
        """Hands a message over; one that is too large ends the call, whatever the handler makes of that."""
        try:
            received = hand_over(message, serialize, deserialize, limit)
        except TooLarge as error:
            self._rpc.finish(Status(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)))
            raise
        if self._rpc.unchanged is not None:
            self._rpc.unchanged.note(self._rpc.method, received)
        return received

    def _check_open(self) -> None:
        if self._rpc.status is not None:
            raise grpc.aio.UsageError(_OVER)
