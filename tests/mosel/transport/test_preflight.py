"""What a consumer answers to `OpenArena`."""

from pathlib import Path

import pytest

from mosel.transport import Reader, SharedMemoryArena
from mosel.transport.preflight import preflight
from mosel.v1 import arena_pb2, tensor_pb2
from tests.mosel.transport.support import AnyArena


def described(arena: AnyArena, **changes: object) -> arena_pb2.OpenArenaRequest:
    request = arena_pb2.OpenArenaRequest(arena=arena.announcement().arena)
    for name, value in changes.items():
        owner = request.arena.host if name in ("boot_id", "time_namespace") else request.arena
        setattr(owner, name, value)
    return request


def test_the_nonce_is_read_through_the_path_and_never_told(shm: Path, arena: AnyArena) -> None:
    announced = arena.announcement()
    assert announced.nonce not in announced.arena.SerializeToString()
    with Reader(shm) as reader:
        report = preflight(reader, arena_pb2.OpenArenaRequest(arena=announced.arena))
        assert (report.nonce, report.reason) == (announced.nonce, "")
        assert reader.arenas_open() == 1


def test_an_arena_is_opened_once(shm: Path, arena: AnyArena) -> None:
    with Reader(shm) as reader:
        first = preflight(reader, described(arena))
        view = reader._views[arena.arena_id, arena.epoch]
        assert preflight(reader, described(arena)) == first
        assert reader._views[arena.arena_id, arena.epoch] is view
        assert reader.arenas_open() == 1
        reader.close(arena.arena_id, arena.epoch)
        reader.close(arena.arena_id, arena.epoch)
        assert reader.arenas_open() == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"boot_id": "another"}, "another host"),
        ({"time_namespace": 1}, "time namespace"),
        ({"rung": tensor_pb2.CUDA_IPC}, "shared memory only"),
        ({"rung": tensor_pb2.INLINE}, "shared memory only"),
        ({"epoch": 1}, "not there"),
        ({"arena_id": 1}, "not there"),
    ],
)
def test_a_path_that_does_not_work_is_reported_with_its_reason(
    shm: Path, arena: SharedMemoryArena, changes: dict[str, object], reason: str
) -> None:
    with Reader(shm) as reader:
        report = preflight(reader, described(arena, **changes))
        assert report.nonce == b""
        assert reason in report.reason
        assert reader.arenas_open() == 0


def test_shared_memory_that_is_not_shared_is_noticed(tmp_path: Path, arena: SharedMemoryArena) -> None:
    """As in a container with a /dev/shm of its own."""
    with Reader(tmp_path) as reader:
        report = preflight(reader, described(arena))
    assert (report.nonce, report.reason) == (b"", "the arena is not there")


def test_a_producer_that_is_gone_is_noticed(shm: Path, arena: AnyArena) -> None:
    request = described(arena)
    arena.close()
    with Reader(shm) as reader:
        reason = "not there" if isinstance(arena, SharedMemoryArena) else "not in this process"
        assert reason in preflight(reader, request).reason
