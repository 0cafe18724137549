"""How a message gets from one end of a call to the other: as it is, within the limits that it has on the wire."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

Serializer = Callable[[Any], bytes] | None
Deserializer = Callable[[bytes], Any] | None
Options = Sequence[tuple[str, Any]]

# What gRPC receives where no option says otherwise; it sends anything.
_RECEIVED_BYTES = 4 * 1024 * 1024


class TooLarge(Exception):
    """A message is larger than may be sent or received."""


def limits(options: Options) -> tuple[int, int]:
    """The most bytes of a message that is sent, and of one that is received, as options of a channel or server say."""
    said = dict(options)
    pair = said.get("grpc.max_send_message_length", -1), said.get("grpc.max_receive_message_length", _RECEIVED_BYTES)
    send, receive = (sys.maxsize if limit < 0 else limit for limit in pair)
    return send, receive


def hand_over(message: Any, serialize: Serializer, deserialize: Deserializer, limit: int) -> Any:
    """What the receiver gets: the object itself where both ends speak of the same kind of message, else it is parsed.

    Args:
        message: neither end changes it from now on.
        serialize: how the sender would write it.
        deserialize: how the receiver would read it.
        limit: the most bytes that it may have.

    Raises:
        TooLarge: it has more.
    """
    kind = getattr(deserialize, "__self__", None)
    if type(message) is kind and serialize is kind.SerializeToString:
        # The only way to know, and cheap: what is large travels as a ref.
        _check(message.ByteSize(), limit)
        return message
    data = message if serialize is None else serialize(message)
    _check(len(data), limit)
    return data if deserialize is None else deserialize(data)


def _check(nbytes: int, limit: int) -> None:
    if nbytes > limit:
        raise TooLarge(f"message larger than max ({nbytes} vs. {limit})")
