"""How tensors travel between real services: proven paths, and refusals where a path is required that is not there."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mosel import Client
from mosel.config import Settings
from mosel.errors import MoselError, ServiceUnavailable
from mosel.launcher import Launcher

PLACEMENTS = ("single", "services")
Until = Callable[..., None]

Payloads = dict[str, NDArray[np.generic]]
Draw = Callable[..., Payloads]
EDGES = {
    ("gateway", "encoder/photo"),
    ("gateway", "encoder/scent"),
    ("encoder/photo", "fusion"),
    ("encoder/scent", "fusion"),
}


def rungs(client: Client) -> dict[tuple[str, str], str]:
    edges = [edge for service in client.status() for edge in service.edges]
    return {(edge.producer.partition("-")[0], edge.consumer): edge.rung for edge in edges}


def test_every_edge_is_proven_and_shown(services: Launcher, client: Client) -> None:
    rung = "in_process" if services.settings.placement == "single" else "posix_shm"
    assert rungs(client) == dict.fromkeys(EDGES, rung)
    selector = next(service for service in client.status() if service.name == "selector")
    assert selector.counters[f"edges.{rung}"] == len(EDGES)


def test_large_payloads_are_written_once_and_read_by_the_chosen_alone(client: Client, draw: Draw) -> None:
    def counted() -> dict[str, dict[str, int]]:
        return {service.name: service.counters for service in client.status()}

    payloads, before = draw(200), counted()
    assert payloads["photo"].nbytes > 64 * 1024
    answer = client.predict("fruit", payloads, modalities=["photo"])
    assert set(answer.modality_sets) == {"photo"}
    after = counted()
    grown = {name: {key: after[name][key] - before[name].get(key, 0) for key in after[name]} for name in after}
    acquired = ("slots_acquired_total", "object_slots_acquired_total")
    assert sum(grown["gateway"].get(name, 0) for name in acquired) == 1
    assert grown["encoder/photo"]["payload_bytes_read"] == payloads["photo"].nbytes
    assert grown["encoder/scent"].get("payload_bytes_read", 0) == 0


@pytest.fixture
def restarted(settings_with: Callable[..., Settings]) -> Iterator[Launcher]:
    with Launcher(
        settings_with(transport={"inline_max_kib": 0, "gateway_arena_mib": 8, "encoder_arena_mib": 4})
    ) as own:
        own.wait_ready(120)
        yield own


def test_a_producer_that_comes_again_is_attached_under_its_new_epoch(
    restarted: Launcher,
    draw: Draw,
    until: Callable[..., None],
) -> None:
    with Client(restarted.address) as client:
        expected = client.predict("fruit", draw(40)).output
        for name in ("encoder/photo", "fusion", "gateway"):
            os.kill(restarted.children[name].process.pid, signal.SIGKILL)
            restarted.children[name].process.wait()
            restarted.start_again(name)
            until(lambda: _is_whole(client), f"{name} is attached again")
            # Not to the last bit: the batches may be others.
            assert np.allclose(client.predict("fruit", draw(40)).output, expected, atol=1e-5)
        opened = {service.name: service.counters.get("arenas_open") for service in client.status()}
        assert opened["fusion"] == 2
        assert opened["encoder/photo"] == opened["encoder/scent"] == 1


def _is_whole(client: Client) -> bool:
    try:
        (model,) = client.models()
    except ServiceUnavailable:
        return False
    return all(info.available for info in model.sets.values()) and rungs(client) == dict.fromkeys(EDGES, "posix_shm")


def refusals(client: Client) -> list[str]:
    """What is said of both encoders; empty while they cannot be asked."""
    with contextlib.suppress(MoselError):
        details = {service.name: service.detail for service in client.status()}
        return [details.get(name, "") for name in ("encoder/photo", "encoder/scent")]
    return ["", ""]


@pytest.mark.parametrize("required", ["cuda_ipc", "in_process"])
def test_a_path_that_is_required_and_not_there_keeps_the_system_from_being_ready(
    settings_with: Callable[..., Settings], until: Until, required: str
) -> None:
    with Launcher(settings_with(transport={"require": required})) as launcher:
        with Client(launcher.address, retries=None) as client:
            until(lambda: all("transport.require" in told for told in refusals(client)), "the selector has said no")
        with pytest.raises(ServiceUnavailable, match=rf"encoder/photo \(transport\.require is {required}, but"):
            launcher.wait_ready(3)
        with Client(launcher.address) as client:
            assert not any(model.ready for model in client.models())
            until(
                lambda: all("embeddings travel posix_shm" in told for told in refusals(client)),
                "what there is is known",
            )


def test_who_no_longer_reaches_fusion_as_required_is_used_no_more_until_it_does(
    settings_with: Callable[..., Settings], tmp_path: Path, draw: Draw, until: Until
) -> None:
    with (
        Launcher(settings_with(transport={"require": "posix_shm"})) as launcher,
        Client(launcher.address, retries=None) as client,
    ):
        launcher.wait_ready(120)

        def move_fusion(settings: Settings) -> None:
            launcher.settings, fusion = settings, launcher.children["fusion"].process
            fusion.kill()
            fusion.wait()
            launcher.start_again("fusion")

        here = launcher.settings
        elsewhere = here.transport.model_copy(update={"shm_dir": tmp_path})
        move_fusion(here.model_copy(update={"transport": elsewhere}))
        until(lambda: all("but embeddings travel inline: posix_shm: " in told for told in refusals(client)), "refused")
        assert not any(info.available for info in client.models()[0].sets.values())
        with pytest.raises(ServiceUnavailable):
            client.predict("fruit", draw(3))
        move_fusion(here)
        until(launcher.is_ready, "all is used again")
        assert len(client.predict("fruit", draw(3)).labels) == 3
