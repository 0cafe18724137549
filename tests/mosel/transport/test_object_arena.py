"""Where both sides share a process: nothing is copied, nothing is in shared memory, and nothing is kept too long."""

import contextlib
import gc
import multiprocessing
import time
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path

import numpy as np
import pytest

from mosel.config import TransportSettings
from mosel.errors import ReadNotProven
from mosel.transport import ArenaKinds, Reader, open_arenas, slice_rows
from mosel.transport.layout import MIB
from mosel.transport.object_arena import ObjectArena, ObjectView
from mosel.transport.preflight import preflight
from mosel.v1 import arena_pb2, tensor_pb2
from tests.mosel.transport.support import ITEM, SETTING, publish, publisher, tensor

HERE = ArenaKinds(in_process=True, shared=False)
BOTH = ArenaKinds(in_process=True, shared=True)
NOWHERE = Path("/nowhere")


class _NoLuckError(Exception):
    """A fill that fails."""


def gathered(reader: Reader, ref: tensor_pb2.TensorRef, start: int, count: int) -> np.ndarray:
    return reader.gather([slice_rows(ref, start, count)], "FP32", ITEM)


def opened(arena: ObjectArena, reader: Reader) -> Reader:
    announced = arena.announcement()
    assert reader.open(announced.arena) == announced.nonce
    return reader


def test_the_rows_of_one_tensor_are_the_caller_s_own_bytes_and_read_only() -> None:
    array = tensor("FP32", 6)
    with ObjectArena(MIB, SETTING) as arena, Reader(NOWHERE) as reader:
        opened(arena, reader)
        ref = publisher(arena).publish("FP32", array.shape, array.data.cast("B"), 60.0)
        rows = gathered(reader, ref, 2, 3)
        assert np.shares_memory(rows, array)
        assert np.array_equal(rows, array[2:5])
        with pytest.raises(ValueError, match="read-only"):
            rows[0] = 1
        both = reader.gather([slice_rows(ref, 0, 2), slice_rows(ref, 4, 2)], "FP32", ITEM)
        assert not np.shares_memory(both, array)
        assert np.array_equal(both, array[[0, 1, 4, 5]])
        assert reader.bytes_read == (3 + 4) * 60


def test_bytes_that_lie_anywhere_are_aligned_for_whoever_computes() -> None:
    array = tensor("FP64", 6)
    body = memoryview(b"x" + array.tobytes())[1:]
    with ObjectArena(MIB, SETTING) as arena, Reader(NOWHERE) as reader:
        opened(arena, reader)
        ref = publisher(arena).publish("FP64", array.shape, body, 60.0)
        rows = reader.gather([slice_rows(ref, 1, 2)], "FP64", ITEM)
    assert rows.flags.aligned
    assert np.array_equal(rows, array[1:3])


def test_rows_that_were_read_outlive_their_slot_and_their_arena() -> None:
    array = tensor("FP32", 6)
    with Reader(NOWHERE) as reader:
        with ObjectArena(MIB, SETTING) as arena:
            made, _ = publisher(arena), opened(arena, reader)
            ref = publish(made, "FP32", array)
            rows = gathered(reader, ref, 0, 6)
            made.release([ref.slot])
            with pytest.raises(ReadNotProven):
                gathered(reader, ref, 0, 6)
        assert np.array_equal(rows, array)


@pytest.mark.parametrize("ends", ["release", "expiry", "close", "another fill"])
def test_an_object_is_dropped_with_its_slot(ends: str) -> None:
    with ObjectArena(MIB, SETTING) as arena:
        array = np.zeros(1000, np.uint8)
        dropped = weakref.ref(array)
        slot = arena.keep(array, time.monotonic() + (60 if ends != "expiry" else 0))
        del array
        gc.disable()
        try:
            assert ends == "another fill" or dropped() is not None
            if ends == "release":
                assert arena.release(slot.index, slot.generation)
            elif ends == "expiry":
                arena.statistics()
            elif ends == "close":
                arena.close()
            else:
                assert arena.release(slot.index, slot.generation)
                while arena.keep(np.zeros(1000, np.uint8), time.monotonic() + 60).index != slot.index:
                    pass
            assert dropped() is None
        finally:
            gc.enable()


def test_a_fill_that_fails_keeps_no_object() -> None:
    with ObjectArena(MIB, SETTING) as arena:
        array = np.zeros(1000, np.uint8)
        dropped = weakref.ref(array)
        with contextlib.suppress(_NoLuckError), arena.filling(array.nbytes, time.monotonic() + 60, 0.0) as slot:
            slot.content = array
            raise _NoLuckError
        del array
        assert dropped() is None


def test_a_closed_arena_is_neither_opened_nor_read() -> None:
    with Reader(NOWHERE) as reader:
        with ObjectArena(MIB, SETTING) as arena:
            ref = publish(publisher(arena), "FP32", tensor("FP32", 2))
            opened(arena, reader)
        with pytest.raises(ReadNotProven):
            gathered(reader, ref, 0, 2)
        with pytest.raises(ReadNotProven, match="not in this process"):
            ObjectView(arena.arena_id, arena.epoch)
        with ObjectArena(MIB, SETTING) as another:
            opened(another, reader)
            assert reader.arenas_open() == 1, "the one that is gone was forgotten"


