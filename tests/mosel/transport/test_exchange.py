"""Tensors in, refs out, and back."""

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mosel.config import TransportSettings
from mosel.errors import Overloaded, PayloadTooLarge, ReadNotProven
from mosel.tensors import DTYPES
from mosel.transport import Publisher, Reader, SharedMemoryArena, open_arenas, slice_rows
from mosel.transport.control import PROOF_MARGIN_NS
from mosel.transport.layout import KIB, MIB
from mosel.transport.shared_memory import SharedMemoryView
from mosel.v1 import arena_pb2, tensor_pb2
from tests.mosel.transport.support import ITEM, AnyArena, publish, publisher, publisher_with, tensor


@pytest.mark.parametrize("place", ["inline", "slot"])
@pytest.mark.parametrize("item", [(), (7,), ITEM])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_dtype_comes_back_bit_for_bit(
    arena: AnyArena, reader: Reader, dtype: str, item: tuple[int, ...], place: str
) -> None:
    array = tensor(dtype, 6, item)
    ref = publish(publisher(arena, place), dtype, array)
    assert ref.WhichOneof("place") == place
    back = reader.gather([slice_rows(ref, 0, 6)], dtype, item)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()
    assert reader.bytes_read == array.nbytes


def with_settings(arena: AnyArena, **limits: int) -> Publisher:
    made = publisher_with(arena, **limits)
    made.rung = arena.rung
    return made


def test_the_limit_decides_what_travels_inline(arena: AnyArena) -> None:
    made = with_settings(arena, inline_max_kib=1)
    at_limit, above = np.zeros(KIB, np.uint8), np.zeros(KIB + 1, np.uint8)
    assert publish(made, "UINT8", at_limit).WhichOneof("place") == "inline"
    assert publish(made, "UINT8", above).WhichOneof("place") == "slot"


def test_everything_travels_inline_until_a_path_is_proven(arena: AnyArena) -> None:
    made = publisher_with(arena, inline_max_kib=0)
    ref = publish(made, "UINT8", np.zeros(2 * arena.largest_slot, np.uint8))
    assert ref.WhichOneof("place") == "inline"
    made.rung = arena.rung
    assert publish(made, "UINT8", np.zeros(1, np.uint8)).WhichOneof("place") == "slot"
    assert arena.statistics().acquired_total == 1


def test_the_rung_of_one_tensor_may_differ(arena: AnyArena) -> None:
    made, data = publisher(arena, "inline"), memoryview(b"abc")
    ref = made.publish("UINT8", (3,), data, 60.0, rung=arena.rung)
    assert ref.WhichOneof("place") == "slot"
    made.rung = arena.rung
    assert made.publish("UINT8", (3,), data, 60.0, rung=tensor_pb2.INLINE).WhichOneof("place") == "inline"


def test_a_full_arena_sends_inline_what_is_small_enough_and_refuses_the_rest(arena: AnyArena) -> None:
    made = with_settings(arena, inline_max_kib=0, inline_when_full_max_kib=1)
    for _ in range(arena.layout.slot_count):
        assert publish(made, "UINT8", np.zeros(KIB, np.uint8)).WhichOneof("place") == "slot"
    ref = publish(made, "UINT8", np.ones(KIB, np.uint8))
    assert ref.inline == bytes([1]) * KIB
    with pytest.raises(Overloaded):
        publish(made, "UINT8", np.zeros(KIB + 1, np.uint8))
    assert arena.statistics().refused_total == 2


def test_a_ref_says_when_its_lease_ends(arena: AnyArena) -> None:
    before = time.monotonic_ns()
    ref = publish(publisher(arena), "UINT8", tensor("UINT8", 2), lease_s=5.0)
    assert 0 <= ref.slot.lease_expires_ns - before - 5 * 10**9 < 10**9


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(
        st.tuples(st.sampled_from(["inline", "slot"]), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
        max_size=5,
    )
)
def test_slices_of_several_tensors_are_gathered_in_order(
    arena: AnyArena, reader: Reader, parts: list[tuple[str, int, int, int]]
) -> None:
    slices, expected, refs = [], [np.empty((0, *ITEM), np.float32)], []
    for place, rows, start, count in parts:
        start, count = min(start, rows), min(count, rows - min(start, rows))
        array = np.random.default_rng(rows).random((rows, *ITEM), np.float32)
        ref = publish(publisher(arena, place if rows else "inline"), "FP32", array)
        slices.append(slice_rows(ref, start, count))
        expected.append(array[start : start + count])
        refs.append(ref)
    read_before = reader.bytes_read
    batch = reader.gather(slices, "FP32", ITEM)
    assert np.array_equal(batch, np.concatenate(expected))
    assert reader.bytes_read - read_before == batch.nbytes
    publisher(arena).release(r.slot for r in refs if r.HasField("slot"))
    assert arena.statistics().published == 0


