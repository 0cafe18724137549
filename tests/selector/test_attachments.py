"""Which path each edge takes."""

from mosel.v1 import arena_pb2, tensor_pb2
from selector.attachments import Attachments, Edge

CUDA, SHM, INLINE = tensor_pb2.CUDA_IPC, tensor_pb2.POSIX_SHM, tensor_pb2.INLINE


class Consumers:
    """Open what they are told to be able to open."""

    def __init__(self) -> None:
        self.works: dict[tuple[str, int], bool] = {}
        self.opened: list[tuple[str, int]] = []
        self.nonces: dict[int, bytes] = {}

    async def open(self, consumer: str, arena: arena_pb2.ArenaDescription) -> arena_pb2.PreflightReport:
        self.opened.append((consumer, arena.arena_id))
        if not self.works.get((consumer, arena.rung), True):
            return arena_pb2.PreflightReport(reason="no GPU here")
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
    attachments = Attachments(consumers.open)
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


async def test_a_path_that_shows_another_nonce_is_not_used() -> None:
    consumers = Consumers()
    attachments = Attachments(consumers.open)
    attachments.announce("image", consumers.announcement(SHM))
    consumers.nonces[1] = b"x" * 16
    edge = await attachments.attach("image", "fusion")
    assert edge.rung == INLINE
    assert "nonce" in edge.reason
    consumers.nonces[1] = b""
    assert (await attachments.attach("image", "fusion")).rung == INLINE


async def test_a_payload_for_all_takes_the_worst_of_their_paths() -> None:
    consumers = Consumers()
    attachments = Attachments(consumers.open)
    attachments.announce("gateway-1", consumers.announcement(SHM))
    consumers.works["far", SHM] = False
    for consumer in ("near", "far"):
        await attachments.attach("gateway-1", consumer)
    assert attachments.worst("gateway-1", ["near"]).rung == SHM
    assert attachments.worst("gateway-1", ["near", "far"]) == Edge(INLINE, "posix_shm: no GPU here")
    assert attachments.worst("gateway-1", ["near", "unknown"]).rung == INLINE
    assert attachments.worst("gateway-1", []).rung == INLINE


async def test_what_is_gone_is_forgotten_on_both_ends() -> None:
    consumers = Consumers()
    attachments = Attachments(consumers.open)
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
