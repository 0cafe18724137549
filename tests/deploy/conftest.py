"""What the tests of deploy/ share: an environment without settings, and the services that a deployment starts."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from mosel.config import Settings, load_settings
from mosel.packages.model_package import find_packages
from mosel.transport.layout import MIB, Layout
from tests.deploy.support import ROOT, Started

# The gRPC services, whose names health checks ask for.
SERVICES = {"selector": "Selector", "encoders": "Encoder", "fusion": "Fusion"}


@pytest.fixture(autouse=True)
def nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MOSEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def image_environment() -> dict[str, str]:
    """What the image sets."""
    (block,) = re.findall(r"^ENV ((?:.*\\\n)*.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    return dict(re.findall(r"(\w+)=(\S+)", block))


@pytest.fixture
def settings_of(image_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[[Started], Settings]:
    """The settings that a service has there; fails if the service would refuse them."""

    def load(started: Started) -> Settings:
        with monkeypatch.context() as patch:
            for name, value in (image_environment | dict(started.environment)).items():
                patch.setenv(name, value)
            return load_settings()

    return load


@pytest.fixture
def check_cell(settings_of: Callable[[Started], Settings]) -> Callable[[Sequence[Started], int], None]:
    """Checks that services make one cell: each is there once, all agree, and everybody's health is asked rightly.

    The second argument is the size of the shared memory that they have, in bytes.
    """

    def check(cell: Sequence[Started], shared_bytes: int) -> None:
        (settings,) = [settings_of(started) for started in cell if started.module == "gateway"]
        packages = find_packages(settings.models_dir, settings.models)
        modalities = sorted({m for package in packages.values() for m in package.modalities})
        parts = [started.module for started in cell if started.module != "encoders"]
        assert sorted(parts) == ["fusion", "gateway", "selector"]
        assert sorted(s.modality for s in cell if s.module == "encoders") == modalities
        for started in cell:
            own = settings_of(started)
            assert (own.run_dir, own.models, own.transport) == (settings.run_dir, settings.models, settings.transport)
            if started.health:
                _check_health(started, own, packages)
        # At start, everybody's; when the gateway comes back, its old arena is still open somewhere.
        gateway = Layout.for_budget(settings.transport.gateway_arena_mib * MIB).total_bytes
        encoder = Layout.for_budget(settings.transport.encoder_arena_mib * MIB).total_bytes
        assert shared_bytes >= 2 * gateway + len(modalities) * encoder

    return check


def _check_health(started: Started, settings: Settings, packages: Mapping[str, object]) -> None:
    match started.module:
        case "gateway":
            address = settings.local_gateway_address
        case "encoders":
            address = settings.encoder_address(started.modality)
        case module:
            address = getattr(settings, f"{module}_address")
    asked = ["mosel", "health", address]
    ready = list(packages) if started.module == "gateway" else [f"mosel.v1.{SERVICES[started.module]}"]
    assert list(started.health) == [*asked, "--service", *ready]