def test_of_an_inline_tensor_only_the_rows_travel_on(arena: AnyArena) -> None:
    array = tensor("FP32", 4)
    ref = publish(publisher(arena, "inline"), "FP32", array)
    assert slice_rows(ref, 0, 4).ref == ref
    part = slice_rows(ref, 1, 2)
    assert part.ref.inline == array[1:3].tobytes()
    assert (list(part.ref.shape), part.ref.nbytes) == ([2, *ITEM], 2 * 60)
    assert (part.row_start, part.row_count) == (0, 2)


def test_of_a_shared_tensor_the_ref_travels_on(arena: AnyArena) -> None:
    ref = publish(publisher(arena), "FP32", tensor("FP32", 4))
    part = slice_rows(ref, 1, 2)
    assert part.ref == ref
    assert (part.row_start, part.row_count) == (1, 2)


def test_releasing_takes_own_slots_back_once_and_passes_over_others(arena: AnyArena) -> None:
    made = publisher(arena)
    ref = publish(made, "FP32", tensor("FP32", 4))
    for field in ("arena_id", "epoch", "slot", "generation"):
        other = tensor_pb2.ArenaSlot()
        other.CopyFrom(ref.slot)
        setattr(other, field, getattr(other, field) + 1)
        made.release([other])
    assert arena.statistics().published == 1
    made.release([ref.slot, ref.slot])
    statistics = arena.statistics()
    assert (statistics.published, statistics.released_total) == (0, 1)


def test_a_slot_that_was_used_again_is_not_read(arena: AnyArena, reader: Reader) -> None:
    made = publisher(arena)
    ref = publish(made, "FP32", tensor("FP32", 4))
    made.release([ref.slot])
    for _ in range(arena.layout.slot_count):
        publish(made, "FP32", tensor("FP32", 1))
    with pytest.raises(ReadNotProven, match="reused"):
        reader.gather([slice_rows(ref, 0, 4)], "FP32", ITEM)
    with pytest.raises(Overloaded):
        publish(made, "FP32", tensor("FP32", 1))


def test_a_slot_that_is_used_again_during_the_copy_is_noticed(
    shm: Path, arena: SharedMemoryArena, reader: Reader
) -> None:
    made = publisher(arena)
    ref = publish(made, "FP32", tensor("FP32", 4))

    class Overtaken(SharedMemoryView):
        """The producer reuses the slot while its bytes are copied."""

        def prove(self, slot: int, generation: int, lease_expires_ns: int) -> None:
            super().prove(slot, generation, lease_expires_ns)
            made.release([ref.slot])
            while publish(made, "FP32", tensor("FP32", 4)).slot.slot != slot:
                pass
            super().prove(slot, generation, lease_expires_ns)

    reader._views[arena.arena_id, arena.epoch] = Overtaken(shm, arena.arena_id, arena.epoch)
    with pytest.raises(ReadNotProven, match="reused"):
        reader.gather([slice_rows(ref, 0, 4)], "FP32", ITEM)


def test_a_tensor_larger_than_every_slot_is_refused(arena: AnyArena) -> None:
    with pytest.raises(PayloadTooLarge):
        publish(publisher(arena), "UINT8", np.zeros(arena.largest_slot + 1, np.uint8))


def test_a_read_that_ends_after_its_lease_is_not_believed(arena: AnyArena, reader: Reader) -> None:
    """Nobody has taken the slot yet: the clock alone decides."""
    margin_s = PROOF_MARGIN_NS / 1e9
    for lease_s in (0.0, margin_s / 2, margin_s):
        ref = publish(publisher(arena), "FP32", tensor("FP32", 4), lease_s)
        with pytest.raises(ReadNotProven, match="lease"):
            reader.gather([slice_rows(ref, 0, 4)], "FP32", ITEM)


def test_of_several_slices_none_is_returned_when_one_is_not_proven(arena: AnyArena, reader: Reader) -> None:
    made, array = publisher(arena), tensor("FP32", 4)
    sound, old = publish(made, "FP32", array), publish(made, "FP32", array, lease_s=0.0)
    with pytest.raises(ReadNotProven):
        reader.gather([slice_rows(sound, 0, 4), slice_rows(old, 0, 4)], "FP32", ITEM)
    assert reader.bytes_read == 0


def test_only_arenas_that_were_opened_are_read(shm: Path, arena: AnyArena) -> None:
    ref = publish(publisher(arena), "FP32", tensor("FP32", 2))
    with Reader(shm) as stranger:
        with pytest.raises(ReadNotProven, match="not open"):
            stranger.gather([slice_rows(ref, 0, 2)], "FP32", ITEM)
        stranger.open(arena.announcement().arena)
        stranger.gather([slice_rows(ref, 0, 2)], "FP32", ITEM)
        stranger.close(arena.arena_id, arena.epoch)
        with pytest.raises(ReadNotProven, match="not open"):
            stranger.gather([slice_rows(ref, 0, 2)], "FP32", ITEM)


