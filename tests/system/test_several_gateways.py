"""Two gateways share one selector: both are served, and one that dies takes nothing of the other along."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mosel.client import Client
from mosel.config import Settings
from mosel.errors import ServiceUnavailable
from mosel.launcher import Launcher
from tests.ports import free_ports

Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
Directly = Callable[[Payloads, Iterable[str]], NDArray[Any]]
Counters = Callable[[Client], dict[str, dict[str, int]]]
Until = Callable[..., None]


@pytest.fixture(scope="module")
def launcher(settings_with: Callable[..., Settings]) -> Iterator[Launcher]:
    transport = {"inline_max_kib": 0, "gateway_arena_mib": 16, "encoder_arena_mib": 16, "lease_grace_ms": 200}
    with Launcher(settings_with(transport=transport)) as launcher:
        launcher.wait_ready(120)
        yield launcher


@pytest.fixture
def second(launcher: Launcher, until: Until) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address and the process of one more gateway of the same selector."""
    settings, names = launcher.settings, ("grpc_port", "http_port", "metrics_port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    own = settings.model_copy(update={"parent_pid": 0, "gateway": settings.gateway.model_copy(update=ports)})
    with subprocess.Popen([sys.executable, "-P", "-m", "gateway"], env=os.environ | own.as_environment()) as process:
        try:
            with Client(own.gateway_address) as client:
                until(lambda: is_ready(client), "the second gateway serves")
            yield own.gateway_address, process
        finally:
            process.kill()


def is_ready(client: Client) -> bool:
    try:
        return all(model.ready for model in client.models())
    except ServiceUnavailable:
        return False


def test_two_gateways_share_a_selector_and_one_of_them_dies(
    launcher: Launcher,
    second: tuple[str, subprocess.Popen[bytes]],
    draw: Draw,
    directly: Directly,
    counters: Counters,
    until: Until,
) -> None:
    address, process = second
    photo = launcher.children["encoder/photo"].process
    with Client(launcher.address) as first, Client(address) as other, ThreadPoolExecutor(8) as pool:
        jobs = [draw(16, seed=seed) for seed in range(8)]
        calls = [pool.submit((first, other)[seed % 2].predict, "fruit", payloads) for seed, payloads in enumerate(jobs)]
        for payloads, call in zip(jobs, calls, strict=True):
            np.testing.assert_allclose(call.result().output.astype(np.float32), directly(payloads, payloads), atol=1e-5)
        edges = {edge.producer for edge in first.status()[1].edges}
        assert {"gateway-1", "gateway-2"} <= edges

        photo.send_signal(signal.SIGSTOP)
        calls = [pool.submit((first, other)[seed % 2].predict, "fruit", jobs[seed]) for seed in range(8)]
        until(lambda: counters(first)["selector"]["jobs"] == len(calls), "the jobs are under way")
        process.kill()
        lost = [calls[seed].exception() for seed in (1, 3, 5, 7)]
        photo.send_signal(signal.SIGCONT)
        assert all(isinstance(error, ServiceUnavailable) for error in lost)
        for seed in (0, 2, 4, 6):
            np.testing.assert_allclose(
                calls[seed].result().output.astype(np.float32), directly(jobs[seed], jobs[seed]), atol=1e-5
            )
        held = ("jobs", "queued_items", "jobs_held", "slots_held")
        until(lambda: not any(counters(first)["selector"].get(name, 0) for name in held), "nothing is held")
