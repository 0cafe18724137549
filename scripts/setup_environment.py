"""Makes .venv ready for `demo` or `dev`: checks this machine, says what will be downloaded, installs.

Only the standard library, and syntax that Python 3.8 reads, so that an old Python gets a clear line and no traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIMUM, NEWEST_TRIED = (3, 11), (3, 13)
GB = 10**9
# What a finished environment takes, downloads included: measured with the CPU build, summed with the CUDA one.
DISK = {"client": GB // 4, "cpu": 3 * GB, "cuda": 12 * GB}
USUAL_DOWNLOAD = {"cpu": GB // 5, "cuda": 3 * GB}
ONLY_WITH_CUDA = re.compile(r"(nvidia|cuda|triton)")
CONTAINER = 'docker run --rm -it -v "$PWD":/mosel -w /mosel -p 8001:8001 python:3.11 make demo'


class SetupProblem(Exception):
    """Something on this machine is in the way; the message is one line that says what to do."""


def say(line: str) -> None:
    """Prints one step."""
    print("setup: " + line, flush=True)


def gigabytes(size: int) -> str:
    """`size` in bytes, for people."""
    return "%.1f GB" % (size / GB) if size >= GB else "%d MB" % (size // 10**6)  # noqa: UP031, RUF100


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end in silence, its output and its errors together in `stdout`."""
    return subprocess.run(
        [str(part) for part in command],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> None:
    """Raises SetupProblem for a Python that is too old; says so for one that nobody has tried."""
    shown = ".".join(str(part) for part in version)
    if tuple(version[:2]) < MINIMUM:
        raise SetupProblem("Python " + shown + " is too old: 3.11 or newer is needed (make PYTHON=/path/to/python3.11)")
    if tuple(version[:2]) > NEWEST_TRIED:
        say("Python " + shown + " is newer than what is tested (3.11 to 3.13); going on")


def check_venv() -> None:
    """Raises SetupProblem where Debian's way of splitting Python up has left venv or ensurepip out."""
    try:
        import ensurepip  # noqa: F401, PLC0415, RUF100
        import venv  # noqa: F401, PLC0415, RUF100
    except ImportError as error:
        raise SetupProblem(
            f"this Python has no module '{error.name}': install it (Debian, Ubuntu: apt install python3-venv)"
        ) from None


def check_disk(folder: Path, needed: int) -> None:
    """Raises SetupProblem where `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SetupProblem(f"{gigabytes(free)} free in {folder}: {gigabytes(needed)} are needed")


def runs_services(system: str = platform.system()) -> bool:
    """Whether the services run here; elsewhere the client alone is installed."""
    return system == "Linux"


def create_venv(folder: Path) -> Path:
    """Creates the environment where none works yet; gives its Python."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists() or run(python, "-m", "pip", "--version").returncode != 0:
        say(f"creating {folder.name} with Python {platform.python_version()}")
        created = run(sys.executable, "-m", "venv", "--clear", folder)
        if created.returncode != 0:
            raise SetupProblem(f"python -m venv failed: {created.stdout.strip()}")
    return python


class Pip:
    """pip of one environment: silent, with bounded waits, its output kept for the case that it fails."""

    def __init__(self, python: Path) -> None:
        self._python = str(python)
        self._log = python.parent.parent / "setup.log"

    def install(self, *arguments: str) -> None:
        """Runs `pip install`; raises SetupProblem with the end of its output."""
        options = ["--timeout=30", "--retries=2", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
        constraints = ["-c", str(ROOT / "constraints.txt")]
        command = [self._python, "-m", "pip", "install", *options, *constraints, *arguments]
        result = run(*command)
        with self._log.open("a") as log:
            log.write(" ".join(command) + "\n" + result.stdout)
        if result.returncode != 0:
            tail = "\n".join(result.stdout.strip().splitlines()[-15:])
            raise SetupProblem(f"pip failed, the whole output is in {self._log}:\n{tail}")

    def has(self, requirement: str) -> bool:
        """Whether `requirement`, as name==version, is installed, whatever the build."""
        name, version = requirement.split("==")
        code = f"from importlib.metadata import version; print(version({name!r}).partition('+')[0])"
        return run(self._python, "-c", code).stdout.strip() == version

    def wheels(self, *arguments: str) -> dict[str, str]:
        """What `pip install` would fetch for these arguments, name to address, without fetching it."""
        report = self._log.with_name("setup-report.json")
        self.install("--dry-run", "--ignore-installed", "--report", str(report), *arguments)
        found = json.loads(report.read_text())["install"]
        return {item["metadata"]["name"].lower(): item["download_info"]["url"] for item in found}


def download_size(urls: list[str]) -> int | None:
    """The sum of the files' sizes in bytes, or None where a server does not tell."""

    def size(url: str) -> int:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10) as answer:  # noqa: S310
            return int(answer.headers["Content-Length"])

    try:
        with ThreadPoolExecutor(8) as pool:
            return sum(pool.map(size, urls))
    except (OSError, TypeError, ValueError):
        return None


def torch_requirement() -> str:
    """The line of constraints.txt that pins torch."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def install_torch(pip: Pip, index: str | None) -> None:
    """Installs torch, after a line that says which build it is and how much is downloaded.

    Args:
        pip: of the environment.
        index: the address of another index for torch alone (TORCH_INDEX).
    """
    torch = torch_requirement()
    if pip.has(torch):
        return
    # From an index of torch's own, torch alone: everything else keeps coming from the usual index.
    source = ["--no-deps", "--index-url", index] if index else []
    say("looking up which build of torch there is")
    wheels = {
        name: url for name, url in pip.wheels(torch, *source).items() if name == "torch" or ONLY_WITH_CUDA.match(name)
    }
    build = "cuda" if len(wheels) > 1 else "cpu"
    check_disk(ROOT, DISK[build])
    size = download_size(list(wheels.values()))
    shown = gigabytes(size) if size is not None else "about " + gigabytes(USUAL_DOWNLOAD[build])
    if build == "cuda":
        say(
            f"torch is the CUDA build here; the CPU build is about {gigabytes(USUAL_DOWNLOAD['cpu'])}: stop now and add"
            " TORCH_INDEX=<address>; pytorch.org/get-started names the address (choose pip, CPU)"
        )
    say(f"installing {torch.replace('==', ' ')} ({shown} to download, {len(wheels)} files)")
    pip.install(*source, torch)


def setup(role: str, folder: Path, index: str | None, system: str) -> None:
    """Checks this machine and installs; raises SetupProblem, with one line on what to do."""
    check_python()
    check_venv()
    check_disk(ROOT, DISK["cpu" if runs_services(system) else "client"])
    pip = Pip(create_venv(folder))
    # From 25.3 on a dry run reads what a wheel needs without fetching the wheel.
    pip.install("--upgrade", "pip>=25.3")
    if not runs_services(system):
        say("installing the Python client")
        pip.install("-e", ".")
        raise SetupProblem(
            f"the Python client is ready in {folder.name}; the services run on Linux only, on {system} in a container:"
            f" {CONTAINER}"
        )
    install_torch(pip, index)
    say(f"installing what {role} needs")
    pip.install("-e", f".[{role}]")
    for ready in ("demo", "dev") if role == "dev" else (role,):
        (folder / f".ready-{ready}").touch()
    say(f"done; source {folder.name}/bin/activate puts mosel on the path")


def main() -> int:
    """Runs the set-up; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=["demo", "dev"])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    arguments = parser.parse_args()
    try:
        setup(arguments.role, arguments.venv.absolute(), os.environ.get("TORCH_INDEX"), platform.system())
    except SetupProblem as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