def test_restarts_leave_no_maps(shm: Path) -> None:
    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(shm))

    with Reader(shm) as reader:
        for _ in range(3):
            with SharedMemoryArena(shm, MIB, "setting") as arena:
                reader.open(arena.announcement().arena)
                ref = publish(publisher(arena), "FP32", tensor("FP32", 2))
                reader.gather([slice_rows(ref, 0, 2)], "FP32", ITEM)
                assert (reader.arenas_open(), maps()) == (1, 2)
            reader.close(arena.arena_id, arena.epoch)
            assert (reader.arenas_open(), maps()) == (0, 0)
        with pytest.raises(ReadNotProven, match="not there"):
            reader.open(arena.announcement().arena)


def test_an_arena_that_was_closed_stays_mapped_for_a_thread_that_still_reads_it(shm: Path) -> None:
    array = tensor("UINT8", 4)
    with Reader(shm) as reader:
        with SharedMemoryArena(shm, MIB, "setting") as gone:
            reader.open(gone.announcement().arena)
            old = publish(publisher(gone), "UINT8", array)
            view = reader._views[gone.arena_id, gone.epoch]
            source = view.bytes_of(old.slot.slot, old.nbytes)
        reader.close(gone.arena_id, gone.epoch)
        assert source.tobytes() == array.tobytes()
        view.prove(old.slot.slot, old.slot.generation, old.slot.lease_expires_ns)


def test_threads_share_a_reader(shm: Path, reader: Reader) -> None:
    with (
        SharedMemoryArena(shm, MIB, "one") as one,
        SharedMemoryArena(shm, MIB, "two") as two,
        ThreadPoolExecutor(4) as threads,
    ):
        for arena in (one, two):
            reader.open(arena.announcement().arena)
        array = tensor("FP32", 100)
        parts = [slice_rows(publish(publisher(arena), "FP32", array), 10, 50) for arena in (one, two)]
        for batch in threads.map(lambda i: reader.gather([parts[i % 2]], "FP32", ITEM), range(64)):
            assert np.array_equal(batch, array[10:60])
    assert reader.bytes_read == 64 * 50 * 60


def test_an_opened_arena_follows_the_settings(shm: Path) -> None:
    (shm / f"mosel-arena-{1:016x}-{2:016x}").write_bytes(b"orphan")
    transport = TransportSettings(shm_dir=shm, inline_max_kib=1)
    with open_arenas(transport, 2, "setting") as made:
        assert made.arena
        arena = made.arena
        assert len(list(shm.iterdir())) == 1
        assert arena.layout.total_bytes <= 2 * MIB + 4 * KIB
        made.rung = tensor_pb2.POSIX_SHM
        assert publish(made, "UINT8", np.zeros(KIB, np.uint8)).WhichOneof("place") == "inline"
        assert publish(made, "UINT8", np.zeros(KIB + 1, np.uint8)).WhichOneof("place") == "slot"
    assert list(shm.iterdir()) == []


def produce(shm: str, pipe: Connection) -> None:
    """Another process: publishes two tensors, sends their refs, and takes back what it is told."""
    with SharedMemoryArena(Path(shm), MIB, "setting") as arena:
        made = with_settings(arena, inline_max_kib=1)
        pipe.send_bytes(arena.announcement().SerializeToString())
        for rows in (1, 500):
            array = np.arange(rows * 15, dtype=np.float32).reshape(rows, *ITEM)
            pipe.send_bytes(publish(made, "FP32", array).SerializeToString())
        made.release(tensor_pb2.ReleaseSlots.FromString(pipe.recv_bytes()).slots)
        pipe.send_bytes(bytes([arena.statistics().published]))


def test_tensors_go_from_one_process_to_another(shm: Path) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=produce, args=(str(shm), there))
    process.start()
    there.close()
    announced = arena_pb2.AnnouncedArena.FromString(here.recv_bytes())
    refs = [tensor_pb2.TensorRef.FromString(here.recv_bytes()) for _ in range(2)]
    assert [ref.WhichOneof("place") for ref in refs] == ["inline", "slot"]
    with Reader(shm) as reader:
        assert reader.open(announced.arena) == announced.nonce
        batch = reader.gather([slice_rows(refs[0], 0, 1), slice_rows(refs[1], 100, 400)], "FP32", ITEM)
    assert np.array_equal(batch[0].ravel(), np.arange(15))
    assert np.array_equal(batch[1:].ravel(), np.arange(100 * 15, 500 * 15))
    here.send_bytes(tensor_pb2.ReleaseSlots(slots=[refs[1].slot]).SerializeToString())
    assert here.recv_bytes() == bytes([0]), "everything was released"
    process.join(30)
    assert process.exitcode == 0
    here.close()
    assert list(shm.iterdir()) == []
