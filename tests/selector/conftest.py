"""What tests of the selector share."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack

import pytest

from mosel.config import Settings
from mosel.modality import FUSION
from tests.selector.scripted import ScriptedService, private_folder

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
