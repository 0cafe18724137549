"""Finds those who change a message after it was handed over: its other end would see that. For tests; it costs much."""

import logging
from collections import deque

from google.protobuf.message import Message

# So many messages later, both ends are through with one for certain.
_WATCHED = 1000

log = logging.getLogger(__name__)


class MessageChanged(AssertionError):
    """Somebody changed a message after it was handed over."""


class Unchanged:
    """The messages that were handed over last, and what was in them then."""

    def __init__(self) -> None:
        self._messages: deque[tuple[str, Message, bytes]] = deque()

    def note(self, method: str, message: object) -> None:
        """From now on, nobody may change a message.

        Raises:
            MessageChanged: an earlier one was changed.
        """
        if isinstance(message, Message):
            self._messages.append((method, message, message.SerializeToString(deterministic=True)))
        while len(self._messages) > _WATCHED:
            self._check(*self._messages.popleft())

    def check(self) -> None:
        """Looks at all that are watched, and watches them no more.

        Raises:
            MessageChanged: one was changed.
        """
        while self._messages:
            self._check(*self._messages.popleft())

    def _check(self, method: str, message: Message, before: bytes) -> None:
        if message.SerializeToString(deterministic=True) != before:
            was = type(message).FromString(before)
            log.critical("a message was changed after hand-over", extra={"method": method})
            raise MessageChanged(f"a message of {method} was changed after it was handed over: from {was} to {message}")
