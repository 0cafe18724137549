"""A connected gateway, and what is to be sent to it."""

import asyncio

from mosel.v1 import selector_pb2

# How long a gateway has to open a listener.
_ANSWER_S = 5.0


class GatewaySession:
    """One connected gateway: its name, and what is to be sent to it; None ends the stream."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.outbox: asyncio.Queue[selector_pb2.SelectorMessage | None] = asyncio.Queue()
        self._asked: dict[str, asyncio.Future[selector_pb2.FetchAddress]] = {}

    def send(self, **message: object) -> None:
        """Queues a message for the gateway."""
        self.outbox.put_nowait(selector_pb2.SelectorMessage(**message))  # type: ignore[arg-type]

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
