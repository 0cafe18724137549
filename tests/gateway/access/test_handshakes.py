"""What C libraries write to standard error becomes lines, and what Python writes goes where it went."""

import subprocess
import sys

PROGRAM = """
import asyncio, contextlib, logging, os, sys
from mosel.observability.logs import configure_logs
from gateway.access.handshakes import native_lines

configure_logs("test", "info")
log = logging.getLogger("program")

def native(text):
    os.write(2, text.encode())

async def main():
    heard = []
    print("python before", file=sys.stderr)
    native("native before\\n")
    with native_lines(heard.append):
        native("one\\ntw")
        await asyncio.sleep(0.01)
        native("o\\n\\nthr\\xe9e\\n")
        print("python inside", file=sys.stderr)
        log.info("logged inside")
        while len(heard) < 3:
            await asyncio.sleep(0.01)
        native("at the end\\n")
        {inside}
    log.info("logged after")
    native("native after\\n")
    print(heard)

asyncio.run(main())
"""


def run(inside: str = "pass") -> "subprocess.CompletedProcess[str]":
    program = PROGRAM.format(inside=inside)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


def test_lines_are_heard_whole_and_nothing_of_python_s_is() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['one', 'two', 'thr\u00e9e', 'at the end']"
    lines = done.stderr.splitlines()
    assert [line for line in lines if not line.startswith("{")] == [
        "python before",
        "native before",
        "python inside",
        "native after",
    ]
    assert [word in done.stderr for word in ("logged inside", "logged after", "at the end")] == [True, True, False]


def test_an_error_inside_is_told_as_ever() -> None:
    done = run("raise ValueError('as asked for')")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: as asked for"


def test_a_crash_leaves_its_trace() -> None:
    done = run("os.abort()")
    assert done.returncode == -6
    assert "Fatal Python error: Aborted" in done.stderr


def test_a_flood_is_cut_and_holds_up_nobody() -> None:
    flood = "with contextlib.suppress(BlockingIOError): [os.write(2, b'x' * 1000 + b'\\n') for _ in range(200)]"
    done = run(f"{flood}\n        log.info('still here')")
    assert done.returncode == 0, done.stderr
    assert "still here" in done.stderr
