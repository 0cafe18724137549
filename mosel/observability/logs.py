"""Structured logs: one JSON object a line on standard error."""

import logging
import sys
from collections.abc import Iterable, Sequence
from contextvars import ContextVar

from pythonjsonlogger.json import JsonFormatter

_about: ContextVar[Sequence[bytes]] = ContextVar("about", default=())


def configure_logs(service: str, level: str) -> None:
    """Sends everything that is logged to standard error as JSON lines with time, level, service and message."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_name_jobs)
    handler.setFormatter(
        JsonFormatter(
            "%(asctime)s %(levelname)s %(name)s %(message)s",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            static_fields={"service": service},
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def about_jobs(*ids: bytes) -> None:
    """From now on, what the current task logs is about these jobs."""
    _about.set(ids)


def job_field(ids: Iterable[bytes]) -> dict[str, str]:
    """The field that names jobs in a log line; several are separated by commas."""
    return {"job_id": ",".join(job_id.hex() for job_id in ids)}


def _name_jobs(record: logging.LogRecord) -> bool:
    if (about := _about.get()) and not hasattr(record, "job_id"):
        vars(record).update(job_field(about))
    return True
