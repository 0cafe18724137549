"""What was measured on a busy machine is measured again on a quiet one, and is in nobody's way."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime

import pytest

from mosel.config import Settings
from mosel.modality import FUSION
from mosel.packages.model_package import ModelPackage, load_package
from mosel.profiles.files import Profile, load_profile, save_profile
from selector.core.jobs import EncodeCall, Job
from selector.core.scheduler import Scheduler
from selector.events import Event, LaneDown, LaneUp
from selector.gateway_session import Gateways
from selector.services.compute_services import ComputeServices
from selector.services.health_watch import HealthWatch
from selector.services.latency_measurement import Latencies
from selector.services.model_loader import ModelLoader
from selector.services.quiet_measurement import QuietMeasurement
from selector.services.tensor_paths import TensorPaths
from tests.fruit_on_disk import Fruit, measured
from tests.selector.conftest import Services
from tests.selector.scripted import ScriptedService, until

BOTH = frozenset({"photo", "scent"})


BUSY_MS, QUIET_MS = 50.0, 0.25


class Selecting:
    """What a selector has of models and services; the test says when it looks, and how busy the machine is."""

    def __init__(self, settings: Settings, package: ModelPackage) -> None:
        self.settings, self.package = settings, package
        self.scheduler, self.gateways = Scheduler({}), Gateways(64)
        self.services = ComputeServices(settings, package.modalities)
        self.latencies = Latencies(settings, self.others_share)
        self.models = ModelLoader(settings, [package], self.scheduler, self.services, self.gateways, self.latencies)
        self.share = 0.5
        self.looks, self.waits = asyncio.Semaphore(0), asyncio.Event()

    async def others_share(self) -> float:
        return self.share

    async def pause(self) -> None:
        self.waits.set()
        await self.looks.acquire()

    def begin_to_look(self) -> None:
        self.waits.clear()
        self.looks.release()

    async def look(self) -> None:
        """Looks, and waits until it is over, or until it has given way."""
        self.begin_to_look()
        await asyncio.wait_for(self.waits.wait(), 60)

    def handle(self, event: Event) -> None:
        if isinstance(event, LaneUp | LaneDown):
            self.scheduler.lane(event.lane, isinstance(event, LaneUp))

    def cost_ms(self) -> float:
        """What a plan says that everything costs for one item."""
        plan = self.scheduler.plan(self.job(0), time.monotonic())
        return max(strategy.cost_ms for strategy, _ in plan.frontier)

    def job(self, number: int) -> Job:
        return Job(number.to_bytes(16, "big"), self.current, 1, BOTH, None, time.monotonic() + 600)

    def call_for_a_job(self) -> EncodeCall:
        """A job comes, and a service is called for it."""
        now = time.monotonic()
        self.scheduler.submit(self.job(1), now)
        call = self.scheduler.next(now)
        assert isinstance(call, EncodeCall)
        return call

    def forget_job(self, call: EncodeCall) -> None:
        self.scheduler.cancelled((1).to_bytes(16, "big"))
        self.scheduler.completed(call, time.monotonic())

    @property
    def current(self) -> str:
        (state,) = self.models.states().models
        return f"{state.model}@{state.revision}"

    @property
    def origin(self) -> str:
        """What the latencies are from."""
        (state,) = self.models.states().models
        return state.latencies

    async def kept(self) -> Profile:
        profile = await asyncio.to_thread(load_profile, self.package, self.settings)
        assert profile is not None
        return profile


@pytest.fixture
def package(changing: Fruit) -> ModelPackage:
    """The model, with everything read that is read in the end."""
    package = load_package(changing.folder)
    package.check_unchanged()
    return package


@pytest.fixture
async def selecting(settings: Settings, scripted: Services, package: ModelPackage) -> AsyncIterator[Selecting]:
    """One that has measured everything on a busy machine."""
    settings = settings.model_copy(update={"models_dir": package.folder.parent})
    selecting = Selecting(settings, package)
    for service in scripted.values():
        service.ms = BUSY_MS
    async with AsyncExitStack() as entered:
        services = await entered.enter_async_context(selecting.services)
        paths = await entered.enter_async_context(TensorPaths(settings, services, selecting.gateways))
        entered.push_async_callback(selecting.models.close)
        watch = HealthWatch(services, paths, selecting.models.prepare, selecting.handle)
        await entered.enter_async_context(watch)
        await until(lambda: all(service.up.is_set() for service in services), "all services are prepared")
        again = QuietMeasurement(selecting.models, selecting.latencies, services, selecting.scheduler, selecting.pause)
        await entered.enter_async_context(again)
        await asyncio.wait_for(selecting.waits.wait(), 60)
        for service in scripted.values():
            service.called.clear()
            service.ms = QUIET_MS
        yield selecting


def asked(scripted: Services) -> dict[str, int]:
    """How often each service has timed a network."""
    return {lane: service.called["Profile"] for lane, service in scripted.items()}


ONCE_EACH = {"photo": 1, "scent": 1, FUSION: 3}
NEVER = dict.fromkeys(ONCE_EACH, 0)


async def test_it_is_measured_again_once_the_machine_is_quiet(selecting: Selecting, scripted: Services) -> None:
    before, today = selecting.cost_ms(), datetime.now(UTC).date()
    busy = (
        f"quick profile of {today}, made while others used 50 % of the processors, spread 1.0; "
        "is measured again when it is quiet"
    )
    assert before >= 3 * BUSY_MS
    await selecting.look()
    assert (selecting.origin, asked(scripted)) == (busy, NEVER)
    selecting.share = 0.02
    await selecting.look()
    assert asked(scripted) == ONCE_EACH
    assert selecting.origin == f"quick profile of {today}, made while others used 2 % of the processors, spread 1.0"
    # What was planned with before is not planned with any more.
    assert selecting.cost_ms() < BUSY_MS
    kept = await selecting.kept()
    assert (kept.others_share, kept.busy, kept.encoders["photo"][0].p50_ms) == (0.02, False, QUIET_MS)
    await selecting.look()
    assert asked(scripted) == ONCE_EACH


async def test_what_was_learned_of_calls_beside_the_old_latencies_is_forgotten(selecting: Selecting) -> None:
    selecting.forget_job(selecting.call_for_a_job())
    assert selecting.scheduler.corrections(time.monotonic())
    selecting.share = 0.0
    await selecting.look()
    assert not selecting.scheduler.corrections(time.monotonic())


async def test_it_gives_way_to_jobs_and_measures_once_more_what_they_disturbed(
    selecting: Selecting, scripted: Services
) -> None:
    selecting.share, before = 0.0, selecting.origin
    scripted["scent"].hold("Profile")
    selecting.begin_to_look()
    await until(lambda: scripted["scent"].waiting["Profile"] == 1, "a network is timed")
    call = selecting.call_for_a_job()
    scripted["scent"].go_on()
    await asyncio.wait_for(selecting.waits.wait(), 60)
    await selecting.look()
    assert asked(scripted) == {"photo": 1, "scent": 1, FUSION: 0}
    assert selecting.origin == before
    selecting.forget_job(call)
    await selecting.look()
    assert asked(scripted) == {"photo": 1, "scent": 2, FUSION: 3}
    assert selecting.origin != before


async def test_a_job_that_is_over_already_has_disturbed_it_too(selecting: Selecting, scripted: Services) -> None:
    selecting.share = 0.0
    scripted[FUSION].hold("Profile")
    selecting.begin_to_look()
    await until(lambda: scripted[FUSION].waiting["Profile"] == 1, "a network is timed")
    selecting.forget_job(selecting.call_for_a_job())
    scripted[FUSION].go_on()
    await asyncio.wait_for(selecting.waits.wait(), 60)
    assert asked(scripted) == {"photo": 1, "scent": 1, FUSION: 1}
    await selecting.look()
    assert asked(scripted) == {"photo": 1, "scent": 1, FUSION: 4}


async def test_a_machine_that_gets_busy_meanwhile_is_left_alone(selecting: Selecting, scripted: Services) -> None:
    selecting.share, before = 0.0, selecting.origin
    scripted["photo"].hold("Profile")
    selecting.begin_to_look()
    await until(lambda: scripted["photo"].waiting["Profile"] == 1, "a network is timed")
    selecting.share = 0.6
    scripted["photo"].go_on()
    await asyncio.wait_for(selecting.waits.wait(), 60)
    assert asked(scripted)[FUSION] == 0
    assert selecting.origin == before


async def test_it_survives_a_service_that_goes_away_and_tries_again(selecting: Selecting, scripted: Services) -> None:
    selecting.share, before = 0.0, selecting.origin
    scripted["scent"].hold("Profile")
    selecting.begin_to_look()
    await until(lambda: scripted["scent"].waiting["Profile"] == 1, "a network is timed")
    await scripted["scent"].die()
    await asyncio.wait_for(selecting.waits.wait(), 60)
    await until(lambda: not selecting.services["scent"].up.is_set(), "the service is known to be away")
    await selecting.look()
    assert (selecting.origin, asked(scripted)[FUSION]) == (before, 0)
    async with ScriptedService(selecting.settings, "scent"):
        await until(selecting.services["scent"].up.is_set, "the service is back")
        await selecting.look()
    assert selecting.origin != before


async def test_a_load_does_not_wait_for_it(selecting: Selecting, scripted: Services, changing: Fruit) -> None:
    """It waits for the batch size that is measured, but for none after that."""
    selecting.share, old = 0.0, selecting.current
    await asyncio.to_thread(changing.edit, "networks.py", "nn.Linear(8, 3)", "nn.Linear(8, 3, True)")
    await asyncio.to_thread(measured, changing.folder)
    scripted["photo"].hold("Profile")
    selecting.begin_to_look()
    await until(lambda: scripted["photo"].waiting["Profile"] == 1, "a network is timed")
    loading = asyncio.create_task(selecting.models.load("fruit"))
    await until(lambda: len(scripted["photo"].models) == 2, "it is loaded beside it")
    scripted["photo"].go_on()
    await asyncio.wait_for(loading, 60)
    assert selecting.current != old
    await asyncio.wait_for(selecting.waits.wait(), 60)
    # Once more for the one that is measured because it is new.
    assert asked(scripted) == {"photo": 2, "scent": 1, FUSION: 3}
    await until(lambda: scripted["photo"].models == {selecting.current}, "the old networks are gone")


async def test_unloading_does_not_wait_for_it(selecting: Selecting, scripted: Services) -> None:
    selecting.share = 0.0
    scripted["photo"].hold("Profile")
    selecting.begin_to_look()
    await until(lambda: scripted["photo"].waiting["Profile"] == 1, "a network is timed")
    await asyncio.wait_for(selecting.models.unload("fruit"), 60)
    scripted["photo"].go_on()
    await asyncio.wait_for(selecting.waits.wait(), 60)
    assert asked(scripted) == {"photo": 1, "scent": 0, FUSION: 0}


async def test_it_ends_at_once(selecting: Selecting, scripted: Services) -> None:
    selecting.share = 0.0
    scripted["photo"].hold("Profile")
    services, scheduler = selecting.services, selecting.scheduler
    async with QuietMeasurement(selecting.models, selecting.latencies, services, scheduler, selecting.pause):
        selecting.begin_to_look()
        await until(lambda: scripted["photo"].waiting["Profile"] == 1, "a network is timed")
        ending = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - ending < 5


async def test_a_profile_that_was_made_through_the_services_meanwhile_is_not_replaced(
    selecting: Selecting, settings: Settings
) -> None:
    quick = await selecting.kept()
    (file,) = await asyncio.to_thread(lambda: [*settings.profiles_dir.iterdir()])
    await asyncio.to_thread(save_profile, quick.model_copy(update={"quick": False, "others_share": 0.0}), file)
    selecting.share = 0.0
    await selecting.look()
    assert "others used 0 %" in selecting.origin
    assert not (await selecting.kept()).quick
