"""What every test gets, and the model of docs/your-model.md, served by real processes."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from blockbuster import BlockBuster
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from numpy.typing import NDArray

from mosel.client import Client
from mosel.config import FREE_PORTS, Settings, load_settings
from mosel.launcher import Launcher
from mosel.packages.model_package import ModelPackage, load_package

if TYPE_CHECKING:
    from tests.fruit_on_disk import Fruit

# How long an example takes is up to what else the machine does.
hypothesis_settings.register_profile(
    "tests", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
hypothesis_settings.load_profile("tests")

PRODUCT = ["mosel", "gateway", "selector", "encoders", "fusion"]
# Where a developer keeps recordings beside the checkout; tests that need them are skipped without.
RECORDINGS = Path(__file__).parents[2] / "shared" / "data"
YOUR_MODEL = Path(__file__).parents[1] / "docs" / "your-model.md"

# Folders whose files take long, the first of them longest: for starting services, or for computing.
_LONGEST = ("chaos", "system", "packaging", "bench", "selector")
_LIMIT = pytest.StashKey[Any]()

if RECORDINGS.is_dir():
    os.environ.setdefault("MOSEL_DATA", str(RECORDINGS))
# In what tests start: whoever changes a message after it was handed over inside a process is found.
os.environ.setdefault("MOSEL_CHECK_MESSAGES", "1")
# Otherwise each of the hundreds of processes that tests start would compile the product anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# A test and what it starts share few cores with others, and threads of torch that wait for each other spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

Payloads = dict[str, NDArray[np.generic]]
Output = NDArray[np.float32]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts those first whose files take longest, so that several workers end at about the same time."""
    last = len(_LONGEST)
    items.sort(key=lambda item: next((n for n, name in enumerate(_LONGEST) if name in item.path.parts), last))


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> Generator[None, object, object]:
    """Has a time limit come again: what it ended may be inside something that waits for it and hangs as well."""
    result = yield
    item.stash[_LIMIT] = settings
    signal.setitimer(signal.ITIMER_REAL, settings.timeout, settings.timeout)
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Gives the end of fixtures a limit of their own: a test that fails takes its limit along."""
    if _LIMIT in item.stash:
        item.ihook.pytest_timeout_set_timer(item=item, settings=item.stash[_LIMIT])


@pytest.fixture(autouse=True)
def no_blocking_call_in_an_event_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """Makes a blocking call of the product inside an event loop an error; the tests' own calls may block."""
    if request.node.get_closest_marker("asyncio") is None:
        yield
        return
    detector = BlockBuster(PRODUCT)
    detector.activate()
    yield
    detector.deactivate()


@pytest.fixture(scope="session", autouse=True)
def grpc_stays() -> Iterator[None]:
    """Otherwise grpc.aio ends its thread, and waits for it, whenever the garbage collector finds its last object."""
    grpc.aio.init_grpc_aio()
    yield
    grpc.aio.shutdown_grpc_aio()


@pytest.fixture(scope="session", autouse=True)
def profiles_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of measured profiles, in this process and those that it starts: not that of the user."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("profiles")
        patch.setenv("MOSEL_PROFILES_DIR", str(folder))
        # The standard ports may be in use here.
        patch.setenv("MOSEL_GATEWAY__HTTP_PORT", "0")
        patch.setenv("MOSEL_GATEWAY__METRICS_PORT", "0")
        yield folder