def test_an_arena_that_nobody_has_any_more_is_gone() -> None:
    arena = ObjectArena(MIB, SETTING)
    name = arena.arena_id, arena.epoch
    assert ObjectView(*name).nonce == arena.nonce
    del arena
    gc.collect()
    with pytest.raises(ReadNotProven, match="not in this process"):
        ObjectView(*name)


def opens(shm: str, pipe: Connection) -> None:
    """A consumer in another process: says what each arena that it is told of answers."""
    with Reader(Path(shm)) as reader:
        while request := pipe.recv_bytes():
            pipe.send_bytes(preflight(reader, arena_pb2.OpenArenaRequest.FromString(request)).SerializeToString())


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_consumer_in_another_process_takes_the_next_arena(shm: Path, method: str) -> None:
    context: SpawnContext | ForkContext = multiprocessing.get_context(method)  # type: ignore[assignment]
    here, there = context.Pipe()
    with open_arenas(TransportSettings(shm_dir=shm), 1, SETTING, BOTH) as made:
        announced = made.announcement().arenas
        assert [a.arena.rung for a in announced] == [tensor_pb2.IN_PROCESS, tensor_pb2.POSIX_SHM]
        process = context.Process(target=opens, args=(str(shm), there))
        process.start()
        there.close()
        reports = []
        for path in announced:
            here.send_bytes(arena_pb2.OpenArenaRequest(arena=path.arena).SerializeToString())
            reports.append(arena_pb2.PreflightReport.FromString(here.recv_bytes()))
        here.send_bytes(b"")
        process.join(30)
        assert process.exitcode == 0
        here.close()
    assert (reports[0].nonce, reports[0].reason) == (b"", "the arena is not in this process")
    assert reports[1].nonce == announced[1].nonce


def test_where_nothing_leaves_the_process_there_is_no_shared_memory(shm: Path) -> None:
    (shm / "mosel-arena-of-somebody").touch()
    transport = TransportSettings(shm_dir=shm, inline_max_kib=0)
    with open_arenas(transport, 1, SETTING, HERE) as made, Reader(NOWHERE) as reader:
        assert made.objects
        assert made.arena is None
        opened(made.objects, reader)
        assert made.largest_slot == made.objects.largest_slot
        made.rung = tensor_pb2.IN_PROCESS
        ref = publish(made, "FP32", tensor("FP32", 5))
        assert np.array_equal(gathered(reader, ref, 0, 5), tensor("FP32", 5))
        # Whoever cannot be reached so gets the bytes.
        made.rung = tensor_pb2.POSIX_SHM
        assert publish(made, "FP32", tensor("FP32", 5)).HasField("inline")
        assert made.statistics()["tensors.in_process"] == made.statistics()["tensors.inline"] == 1
        assert [file.name for file in shm.iterdir()] == ["mosel-arena-of-somebody"]


@pytest.mark.parametrize(
    ("rung", "prefix"), [(tensor_pb2.IN_PROCESS, "object_"), (tensor_pb2.POSIX_SHM, ""), (tensor_pb2.FETCH, "")]
)
def test_the_rung_decides_which_arena_keeps_a_tensor(shm: Path, rung: tensor_pb2.Rung.ValueType, prefix: str) -> None:
    transport = TransportSettings(shm_dir=shm, inline_max_kib=0)
    with open_arenas(transport, 1, SETTING, BOTH) as made:
        made.rung = rung
        assert made.copies == (prefix == "")
        assert made.has_room(1)
        ref = publish(made, "FP32", tensor("FP32", 5))
        other = "" if prefix else "object_"
        statistics = made.statistics()
        assert (statistics[f"{prefix}slots_published"], statistics[f"{other}slots_published"]) == (1, 0)
        made.release([ref.slot, ref.slot])
        assert made.statistics()[f"{prefix}slots_released_total"] == 1


def test_a_producer_needs_consumers_somewhere() -> None:
    with pytest.raises(ValueError, match="in_process and shared are both false"):
        ArenaKinds(in_process=False, shared=False)


@pytest.mark.parametrize("slot", [-1, 10**6, 0])
def test_what_a_slot_does_not_hold_is_not_read(slot: int) -> None:
    with ObjectArena(MIB, SETTING) as arena:
        view = ObjectView(arena.arena_id, arena.epoch)
        kept = arena.keep(np.zeros(1000, np.uint8), time.monotonic() + 60)
        changes: list[Callable[[], object]] = [
            lambda: view.bytes_of(slot if slot else kept.index, 1001),
            lambda: view.bytes_of(slot if slot else kept.index + 1, 1000),
        ]
        for wrong in changes:
            with pytest.raises(ReadNotProven, match="holds no such tensor"):
                wrong()
