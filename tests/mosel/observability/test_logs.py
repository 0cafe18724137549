"""Log lines, and the jobs that they are about."""

import io
import json
import logging
import subprocess
import sys
import threading

import pytest

from mosel.observability.logs import MOST_WAITING, WriteBehind

CODE = """
import asyncio
import logging

from mosel.observability.logs import about_jobs, configure_logs, job_field

log = logging.getLogger("test")


async def serve(text, *ids):
    about_jobs(*ids)
    await asyncio.sleep(0)
    log.info(text)


async def lose():
    about_jobs(b"\\x01" * 16)
    log.warning("lost", extra=job_field([b"\\x09" * 16]) | {"peer": "fusion"})


async def main():
    log.info("before")
    await asyncio.gather(serve("one", b"\\x01" * 16), serve("two", b"\\x02" * 16, b"\\x03" * 16), lose())
    log.info("after")


configure_logs("encoder/image", "info")
asyncio.run(main())
"""


def test_a_line_names_the_jobs_that_its_task_serves() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    lines = {line["message"]: line for line in map(json.loads, done.stderr.splitlines())}
    assert {message: line.get("job_id") for message, line in lines.items()} == {
        "before": None,
        "one": "01" * 16,
        "two": f"{'02' * 16},{'03' * 16}",
        # What a line says itself counts.
        "lost": "09" * 16,
        "after": None,
    }
    named = ("service", "logger", "level", "peer")
    assert [lines["lost"][name] for name in named] == ["encoder/image", "test", "WARNING", "fusion"]
    assert all("time" in line for line in lines.values())


class Written(io.StringIO):
    """Says when something was written."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed = threading.Event()

    def flush(self) -> None:
        self.flushed.set()


def record(level: int, message: str) -> logging.LogRecord:
    return logging.LogRecord("test", level, __file__, 1, message, (), None)


def test_a_line_is_written_a_moment_later_and_a_warning_at_once_after_those_before_it() -> None:
    first, second = Written(), Written()
    handler = WriteBehind(first)
    handler.handle(record(logging.INFO, "one"))
    assert first.flushed.wait(30)
    assert first.getvalue() == "one\n"
    for number in range(100):
        handler.handle(record(logging.INFO, str(number)))
    handler.handle(record(logging.WARNING, "now"))
    assert first.getvalue().splitlines() == ["one", *map(str, range(100)), "now"]
    handler.handle(record(logging.INFO, "still here"))
    handler.setStream(second)
    handler.handle(record(logging.INFO, "there"))
    handler.flush()
    assert (first.getvalue().splitlines()[-1], second.getvalue()) == ("still here", "there\n")


def test_who_logs_waits_for_a_stream_that_takes_nothing_and_no_line_is_lost() -> None:
    asked, go_on = threading.Event(), threading.Event()

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            asked.set()
            assert go_on.wait(30)
            return super().write(text)

    handler = WriteBehind(stream := Full())
    handler.handle(record(logging.INFO, "first"))
    assert asked.wait(30)
    for number in range(MOST_WAITING - 1):
        handler.handle(record(logging.INFO, str(number)))
    last = threading.Thread(target=handler.handle, args=(record(logging.INFO, "last"),))
    last.start()
    last.join(0.1)
    assert last.is_alive()
    go_on.set()
    last.join(30)
    assert stream.getvalue().splitlines() == ["first", *map(str, range(MOST_WAITING - 1)), "last"]


def test_a_line_that_cannot_be_written_takes_no_other_along(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Written()
    handler = WriteBehind(stream)
    wrong = logging.LogRecord("test", logging.INFO, __file__, 1, "%d", ("no number",), None)
    for one in (record(logging.INFO, "before"), wrong, record(logging.WARNING, "after")):
        handler.handle(one)
    assert stream.getvalue() == "before\nafter\n"
    assert "Logging error" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["leftovers.end_process(0)", "sys.exit()", "raise SystemExit"])
def test_nothing_is_lost_at_the_end(end: str) -> None:
    code = f"""
import logging, sys
from mosel.observability.logs import configure_logs
from mosel.runtime import leftovers

configure_logs("gateway", "info")
for number in range(100):
    logging.info("line %d", number)
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [json.loads(line)["message"] for line in done.stderr.splitlines()] == [f"line {n}" for n in range(100)]


@pytest.mark.parametrize(
    ("error", "last"),
    [("ConfigError('wrong')", "gateway: error: wrong"), ("LookupError('a bug')", "LookupError: a bug")],
)
def test_why_a_process_ended_is_its_last_line(error: str, last: str) -> None:
    code = f"""
import logging
from mosel.errors import ConfigError
from mosel.runtime.service import run_service

async def serve(settings, stop):
    logging.info("logged")
    raise {error}

run_service("gateway", serve)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert (json.loads(lines[0])["message"], lines[-1]) == ("logged", last)
