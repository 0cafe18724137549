"""One call: what its two ends share."""

import asyncio
import time
from collections.abc import Callable
from contextvars import copy_context
from typing import Any, NamedTuple

import grpc

from mosel.runtime.in_process.handing_over import Deserializer, Serializer
from mosel.runtime.in_process.message_queue import MessageQueue
from mosel.runtime.in_process.unchanged import Unchanged
from mosel.runtime.in_process.waiters import Waiters

Metadata = tuple[tuple[str, str | bytes], ...]


class Status(NamedTuple):
    """How a call ended."""

    code: grpc.StatusCode
    details: str = ""
    trailing: Metadata = ()
    by_caller: bool = False


# As gRPC words them.
CANCELLED = Status(grpc.StatusCode.CANCELLED, "CANCELLED")
STOPPED = Status(grpc.StatusCode.UNAVAILABLE, "Cancelling all calls")
CANCELLED_BY_CALLER = Status(grpc.StatusCode.CANCELLED, "Locally cancelled by application!", by_caller=True)
_TOO_LATE = Status(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")


class Rpc:
    """A call from its begin until both ends are through with it.

    Args:
        method: its full name.
        streams: whether the caller sends several messages.
        streamed: whether the server does.
        metadata: what the caller sent before the first message.
        timeout: seconds; None for as long as it takes.
        serialize: how the caller would write its messages.
        deserialize: how the caller would read those of the server.
        limits: the most bytes of a message that the caller sends, and of one that it receives.

    Attributes:
        deadline: seconds of `time.monotonic()`.
        request: of a caller that sends one only.
        requests, replies: of those who send several.
        reply: of a server that sends one only.
        initial: what the server sent before its first message; None before that.
        status: how the call ended; None before that.
        task: who works for it: the handler's, or one that waits for a server.
        group: the calls of its channel that are under way.
        unchanged: is told of each message, if somebody asks for it.
    """

    __slots__ = (
        "_changed", "_done_callbacks", "_timer", "deadline", "deserialize", "group", "initial", "limits", "metadata",
        "method", "replies", "reply", "request", "requests", "serialize", "status", "task",
        "unchanged",
    )  # fmt: skip

    def __init__(
        self,
        method: str,
        streams: bool,
        streamed: bool,
        metadata: Metadata,
        timeout: float | None,
        serialize: Serializer,
        deserialize: Deserializer,
        limits: tuple[int, int],
        group: set["Rpc"],
        unchanged: Unchanged | None,
    ) -> None:
        self.method, self.metadata, self.serialize, self.deserialize = method, metadata, serialize, deserialize
        self.limits, self.group, self.unchanged = limits, group, unchanged
        self.request: Any = None
        self.reply: Any = None
        self.requests = MessageQueue() if streams else None
        self.replies = MessageQueue() if streamed else None
        self.initial: Metadata | None = None
        self.status: Status | None = None
        self.task: asyncio.Task[None] | None = None
        self.deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._changed = Waiters()
        self._done_callbacks: list[Callable[[], object]] = []
        group.add(self)
        if timeout is not None:
            self.deadline = time.monotonic() + timeout
            if timeout <= 0:
                self.break_off(_TOO_LATE)
            else:
                self._timer = asyncio.get_running_loop().call_later(timeout, self.break_off, _TOO_LATE)

    @property
    def time_remaining(self) -> float | None:
        """Seconds until the deadline, 0 from then on; None if there is none."""
        return None if self.deadline is None else max(self.deadline - time.monotonic(), 0.0)

    async def send(self, request: Any) -> bool:
        """Sends one of several requests once there is room; False if no more can be sent."""
        assert self.requests is not None, "the stub streams requests"
        if self.unchanged is not None:
            self.unchanged.note(self.method, request)
        return await self.requests.put(request)

    def begin_replies(self, metadata: Metadata = ()) -> None:
        """The server sends what comes before its first message."""
        if self.initial is None:
            self.initial = metadata
            self._changed.wake()

    def finish(self, status: Status) -> None:
        """The call is over, unless it was before; what the server has written can still be read."""
        if self.status is not None:
            return
        self.status = status
        if self.initial is None:
            self.initial = ()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.requests is not None:
            self.requests.break_off()
        if self.replies is not None:
            self.replies.end()
        self.group.discard(self)
        self._changed.wake()
        for callback in self._done_callbacks:
            callback()
        self._done_callbacks.clear()

    def break_off(self, status: Status) -> None:
        """Ends the call for both ends, unless it is over: the handler is cancelled, what was written is dropped."""
        if self.status is not None:
            return
        if self.replies is not None:
            self.replies.break_off()
        self.finish(status)
        if self.task is not None:
            self.task.cancel()

    async def begun(self) -> Metadata:
        """Waits until the server has sent what comes before its first message, which it returns."""
        while self.initial is None:
            await self._changed.wait()
        return self.initial

    async def over(self) -> Status:
        """Waits until the call is over."""
        while self.status is None:
            await self._changed.wait()
        return self.status

    def when_over(self, callback: Callable[[], object]) -> None:
        """Has something called soon after the call is over, by the loop, in the context of who asks for it."""
        loop, context = asyncio.get_running_loop(), copy_context()
        if self.status is None:
            self._done_callbacks.append(lambda: loop.call_soon(callback, context=context))
        else:
            _ = loop.call_soon(callback, context=context)
