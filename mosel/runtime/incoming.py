"""What is known of the call that the current task serves, whatever protocol it came by; for logs and traces alone."""

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass

Headers = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True)
class Incoming:
    """A call.

    Attributes:
        method: `Predict`, `ModelInfer`, ...
        headers: gives its metadata or headers, with names in lower case.
    """

    method: str
    headers: Callable[[], Headers]

    @property
    def traceparent(self) -> str:
        """The W3C trace context that the caller brought, unchecked; empty if it brought none."""
        values = (value for name, value in self.headers() if name == "traceparent" and isinstance(value, str))
        return next(values, "")


_incoming: ContextVar[Incoming] = ContextVar("incoming")
_UNKNOWN = Incoming("", tuple)


def note_incoming(method: str, headers: Callable[[], Headers]) -> None:
    """From now on, the current task serves this call; arguments as attributes of `Incoming`."""
    _incoming.set(Incoming(method, headers))


def incoming() -> Incoming:
    """The call that the current task serves."""
    return _incoming.get(_UNKNOWN)
