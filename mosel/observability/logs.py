"""Structured logs: one JSON object a line on standard error."""

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import TextIO

from pythonjsonlogger.json import JsonFormatter

_about: ContextVar[Sequence[bytes]] = ContextVar("about", default=())
# Where several services share a process.
_service: ContextVar[str] = ContextVar("service")


# Lines wait so long for others, and who logs waits for the stream when there are so many.
_TOGETHER_S, MOST_WAITING = 0.02, 10_000


class WriteBehind(logging.StreamHandler[TextIO]):
    """Writes lines a moment after they were logged, many at once, in a thread: one by one takes several times as long.

    Warnings and worse are written at once, after what waits. What is logged must not change any more.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._waiting: deque[logging.LogRecord] = deque()
        self._some, self._writing = threading.Event(), threading.RLock()
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a line."""
        self._waiting.append(record)
        if record.levelno >= logging.WARNING or len(self._waiting) >= MOST_WAITING:
            self.flush()
        elif not self._some.is_set():
            self._some.set()

    def flush(self) -> None:
        """Writes what waits."""
        with self._writing:
            lines = []
            while self._waiting:
                record = self._waiting.popleft()
                try:
                    lines.append(self.format(record) + self.terminator)
                except Exception:  # noqa: BLE001 (as every handler: a line that cannot be written ends nothing)
                    self.handleError(record)
            if lines:
                self.stream.write("".join(lines))
                self.stream.flush()

    def setStream(self, stream: TextIO) -> TextIO | None:  # noqa: N802 (of logging)
        """Writes what waits, and everything later to another stream."""
        with self._writing:
            return super().setStream(stream)

    def _write(self) -> None:
        while True:
            self._some.wait()
            time.sleep(_TOGETHER_S)
            self._some.clear()
            self.flush()


def configure_logs(service: str, level: str) -> None:
    """Sends everything that is logged to standard error as JSON lines with time, level, service and message."""
    handler = WriteBehind(sys.stderr)
    handler.addFilter(_name_jobs)
    handler.addFilter(partial(_name_service, service))
    handler.setFormatter(
        JsonFormatter(
            "%(asctime)s %(levelname)s %(service)s %(name)s %(message)s",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        )
    )
    # No line says them, and to find them out costs as much as the rest of a record.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def flush_logs() -> None:
    """Writes what was logged, so that what is written to standard error next comes after it."""
    for handler in logging.root.handlers:
        handler.flush()


def as_service(name: str) -> None:
    """From now on, what the current task logs, and those that it begins, is of this service."""
    _service.set(name)


def about_jobs(*ids: bytes) -> None:
    """From now on, what the current task logs is about these jobs."""
    _about.set(ids)


def job_field(ids: Iterable[bytes]) -> dict[str, str]:
    """The field that names jobs in a log line; several are separated by commas."""
    return {"job_id": ",".join(job_id.hex() for job_id in ids)}


def _name_service(process: str, record: logging.LogRecord) -> bool:
    record.service = _service.get(process)
    return True


def _name_jobs(record: logging.LogRecord) -> bool:
    if (about := _about.get()) and not hasattr(record, "job_id"):
        vars(record).update(job_field(about))
    return True
