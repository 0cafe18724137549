"""Traces: what each step of a request took, in which service. Off unless the settings name a collector.

A trace travels as a W3C `traceparent`; an empty one means that nobody records it.
"""

import contextlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Literal

from mosel.config import Settings
from mosel.errors import ConfigError

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
        return Span(parent)


OFF = Tracing()


@contextlib.contextmanager
def open_tracing(settings: Settings, service: str) -> Iterator[Tracing]:
    """What the settings ask for; at the end, what is not sent yet is sent, for a second at most.

    Args:
        settings: the effective settings.
        service: the service's name.

    Raises:
        ConfigError: what it needs is not installed.
    """
    if not settings.tracing.otlp_endpoint:
        yield OFF
        return
    try:
        from mosel.observability.otlp import OtlpTracing
    except ImportError as error:
        raise ConfigError(
            f"tracing.otlp_endpoint is set, but {error.name} is not installed: pip install 'mosel-server[tracing]'"
        ) from None
    tracing = OtlpTracing(settings.tracing, service)
    try:
        yield tracing
    finally:
        tracing.close(min(settings.stop_grace_ms / 1000, 1.0))
