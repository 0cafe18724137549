"""Arenas in POSIX shared memory, seen from both sides."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mosel.errors import ReadNotProven
from mosel.transport import SharedMemoryArena
from mosel.transport.control import ControlFile
from mosel.transport.layout import KIB, Layout
from mosel.transport.shared_memory import SharedMemoryView
from mosel.v1 import tensor_pb2
from tests.mosel.transport.support import SETTING, write

FOREVER_NS = 2**63


@pytest.fixture
def view(shm: Path, arena: SharedMemoryArena) -> Iterator[SharedMemoryView]:
    view = SharedMemoryView(shm, arena.arena_id, arena.epoch)
    yield view
    view.close()


def test_a_consumer_reads_what_was_written_and_cannot_write(arena: SharedMemoryArena, view: SharedMemoryView) -> None:
    slots = [write(arena, bytes([i]) * 1000 * (i + 1)) for i in range(4)]
    for i, slot in enumerate(slots):
        data = view.bytes_of(slot.index, 1000 * (i + 1))
        view.prove(slot.index, slot.generation, FOREVER_NS)
        assert set(data.tolist()) == {i}
        assert not data.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            data[0] = 1
        del data


def test_a_closed_arena_leaves_nothing_and_its_readers_keep_their_map(
    shm: Path, arena: SharedMemoryArena, view: SharedMemoryView
) -> None:
    slot = write(arena, b"still here")
    arena.close()
    assert list(shm.iterdir()) == []
    arena.close()
    assert view.bytes_of(slot.index, 10).tobytes() == b"still here"
    with pytest.raises(ReadNotProven, match="not there"):
        SharedMemoryView(shm, arena.arena_id, arena.epoch)


def test_a_slot_is_filled_in_place(arena: SharedMemoryArena, view: SharedMemoryView) -> None:
    with arena.filling(6, 1e18, 0.0) as slot, arena.writable(slot, 6) as target:
        assert len(target) == 6
        target[:3], target[3:] = b"abc", b"def"
    assert view.bytes_of(slot.index, 6).tobytes() == b"abcdef"


def test_a_slot_that_is_used_again_is_noticed(arena: SharedMemoryArena, view: SharedMemoryView) -> None:
    slot = write(arena, b"old")
    old = slot.generation
    arena.release(slot.index, old)
    view.prove(slot.index, old, FOREVER_NS)  # released, but not yet another's
    while write(arena, b"new").index != slot.index:
        pass
    with pytest.raises(ReadNotProven, match="reused"):
        view.prove(slot.index, old, FOREVER_NS)


def test_a_slot_counts_as_another_s_before_its_first_new_byte(arena: SharedMemoryArena, view: SharedMemoryView) -> None:
    slots = [write(arena, b"old") for _ in range(arena.layout.slot_count)]
    arena.release(slots[0].index, 1)
    with arena.filling(3, 1e18, 0.0) as slot:
        assert slot.index == slots[0].index
        assert view.bytes_of(slot.index, 3).tobytes() == b"old"
        with pytest.raises(ReadNotProven, match="reused"):
            view.prove(slot.index, 1, FOREVER_NS)


@pytest.mark.parametrize(("slot", "nbytes"), [(-1, 1), (10**6, 1), (0, 64 * KIB + 1), (0, -1), (0, 2**63)])
def test_nothing_outside_a_slot_is_read(view: SharedMemoryView, slot: int, nbytes: int) -> None:
    with pytest.raises(ReadNotProven):
        view.bytes_of(slot, nbytes)


def test_what_an_older_tensor_left_behind_a_shorter_one_is_not_read(
    arena: SharedMemoryArena, view: SharedMemoryView
) -> None:
    slots = [write(arena, b"a long secret") for _ in range(arena.layout.slot_count)]
    arena.release(slots[0].index, 1)
    assert write(arena, b"short").index == slots[0].index
    assert view.bytes_of(slots[0].index, 5).tobytes() == b"short"
    with pytest.raises(ReadNotProven, match="another size"):
        view.bytes_of(slots[0].index, 13)


def test_a_control_file_without_slots_is_no_arena_in_shared_memory(shm: Path) -> None:
    file = ControlFile(shm, Layout((1, 0, 0, 0, 0, 0)), False, SETTING)
    with pytest.raises(ReadNotProven, match="not in shared memory"):
        SharedMemoryView(shm, file.arena_id, file.epoch)
    file.close()


def test_an_arena_announces_itself_without_saying_where_its_slots_are(arena: SharedMemoryArena) -> None:
    announced = arena.announcement()
    assert announced.arena.rung == tensor_pb2.POSIX_SHM
    assert (announced.arena.arena_id, announced.arena.epoch) == (arena.arena_id, arena.epoch)
    assert (announced.arena.cuda_handle, announced.arena.gpu_uuid) == (b"", "")
    assert len(announced.nonce) == 16
