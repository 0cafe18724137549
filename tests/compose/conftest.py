"""A Docker engine, the image, and everything that docker-compose.yml starts; skipped where there is no engine."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
import yaml

from tests.compose.stack import Stack, run
from tests.deploy.support import ROOT, compose_program
from tests.ports import free_ports

IMAGE = "mosel-test"
# What the image is built from: `docker import` makes one where no registry can be reached (docs/operations.md).
BASE = os.environ.get("TEST_BASE_IMAGE", "python:3.11-slim")
_BUILD_S = 1800


def _answers(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


@pytest.fixture(scope="session")
def docker() -> str:
    """A docker program that reaches an engine and can build with BuildKit: by itself up to 20.10, then with buildx."""
    reason = "no docker program here"
    for program in filter(None, (shutil.which("docker"), shutil.which("docker", path="/usr/bin"))):
        if not _answers(program, "info"):
            reason = "no Docker engine answers"
        elif not _answers(program, "buildx", "version") and " 20.10." not in run([program, "--version"], {}):
            reason = f"{program} has no buildx"
        elif compose_program() is None:
            reason = "no docker compose here"
        else:
            return program
    pytest.skip(reason)


@pytest.fixture(scope="session")
def image(docker: str) -> str:
    """The image, built from this checkout."""
    environment = os.environ | {"DOCKER_BUILDKIT": "1"}
    run([docker, "build", "--build-arg", f"BASE={BASE}", "-t", IMAGE, "."], environment, timeout_s=_BUILD_S)
    return IMAGE


@pytest.fixture(scope="session")
def stack(docker: str, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Everything, started."""
    program = compose_program()
    assert program is not None
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    override = tmp_path_factory.mktemp("compose") / "image.yml"
    override.write_text(yaml.safe_dump({"services": {name: {"image": image} for name in services}}))
    compose = [*program, "-p", f"moseltest{os.getpid()}", "--project-directory", str(ROOT)]
    compose += ["-f", str(ROOT / "docker-compose.yml"), "-f", str(override)]
    grpc_port, http_port, metrics_port = free_ports(3)
    environment = os.environ | {
        "GRPC_PORT": str(grpc_port),
        "HTTP_PORT": str(http_port),
        "METRICS_PORT": str(metrics_port),
        "HEALTH_INTERVAL": "2s",
    }
    stack = Stack(docker, compose, environment, grpc_port, http_port, metrics_port)
    try:
        stack.up()
        yield stack
    finally:
        run([*compose, "down", "-v", "--timeout", "20"], environment)


@pytest.fixture(scope="session")
def eventually() -> Callable[..., float]:
    """Waits until a condition holds, and returns the seconds that it took."""

    def wait(condition: Callable[[], bool], what: str, seconds: float = 120) -> float:
        started = time.monotonic()
        while not condition():
            assert time.monotonic() < started + seconds, f"after {seconds} s still not: {what}"
            time.sleep(0.2)
        return time.monotonic() - started

    return wait
