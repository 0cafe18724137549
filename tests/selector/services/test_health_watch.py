"""Services that come, go, hang and answer late, as the dispatcher is told of them."""

from collections.abc import AsyncIterator, Sequence

import pytest

from mosel.config import Settings
from mosel.modality import FUSION
from mosel.v1 import arena_pb2, tensor_pb2
from selector.events import Event, LaneDown, LaneRemoved, LaneUp
from selector.gateway_session import Gateways, GatewaySession
from selector.services import health_watch, tensor_paths
from selector.services.compute_services import ComputeServices
from selector.services.health_watch import HealthWatch
from selector.services.tensor_paths import TensorPaths
from tests.selector.conftest import Services
from tests.selector.scripted import ScriptedService, until

ARENA = arena_pb2.AnnouncedArena(
    arena=arena_pb2.ArenaDescription(arena_id=1, epoch=1, rung=tensor_pb2.POSIX_SHM), nonce=b"n" * 16
)


class Watched:
    """What a dispatcher would have been told."""

    def __init__(self, settings: Settings) -> None:
        self.services = ComputeServices(settings, {"photo", "scent"})
        self.gateways = Gateways(100)
        self.paths = TensorPaths(settings, self.services, self.gateways)
        self.watch = HealthWatch(self.services, self.paths, self.prepare, self.handle)
        self.up: dict[str, str] = {}
        self.removed: list[str] = []
        self.errors: list[Exception] = []

    async def prepare(self, lane: str, has: Sequence[str]) -> None:
        if self.errors:
            raise self.errors.pop()

    def handle(self, event: Event) -> None:
        match event:
            case LaneUp(lane, resource):
                self.up[lane] = resource
            case LaneDown(lane):
                del self.up[lane]
            case LaneRemoved(lane):
                self.removed.append(lane)


@pytest.fixture
async def watched(settings: Settings) -> AsyncIterator[Watched]:
    watched = Watched(settings)
    async with watched.services, watched.paths, watched.watch:
        yield watched


def rung_told(gateway: GatewaySession) -> int | None:
    return gateway.transport.rung if gateway.transport else None


async def all_up(watched: Watched) -> None:
    await until(lambda: watched.up.keys() == {"photo", "scent", FUSION}, "all are up")


async def test_a_service_is_used_once_it_has_said_what_it_computes_on(scripted: Services, watched: Watched) -> None:
    photo = scripted["photo"]
    photo.hold("Status")
    photo.resource = "GPU-1"
    await until(lambda: photo.called["Status"] == 2, "it was asked again")
    assert watched.up == {}
    assert watched.services.resources.keys() <= {"scent", FUSION}
    photo.go_on()
    await all_up(watched)
    assert watched.up == {"photo": "GPU-1", "scent": "cpu", FUSION: "cpu"}


async def test_a_consumer_that_hangs_holds_up_no_other_and_is_away_until_it_answers(
    scripted: Services, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    await all_up(watched)
    monkeypatch.setattr(tensor_paths, "_ATTACH_TIMEOUT_S", 1.0)
    photo, scent = scripted["photo"], scripted["scent"]
    photo.arenas[1] = scent.arenas[1] = ARENA.nonce
    photo.hold()
    gateway = watched.gateways.open()
    watched.paths.gateway_came(gateway, arena_pb2.Announcement(arenas=[ARENA]))
    await until(lambda: watched.paths.attachments.is_attached(gateway.name, "scent"), "scent is attached")
    assert photo.waiting["OpenArena"] == 1
    assert rung_told(gateway) is None
    await until(lambda: "photo" not in watched.up, "the one that hangs is away")
    await until(lambda: rung_told(gateway) == tensor_pb2.POSIX_SHM, "the gateway is told how it goes on without")
    assert watched.up.keys() == {"scent", FUSION}
    photo.go_on()
    await all_up(watched)
    assert watched.paths.attachments.rung(gateway.name, "photo") == tensor_pb2.POSIX_SHM


async def test_an_encoder_comes_up_although_fusion_hangs(
    settings: Settings, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_paths, "_ATTACH_TIMEOUT_S", 1.0)
    monkeypatch.setattr(health_watch, "_ALL_THERE_S", 0.01)
    scent, fusion = ScriptedService(settings, "scent"), ScriptedService(settings, FUSION)
    scent.announcement = arena_pb2.Announcement(arenas=[ARENA])
    async with fusion:
        await until(lambda: FUSION in watched.up, "fusion is there")
        fusion.hold()
        async with scent:
            await until(lambda: watched.up.keys() == {"scent"}, "the encoder is up, and fusion away")
            fusion.arenas[1] = ARENA.nonce
            fusion.go_on()
            await until(lambda: watched.up.keys() == {"scent", FUSION}, "fusion is back")
            assert watched.paths.attachments.rung("scent", FUSION) == tensor_pb2.POSIX_SHM


async def test_an_error_that_nobody_expected_does_not_end_the_watch(scripted: Services, watched: Watched) -> None:
    watched.errors.append(ValueError("a bug"))
    await all_up(watched)
    assert watched.errors == []


async def test_a_service_that_is_needed_no_more_is_forgotten_while_it_is_still_prepared(
    scripted: Services, watched: Watched
) -> None:
    scripted["photo"].hold("Status")
    await until(lambda: scripted["photo"].called["Status"] == 1, "it is asked")
    watched.services.remove("photo")
    await until(lambda: watched.removed == ["photo"], "it is removed")
    assert watched.services.get("photo") is None
    assert watched.services.add("photo")
    scripted["photo"].go_on()
    await all_up(watched)


async def test_releases_are_repeated_until_the_encoder_answers(scripted: Services, watched: Watched) -> None:
    await all_up(watched)
    photo = scripted["photo"]
    photo.failing.add("Release")
    watched.services.release("photo", [tensor_pb2.ArenaSlot(slot=1)])
    await until(lambda: photo.called["Release"] == 1, "it failed once")
    watched.services.release("photo", [tensor_pb2.ArenaSlot(slot=2)])
    assert watched.services.statistics()["released_slots_waiting"] > 0
    photo.failing.clear()
    await until(lambda: photo.released == [1, 2], "both are released")
    assert watched.services.statistics() == {"released_slots_waiting": 0}
