"""A connected gateway, and what is to be sent to it."""

import asyncio

from mosel.v1 import selector_pb2


class Session:
    """One connected gateway: its name, and what is to be sent to it; None ends the stream."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.outbox: asyncio.Queue[selector_pb2.SelectorMessage | None] = asyncio.Queue()

    def send(self, **message: object) -> None:
        """Queues a message for the gateway."""
        self.outbox.put_nowait(selector_pb2.SelectorMessage(**message))  # type: ignore[arg-type]
