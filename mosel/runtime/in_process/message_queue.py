"""One direction of a stream."""

from collections import deque
from typing import Any

import grpc

from mosel.runtime.in_process.waiters import Waiters

# A writer waits while so many messages are not read; on the wire, while some 64 KiB are not.
MOST_WAITING = 16


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
