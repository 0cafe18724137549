"""Files that a process must not leave behind, however it ends: its arenas and its sockets."""

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

_files: set[Path] = set()


def made(file: Path) -> None:
    """The process has made a file that goes when it goes."""
    _files.add(file)


def remove(file: Path) -> None:
    """Removes such a file."""
    file.unlink(missing_ok=True)
    _files.discard(file)


def end_process(code: int) -> NoReturn:
    """Ends the process now, whatever its threads do, and removes what it would leave behind.

    Not `sys.exit`: that waits for threads, and Python spends seconds on taking modules such as torch apart.
    """
    for file in list(_files):
        with contextlib.suppress(OSError):
            remove(file)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)
