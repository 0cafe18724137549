"""Slots with leases, and what happens when there are none left."""

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mosel.errors import ConfigError, Overloaded, PayloadTooLarge
from mosel.transport import SharedMemoryArena
from mosel.transport.layout import KIB, MIB
from mosel.transport.slots import Slot
from tests.mosel.transport.support import SETTING, AnyArena, write

LONG_S = 20.0


class _NoLuckError(Exception):
    """A fill that fails."""


def fill(arena: AnyArena, lease_s: float = 60.0) -> list[Slot]:
    return [write(arena, b"x", lease_s) for _ in range(arena.layout.slot_count)]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def test_a_full_arena_is_overload_until_a_slot_is_released(arena: AnyArena) -> None:
    slots = fill(arena)
    with pytest.raises(Overloaded, match=SETTING):
        write(arena, b"x")
    assert arena.release(slots[0].index, slots[0].generation)
    assert not arena.release(slots[0].index, slots[0].generation)
    assert write(arena, b"x").index == slots[0].index
    statistics = arena.statistics()
    assert (statistics.free, statistics.filling, statistics.refused_total) == (0, 0, 1)


def test_leases_that_are_over_make_room(arena: AnyArena) -> None:
    for _ in range(3 * arena.layout.slot_count):
        write(arena, b"x", lease_s=0.0)
    assert arena.statistics().published == 0


def test_a_tensor_larger_than_every_slot_names_the_limit_and_the_setting(arena: AnyArena) -> None:
    assert arena.largest_slot == 256 * KIB
    write(arena, bytes(256 * KIB))
    with pytest.raises(PayloadTooLarge, match=f"262145 bytes is larger than the largest slot, 262144 .*{SETTING}"):
        write(arena, bytes(256 * KIB + 1), wait_s=LONG_S)


def test_a_wait_is_bounded_and_counts_as_one_refusal(arena: AnyArena) -> None:
    fill(arena)
    started = time.monotonic()
    with pytest.raises(Overloaded):
        write(arena, b"x", wait_s=0.05)
    assert 0.05 <= time.monotonic() - started < 5
    assert arena.statistics().refused_total == 1


def test_a_wait_ends_with_a_release(arena: AnyArena, threads: ThreadPoolExecutor) -> None:
    slots = fill(arena)
    waiting = threads.submit(write, arena, b"y", 60.0, LONG_S)
    time.sleep(0.05)
    assert not waiting.done()
    arena.release(slots[3].index, slots[3].generation)
    assert waiting.result(LONG_S / 2).index == slots[3].index
    assert arena.statistics().refused_total == 0, "it was served in the end"


def test_a_wait_ends_with_an_expiry(arena: AnyArena) -> None:
    fill(arena, lease_s=0.05)
    started = time.monotonic()
    write(arena, b"y", wait_s=LONG_S)
    assert time.monotonic() - started < LONG_S / 2
    assert arena.statistics().expired_total >= 1


def test_a_wait_ends_with_a_fill_that_failed(arena: AnyArena, threads: ThreadPoolExecutor) -> None:
    fill(arena)
    arena.release(0, 1)
    with contextlib.suppress(_NoLuckError), arena.filling(1, 1e18, 0.0):
        waiting = threads.submit(write, arena, b"y", 60.0, LONG_S)
        time.sleep(0.05)
        assert not waiting.done()
        raise _NoLuckError
    assert waiting.result(LONG_S / 2).index == 0


def test_a_small_tensor_does_not_wait_behind_a_large_one(arena: AnyArena, threads: ThreadPoolExecutor) -> None:
    slots = fill(arena)
    large = threads.submit(write, arena, bytes(256 * KIB), 60.0, LONG_S)
    time.sleep(0.05)
    small = threads.submit(write, arena, b"y", 60.0, LONG_S)
    time.sleep(0.05)
    arena.release(slots[0].index, slots[0].generation)
    assert small.result(LONG_S / 2).index == slots[0].index
    assert not large.done()
    arena.release(slots[-1].index, slots[-1].generation)
    assert large.result(LONG_S / 2).index == slots[-1].index


def test_a_fill_that_fails_frees_its_slot(arena: AnyArena) -> None:
    data = memoryview(bytearray(10))[::2]
    with pytest.raises((TypeError, ValueError, BufferError)):
        arena.write(data, time.monotonic() + 60)
    statistics = arena.statistics()
    assert (statistics.filling, statistics.published) == (0, 0)


def test_a_slot_being_filled_is_neither_released_nor_expired(arena: AnyArena) -> None:
    with arena.filling(1, 0.0, 0.0) as slot:
        assert not arena.release(slot.index, slot.generation)
        assert arena.statistics().filling == 1
    assert arena.statistics().free == arena.layout.slot_count, "its lease was over when it was published"


def test_threads_share_an_arena(arena: AnyArena) -> None:
    """Each slot is had by one thread at a time, and none is lost."""
    held: set[int] = set()
    lock = threading.Lock()

    def use(_: int) -> None:
        with arena.filling(1, 1e18, LONG_S) as slot:
            generation = slot.generation
            with lock:
                assert slot.index not in held
                held.add(slot.index)
            time.sleep(0.0005)
            with lock:
                held.remove(slot.index)
        assert arena.release(slot.index, generation)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(use, range(500)))
    statistics = arena.statistics()
    assert (statistics.free, statistics.acquired_total) == (arena.layout.slot_count, 500)


def test_what_cannot_be_reserved_is_a_setting_s_fault(shm: Path) -> None:
    with pytest.raises(ConfigError, match=r"transport\.shm_dir"):
        SharedMemoryArena(shm / "nowhere", MIB, SETTING)
