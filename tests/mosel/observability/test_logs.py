"""Log lines, and the jobs that they are about."""

import json
import subprocess
import sys

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
