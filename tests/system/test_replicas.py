"""Two encoders of one modality, as real processes: both are used, and either can go."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from mosel.client import Client, Prediction
from mosel.config import Settings
from mosel.errors import MoselError, ServiceUnavailable
from mosel.launcher import Child, Launcher
from tests.fruit_on_disk import measured

Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
Directly = Callable[[Payloads, Iterable[str]], NDArray[Any]]
Counters = Callable[[Client], dict[str, dict[str, int]]]
Until = Callable[..., None]
Outcome = Prediction | MoselError

FIRST, SECOND = "encoder/photo", "encoder/photo/2"
BOTH = ["photo", "scent"]
# A multiple of every batch size that calls are cut into: no two jobs share a call.
ITEMS = 64
TRANSPORT = {"inline_max_kib": 0, "gateway_arena_mib": 32, "encoder_arena_mib": 16, "lease_grace_ms": 200}


@pytest.fixture(scope="module")
def launcher(settings_with: Callable[..., Settings]) -> Iterator[Launcher]:
    """Services of this module alone, with two encoders of photos; every tensor travels by shared memory."""
    with Launcher(settings_with(transport=TRANSPORT, encoders={"replicas": {"photo": 2}})) as launcher:
        launcher.wait_ready(120)
        yield launcher


def outcome_of(address: str, payloads: Payloads) -> Outcome:
    with Client(address, retries=None) as client:
        try:
            return client.predict("fruit", payloads, modalities=BOTH, timeout_s=60)
        except MoselError as error:
            return error


def outcomes_of(address: str, jobs: Sequence[Payloads]) -> list[Outcome]:
    """What becomes of jobs that are sent at the same time."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(lambda payloads: outcome_of(address, payloads), jobs))


def check(outcome: Outcome, payloads: Payloads, directly: Directly) -> None:
    assert isinstance(outcome, Prediction), outcome
    np.testing.assert_allclose(outcome.output.astype(np.float32), directly(payloads, BOTH), atol=1e-5)


def test_both_are_used_and_seen_and_the_answers_are_right(
    launcher: Launcher, draw: Draw, directly: Directly, counters: Counters
) -> None:
    jobs = [draw(ITEMS, seed=seed) for seed in range(12)]
    for payloads, outcome in zip(jobs, outcomes_of(launcher.address, jobs), strict=True):
        check(outcome, payloads, directly)
    with Client(launcher.address) as client:
        encoded = {name: counters(client)[name].get("items", 0) for name in (FIRST, SECOND)}
        edges = {(e.producer, e.consumer): e.rung for service in client.status() for e in service.edges}
    assert sum(encoded.values()) == 12 * ITEMS
    assert min(encoded.values()) > 0
    assert edges[SECOND, "fusion"] == "posix_shm"
    page = httpx.get(launcher.metrics_address, timeout=30).text
    for label in ("callee", "service"):
        assert f'{label}="{SECOND}"' in page


@pytest.mark.parametrize("name", [SECOND, FIRST])
def test_one_that_is_killed_under_load_takes_along_only_what_it_has(
    launcher: Launcher,
    draw: Draw,
    directly: Directly,
    counters: Counters,
    until: Until,
    name: str,
) -> None:
    jobs, lane = [draw(ITEMS, seed=seed) for seed in range(20, 28)], name.removeprefix("encoder/")
    child, enough = launcher.children[name], threading.Event()

    def load(payloads: Payloads) -> list[Outcome]:
        outcomes = [outcome_of(launcher.address, payloads)]
        while not enough.is_set():
            outcomes.append(outcome_of(launcher.address, payloads))
        return outcomes

    with Client(launcher.address) as client, ThreadPoolExecutor(len(jobs)) as pool:

        def in_its_hands() -> int:
            return counters(client)["selector"][f"calls_in_flight.{lane}"]

        child.process.send_signal(signal.SIGSTOP)
        # A few jobs may all go to the other one, which is free again by the time that the next is placed.
        loads = [pool.submit(load, payloads) for payloads in jobs]
        try:
            until(in_its_hands, "it has calls")
        finally:
            enough.set()
            child.process.kill()
            child.process.wait()
        lost: list[MoselError] = []
        for payloads, outcomes in zip(jobs, (one.result() for one in loads), strict=True):
            for outcome in outcomes:
                if isinstance(outcome, MoselError):
                    lost.append(outcome)
                else:
                    check(outcome, payloads, directly)
        assert len(lost) <= launcher.settings.workers
        for error in lost:
            assert isinstance(error, ServiceUnavailable)
            assert str(error).startswith(f"service {name} ")
        assert all(info.available for info in client.models()[0].sets.values())
        check(outcome_of(launcher.address, jobs[0]), jobs[0], directly)

        launcher.start_again(name)
        until(lambda: name in {service.name for service in client.status() if service.ready}, "it is back")

        def is_used() -> bool:
            # Several at a time: one alone goes to the same encoder again and again.
            for payloads, outcome in zip(jobs, outcomes_of(launcher.address, jobs), strict=True):
                check(outcome, payloads, directly)
            return counters(client)[name].get("items", 0) > 0

        until(is_used, "it is used again")


def test_one_with_other_files_is_left_out(
    settings_with: Callable[..., Settings],
    models_dir: Path,
    tmp_path: Path,
    draw: Draw,
    directly: Directly,
    counters: Counters,
    until: Until,
) -> None:
    shutil.copytree(models_dir, tmp_path / "models")
    with (tmp_path / "models" / "fruit" / "networks.py").open("a") as file:
        file.write("\n# Another revision.\n")
    measured(tmp_path / "models" / "fruit")
    # Two encoders, of which the launcher starts one.
    encoders = {"addresses": {"photo": ["", ""]}, "replicas": {"photo": 1}}
    with Launcher(settings_with(transport=TRANSPORT, encoders=encoders)) as launcher:
        environment = launcher.settings.model_copy(update={"models_dir": tmp_path / "models"}).as_environment()
        command = ("encoders", "--modality", "photo", "--replica", "2")
        log = tmp_path / "second.log"
        with log.open("ab") as stream:
            python = [sys.executable, "-P", "-m", *command]
            process = subprocess.Popen(python, env=os.environ | environment, stdout=stream, stderr=stream)
        launcher.children[SECOND] = Child(SECOND, command, process, log, 0)
        launcher.wait_ready(120)
        jobs = [draw(ITEMS, seed=seed) for seed in range(6)]
        for payloads, outcome in zip(jobs, outcomes_of(launcher.address, jobs), strict=True):
            check(outcome, payloads, directly)
        with Client(launcher.address) as client:
            until(lambda: SECOND in counters(client), "its state is known")
            assert counters(client)[SECOND].get("items", 0) == 0
            assert counters(client)[FIRST]["items"] == len(jobs) * ITEMS
            loaded = client.load_model("fruit")
            assert loaded.ready, "loading it anew does without it, too"
            assert loaded.reason.startswith(f"service {SECOND}: ")
        process.terminate()
        assert process.wait() == 0
