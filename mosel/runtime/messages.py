"""How large a message may be, in both directions, on every channel."""

from mosel.errors import PayloadTooLarge

_MIB = 1024 * 1024
# What the rest of a message may take beside what was counted.
ENVELOPE_BYTES = 64 * 1024


def limit_bytes(max_message_mib: int) -> int:
    """The setting `transport.max_message_mib` in bytes."""
    return max_message_mib * _MIB


def check_message(what: str, nbytes: int, limit: int) -> None:
    """Refuses to send what gRPC would not carry: it ends the call, or a stream of many jobs, and names no setting.

    Args:
        what: is too large, for the message.
        nbytes: what it has.
        limit: what it may have.

    Raises:
        PayloadTooLarge: names the setting.
    """
    if nbytes > limit:
        raise PayloadTooLarge(
            f"{what} {nbytes} bytes; expected at most {limit} bytes (setting transport.max_message_mib): "
            "send fewer items"
        )
