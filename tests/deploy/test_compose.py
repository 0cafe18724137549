"""The compose files, without an engine: tests/compose starts them."""

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.support import ROOT, Started, compose_program

BASE = ROOT / "docker-compose.yml"
GPU, MPS = ROOT / "deploy" / "compose.gpu.yml", ROOT / "deploy" / "compose.mps.yml"
OBSERVABILITY, PROTECTED = ROOT / "deploy" / "compose.observability.yml", ROOT / "deploy" / "compose.protected.yml"
STACKS = [(BASE,), (BASE, GPU), (BASE, GPU, MPS), (BASE, OBSERVABILITY), (BASE, GPU, OBSERVABILITY), (BASE, PROTECTED)]
UNITS = {"m": 1024**2, "g": 1024**3}


def names(files: Sequence[Path]) -> str:
    return "+".join(file.stem.removeprefix("compose.") for file in files)


def read(file: Path) -> dict[str, Any]:
    """A file with the defaults of its variables."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", file.read_text())
    assert "${" not in text
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def merged(first: Any, second: Any) -> Any:
    """As compose puts a further file on top: maps by key, the lists of a service one after the other."""
    if isinstance(first, dict) and isinstance(second, dict):
        return {k: merged(first[k], second[k]) if {k} <= first.keys() & second.keys() else (first | second)[k]
                for k in first | second}  # fmt: skip
    return first + second if isinstance(first, list) and isinstance(second, list) else second


def stack(files: Sequence[Path]) -> dict[str, Any]:
    content: Any = {}
    for file in files:
        part = read(file)
        for service in part["services"].values():
            # Written as a list: with the condition that a list means.
            if isinstance(service.get("depends_on"), list):
                service["depends_on"] = {name: {"condition": "service_started"} for name in service["depends_on"]}
        content = merged(content, part)
    result: dict[str, Any] = content
    return result


def product(services: Mapping[str, Any]) -> dict[str, Started]:
    """The services of this product, by name."""
    found = {}
    for name, service in services.items():
        if service.get("command", [""])[0] == "python":
            environment = {key: str(value) for key, value in service["environment"].items()}
            found[name] = Started(service["command"], environment, service["healthcheck"]["test"][1:])
    return found


def size(text: str) -> int:
    return int(text[:-1]) * UNITS[text[-1]]


@pytest.fixture(params=STACKS, ids=names)
def files(request: pytest.FixtureRequest) -> tuple[Path, ...]:
    chosen: tuple[Path, ...] = request.param
    return chosen


def test_its_services_make_one_cell(
    files: tuple[Path, ...], check_cell: Callable[[Sequence[Started], int], None]
) -> None:
    services = stack(files)["services"]
    check_cell(list(product(services).values()), size(services["memory"]["shm_size"]))


def test_all_share_the_memory_and_the_sockets_of_one(files: tuple[Path, ...]) -> None:
    services = stack(files)["services"]
    assert services["memory"]["ipc"] == "shareable"
    for name in product(services):
        assert services[name]["ipc"] == "service:memory"
        assert "sockets:/run/mosel" in services[name]["volumes"]
        assert "memory" in waits_for(services, name)


def test_everybody_starts_when_what_it_calls_is_healthy(files: tuple[Path, ...]) -> None:
    services = stack(files)["services"]
    behind = [name for name in product(services) if name not in ("gateway", "selector")]
    for name, needed in (("gateway", ["selector"]), ("selector", behind)):
        assert {services[name]["depends_on"][other]["condition"] for other in needed} == {"service_healthy"}


def waits_for(services: Mapping[str, Any], name: str) -> set[str]:
    """Everything that is started before; never ends if services wait for each other in a circle."""
    needed = services[name].get("depends_on", {}).keys()
    return set(needed).union(*(waits_for(services, other) for other in needed))


def test_nothing_may_do_more_than_it_must(files: tuple[Path, ...]) -> None:
    content = stack(files)
    assert content["networks"]["cell"] == {"internal": True}
    for name, service in content["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert service["pids_limit"] <= 256, name
        assert size(service["mem_limit"]) <= size("4g"), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        if name not in ("gateway", "prometheus", "grafana"):
            assert service["networks"] == ["cell"], name


def test_a_service_has_time_to_finish(settings_of: Callable[[Started], Any]) -> None:
    services = stack([BASE])["services"]
    for name, started in product(services).items():
        grace_s = int(services[name]["stop_grace_period"].removesuffix("s"))
        assert grace_s > settings_of(started).stop_grace_ms / 1000


def test_memory_limits_leave_room_for_arenas(settings_of: Callable[[Started], Any]) -> None:
    services = stack([BASE])["services"]
    for name, started in product(services).items():
        transport = settings_of(started).transport
        arena = {"gateway": transport.gateway_arena_mib, "encoders": transport.encoder_arena_mib}
        assert size(services[name]["mem_limit"]) >= (arena.get(started.module, 0) + 256) * 1024**2


def test_every_file_that_is_mounted_exists() -> None:
    for service in stack([BASE, OBSERVABILITY])["services"].values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (ROOT / source).is_file(), volume


@pytest.mark.parametrize("file", [GPU, MPS, OBSERVABILITY, PROTECTED], ids=lambda file: file.stem)
def test_an_overlay_changes_services_that_exist_or_brings_whole_ones(file: Path) -> None:
    known = read(BASE)["services"]
    for name, service in read(file)["services"].items():
        assert name in known or "image" in service, f"{name} is no service of docker-compose.yml"


def test_other_machines_come_in_with_tls_and_tokens_or_not_at_all(
    files: tuple[Path, ...], settings_of: Callable[[Started], Any]
) -> None:
    settings = settings_of(product(stack(files)["services"])["gateway"])
    protected = PROTECTED in files
    assert settings.gateway.insecure != protected
    assert (settings.gateway.tokens_file is not None, settings.tls.certificate is not None) == (protected, protected)


def test_gpus_come_with_what_cuda_ipc_needs(settings_of: Callable[[Started], Any]) -> None:
    services = stack([BASE, GPU])["services"]
    computing = {
        name: started for name, started in product(services).items() if started.module in ("encoders", "fusion")
    }
    devices = set()
    for name, started in computing.items():
        assert settings_of(started).device == "cuda"
        assert (services[name]["pid"], services[name]["ipc"]) == ("service:memory", "service:memory")
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        devices.add((*device["device_ids"], *device["capabilities"]))
    assert devices == {("0", "gpu")}
    assert {service["image"] for service in services.values()} == {"mosel:cuda"}


def test_a_compose_program_takes_them(files: tuple[Path, ...]) -> None:
    program = compose_program()
    if program is None:
        pytest.skip("no docker compose here")
    arguments = [argument for file in files for argument in ("-f", str(file))]
    checked = subprocess.run(
        [*program, *arguments, "--project-directory", str(ROOT), "config", "-q"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
