"""Turns traces on where the settings name a collector."""

import contextlib
from collections.abc import Iterator

from mosel.config import Settings
from mosel.errors import ConfigError
from mosel.observability.tracing import OFF, Tracing


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
