"""Torch tensors in, refs out, and back, through every kind of memory; the GPU is a nasty fake."""

import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mosel.config import TransportSettings
from mosel.errors import Overloaded, PayloadTooLarge, ReadNotProven
from mosel.transport import Publisher, Reader, SharedMemoryArena, slice_rows
from mosel.transport.cupy_ipc import device_ipc_for
from mosel.transport.layout import KIB, MIB
from mosel.transport.object_arena import ObjectArena
from mosel.transport.torch_exchange import TORCH_DTYPES, TensorPublisher, TensorReader
from mosel.v1 import tensor_pb2
from tests.mosel.transport.device_link import (
    CPU,
    CUDA_IPC,
    IN_PROCESS,
    INLINE,
    ITEM,
    POSIX_SHM,
    RUNGS,
    Link,
    bits,
    linked,
    noise,
)


@pytest.fixture
def link(shm: Path) -> Iterator[Link]:
    with linked(shm, in_process=True) as link:
        yield link


@pytest.mark.parametrize("rung", RUNGS, ids=tensor_pb2.Rung.Name)
@pytest.mark.parametrize("item", [(), (0,), (7,), (100, 160)])
@pytest.mark.parametrize("dtype", list(TORCH_DTYPES))
def test_every_dtype_comes_back_bit_for_bit(
    link: Link, dtype: str, item: tuple[int, ...], rung: tensor_pb2.Rung.ValueType
) -> None:
    tensor = noise((2, *item), dtype)
    ref = link.publish(tensor, rung)
    inline = rung == INLINE or tensor.nbytes == 0
    assert ref.WhichOneof("place") == ("inline" if inline else "slot")
    back = link.gather(ref, dtype=dtype, item=item)
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert bits(back) == bits(tensor)
    assert link.reader.bytes_read == tensor.nbytes


def test_rows_that_do_not_lie_in_order_in_memory_are_published_in_order(link: Link) -> None:
    tensor = torch.arange(24.0).reshape(4, 6).T
    for rung in RUNGS:
        assert torch.equal(link.gather(link.publish(tensor, rung), dtype="FP32", item=(4,)), tensor)


def test_results_of_a_network_can_be_published(link: Link) -> None:
    weight = torch.ones(3, 5, requires_grad=True)
    with torch.inference_mode():
        inference = torch.ones(3, 5) * 2
        for rung in RUNGS:
            assert torch.equal(link.gather(link.publish(inference, rung), dtype="FP32", item=(5,)), inference)
    for rung in RUNGS:
        assert torch.equal(link.gather(link.publish(weight * 3, rung), dtype="FP32", item=(5,)), weight * 3)


parts = st.lists(st.tuples(st.sampled_from(RUNGS), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), max_size=5)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=parts, dtype=st.sampled_from(["FP32", "BF16", "BOOL"]))
def test_slices_from_every_kind_of_memory_are_gathered_in_order(
    link: Link, parts: list[tuple[tensor_pb2.Rung.ValueType, int, int, int]], dtype: str
) -> None:
    slices, expected, refs = [], b"", []
    for rung, rows, start, count in parts:
        start, count = min(start, rows), min(count, rows - min(start, rows))
        tensor = noise((rows, *ITEM), dtype, rows)
        refs.append(link.publish(tensor, rung))
        slices.append(slice_rows(refs[-1], start, count))
        expected += bits(tensor[start : start + count])
    batch = link.reader.gather(iter(slices), dtype, ITEM)
    assert batch.shape == (sum(count.row_count for count in slices), *ITEM)
    assert bits(batch) == expected
    link.publisher.release(ref.slot for ref in refs if ref.HasField("slot"))
    assert link.in_use() == 0


def test_limits_decide_what_travels_inline(shm: Path) -> None:
    with linked(shm, inline_max_kib=1, inline_when_full_max_kib=100) as link:
        for rung in RUNGS:
            assert link.publish(noise((KIB,)), rung).HasField("inline")
        assert link.publish(noise((KIB + 1,)), INLINE).HasField("inline")
        slots = [link.publish(noise((KIB + 1,)), rung).slot for rung in (POSIX_SHM, CUDA_IPC)]
        assert [slot.arena_id == link.device_arena.arena_id for slot in slots] == [False, True]
        with pytest.raises(PayloadTooLarge, match="device setting"):
            link.publish(noise((link.device_arena.largest_slot + 1,)))
        while (ref := link.publish(noise((100 * KIB,)))).HasField("slot"):
            pass
        assert torch.equal(link.gather(ref), noise((100 * KIB,)))
        with pytest.raises(Overloaded, match="device setting"):
            link.publish(noise((100 * KIB + 1,)))


