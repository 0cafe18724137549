"""What tests of the selector share."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack

import pytest

from mosel.config import Settings
from mosel.modality import FUSION, format_set
from mosel.packages.model_package import ModelPackage
from mosel.profiles.files import CallCost, Point, profile_file, quick_profile, save_profile
from mosel.profiles.hardware import this_hardware
from tests.selector.scripted import ScriptedService, Selector, private_folder, selector_of, until

Services = dict[str, ScriptedService]


@pytest.fixture
def settings(settings_with: Callable[..., Settings]) -> Iterator[Settings]:
    """Those of a selector and services of one test."""
    with private_folder() as folder:
        selector = {"profile_batch_sizes": (1,), "profile_repeats": 1, "max_queued_items": 8}
        gateway = {"grpc_port": 0, "http_port": 0, "metrics_port": 0, "max_items_per_job": 8}
        yield settings_with(
            run_dir=folder, profiles_dir=folder / "profiles", selector=selector, gateway=gateway, stop_grace_ms=500
        )


@pytest.fixture
async def scripted(settings: Settings) -> AsyncIterator[Services]:
    """The services that `fruit` needs, by lane."""
    async with AsyncExitStack() as entered:
        lanes = ("photo", "scent", FUSION)
        yield {lane: await entered.enter_async_context(ScriptedService(settings, lane)) for lane in lanes}


@pytest.fixture
def measured(settings: Settings, fruit: ModelPackage) -> None:
    """The latencies of `fruit` are kept: a selector that starts need not measure them."""
    hardware, points = this_hardware(settings, "cpu"), (Point(batch_size=1, p50_ms=1.0, p95_ms=1.0),)
    fusion = dict.fromkeys(map(format_set, fruit.accuracy.sets), points)
    calls = dict.fromkeys((*fruit.modalities, FUSION), CallCost(overhead_ms=0.1))
    profile = quick_profile(fruit, hardware, dict.fromkeys(fruit.modalities, points), fusion, calls)
    save_profile(profile, profile_file(fruit, hardware, settings))


@pytest.fixture
async def selector(settings: Settings, scripted: Services, measured: None) -> AsyncIterator[Selector]:
    """A process that knows all services, and whose model is ready."""
    async with selector_of(settings) as selector:
        async with selector.connected() as stream:
            await until(lambda: all(state.ready for state in stream.models().values()), "the model is ready")
        yield selector
