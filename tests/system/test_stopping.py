"""Services that are told to stop: they take nothing new, finish what was admitted, and leave nothing behind."""

import contextlib
import itertools
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray

from mosel.client import Client, Prediction
from mosel.config import Settings
from mosel.errors import MoselError, ServiceUnavailable
from mosel.launcher import Launcher
from tests.fruit_on_disk import measured
from tests.running_up import ready_address, up

Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
Until = Callable[..., None]

# Enough for a busy machine to do what the tests then ask of it, and a short one for jobs that outlast it.
GRACE_S, SHORT_S = 60.0, 3.0
# What a busy machine may add to the grace.
LITTLE_S = 10
# How long callers wait for their answers.
PATIENCE_S = 120.0
HEALTH_NAMES = {
    "gateway": "mosel.v1.Gateway",
    "selector": "mosel.v1.Selector",
    "encoder/scent": "mosel.v1.Encoder",
    "fusion": "mosel.v1.Fusion",
}
SERVICES = list(HEALTH_NAMES)
# What is said of jobs that were not admitted; of others, a service "went away" or "stopped before it answered".
REFUSED = re.compile(
    r"service (gateway|selector) is stopping|service (fusion|encoder/\w+) is away.*"
    r"|service selector is not reachable|service gateway at \S+ (is not reachable|stopped before it answered)"
)
# A scent with a number from here on is computed only once a file of that name is there.
HELD = itertools.count(1_000_000)
HOLD = """
    def forward(self, scent: Tensor) -> Tensor:
        import pathlib, time
        number = round(float(scent.max()))
        while number >= 1_000_000 and not pathlib.Path("{folder}", str(number)).exists():
            time.sleep(0.01)
        return super().forward(scent)
"""


@pytest.fixture(scope="module")
def holding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of files that held scents wait for."""
    return tmp_path_factory.mktemp("holding")


@pytest.fixture
def go_on(holding: Path) -> Path:
    """The file that the held scents of one test wait for."""
    return holding / str(next(HELD))


@pytest.fixture(scope="module")
def held_models(models_dir: Path, holding: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fruit` with scents that can be held."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(models_dir / "fruit", folder / "fruit")
    networks = folder / "fruit" / "networks.py"
    made = "        super().__init__(6, 8)\n"
    assert made in networks.read_text()
    networks.write_text(networks.read_text().replace(made, made + HOLD.format(folder=holding)))
    measured(folder / "fruit")
    return folder


@pytest.fixture(scope="module")
def shared_memory() -> Iterator[Path]:
    """A folder in shared memory for these services alone."""
    folder = Path(tempfile.mkdtemp(prefix="mosel-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module", params=[GRACE_S])
def launcher(
    request: pytest.FixtureRequest,
    settings_with: Callable[..., Settings],
    held_models: Path,
    shared_memory: Path,
    tmp_path_factory: Any,
) -> Iterator[Launcher]:
    """Services of this module alone, with so many seconds of grace; every tensor travels by shared memory."""
    settings = settings_with(
        models_dir=held_models,
        profiles_dir=tmp_path_factory.mktemp("profiles"),
        stop_grace_ms=request.param * 1000,
        transport={"shm_dir": shared_memory, "inline_max_kib": 0, "gateway_arena_mib": 32, "encoder_arena_mib": 16},
    )
    with Launcher(settings) as launcher:
        launcher.wait_ready(120)
        yield launcher


@pytest.fixture
def own(launcher: Launcher, until: Until) -> Launcher:
    """The module's services, all of them running and ready."""
    for child in launcher.ended():
        launcher.start_again(child.name)
    until(launcher.is_ready, "all services are ready", 120)
    return launcher


