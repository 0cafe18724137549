"""Structured logs: one JSON object a line on standard error."""

import logging
import sys
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from functools import partial

from pythonjsonlogger.json import JsonFormatter

_about: ContextVar[Sequence[bytes]] = ContextVar("about", default=())
# Where several services share a process.
_service: ContextVar[str] = ContextVar("service")


def configure_logs(service: str, level: str) -> None:
    """Sends everything that is logged to standard error as JSON lines with time, level, service and message."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_name_jobs)
    handler.addFilter(partial(_name_service, service))
    handler.setFormatter(
        JsonFormatter(
            "%(asctime)s %(levelname)s %(service)s %(name)s %(message)s",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


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
