"""One direction of a stream."""

from abc import ABC, abstractmethod
from collections import deque
from typing import Any, Self

import grpc

from mosel.runtime.in_process.waiters import Waiters

# A writer waits while so many messages are not read; on the wire, while some 64 KiB are not.
MOST_WAITING = 16


class ReadByIterating(ABC):
    """Iterating gives what reading gives, until the end."""

    @abstractmethod
    async def read(self) -> Any:
        """The next message, `grpc.aio.EOF` after the last."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        message = await self.read()
        if message is grpc.aio.EOF:
            raise StopAsyncIteration
        return message


class MessageQueue:
    """Messages in order, from one end of a call to the other.

    Attributes:
        ended: whether nothing more can be written.
    """

    __slots__ = ("_messages", "_read", "_written", "ended")

    def __init__(self) -> None:
        self.ended = False
        self._messages: deque[Any] = deque()
        self._written, self._read = Waiters(), Waiters()

    async def put(self, message: Any) -> bool:
        """Writes a message once there is room; False if the queue has ended before."""
        while len(self._messages) >= MOST_WAITING and not self.ended:
            await self._read.wait()
        if self.ended:
            return False
        self._messages.append(message)
        self._written.wake()
        return True

    async def get(self) -> Any:
        """The next message, `grpc.aio.EOF` after the last."""
        while not self._messages:
            if self.ended:
                return grpc.aio.EOF
            await self._written.wait()
        self._read.wake()
        return self._messages.popleft()

    def end(self) -> None:
        """No more is written; what is there can be read."""
        self.ended = True
        self._written.wake()
        self._read.wake()

    def break_off(self) -> None:
        """No more is written or read."""
        self._messages.clear()
        self.end()
