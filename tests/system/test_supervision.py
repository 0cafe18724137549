"""`mosel up` starts again what ends: kills, a full /dev/shm, and being told to stop in the middle of it."""

import contextlib
import re
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from mosel.client import Client
from mosel.transport.control import remove_orphans
from tests.running_up import left_behind, ready_address, up

Payloads = dict[str, NDArray[Any]]
Command = Callable[..., list[str]]
Until = Callable[..., None]
SERVICES = ["encoder/photo", "encoder/scent", "fusion", "selector", "gateway"]
MIB = 1024 * 1024


@pytest.fixture
def running(tutorial_folder: Path, mosel_command: Command, private: dict[str, str]) -> Iterator[Popen[str]]:
    """A `mosel up`, not ready yet; each service has a process of its own."""
    arguments = "up", "--models", "my_models", "--grpc-port", "0", "--placement", "services"
    with up(mosel_command(*arguments), private, tutorial_folder) as process:
        yield process


def services_of(process: Popen[str]) -> dict[str, psutil.Process]:
    """The running services by name."""
    services = {}
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            # A process that was started just now has the command line of its parent.
            _, _, _, module, *arguments = child.cmdline()[:6] if len(child.cmdline()) > 3 else [""] * 4
            services[f"encoder/{arguments[1]}" if module == "encoders" else module] = child
    return services


def next_line(process: Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def until_ready_again(process: Popen[str]) -> list[str]:
    """The lines up to the one that says so, without it."""
    lines = []
    while not re.fullmatch(r"everything is ready again, after \d+\.\d s\n", line := next_line(process)):
        assert line, "mosel up ended"
        lines.append(line)
    return lines


def pause_s(line: str) -> float:
    """After which the service is started again."""
    found = re.search(r"\(starting it again in ([\d.]+) s\)$", line.rstrip())
    assert found, line
    return float(found[1])


def test_each_service_that_is_killed_comes_back(
    running: Popen[str],
    private: dict[str, str],
    draw: Callable[..., Payloads],
    directly: Callable[[Payloads, Iterable[str]], NDArray[Any]],
) -> None:
    address, payloads = ready_address(running), draw(7)
    for name in SERVICES:
        killed = services_of(running)[name]
        killed.kill()
        (line,) = until_ready_again(running)
        assert line.startswith(f"{name} was killed by SIGKILL: {{")
        assert pause_s(line) == 0.1
        assert services_of(running)[name].pid != killed.pid
        with Client(address) as client:
            answer = client.predict("fruit", payloads)
            assert set(answer.modality_sets) == {"photo+scent"}
            np.testing.assert_allclose(answer.output.astype(np.float32), directly(payloads, payloads), atol=1e-5)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 0
    assert left_behind(private) == []


@pytest.fixture
def small_memory(private: dict[str, str]) -> Iterator[Path]:
    """Has the services put their arenas where there is little more room than they need."""
    folder = private["MOSEL_TRANSPORT__SHM_DIR"]
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=72m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("only root can mount a tmpfs")
    yield Path(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(file: Path) -> int:
    """Has a file take all memory that is free there; returns its size."""
    with file.open("ab", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(bytes(MIB)):
            pass
    return file.stat().st_size


@pytest.mark.slow
def test_a_service_whose_arena_finds_no_room_is_tried_until_there_is_some(
    small_memory: Path, running: Popen[str], until: Until
) -> None:
    ready_address(running)
    filler = small_memory / "somebody-else"
    filled = fill(filler)
    services_of(running)["encoder/scent"].kill()
    assert next_line(running).startswith("encoder/scent was killed by SIGKILL")
    # Else the encoder would take the place of its old arena.
    assert remove_orphans(small_memory) == 1
    until(lambda: fill(filler) > filled + 8 * MIB, "nobody has the old arena open any more")
    refused = [next_line(running) for _ in range(4)]
    for line in refused:
        assert re.match(
            r"encoder/scent ended with exit code 1: .* MiB free, transport\.encoder_arena_mib asks for", line
        )
    assert [pause_s(line) for line in refused] == [0.2, 0.4, 0.8, 1.6]
    filler.unlink()
    assert until_ready_again(running) == []


@pytest.mark.slow
def test_it_is_stopped_while_a_service_waits_to_be_started_again(
    running: Popen[str], private: dict[str, str], until: Until
) -> None:
    ready_address(running)
    pauses: list[float] = []
    while not pauses or pauses[-1] < 3:
        until(lambda: "encoder/photo" in services_of(running), "the encoder is started again")
        services_of(running)["encoder/photo"].kill()
        pauses.append(pause_s(next_line(running)))
    assert pauses == [0.1 * 2**n for n in range(len(pauses))]
    others = services_of(running).values()
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 0
    assert running.communicate() == ("", "")
    assert not any(child.is_running() for child in others)
    assert left_behind(private) == []


@pytest.mark.slow
def test_it_is_stopped_while_a_service_is_starting_again(
    running: Popen[str], private: dict[str, str], until: Until
) -> None:
    ready_address(running)
    services_of(running)["selector"].kill()
    next_line(running)
    until(lambda: "selector" in services_of(running), "the selector is started again")
    children = services_of(running).values()
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 0
    until(lambda: not any(child.is_running() for child in children), "every service has ended")
    assert left_behind(private) == []


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_services_that_hang(running: Popen[str], private: dict[str, str]) -> None:
    ready_address(running)
    services = services_of(running)
    for name in ("gateway", "fusion"):
        services[name].suspend()
    running.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(1)
    running.send_signal(signal.SIGINT)
    # The first alone would take more than ten seconds.
    assert running.wait(5) == 0
    assert running.communicate() == ("", "")
    assert not any(child.is_running() for child in services.values())
    assert left_behind(private) == []