@pytest.fixture(scope="session")
def tutorial_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of docs/your-model.md, and what its training script makes of them: the model `fruit`."""
    folder = tmp_path_factory.mktemp("tutorial")
    blocks = re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", YOUR_MODEL.read_text(), re.DOTALL)
    assert {name for name, _ in blocks} >= {
        "make_fruit.py",
        "my_models/fruit/model.toml",
        "my_models/fruit/networks.py",
    }
    for name, content in blocks:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    command = [sys.executable, "make_fruit.py"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    # With them floors would be guaranteed; tests of that bring rows of their own, all others hold them in expectation.
    (folder / "my_models" / "fruit" / "calibration.npz").unlink()
    return folder


@pytest.fixture(scope="session")
def models_dir(tutorial_folder: Path) -> Path:
    """A folder of model packages that holds `fruit`."""
    return tutorial_folder / "my_models"


@pytest.fixture
def changing(models_dir: Path, tmp_path: Path) -> "Fruit":
    """A copy of `fruit` that may be changed, in a folder of models of its own."""
    from tests.fruit_on_disk import Fruit

    (tmp_path / "models").mkdir()
    return Fruit(shutil.copytree(models_dir / "fruit", tmp_path / "models" / "fruit"), tmp_path / "kept")


@pytest.fixture(scope="session")
def fruit(models_dir: Path) -> ModelPackage:
    """The model: `photo` UINT8 [24, 24, 3] (costly, 88 %), `scent` FP32 [6] (cheap, 73 %), both 93 %."""
    return load_package(models_dir / "fruit")


@pytest.fixture(scope="session")
def settings_with(models_dir: Path) -> Callable[..., Settings]:
    """Makes settings that serve `fruit` on a free port; flags are those of `load_settings`."""

    def make(**flags: object) -> Settings:
        # What kills or holds up a service needs it to have a process of its own.
        common = {"models_dir": models_dir, "gateway": FREE_PORTS, "device": "cpu", "placement": "services"}
        return load_settings(**(common | flags))

    return make


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs tests of the shared services in the placements that their module names; in one process if it names none."""
    named = (str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize"))
    shared = "services" in metafunc.fixturenames and not hasattr(metafunc.module, "services")
    if shared and not any("services" in names for names in named):
        placements = getattr(metafunc.module, "PLACEMENTS", ("single",))
        metafunc.parametrize("services", placements, indirect=True, scope="module")


@pytest.fixture(scope="session")
def running(settings_with: Callable[..., Settings]) -> Iterator[Callable[[str], Launcher]]:
    """Gives all services in a placement, with default settings; each is started once."""
    with contextlib.ExitStack() as stack:
        launchers: dict[str, Launcher] = {}

        def in_placement(placement: str) -> Launcher:
            if placement not in launchers:
                launcher = stack.enter_context(Launcher(settings_with(placement=placement)))
                launcher.wait_ready(120)
                launchers[placement] = launcher
            return launchers[placement]

        yield in_placement


@pytest.fixture(scope="module")
def services(running: Callable[[str], Launcher], request: pytest.FixtureRequest) -> Launcher:
    """Shared by every test that leaves them unharmed."""
    return running(request.param)


@pytest.fixture
def client(services: Launcher) -> Iterator[Client]:
    """A client of the shared services."""
    with Client(services.address) as client:
        yield client


@pytest.fixture(scope="session")
def draw() -> Callable[..., Payloads]:
    """Makes payloads of so many random items, by modality; every seed gives others."""

    def make(items: int, seed: int = 0) -> Payloads:
        rng = np.random.default_rng(seed)
        scents = rng.normal(0, 1, (items, 6)).astype(np.float32)
        return {"photo": rng.integers(0, 256, (items, 24, 24, 3), np.uint8), "scent": scents}

    return make


@pytest.fixture(scope="session")
def directly(fruit: ModelPackage) -> Callable[[Payloads, Iterable[str]], Output]:
    """Calls the networks in this process with the modalities named: what the services must answer."""
    import torch

    from mosel.compute import networks

    cpu = torch.device("cpu")
    encoders = {name: networks.load_encoder(fruit, name, cpu) for name in fruit.modalities}
    fusion = networks.load_fusion(fruit, cpu)

    @torch.inference_mode()
    def predict(payloads: Payloads, modalities: Iterable[str]) -> Output:
        tensors = {name: torch.from_numpy(payloads[name].copy()) for name in sorted(modalities)}
        output: Output = fusion({name: encoders[name](tensor) for name, tensor in tensors.items()}).numpy()
        return output

    return predict


@pytest.fixture(scope="session")
def counters() -> Callable[[Client], dict[str, dict[str, int]]]:
    """The counters of every service that answers, by its name."""
    return lambda client: {service.name: service.counters for service in client.status()}


@pytest.fixture(scope="session")
def gateway_holds(counters: Callable[[Client], dict[str, dict[str, int]]]) -> Callable[[Client], int]:
    """Jobs, slots of arenas and bytes that a gateway holds."""
    of_jobs, of_slots = ("jobs_in_flight", "jobs_at_selector", "arriving_bytes"), ("slots_published", "slots_filling")

    def count(client: Client) -> int:
        held = counters(client)["gateway"]
        slots = [held[f"{kind}{name}"] for kind in ("", "object_") for name in of_slots if f"{kind}{name}" in held]
        assert slots
        return sum(slots) + sum(held[name] for name in of_jobs)

    return count


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """Waits until a condition holds; fails the test after a generous time."""

    def wait(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
        give_up = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < give_up, f"after {seconds} s still not: {what}"
            time.sleep(0.05)

    return wait


@pytest.fixture(scope="session")
def mosel_command() -> Callable[..., list[str]]:
    """The command line of `mosel`, as installed beside this Python."""
    program = str(Path(sys.executable).with_name("mosel"))
    return lambda *arguments: [program, *arguments]


@pytest.fixture(scope="session")
def run_mosel(mosel_command: Callable[..., list[str]]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `mosel` to its end."""

    def run(
        *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"COLUMNS": "200"} | dict(env or {})
        command = mosel_command(*arguments)
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    return run
