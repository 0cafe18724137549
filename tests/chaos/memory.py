"""Shared memory of one's own, which can be full."""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mosel.transport.control import remove_orphans

_MIB = 1024 * 1024


class SharedMemory:
    """A folder for arenas; a tmpfs of its own where this user may mount one. A context manager.

    Args:
        mib: how large it is then.

    Attributes:
        folder: where it is.
        own: whether it is a tmpfs of its own, and can be filled.
    """

    def __init__(self, mib: int) -> None:
        self._mib, self._entered = mib, contextlib.ExitStack()

    def __enter__(self) -> "SharedMemory":
        self.folder = Path(self._entered.enter_context(tempfile.TemporaryDirectory(prefix="mosel-", dir="/dev/shm")))
        mount = ["mount", "-t", "tmpfs", "-o", f"size={self._mib}m,mode=700", "tmpfs", str(self.folder)]
        self.own = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        if self.own:
            self._entered.callback(subprocess.run, ["umount", "--lazy", str(self.folder)], check=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._entered.close()

    def arenas(self) -> int:
        """How many files are in it."""
        return sum(1 for _ in self.folder.iterdir())

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Nothing finds room inside the block."""
        self.fill()
        try:
            yield
        finally:
            self._filler.unlink()

    def fill(self) -> None:
        """Takes what is free, and what the dead have left, which somebody who starts again would take."""
        remove_orphans(self.folder)
        with self._filler.open("ab", buffering=0) as stream, contextlib.suppress(OSError):
            while stream.write(bytes(_MIB)):
                pass

    @property
    def _filler(self) -> Path:
        return self.folder / "somebody-else"
