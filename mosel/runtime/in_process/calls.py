"""What a stub returns: the caller's end of a call."""

import asyncio
import logging
from collections.abc import AsyncIterable, Callable, Generator, Iterable
from functools import partial
from typing import Any

import grpc

from mosel.runtime.in_process.message_queue import ReadByIterating
from mosel.runtime.in_process.rpc import CANCELLED_BY_CALLER, Rpc, Status

log = logging.getLogger(__name__)


class _Call:
    """What all kinds of calls have in common."""

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc

    def cancel(self) -> bool:
        """Ends the call, for the handler as well; False if it is over."""
        if self._rpc.status is not None:
            return False
        self._rpc.break_off(CANCELLED_BY_CALLER)
        return True

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._rpc.status is not None and self._rpc.status.code is grpc.StatusCode.CANCELLED

    def done(self) -> bool:
        """Whether it is over."""
        return self._rpc.status is not None

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Has something called with the call when it is over."""
        self._rpc.when_over(partial(callback, self))

    def time_remaining(self) -> float | None:
        """Seconds until the deadline, 0 from then on; None if there is none."""
        return self._rpc.time_remaining

    async def initial_metadata(self) -> grpc.aio.Metadata:
        """Waits for what the server sends before its first message."""
        return grpc.aio.Metadata(*await self._rpc.begun())

    async def trailing_metadata(self) -> grpc.aio.Metadata:
        """Waits for what the server sends with the status."""
        return grpc.aio.Metadata(*(await self._rpc.over()).trailing)

    async def code(self) -> grpc.StatusCode:
        """Waits for the status."""
        return (await self._rpc.over()).code

    async def details(self) -> str:
        """Waits for what is said beside the status."""
        return (await self._rpc.over()).details

    def _raise_for(self, status: Status) -> None:
        """Raises what a status stands for."""
        if status.by_caller:
            raise asyncio.CancelledError
        if status.code is not grpc.StatusCode.OK:
            raise grpc.aio.AioRpcError(
                status.code,
                grpc.aio.Metadata(*(self._rpc.initial or ())),
                grpc.aio.Metadata(*status.trailing),
                details=status.details,
            )


class _OneReply(_Call):
    """The reply is what awaiting it gives."""

    def __await__(self) -> Generator[Any, None, Any]:
        try:
            status = self._rpc.status or (yield from self._rpc.over().__await__())
        except asyncio.CancelledError:
            self.cancel()
            raise
        self._raise_for(status)
        return self._rpc.reply


class _Replies(_Call, ReadByIterating):
    """Iterating gives the replies, and so does reading."""

    def __init__(self, rpc: Rpc) -> None:
        super().__init__(rpc)
        self._loop = asyncio.get_running_loop()

    def __del__(self) -> None:
        # Nobody can read them any more. The garbage collector may come in any thread.
        if self._rpc.status is None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._rpc.break_off, CANCELLED_BY_CALLER)

    async def read(self) -> Any:
        """The next reply, EOF after the last."""
        assert self._rpc.replies is not None, "it is a stream"
        try:
            message = await self._rpc.replies.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if message is grpc.aio.EOF:
            self._raise_for(await self._rpc.over())
        return message


class _Requests(_Call):
    """Requests are written one by one, or come from what the caller gave to iterate."""

    async def write(self, request: Any) -> None:
        """Sends a request, once the handler has read enough of those before."""
        requests = self._rpc.requests
        assert requests is not None, "it is a stream"
        if self._rpc.status is not None:
            raise asyncio.InvalidStateError("RPC already finished.")
        if requests.ended:
            raise asyncio.InvalidStateError('RPC is half closed after calling "done_writing".')
        try:
            written = await self._rpc.send(request)
        except asyncio.CancelledError:
            self.cancel()
            raise
        if not written:
            self._raise_for(await self._rpc.over())

    async def done_writing(self) -> None:
        """Says that no more requests come."""
        assert self._rpc.requests is not None, "it is a stream"
        self._rpc.requests.end()


class UnaryUnaryCall(_OneReply):
    """One request, one reply."""


class UnaryStreamCall(_Replies):
    """One request, several replies."""


class StreamUnaryCall(_Requests, _OneReply):
    """Several requests, one reply."""


class StreamStreamCall(_Requests, _Replies):
    """Several requests, several replies."""


async def send_all(rpc: Rpc, requests: AsyncIterable[Any] | Iterable[Any]) -> None:
    """Sends what a caller gave to iterate, until that ends or the call does; what it raises cancels the call."""
    assert rpc.requests is not None, "it is a stream"
    try:
        if isinstance(requests, AsyncIterable):
            async for request in requests:
                if not await rpc.send(request):
                    return
        else:
            for request in requests:
                if not await rpc.send(request):
                    return
        rpc.requests.end()
    except Exception:
        log.exception("what gives requests failed", extra={"method": rpc.method})
        rpc.break_off(CANCELLED_BY_CALLER)
