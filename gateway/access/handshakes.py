"""TLS handshakes that gRPC refused: it tells nobody, but writes a line to standard error."""

import asyncio
import contextlib
import faulthandler
import logging
import os
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TextIO

_STDERR = 2
_PIPE_BYTES = 64 * 1024
# Of a caller whom TLS does not let in: plain text, no certificate, or a wrong one.
_HANDSHAKE_FAILED = re.compile(r"Handshake failed with error .*?(?:OPENSSL_internal:([A-Z_0-9]+)|$)")

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def handshakes_watched(refused: Callable[[str], None]) -> AsyncIterator[None]:
    """Calls back with the reason for each handshake that a gRPC server of this process refuses inside the block."""

    def on_line(line: str) -> None:
        if failed := _HANDSHAKE_FAILED.search(line):
            refused(failed[1] or "unknown reason")
        else:
            log.info("grpc", extra={"line": line})

    with native_lines(on_line):
        yield


@contextlib.contextmanager
def native_lines(on_line: Callable[[str], None]) -> Iterator[None]:
    """Calls back for each line that is written to file descriptor 2 inside the block, in the running event loop.

    What Python writes to `sys.stderr`, its log lines above all, goes where it went before.
    """
    original = os.dup(_STDERR)
    reading, writing = os.pipe()
    for end in (reading, writing):
        # A line that finds the pipe full is lost: better than a library that waits for this loop.
        os.set_blocking(end, False)
    lines = _Lines(reading, on_line)
    with open(original, "w", buffering=1, errors="backslashreplace") as python, _python_writes_to(python):  # noqa: PTH123
        os.dup2(writing, _STDERR)
        os.close(writing)
        loop = asyncio.get_running_loop()
        loop.add_reader(reading, lines.read)
        try:
            yield
        finally:
            os.dup2(original, _STDERR)
            loop.remove_reader(reading)
            lines.read()
            os.close(reading)


@contextlib.contextmanager
def _python_writes_to(stream: TextIO) -> Iterator[None]:
    before = sys.stderr
    handlers = [h for h in logging.root.handlers if isinstance(h, logging.StreamHandler) and h.stream is before]
    _let_write(stream, handlers)
    # The last words of a process that crashes must not end in a pipe that nobody reads any more.
    watched = faulthandler.is_enabled()
    if not watched:
        faulthandler.enable(stream)
    try:
        yield
    finally:
        if not watched:
            faulthandler.disable()
        _let_write(before, handlers)


def _let_write(stream: TextIO, handlers: "list[logging.StreamHandler[TextIO]]") -> None:
    sys.stderr = stream
    for handler in handlers:
        handler.setStream(stream)


class _Lines:
    """Puts lines together from a pipe."""

    def __init__(self, pipe: int, on_line: Callable[[str], None]) -> None:
        self._pipe, self._on_line, self._rest = pipe, on_line, b""

    def read(self) -> None:
        """Passes on the whole lines that are there."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._pipe, _PIPE_BYTES):
                *lines, self._rest = (self._rest + data).split(b"\n")
                for line in filter(None, lines):
                    self._on_line(line.decode(errors="backslashreplace"))
