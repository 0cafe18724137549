"""A running `mosel up`, and what it must not leave behind."""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen


@contextlib.contextmanager
def up(command: list[str], private: dict[str, str], folder: Path) -> Iterator[Popen[str]]:
    """A running `mosel up`; killed at the end if it still runs."""
    with Popen(
        command, cwd=folder, env=os.environ | private, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ready_address(process: Popen[str]) -> str:
    """Reads until the line that says where the gateway is."""
    assert process.stdout is not None
    for line in process.stdout:
        found = re.fullmatch(r"ready: gRPC on (\S+), .*models: fruit \(Ctrl-C stops\)", line.strip())
        if found:
            return found[1]
    assert process.stderr is not None
    raise AssertionError(f"mosel up ended: {process.stderr.read()}")


def left_behind(private: dict[str, str]) -> list[Path]:
    folders = private["MOSEL_TRANSPORT__SHM_DIR"], private["XDG_RUNTIME_DIR"]
    return [path for folder in folders for path in Path(folder).iterdir()]
