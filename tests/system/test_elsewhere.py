"""An encoder on another host: it is reached with no setting but its address, and what happens when it is cut off."""

import contextlib
import itertools
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mosel.client import Client, Prediction
from mosel.config import FREE_PORTS, Settings
from mosel.errors import MoselError
from tests.system.two_hosts import Host, authority, two_hosts

Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
Directly = Callable[[Payloads, Iterable[str]], NDArray[Any]]
Counters = Callable[[Client], dict[str, dict[str, int]]]
Until = Callable[..., None]

NEAR, FAR = "10.83.7.1", "10.83.7.2"
# How long a call may take beyond its deadline before it counts as hanging.
MARGIN_S = 15


@dataclass
class System:
    """Everything on one host, and the encoder of `photo` on another."""

    near: Host
    far: Host
    running: contextlib.ExitStack
    gateway: subprocess.Popen[bytes]
    client: Client

    def rungs(self) -> dict[tuple[str, str], str]:
        edges = [edge for service in self.client.status() for edge in service.edges]
        return {(edge.producer.partition("-")[0], edge.consumer): edge.rung for edge in edges}

    def is_whole(self) -> bool:
        with contextlib.suppress(MoselError):
            return bool(self.rungs() == RUNGS) and self.sets_available() == {"photo", "scent", "photo+scent"}
        return False

    def sets_available(self) -> set[str]:
        (model,) = self.client.models()
        return {name for name, info in model.sets.items() if info.available}


