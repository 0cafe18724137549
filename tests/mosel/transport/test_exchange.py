"""Tensors in, refs out, and back."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mosel.config import TransportSettings
from mosel.errors import InvalidRequest, MoselError, Overloaded, PayloadTooLarge, ReadNotProven
from mosel.tensors import DTYPES
from mosel.transport import Arena, Publisher, Reader, open_arena, slice_rows
from mosel.transport.layout import KIB, MIB
from mosel.transport.shared_memory import ArenaView
from mosel.v1 import tensor_pb2

ITEM = (3, 5)
INLINE_MAX = 64


@pytest.fixture
def arena(shm: Path) -> Iterator[Arena]:
    with Arena(shm, MIB, "setting") as arena:
        yield arena


@pytest.fixture
def reader(shm: Path) -> Iterator[Reader]:
    with Reader(shm) as reader:
        yield reader


def tensor(dtype: str, rows: int, item: tuple[int, ...] = ITEM) -> NDArray[np.generic]:
    noise = np.random.default_rng(rows).integers(0, 2 if dtype == "BOOL" else 100, (rows, *item))
    return noise.astype(DTYPES[dtype])


def publish(publisher: Publisher, dtype: str, array: NDArray[np.generic]) -> tensor_pb2.TensorRef:
    return publisher.publish(dtype, array.shape, memoryview(array.tobytes()), 60.0)


@pytest.mark.parametrize("place", ["inline", "shared_memory"])
@pytest.mark.parametrize("item", [(), (7,), ITEM])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_dtype_comes_back_bit_for_bit(
    arena: Arena, reader: Reader, dtype: str, item: tuple[int, ...], place: str
) -> None:
    array = tensor(dtype, 6, item)
    ref = publish(Publisher(arena, MIB if place == "inline" else 0), dtype, array)
    assert ref.WhichOneof("place") == place
    back = reader.gather([slice_rows(ref, 0, 6)], dtype, item)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()
    assert reader.bytes_read == array.nbytes


def test_the_limit_decides_what_travels_inline(arena: Arena) -> None:
    publisher = Publisher(arena, INLINE_MAX)
    at_limit, above = np.zeros(INLINE_MAX, np.uint8), np.zeros(INLINE_MAX + 1, np.uint8)
    assert publish(publisher, "UINT8", at_limit).WhichOneof("place") == "inline"
    assert publish(publisher, "UINT8", above).WhichOneof("place") == "shared_memory"


def test_rows_that_do_not_lie_in_order_in_memory_are_published_in_order(arena: Arena, reader: Reader) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)[::-1, ::2]
    ref = Publisher(arena, 0).publish_array(array, 60.0)
    assert np.array_equal(reader.gather([slice_rows(ref, 0, 4)], "FP32", (3,)), array)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(
        st.tuples(st.sampled_from([0, MIB]), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), max_size=5
    )
)
def test_slices_of_several_tensors_are_gathered_in_order(
    arena: Arena, reader: Reader, parts: list[tuple[int, int, int, int]]
) -> None:
    slices, expected, refs = [], [np.empty((0, *ITEM), np.float32)], []
    for inline_max, rows, start, count in parts:
        start, count = min(start, rows), min(count, rows - min(start, rows))
        array = np.random.default_rng(rows).random((rows, *ITEM), np.float32)
        ref = publish(Publisher(arena, inline_max), "FP32", array)
        slices.append(slice_rows(ref, start, count))
        expected.append(array[start : start + count])
        refs.append(ref)
    read_before = reader.bytes_read
    batch = reader.gather(slices, "FP32", ITEM)
    assert np.array_equal(batch, np.concatenate(expected))
    assert reader.bytes_read - read_before == batch.nbytes
    Publisher(arena, 0).release(r.shared_memory for r in refs if r.HasField("shared_memory"))
    assert arena.statistics().published == 0


def test_of_an_inline_tensor_only_the_rows_travel_on(arena: Arena) -> None:
    array = tensor("FP32", 4)
    ref = publish(Publisher(arena, MIB), "FP32", array)
    assert slice_rows(ref, 0, 4).ref == ref
    part = slice_rows(ref, 1, 2)
    assert part.ref.inline == array[1:3].tobytes()
    assert (list(part.ref.shape), part.ref.nbytes) == ([2, *ITEM], 2 * 60)
    assert (part.row_start, part.row_count) == (0, 2)


def test_of_a_shared_tensor_the_ref_travels_on(arena: Arena) -> None:
    ref = publish(Publisher(arena, 0), "FP32", tensor("FP32", 4))
    part = slice_rows(ref, 1, 2)
    assert part.ref == ref
    assert (part.row_start, part.row_count) == (1, 2)


def test_releasing_takes_own_slots_back_once_and_passes_over_others(arena: Arena) -> None:
    publisher = Publisher(arena, 0)
    ref = publish(publisher, "FP32", tensor("FP32", 4))
    for field in ("arena_id", "epoch", "slot", "generation"):
        other = tensor_pb2.SharedMemorySlot()
        other.CopyFrom(ref.shared_memory)
        setattr(other, field, getattr(other, field) + 1)
        publisher.release([other])
    assert arena.statistics().published == 1
    publisher.release([ref.shared_memory, ref.shared_memory])
    statistics = arena.statistics()
    assert (statistics.published, statistics.released_total) == (0, 1)


def test_a_slot_that_was_used_again_is_not_read(arena: Arena, reader: Reader) -> None:
    publisher = Publisher(arena, 0)
    ref = publish(publisher, "FP32", tensor("FP32", 4))
    publisher.release([ref.shared_memory])
    for _ in range(arena.layout.slot_count):
        publish(publisher, "FP32", tensor("FP32", 1))
    with pytest.raises(ReadNotProven, match="reused"):
        reader.gather([slice_rows(ref, 0, 4)], "FP32", ITEM)
    with pytest.raises(Overloaded):
        publish(publisher, "FP32", tensor("FP32", 1))


def test_a_slot_that_is_used_again_during_the_copy_is_noticed(shm: Path, arena: Arena, reader: Reader) -> None:
    publisher = Publisher(arena, 0)
    ref = publish(publisher, "FP32", tensor("FP32", 4))

    class Overtaken(ArenaView):
        """The producer reuses the slot right after the first check."""

        def prove(self, slot: int, generation: int) -> None:
            super().prove(slot, generation)
            publisher.release([ref.shared_memory])
            while publish(publisher, "FP32", tensor("FP32", 1)).shared_memory.slot != slot:
                pass

    reader._views[arena.arena_id, arena.epoch] = Overtaken(shm, arena.arena_id, arena.epoch)
    with pytest.raises(ReadNotProven, match="reused"):
        reader.gather([slice_rows(ref, 0, 4)], "FP32", ITEM)


def test_a_tensor_larger_than_every_slot_is_refused(arena: Arena) -> None:
    with pytest.raises(PayloadTooLarge):
        publish(Publisher(arena, 0), "UINT8", np.zeros(arena.largest_slot + 1, np.uint8))


def test_readers_drop_arenas_that_are_gone(shm: Path, reader: Reader) -> None:
    for _ in range(3):
        with Arena(shm, MIB, "setting") as arena:
            ref = publish(Publisher(arena, 0), "FP32", tensor("FP32", 2))
            reader.gather([slice_rows(ref, 0, 2)], "FP32", ITEM)
            assert len(reader._views) == 1
    with Reader(shm) as late, pytest.raises(ReadNotProven, match="not there"):
        late.gather([slice_rows(ref, 0, 2)], "FP32", ITEM)


def test_an_arena_that_is_gone_stays_mapped_for_a_thread_that_still_reads_it(shm: Path, reader: Reader) -> None:
    array = tensor("UINT8", 4)
    with Arena(shm, MIB, "setting") as gone:
        old = publish(Publisher(gone, 0), "UINT8", array)
        view = reader._view(gone.arena_id, gone.epoch)
        source = view.bytes_of(old.shared_memory.slot, old.nbytes)
    with Arena(shm, MIB, "setting") as arena:
        reader.gather([slice_rows(publish(Publisher(arena, 0), "UINT8", array), 0, 4)], "UINT8", ITEM)
    assert len(reader._views) == 1
    assert source.tobytes() == array.tobytes()
    view.prove(old.shared_memory.slot, old.shared_memory.generation)


def test_threads_share_a_reader(shm: Path, reader: Reader) -> None:
    with Arena(shm, MIB, "one") as one, Arena(shm, MIB, "two") as two, ThreadPoolExecutor(4) as threads:
        array = tensor("FP32", 100)
        parts = [slice_rows(publish(Publisher(arena, 0), "FP32", array), 10, 50) for arena in (one, two)]
        for batch in threads.map(lambda i: reader.gather([parts[i % 2]], "FP32", ITEM), range(64)):
            assert np.array_equal(batch, array[10:60])
    assert reader.bytes_read == 64 * 50 * 60


def test_an_opened_arena_follows_the_settings(shm: Path) -> None:
    (shm / f"mosel-arena-{1:016x}-{2:016x}").write_bytes(b"orphan")
    transport = TransportSettings(shm_dir=shm, inline_max_kib=1)
    with open_arena(transport, 2, "setting") as (arena, publisher):
        assert len(list(shm.iterdir())) == 1
        assert arena.layout.total_bytes <= 2 * MIB + 4 * KIB
        assert publish(publisher, "UINT8", np.zeros(KIB, np.uint8)).WhichOneof("place") == "inline"
    assert list(shm.iterdir()) == []


Change = Callable[[tensor_pb2.RowSlice], None]


def field(path: str, value: int | bytes) -> Change:
    """Sets one field of a slice."""

    def change(part: tensor_pb2.RowSlice) -> None:
        *parents, name = path.split(".")
        message = part
        for parent in parents:
            message = getattr(message, parent)
        setattr(message, name, value)

    return change


def shape(*dimensions: int) -> Change:
    return lambda part: part.ref.shape.__setitem__(slice(None), dimensions)


def no_place(part: tensor_pb2.RowSlice) -> None:
    part.ref.ClearField("inline")
    part.ref.ClearField("shared_memory")


def huge(part: tensor_pb2.RowSlice) -> None:
    shape(2**31, *ITEM)(part)
    part.ref.nbytes = 2**31 * 60
    part.row_count = 2**31


MALFORMED = {
    "dtype unknown": (field("ref.dtype", 77), "dtype 77 is unknown"),
    "dtype unspecified": (field("ref.dtype", 0), "dtype 0 is unknown"),
    "another dtype": (field("ref.dtype", tensor_pb2.INT32), "expected FP32"),
    "no shape": (shape(), r"expected FP32 \[rows, 3, 5\]"),
    "another item shape": (shape(4, 5, 3), r"expected FP32 \[rows, 3, 5\]"),
    "another rank": (shape(4, 15), r"expected FP32 \[rows, 3, 5\]"),
    "rank 9": (shape(*[1] * 9), "rank 9"),
    "negative rows": (shape(-4, 3, 5), "at least 0"),
    "more rows than bytes": (shape(5, 3, 5), "ref.nbytes is 240"),
    "product overflows": (shape(2**62, 3, 5), "larger than any memory"),
    "nbytes": (field("ref.nbytes", 241), "ref.nbytes is 241"),
    "no place": (no_place, "no place"),
    "rows beyond the end": (field("row_start", 3), "rows 3"),
    "count beyond the end": (field("row_count", 2**32 - 1), "of a tensor with 4 rows"),
}
INLINE_ONLY = {
    "fewer inline bytes": (field("ref.inline", bytes(239)), "ref.inline has 239 bytes"),
    "no inline bytes": (field("ref.inline", b""), "ref.inline has 0 bytes"),
    "larger than memory": (huge, "ref.inline has 240 bytes"),
}
SHARED_ONLY = {
    "larger than memory": (huge, "the largest slot has"),
}


@pytest.mark.parametrize(
    ("inline_max", "change", "message"),
    [pytest.param(0, *case, id=f"shared: {name}") for name, case in (MALFORMED | SHARED_ONLY).items()]
    + [pytest.param(MIB, *case, id=f"inline: {name}") for name, case in (MALFORMED | INLINE_ONLY).items()],
)
def test_a_malformed_slice_is_refused_by_name(
    arena: Arena, reader: Reader, inline_max: int, change: Change, message: str
) -> None:
    part = slice_rows(publish(Publisher(arena, inline_max), "FP32", tensor("FP32", 4)), 0, 4)
    change(part)
    with pytest.raises(InvalidRequest, match=message):
        reader.gather([part], "FP32", ITEM)
    assert reader.bytes_read == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("arena_id", 1), ("epoch", 1), ("slot", 10**6), ("slot", 2**32 - 1), ("generation", 0), ("generation", 2)],
)
def test_a_ref_to_what_was_not_published_is_not_proven(arena: Arena, reader: Reader, name: str, value: int) -> None:
    ref = publish(Publisher(arena, 0), "FP32", tensor("FP32", 4))
    setattr(ref.shared_memory, name, value)
    with pytest.raises(ReadNotProven):
        reader.gather([slice_rows(ref, 0, 4)], "FP32", ITEM)


numbers = st.sampled_from([0, 1, 2, 4, 5, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1)
large = st.sampled_from([0, 1, 2**63 - 1, 2**64 - 1]) | st.integers(0, 2**64 - 1)
dimensions = st.sampled_from([-(2**63), -1, 0, 1, 3, 4, 5, 2**40, 2**59, 2**63 - 1])
CHANGES = st.one_of(
    st.builds(field, st.sampled_from(["row_start", "row_count", "ref.shared_memory.slot"]), numbers),
    st.builds(
        field,
        st.sampled_from([f"ref.{n}" for n in ("nbytes", *(f"shared_memory.{f}" for f in ("epoch", "generation")))]),
        large,
    ),
    st.builds(field, st.just("ref.dtype"), st.integers(-1, 20)),
    st.builds(field, st.just("ref.inline"), st.binary(max_size=300)),
    st.lists(dimensions, max_size=10).map(lambda values: shape(*values)),
    st.tuples(dimensions).map(lambda values: shape(*values, *ITEM)),
    st.just(huge),
    st.just(no_place),
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(inline_max=st.sampled_from([0, MIB]), changes=st.lists(CHANGES, min_size=1, max_size=3))
def test_whatever_a_peer_sends_the_reader_answers_with_bytes_or_one_of_its_errors(
    arena: Arena, reader: Reader, inline_max: int, changes: list[Change]
) -> None:
    array = tensor("FP32", 4)
    ref = publish(Publisher(arena, inline_max), "FP32", array)
    part = slice_rows(ref, 0, 4)
    part = tensor_pb2.RowSlice.FromString(part.SerializeToString())
    for change in changes:
        change(part)
    try:
        batch = reader.gather([part], "FP32", ITEM)
    except MoselError as error:
        assert type(error) in (InvalidRequest, ReadNotProven)  # noqa: PT017
    else:
        assert batch.shape == (part.row_count, *ITEM)
        if part.ref.shape == ref.shape and part.ref.WhichOneof("place") == "shared_memory":
            assert np.array_equal(batch, array[part.row_start : part.row_start + part.row_count])
    Publisher(arena, 0).release([ref.shared_memory])


def produce(shm: str, pipe: Connection) -> None:
    """Another process: publishes two tensors, sends their refs, and takes back what it is told."""
    with Arena(Path(shm), MIB, "setting") as arena:
        publisher = Publisher(arena, INLINE_MAX)
        for rows in (1, 500):
            array = np.arange(rows * 15, dtype=np.float32).reshape(rows, *ITEM)
            pipe.send_bytes(publisher.publish_array(array, 60.0).SerializeToString())
        publisher.release(tensor_pb2.ReleaseSlots.FromString(pipe.recv_bytes()).slots)
        pipe.send_bytes(bytes([arena.statistics().published]))


def test_tensors_go_from_one_process_to_another(shm: Path, reader: Reader) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=produce, args=(str(shm), there))
    process.start()
    there.close()
    refs = [tensor_pb2.TensorRef.FromString(here.recv_bytes()) for _ in range(2)]
    assert [ref.WhichOneof("place") for ref in refs] == ["inline", "shared_memory"]
    batch = reader.gather([slice_rows(refs[0], 0, 1), slice_rows(refs[1], 100, 400)], "FP32", ITEM)
    assert np.array_equal(batch[0].ravel(), np.arange(15))
    assert np.array_equal(batch[1:].ravel(), np.arange(100 * 15, 500 * 15))
    here.send_bytes(tensor_pb2.ReleaseSlots(slots=[refs[1].shared_memory]).SerializeToString())
    assert here.recv_bytes() == bytes([0]), "everything was released"
    process.join(30)
    assert process.exitcode == 0
    here.close()
    assert list(shm.iterdir()) == []


def test_a_write_that_fails_frees_its_slot(arena: Arena) -> None:
    data = memoryview(bytearray(10))[::2]
    with pytest.raises((TypeError, ValueError, BufferError)):
        arena.write(data, time.monotonic() + 60)
    statistics = arena.statistics()
    assert (statistics.filling, statistics.published) == (0, 0)