def test_the_announcement_has_the_best_first_and_statistics_tell_them_apart(link: Link) -> None:
    assert [announced.arena.rung for announced in link.publisher.announcement().arenas] == [
        IN_PROCESS,
        CUDA_IPC,
        POSIX_SHM,
    ]
    refs = [link.publish(noise((10,)), rung) for rung in (POSIX_SHM, CUDA_IPC, CUDA_IPC, *[IN_PROCESS] * 3)]
    statistics = link.publisher.statistics()
    assert (statistics["slots_published"], statistics["device_slots_published"]) == (1, 2)
    assert (statistics["object_slots_published"], statistics["tensors.in_process"]) == (3, 3)
    link.publisher.release(ref.slot for ref in refs * 2)
    statistics = link.publisher.statistics()
    assert (statistics["slots_released_total"], statistics["device_slots_released_total"]) == (1, 2)
    assert link.in_use() == 0


def test_without_a_gpu_the_rest_works_and_the_reason_is_told(shm: Path) -> None:
    transport = TransportSettings(inline_max_kib=0)
    ipc, reason = device_ipc_for(CPU)
    assert (ipc, reason) == (None, "no CUDA IPC on device 'cpu'")
    with (
        SharedMemoryArena(shm, MIB, "setting") as arena,
        Reader(shm) as host_reader,
        TensorReader(host_reader, shm, CPU, None, reason) as reader,
    ):
        publisher = TensorPublisher(Publisher(arena, transport), None)
        (announced,) = publisher.announcement().arenas
        assert reader.open(announced.arena) == announced.nonce
        for rung in RUNGS:
            ref = publisher.publish(noise((4, *ITEM), "BF16"), rung, 60.0)
            assert bits(reader.gather([slice_rows(ref, 1, 2)], "BF16", ITEM)) == bits(noise((4, *ITEM), "BF16")[1:3])
        publisher.release([ref.slot])
        assert publisher.statistics()["slots_released_total"] == 1
        announced.arena.rung = CUDA_IPC
        with pytest.raises(ReadNotProven, match=r"^no CUDA IPC on device 'cpu'$"):
            reader.open(announced.arena)
        assert reader.arenas_open() == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_reason() -> None:
    assert device_ipc_for(torch.device("cuda")) == (None, "no CUDA IPC: torch finds no GPU")


def test_a_tensor_in_one_process_stays_where_it_was_made(link: Link) -> None:
    tensor = noise((6, *ITEM), "FP32")
    ref = link.publish(tensor, IN_PROCESS)
    rows = link.reader.gather([slice_rows(ref, 2, 3)], "FP32", ITEM)
    assert rows.data_ptr() == tensor[2:].data_ptr()
    assert bits(rows) == bits(tensor[2:5])
    link.publisher.release([ref.slot])
    assert bits(rows) == bits(tensor[2:5]), "who has it keeps it"
    with pytest.raises(ReadNotProven):
        link.gather(ref, dtype="FP32", item=ITEM)
    assert link.reader.bytes_read == rows.nbytes


def test_a_view_of_a_larger_tensor_keeps_only_its_own_bytes(link: Link) -> None:
    for view in (noise((1, 100, 7), "FP32")[:, 0], noise((50, 7), "FP32")[20:22]):
        rows = link.gather(link.publish(view, IN_PROCESS), dtype="FP32", item=(7,))
        assert bits(rows) == bits(view.contiguous())
        assert rows.untyped_storage().nbytes() == view.nbytes


def test_a_tensor_is_dropped_when_its_slot_is_released(link: Link) -> None:
    memory = np.zeros(1000, np.uint8)
    kept = weakref.ref(memory)
    tensor = torch.from_numpy(memory)
    del memory
    ref = link.publish(tensor, IN_PROCESS)
    del tensor
    assert kept() is not None
    link.publisher.release([ref.slot])
    assert kept() is None


def test_payloads_that_are_objects_become_tensors_over_the_same_bytes(shm: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    array.flags.writeable = False
    transport = TransportSettings(inline_max_kib=0)
    with (
        ObjectArena(MIB, "setting") as objects,
        Reader(shm) as host_reader,
        TensorReader(host_reader, shm, CPU, None) as reader,
    ):
        reader.open(objects.announcement().arena)
        ref = Publisher(None, transport, objects).publish("FP32", (4, 6), array.data.cast("B"), 60.0, rung=IN_PROCESS)
        rows = reader.gather([slice_rows(ref, 1, 2)], "FP32", (6,))
        assert np.shares_memory(rows.numpy(), array)
        assert np.array_equal(rows.numpy(), array[1:3])
        kept = TensorPublisher(Publisher(None, transport, objects), None).publish(rows, IN_PROCESS, 60.0)
        with pytest.raises(ReadNotProven, match="object of torch"):
            host_reader.gather([slice_rows(kept, 0, 2)], "FP32", (6,))