@contextlib.contextmanager
def under_way(launcher: Launcher, draw: Draw, until: Until, go_on: Path) -> Iterator[list["Future[Any]"]]:
    """Jobs that the selector has, held until the end: one is answered whole, one item by item, and one over HTTP."""

    def whole() -> Any:
        return outcome_of(lambda: client.predict("fruit", held(draw(4), go_on), timeout_s=PATIENCE_S))

    def streamed() -> Any:
        events = client.submit_job("fruit", held(draw(200), go_on), timeout_s=PATIENCE_S)
        return outcome_of(lambda: [item for event in events for item in getattr(event, "items", ())])

    def over_http() -> tuple[int, str]:
        scent = held(draw(1), go_on)["scent"]
        sent = {"name": "scent", "datatype": "FP32", "shape": scent.shape, "data": scent.tolist()}
        body = {"inputs": [sent], "parameters": {"latency_slo_ms": PATIENCE_S * 1000}}
        reply = httpx.post(f"http://{launcher.http_address}/v2/models/fruit/infer", json=body, timeout=PATIENCE_S)
        return reply.status_code, reply.json().get("error", "")

    with Client(launcher.address) as client, Client(launcher.local_address) as watcher, ThreadPoolExecutor(3) as pool:
        jobs: list[Future[Any]] = [pool.submit(whole), pool.submit(streamed), pool.submit(over_http)]
        try:
            until(lambda: jobs_at_selector(watcher) == len(jobs), "the jobs are under way")
            yield jobs
        finally:
            go_on.touch()


def outcome_of(call: Callable[[], Any]) -> Any:
    """An answer or a typed error; anything else fails the test."""
    try:
        return call()
    except MoselError as error:
        return error


def all_are_answered(jobs: list["Future[Any]"]) -> None:
    """Those of `under_way`."""
    whole, streamed, over_http = [job.result() for job in jobs]
    assert isinstance(whole, Prediction), whole
    assert sorted(streamed) == list(range(200))
    assert over_http[0] == 200, over_http


def held(payloads: Payloads, go_on: Path) -> Payloads:
    payloads["scent"][0, 0] = float(go_on.name)
    return payloads


def jobs_at_selector(client: Client) -> int:
    return sum(service.counters.get("jobs", 0) for service in client.status() if service.name == "selector")


def address_of(launcher: Launcher, name: str) -> str:
    settings, (kind, _, modality) = launcher.settings, name.partition("/")
    addresses = {"gateway": settings.local_gateway_address, "selector": settings.selector_address}
    return settings.encoder_address(modality) if kind == "encoder" else addresses.get(kind, settings.fusion_address)


def health_of(launcher: Launcher, name: str) -> str:
    """What a service says of itself on a new connection."""
    with grpc.insecure_channel(address_of(launcher, name)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            request = health_pb2.HealthCheckRequest(service=HEALTH_NAMES[name])
            reply = stub.Check(request, timeout=10)  # type: ignore[attr-defined]
        except grpc.RpcError as error:
            return str(error.code().name)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


def nothing_is_left(launcher: Launcher, shared_memory: Path, *names: str) -> None:
    """No socket of some services, and no arena but those of services that run."""
    for name in names:
        assert not Path(address_of(launcher, name).removeprefix("unix:")).exists(), name
    running = {name for name, child in launcher.children.items() if child.process.poll() is None}
    producers = [name for name in running if name == "gateway" or name.startswith("encoder/")]
    assert len(list(shared_memory.iterdir())) == len(producers)


@pytest.mark.parametrize("name", SERVICES)
def test_what_was_admitted_is_answered_and_nothing_else(
    own: Launcher, draw: Draw, until: Until, shared_memory: Path, go_on: Path, name: str
) -> None:
    process = own.children[name].process
    with under_way(own, draw, until, go_on) as jobs, Client(own.address, retries=None) as caller:
        process.send_signal(signal.SIGTERM)
        # It does not listen any more, so that callers go elsewhere, or says that it is not to be used.
        until(lambda: health_of(own, name) in ("NOT_SERVING", "UNAVAILABLE"), "it is not ready")
        new = outcome_of(lambda: caller.predict("fruit", draw(3)))
        assert not any(job.done() for job in jobs)
        assert process.poll() is None
        assert isinstance(new, ServiceUnavailable), new
        assert str(new).startswith(f"service {'gateway at' if name == 'gateway' else name} ")
        go_on.touch()
        all_are_answered(jobs)
    assert process.wait(GRACE_S + LITTLE_S) == 0
    nothing_is_left(own, shared_memory, name)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [SHORT_S], indirect=True)
