"""Traces: what each step of a request took, in which service. `mosel.runtime.tracing` turns them on.

A trace travels as a W3C `traceparent`; an empty one means that nobody records it.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

Attributes = Mapping[str, str | int | float]
NONE: Attributes = MappingProxyType({})
Kind = Literal["internal", "server", "client"]


class Span:
    """A step under way; this one is not recorded.

    Args:
        traceparent: what the steps inside it are told.
    """

    def __init__(self, traceparent: str = "") -> None:
        self.traceparent = traceparent

    def end(
        self, attributes: Attributes = NONE, error: BaseException | None = None, ended: float | None = None
    ) -> None:
        """The step is over.

        Args:
            attributes: what is known of it now.
            error: what it failed with.
            ended: when, in seconds of `time.monotonic()`; None: now.
        """


# What nobody records, with nothing to hand on.
NO_SPAN = Span()


class Tracing:
    """Makes spans; this one makes none, and hands on the trace that it is given.

    Attributes:
        on: whether it makes any.
    """

    on = False

    def begin(
        self,
        step: str,
        parent: str = "",
        kind: Kind = "internal",
        trace_id: bytes = b"",
        started: float | None = None,
    ) -> Span:
        """A step begins.

        Args:
            step: the span's name.
            parent: the traceparent of what it is a step of; if it is none, a trace begins.
            kind: "server" and "client" are the two sides of a call.
            trace_id: 16 bytes, of a trace that begins.
            started: when, in seconds of `time.monotonic()`; None: now.
        """
        return Span(parent) if parent else NO_SPAN


OFF = Tracing()