RUNGS = {
    ("gateway", "encoder/photo"): "fetch",
    ("gateway", "encoder/scent"): "posix_shm",
    ("encoder/photo", "fusion"): "fetch",
    ("encoder/scent", "fusion"): "posix_shm",
}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One authority, and a certificate for each host."""
    folder = tmp_path_factory.mktemp("certificates")
    ca = authority(folder)
    for address in (NEAR, FAR):
        certificate = ca.issue_cert(address)
        certificate.cert_chain_pems[0].write_to_path(str(folder / f"{address}.pem"))
        certificate.private_key_pem.write_to_path(str(folder / f"{address}.key"))
        (folder / f"{address}.key").chmod(0o600)
    return folder


@pytest.fixture(scope="module")
def system(settings_with: Callable[..., Settings], certificates: Path, until: Until) -> Iterator[System]:
    flags: dict[str, object] = {
        "gateway": FREE_PORTS | {"grpc_port": 8001},
        "encoders": {"addresses": {"photo": f"{FAR}:7001"}},
        # Embeddings are small, and to be fetched as well.
        "transport": {"inline_max_kib": 0, "gateway_arena_mib": 16, "encoder_arena_mib": 16},
    }
    with two_hosts(settings_with, certificates, **flags) as (near, far), contextlib.ExitStack() as running:
        running.enter_context(far.running("encoders", "--modality", "photo"))
        running.enter_context(near.running("encoders", "--modality", "scent"))
        for module in ("fusion", "selector"):
            running.enter_context(near.running(module))
        gateway = running.enter_context(near.running("gateway"))
        # A socket is in the file system, which both hosts share with this process.
        client = running.enter_context(Client(near.settings.local_gateway_address, retries=None))
        system = System(near, far, running, gateway, client)
        until(system.is_whole, "both encoders are there", seconds=120)
        yield system


def test_what_cannot_be_mapped_is_fetched(system: System, draw: Draw, directly: Directly, counters: Counters) -> None:
    before = counters(system.client)
    payloads = draw(200)
    assert payloads["photo"].nbytes > 64 * 1024
    answer = system.client.predict("fruit", payloads, latency_slo_ms=60_000, timeout_s=60)
    assert set(answer.modality_sets) == {"photo+scent"}
    np.testing.assert_allclose(answer.output.astype(np.float32), directly(payloads, payloads), atol=1e-5)
    after = counters(system.client)
    grown = {name: {key: after[name][key] - before[name].get(key, 0) for key in after[name]} for name in after}
    assert grown["encoder/photo"]["bytes_fetched"] == grown["encoder/photo"]["payload_bytes_read"]
    assert grown["encoder/photo"]["bytes_fetched"] == payloads["photo"].nbytes
    assert grown["encoder/scent"]["bytes_fetched"] == 0
    assert 0 < grown["fusion"]["bytes_fetched"] < grown["fusion"]["embedding_bytes_read"]
    # So nothing of it passed the selector.
    assert not any(grown[name].get("tensor_bytes.inline") for name in ("gateway", "encoder/photo"))


def test_the_status_says_how_and_why(system: System) -> None:
    assert system.rungs() == RUNGS
    services = {service.name: service for service in system.client.status()}
    edges = {(edge.producer.partition("-")[0], edge.consumer): edge for edge in services["selector"].edges}
    assert edges["gateway", "encoder/photo"].reason == "posix_shm: the arena is not there"
    assert services["selector"].counters["edges.fetch"] == 2
    assert services["encoder/photo"].address == f"{FAR}:7001"


def test_a_gateway_that_comes_again_is_fetched_from_where_it_is_now(
    system: System, draw: Draw, directly: Directly, counters: Counters, until: Until
) -> None:
    system.gateway.kill()
    system.gateway.wait()
    system.gateway = system.running.enter_context(system.near.running("gateway"))
    until(system.is_whole, "the gateway is there again")
    payloads = draw(100)
    answer = system.client.predict("fruit", payloads, latency_slo_ms=60_000, timeout_s=60)
    np.testing.assert_allclose(answer.output.astype(np.float32), directly(payloads, payloads), atol=1e-5)
    until(lambda: counters(system.client)["encoder/photo"]["arenas_open"] == 1, "the arena of before is closed")


@dataclass
class Call:
    """What became of a call, and how long it took."""

    seconds: float
    outcome: Prediction | MoselError


def called(client: Client, payloads: Payloads, seconds: float, **options: Any) -> Call:
    started = time.monotonic()
    outcome: Prediction | MoselError
    try:
        outcome = client.predict("fruit", payloads, latency_slo_ms=seconds * 1000, **options)
    except MoselError as error:
        outcome = error
    return Call(time.monotonic() - started, outcome)


def test_a_host_that_is_cut_off_ends_no_call_late_and_is_used_again(
    system: System, draw: Draw, directly: Directly, until: Until
) -> None:
    payloads, deadline_s, stop = draw(100), 10.0, False
    expected = {name: directly(payloads, name.split("+")) for name in ("photo", "scent", "photo+scent")}

    def load(floor: float) -> list[Call]:
        calls: list[Call] = []
        while not stop:
            calls.append(called(system.client, payloads, deadline_s, min_accuracy=floor))
        return calls

    with ThreadPoolExecutor(4) as pool:
        # Two ask for what only both modalities together have, two are content with either.
        running = [pool.submit(load, floor) for floor in (0.9, 0.9, 0.6, 0.6)]
        try:
            time.sleep(1)
            system.far.set_link("down")
            until(lambda: system.sets_available() == {"scent"}, "the encoder is known to be away")
            content = called(system.client, payloads, deadline_s, min_accuracy=0.6).outcome
            assert isinstance(content, Prediction)
            assert set(content.modality_sets) == {"scent"}
            demanding = called(system.client, payloads, deadline_s, min_accuracy=0.9)
            assert isinstance(demanding.outcome, MoselError)
            assert demanding.seconds < deadline_s
            system.far.set_link("up")
            until(system.is_whole, "the encoder is used again")
            again = called(system.client, payloads, 30, modalities=["photo", "scent"]).outcome
            assert isinstance(again, Prediction)
        finally:
            stop = True
            system.far.set_link("up")
        *demanding_ones, one, other = (loaded.result() for loaded in running)
    contented = [call for calls in (one, other) for call in calls]
    for call in (*contented, *itertools.chain(*demanding_ones)):
        assert call.seconds < deadline_s + MARGIN_S
        if isinstance(call.outcome, Prediction):
            for item, name in enumerate(call.outcome.modality_sets):
                output = call.outcome.output[item].astype(np.float32)
                np.testing.assert_allclose(output, expected[name][item], atol=1e-5)
    # All but those that were under way there.
    assert sum(isinstance(call.outcome, Prediction) for call in contented) > len(contented) / 2
