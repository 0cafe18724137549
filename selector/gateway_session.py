"""The gateways that are connected, and what is to be sent to each."""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator

from mosel.v1 import selector_pb2, tensor_pb2

# How long a gateway has to open a listener.
_ANSWER_S = 5.0


class GatewaySession:
    """One connected gateway, and its outbox.

    Released slots have a lane of their own in it: they go first, all in one message, and are never dropped. There are
    no more of them than the gateway's arena has slots. Other messages are bounded: a gateway that leaves so many unread
    does not read its stream, and its session ends.

    Args:
        name: of the gateway, unique among all that ever were there.
        max_messages: how many may wait.

    Attributes:
        models: what its jobs may name from now on.
        announced: whether it said which arenas it has.
        transport: what it was last told of how payloads travel.
        overflowed: set when it left too much unread.
    """

    def __init__(self, name: str, max_messages: int) -> None:
        self.name, self._max_messages = name, max_messages
        self.models: set[str] = set()
        self.announced = False
        self.transport: selector_pb2.PayloadTransport | None = None
        self.overflowed = asyncio.Event()
        self._messages: deque[selector_pb2.SelectorMessage] = deque()
        self._released: list[tensor_pb2.ArenaSlot] = []
        self._ended = False
        self._changed = asyncio.Event()
        self._asked: dict[str, asyncio.Future[selector_pb2.FetchAddress]] = {}

    def send(self, **message: object) -> None:
        """Queues a message for the gateway."""
        if self._ended:
            return
        if len(self._messages) == self._max_messages:
            self._messages.clear()
            self.overflowed.set()
            self.end()
            return
        self._messages.append(selector_pb2.SelectorMessage(**message))  # type: ignore[arg-type]
        self._changed.set()

    def release(self, slots: Iterable[tensor_pb2.ArenaSlot]) -> None:
        """Says that nobody reads these slots of the gateway any more."""
        self._released.extend(slots)
        self._changed.set()

    def end(self) -> None:
        """Takes no more messages; the stream ends when those that wait are sent."""
        self._ended = True
        self._changed.set()

    async def outgoing(self) -> AsyncIterator[selector_pb2.SelectorMessage]:
        """What is to be sent, until the end."""
        while True:
            if self._released:
                slots, self._released = self._released, []
                yield selector_pb2.SelectorMessage(release=tensor_pb2.ReleaseSlots(slots=slots))
            elif self._messages:
                yield self._messages.popleft()
            elif self._ended:
                return
            else:
                self._changed.clear()
                await self._changed.wait()

    def statistics(self) -> dict[str, int]:
        """What waits to be sent."""
        return {"outbox_messages": len(self._messages), "outbox_released_slots": len(self._released)}

    async def fetch_address(self, encoder: str) -> selector_pb2.FetchAddress:
        """Asks the gateway where an encoder on another host can fetch payloads from; `encoder` is its address."""
        if encoder not in self._asked:
            self._asked[encoder] = asyncio.get_running_loop().create_future()
            self.send(fetch_question=selector_pb2.FetchQuestion(encoder=encoder))
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await asyncio.shield(self._asked[encoder])
        except TimeoutError:
            self._asked.pop(encoder, None)
            return selector_pb2.FetchAddress(encoder=encoder, reason="the gateway did not say where")

    def heard(self, answer: selector_pb2.FetchAddress) -> None:
        """The gateway answered such a question; what was not asked is passed over."""
        asked = self._asked.pop(answer.encoder, None)
        if asked is not None and not asked.done():
            asked.set_result(answer)


class Gateways:
    """The sessions of all gateways that are connected.

    Args:
        max_messages: how many may wait in the outbox of each.
    """

    def __init__(self, max_messages: int) -> None:
        self._max_messages = max_messages
        self._numbers = itertools.count(1)
        self._sessions: dict[str, GatewaySession] = {}
        self._overflowed = 0

    def open(self) -> GatewaySession:
        """A gateway connected."""
        name = f"gateway-{next(self._numbers)}"
        session = self._sessions[name] = GatewaySession(name, self._max_messages)
        return session

    def close(self, session: GatewaySession) -> None:
        """It is gone, or is treated so."""
        self._overflowed += session.overflowed.is_set()
        del self._sessions[session.name]

    def get(self, name: str) -> GatewaySession | None:
        """A gateway, None if it is not connected (any more)."""
        return self._sessions.get(name)

    def __iter__(self) -> Iterator[GatewaySession]:
        return iter(list(self._sessions.values()))

    def announced(self) -> list[GatewaySession]:
        """Those that said which arenas they have."""
        return [session for session in self if session.announced]

    def statistics(self) -> dict[str, int]:
        """What waits to be sent to all of them, and how many did not read."""
        counts = {"outbox_messages": 0, "outbox_released_slots": 0}
        for session in self._sessions.values():
            for name, count in session.statistics().items():
                counts[name] += count
        return counts | {"gateways": len(self._sessions), "gateways_overflowed": self._overflowed}
