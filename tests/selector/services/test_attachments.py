"""Which path each edge takes."""

import asyncio

from mosel.v1 import arena_pb2, selector_pb2, tensor_pb2
from selector.services.attachments import Attachments, Edge

CUDA, SHM, INLINE = tensor_pb2.CUDA_IPC, tensor_pb2.POSIX_SHM, tensor_pb2.INLINE
FETCH, IN_PROCESS = tensor_pb2.FETCH, tensor_pb2.IN_PROCESS


class Consumers:
    """Open what they are told to be able to open."""

    def __init__(self) -> None:
        self.works: dict[tuple[str, int], bool] = {}
        self.opened: list[tuple[str, int]] = []
        self.nonces: dict[int, bytes] = {}
        self.free = asyncio.Event()
        self.free.set()
        self.where = selector_pb2.FetchAddress()
        self.fetched_at: list[str] = []
        self.asked: list[tuple[str, str]] = []

    def attachments(self) -> Attachments:
        return Attachments(self.open, self.fetch_from)

    async def fetch_from(self, producer: str, consumer: str) -> selector_pb2.FetchAddress:
        self.asked.append((producer, consumer))
        return self.where

    async def open(self, consumer: str, arena: arena_pb2.ArenaDescription) -> arena_pb2.PreflightReport:
        self.opened.append((consumer, arena.arena_id))
        await self.free.wait()
        if not self.works.get((consumer, arena.rung), True):
            return arena_pb2.PreflightReport(reason="no GPU here")
        if arena.rung == FETCH:
            self.fetched_at.append(arena.address)
        return arena_pb2.PreflightReport(nonce=self.nonces[arena.arena_id])

    def announcement(self, *rungs: tensor_pb2.Rung.ValueType) -> arena_pb2.Announcement:
        announcement = arena_pb2.Announcement()
        for rung in rungs:
            arena_id = len(self.nonces) + 1
            self.nonces[arena_id] = bytes([arena_id]) * 16
            arena = arena_pb2.ArenaDescription(arena_id=arena_id, epoch=7, rung=rung)
            announcement.arenas.add(arena=arena, nonce=self.nonces[arena_id])
        return announcement


async def test_the_best_path_that_works_is_taken_and_what_does_not_is_explained() -> None:
    consumers = Consumers()
    attachments = consumers.attachments()
    attachments.announce("image", consumers.announcement(CUDA, SHM))
    assert attachments.rung("image", "fusion") == INLINE
    assert await attachments.attach("image", "fusion") == Edge(CUDA, "")
    consumers.works["fusion", CUDA] = False
    assert await attachments.attach("image", "fusion") == Edge(SHM, "cuda_ipc: no GPU here")
    assert attachments.rung("image", "fusion") == SHM
    consumers.works["fusion", SHM] = False
    edge = await attachments.attach("image", "fusion")
    assert edge == Edge(INLINE, "cuda_ipc: no GPU here; posix_shm: no GPU here")
    assert attachments.statistics() == {"edges.inline": 1}


async def test_of_paths_only_those_that_would_be_better_are_explained() -> None:
    consumers = Consumers()
    attachments = consumers.attachments()
    attachments.announce("image", consumers.announcement(IN_PROCESS, CUDA, SHM))
    consumers.works["fusion", CUDA] = False
    assert await attachments.attach("image", "fusion") == Edge(IN_PROCESS, "")
    consumers.works["fusion", IN_PROCESS] = False
    why = "in_process: no GPU here; cuda_ipc: no GPU here"
    assert await attachments.attach("image", "fusion") == Edge(SHM, why)
    assert attachments.statistics() == {"edges.posix_shm": 1}


async def test_a_path_that_shows_another_nonce_is_not_used() -> None:
    consumers = Consumers()
    attachments = consumers.attachments()
    attachments.announce("image", consumers.announcement(SHM))
    consumers.nonces[1] = b"x" * 16
    edge = await attachments.attach("image", "fusion")
    assert edge.rung == INLINE
    assert "nonce" in edge.reason
    consumers.nonces[1] = b""
    assert (await attachments.attach("image", "fusion")).rung == INLINE


async def test_a_payload_for_all_takes_the_worst_of_their_paths() -> None:
    consumers = Consumers()
    attachments = consumers.attachments()
    attachments.announce("gateway-1", consumers.announcement(SHM))
    consumers.works["far", SHM] = False
    for consumer in ("near", "far"):
        await attachments.attach("gateway-1", consumer)
    assert attachments.worst("gateway-1", ["near"]).rung == SHM
    assert attachments.worst("gateway-1", ["near", "far"]) == Edge(INLINE, "posix_shm: no GPU here")
    assert attachments.worst("gateway-1", ["near", "unknown"]).rung == INLINE
    assert attachments.worst("gateway-1", []).rung == INLINE


async def test_what_cannot_be_mapped_is_fetched_from_where_its_producer_says() -> None:
    consumers = Consumers()
    attachments = consumers.attachments()
    attachments.announce("image", consumers.announcement(CUDA, SHM))
    assert (await attachments.attach("image", "fusion")).rung == CUDA
    assert consumers.asked == []
    consumers.works = {("fusion", CUDA): False, ("fusion", SHM): False}
    why = "cuda_ipc: no GPU here; posix_shm: no GPU here"
    assert await attachments.attach("image", "fusion") == Edge(INLINE, why)
    consumers.where.reason = "no way there"
    assert await attachments.attach("image", "fusion") == Edge(INLINE, f"{why}; fetch: no way there")
    consumers.where = selector_pb2.FetchAddress(address="10.0.0.1:7")
    assert await attachments.attach("image", "fusion") == Edge(FETCH, why)
    assert (consumers.asked[-1], consumers.fetched_at) == (("image", "fusion"), ["10.0.0.1:7"])
    assert attachments.statistics() == {"edges.fetch": 1}
    consumers.works["fusion", FETCH] = False
    assert await attachments.attach("image", "fusion") == Edge(INLINE, f"{why}; fetch: no GPU here")


async def test_a_producer_that_went_while_it_was_asked_has_no_edge() -> None:
    consumers = Consumers()
    attachments = consumers.attachments()
    attachments.announce("gateway-1", consumers.announcement(SHM))
    consumers.free.clear()
    attachment = asyncio.create_task(attachments.attach("gateway-1", "image"))
    await asyncio.sleep(0)
    attachments.forget("gateway-1")
    consumers.free.set()
    await attachment
    assert attachments.statuses() == []


async def test_what_is_gone_is_forgotten_on_both_ends() -> None:
    consumers = Consumers()
    attachments = consumers.attachments()
    attachments.announce("gateway-1", consumers.announcement(SHM))
    attachments.announce("image", consumers.announcement(SHM))
    await attachments.attach("gateway-1", "image")
    await attachments.attach("image", "fusion")
    assert [(s.producer, s.consumer) for s in attachments.statuses()] == [("gateway-1", "image"), ("image", "fusion")]
    assert [(consumer, arena.arena_id) for consumer, arena in attachments.forget("image")] == [("fusion", 2)]
    assert attachments.statuses() == []
    # A restart is a new epoch, announced and opened again.
    attachments.announce("image", consumers.announcement(SHM))
    assert (await attachments.attach("image", "fusion")).rung == SHM
    assert consumers.opened[-1] == ("fusion", 3)