@pytest.mark.parametrize("name", SERVICES)
def test_what_takes_longer_than_the_grace_is_ended(
    own: Launcher, draw: Draw, until: Until, shared_memory: Path, go_on: Path, name: str
) -> None:
    process = own.children[name].process
    with under_way(own, draw, until, go_on) as (*jobs, over_http):
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        outcomes, (status, error) = [job.result() for job in jobs], over_http.result()
        assert process.wait(LITTLE_S) == 0
        assert SHORT_S - 0.5 < time.monotonic() - started < SHORT_S + LITTLE_S
    for outcome in outcomes:
        assert isinstance(outcome, ServiceUnavailable), outcome
        assert str(outcome).startswith("service ")
    assert (status, error[:8]) == (503, "service ")
    nothing_is_left(own, shared_memory, name)


def test_all_at_once_under_load_no_admitted_job_is_lost(
    own: Launcher, draw: Draw, until: Until, shared_memory: Path, go_on: Path
) -> None:
    def load(seed: int) -> MoselError:
        """The first error."""
        with Client(own.address, retries=None) as client:
            while True:
                outcome = outcome_of(lambda: client.predict("fruit", draw(8, seed), timeout_s=PATIENCE_S))
                if isinstance(outcome, MoselError):
                    return outcome

    with (
        under_way(own, draw, until, go_on) as jobs,
        Client(own.local_address) as watcher,
        ThreadPoolExecutor(8) as pool,
    ):
        errors = [pool.submit(load, seed) for seed in range(8)]
        until(lambda: jobs_at_selector(watcher) > len(jobs), "there is load")
        # Whoever tells them does not tell all at the very same moment.
        for child in random.sample(list(own.children.values()), len(own.children)):
            child.process.send_signal(signal.SIGTERM)
        go_on.touch()
        all_are_answered(jobs)
        for error in errors:
            assert isinstance(error.result(), ServiceUnavailable)
            assert REFUSED.fullmatch(str(error.result())), error.result()
    for name, child in own.children.items():
        assert child.process.wait(GRACE_S + LITTLE_S) == 0, name
    nothing_is_left(own, shared_memory, *SERVICES)


@pytest.mark.parametrize("name", ["gateway", "encoder/scent"])
def test_a_second_signal_ends_a_service_at_once(
    own: Launcher, draw: Draw, until: Until, shared_memory: Path, go_on: Path, name: str
) -> None:
    process = own.children[name].process
    with under_way(own, draw, until, go_on) as jobs:
        process.send_signal(signal.SIGTERM)
        until(lambda: health_of(own, name) in ("NOT_SERVING", "UNAVAILABLE"), "it is not ready")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(LITTLE_S) == 1
        assert all(isinstance(job.result(), ServiceUnavailable) for job in jobs[:2])
    nothing_is_left(own, shared_memory, name)


def test_up_finishes_what_was_admitted(
    held_models: Path,
    shared_memory: Path,
    go_on: Path,
    mosel_command: Callable[..., list[str]],
    draw: Draw,
    until: Until,
    tmp_path: Path,
) -> None:
    before = set(shared_memory.iterdir())
    command = mosel_command("up", "--models", str(held_models), "--grpc-port", "0", "--device", "cpu")
    environment = {
        "MOSEL_PROFILES_DIR": str(tmp_path),
        "MOSEL_TRANSPORT__SHM_DIR": str(shared_memory),
        "MOSEL_STOP_GRACE_MS": str(GRACE_S * 1000),
    }
    with up(command, environment, tmp_path) as process, ThreadPoolExecutor(1) as pool:
        with Client(ready_address(process)) as client:
            client.predict("fruit", draw(2))
            job = pool.submit(client.predict, "fruit", held(draw(2), go_on), timeout_s=PATIENCE_S)
            try:
                until(lambda: jobs_at_selector(client) == 1, "the job is under way")
                process.send_signal(signal.SIGTERM)
                until(lambda: isinstance(outcome_of(client.models), ServiceUnavailable), "it is stopping")
            finally:
                go_on.touch()
            assert isinstance(job.result(), Prediction)
        assert process.wait(GRACE_S + LITTLE_S) == 0
    assert set(shared_memory.iterdir()) == before
