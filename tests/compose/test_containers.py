"""Everything in containers, called from outside. Slow: builds the image, unless its layers are there already."""

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bench.workload import Arrival, poisson
from mosel.client import Client
from mosel.compute import networks
from mosel.config import reference_models
from mosel.errors import MoselError, ServiceUnavailable
from mosel.packages.model_package import load_package
from tests.chaos.load import Load
from tests.chaos.truth import Truth
from tests.compose.stack import UP_S, Stack

# The first of them builds the image.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

log = logging.getLogger(__name__)

SERVICES = ["fusion", "encoder-audio", "encoder-image", "encoder-pen", "selector", "gateway"]
# Of the load: requests per second from outside, and of each the items and the deadline. A busy machine can do it.
RATE, ITEMS, DEADLINE_MS = 10.0, 8, 20_000.0
Eventually = Callable[..., float]


@pytest.fixture
def client(stack: Stack, eventually: Eventually) -> Iterator[Client]:
    """A client of the running system; tests before may have left it starting."""
    with Client(stack.address) as client:
        eventually(lambda: all(stack.is_healthy(service) for service in SERVICES), "everybody healthy")
        yield client


def payloads(items: int) -> dict[str, NDArray[np.float32]]:
    """Noise, of a size that travels in shared memory."""
    rng = np.random.default_rng(items)
    shapes = {"audio": (8000,), "image": (28, 28), "pen": (2, 2)}
    return {name: rng.normal(0, 0.1, (items, *shape)).astype(np.float32) for name, shape in shapes.items()}


def directly(inputs: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """What the networks answer in this process."""
    package, cpu = load_package(reference_models() / "digits"), torch.device("cpu")
    with torch.inference_mode():
        embeddings = {
            name: networks.load_encoder(package, name, cpu)(torch.from_numpy(tensor)) for name, tensor in inputs.items()
        }
        output: NDArray[np.float32] = networks.load_fusion(package, cpu)(embeddings).numpy()
    return output


def test_it_answers_as_the_networks_do(client: Client) -> None:
    inputs = payloads(64)
    answer = client.predict("digits", inputs, timeout_s=60)
    assert set(answer.modality_sets) == {"audio+image+pen"}
    assert np.abs(answer.output.astype(np.float32) - directly(inputs)).max() < 1e-4


def test_floors_choose_what_is_run(client: Client) -> None:
    answer = client.predict("digits", payloads(4), min_accuracy=0.85, timeout_s=60)
    assert answer.expected_accuracy >= 0.85
    assert len(answer.modality_sets[0].split("+")) < 3


def test_tensors_travel_in_the_shared_memory_of_all_containers(client: Client) -> None:
    edges = [edge for service in client.status() for edge in service.edges]
    # The gateway to three encoders, and these to fusion.
    assert {edge.rung for edge in edges} == {"posix_shm"}, edges
    assert len(edges) == 6


def test_http_and_metrics_are_there(stack: Stack, client: Client) -> None:
    models = httpx.get(f"http://127.0.0.1:{stack.http_port}/v2/models/digits/ready", timeout=30)
    assert models.status_code == 200
    page = httpx.get(f"http://127.0.0.1:{stack.metrics_port}/metrics", timeout=30).raise_for_status().text
    up = {line for line in page.splitlines() if line.startswith("mosel_up{")}
    names = ["gateway", "selector", "fusion", *(f"encoder/{m}" for m in ("audio", "image", "pen"))]
    assert up == {f'mosel_up{{service="{name}"}} 1.0' for name in names}


@pytest.mark.parametrize("service", SERVICES)
def test_nobody_is_root_or_writes_anywhere(stack: Stack, client: Client, service: str) -> None:
    assert stack.inside(service, "id -u").strip() == "10001"
    assert stack.inside(service, "grep CapEff /proc/self/status").split() == ["CapEff:", "0000000000000000"]
    wrote = stack.inside(service, "touch /opt/mosel/x /etc/x /x 2>&1 || true")
    assert wrote.count("Read-only file system") == 3


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_that_is_killed_comes_back(
    stack: Stack, client: Client, eventually: Eventually, service: str
) -> None:
    container, restarts = stack.container(service), int(stack.inspect(service, "{{.RestartCount}}"))
    stack.kill(service)
    errors, missing = set(), set()

    def answered_in_full() -> bool:
        try:
            answer = client.predict("digits", payloads(64), timeout_s=10)
        except MoselError as error:
            errors.add(type(error))
            return False
        missing.add(answer.unavailable_modalities)
        return set(answer.modality_sets) == {"audio+image+pen"} and restarted()

    def restarted() -> bool:
        return int(stack.inspect(service, "{{.RestartCount}}")) == restarts + 1

    seconds = eventually(answered_in_full, f"answers from all modalities after {service} was killed")
    log.info("%s: answers in full %.1f s after it was killed", service, seconds)
    if modality := service.partition("encoder-")[2]:
        # The others meet the floor that the model has by itself.
        assert (errors, missing) == (set(), {(modality,), ()})
    else:
        assert errors == {ServiceUnavailable}
    assert stack.container(service) == container
    eventually(lambda: stack.is_healthy(service), f"{service} healthy")
    test_tensors_travel_in_the_shared_memory_of_all_containers(client)


@contextlib.contextmanager
def load(stack: Stack) -> Iterator[Load]:
    """Requests, single ones and streamed jobs, whatever becomes of those before; at the end all of them have ended."""
    truth = Truth(load_package(reference_models() / "digits"), payloads(64))
    floors = itertools.cycle([None, 0.85])
    times = poisson(RATE, UP_S, seed=0)
    arrivals = (Arrival(at_s, ITEMS, DEADLINE_MS, floor) for at_s, floor in zip(times, floors, strict=False))
    load = Load(stack.address, truth, arrivals, seed=0)
    thread = threading.Thread(target=asyncio.run, args=(load.run(),), name="load")
    thread.start()
    try:
        yield load
    finally:
        load.stop = True
        thread.join()


def is_answered_soon(sent: Load) -> bool:
    """Whether it runs, and the machine is not so busy with other things that requests pile up."""
    lately = sent.ended[-int(RATE) :]
    return len(lately) == RATE and all(not ended.error and ended.ended_s - ended.sent_s < 1 for ended in lately)


@pytest.mark.parametrize("stop", [Stack.stop, Stack.stop_at_once], ids=["in order", "all at once"])
def test_stopping_under_load_loses_no_admitted_job_and_leaves_nothing_behind(
    stack: Stack, client: Client, eventually: Eventually, stop: Callable[..., None]
) -> None:
    arenas = stack.inside("memory", "ls /dev/shm").split()
    assert len(arenas) == 4, arenas
    with load(stack) as sent:
        eventually(lambda: is_answered_soon(sent), "the machine does what is asked of it")
        told_s = time.monotonic()
        stop(stack, *SERVICES)
        log.info("all stopped after %.1f s", time.monotonic() - told_s)
    exit_codes = {stack.inspect(service, "{{.State.ExitCode}}") for service in SERVICES}
    left = stack.inside("memory", "ls /dev/shm").split()
    stack.up()
    # Docker kills what is still there after stop_grace_period.
    assert exit_codes == {"0"}
    assert left == []
    assert [ended.broken for ended in sent.ended if ended.broken] == []
    # What had been sent a little before was admitted; what was sent last came too late.
    assert {ended.error for ended in sent.ended if told_s - 1 < ended.sent_s < told_s - 0.2} == {""}
    assert {ended.error for ended in sent.ended} == {"", "ServiceUnavailable"}
