"""How long device memory and handles live, and what becomes of reads and writes that fail; the GPU is a nasty fake."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from mosel.errors import InternalError, InvalidRequest, ReadNotProven
from mosel.transport import Reader, slice_rows
from mosel.transport.layout import KIB
from mosel.transport.torch_exchange import TensorReader
from mosel.v1 import tensor_pb2
from tests.mosel.transport.device_link import (
    CPU,
    CUDA_IPC,
    RUNGS,
    Link,
    attach,
    elsewhere,
    linked,
    noise,
    producing,
)
from tests.mosel.transport.fake_cuda import FakeGpu, FakeRuntime, ImpatientRuntime, runtimes


def land(runtime: FakeRuntime) -> None:
    """Has the copies land that were kept from it."""
    runtime.may_land.set()
    while runtime.under_way():
        time.sleep(0.001)


def test_the_handle_is_opened_once_for_many_messages_and_threads(shm: Path) -> None:
    gpu = FakeGpu(delay_s=0)
    with linked(shm, gpu=gpu) as link, ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: attach(link.reader, link.publisher), range(8)))

        def message(i: int) -> bool:
            tensor = noise((1 + i % 5, 1000), seed=i)
            ref = link.publisher.publish(tensor, CUDA_IPC, 60.0, wait_s=10.0)
            same = torch.equal(link.gather(ref, item=(1000,)), tensor)
            link.publisher.release([ref.slot])
            return same

        assert all(threads.map(message, range(500)))
        assert (link.consumer.calls["open"], link.producer.calls["export"]) == (1, 1)
        assert link.reader.arenas_open() == 2
        assert link.in_use() == 0
    assert (link.consumer.calls["close"], link.producer.calls["free"]) == (1, 1)
    assert link.reader.arenas_open() == 0


def test_a_restart_is_a_new_epoch(shm: Path) -> None:
    gpu = FakeGpu()
    with runtimes(gpu, *[FakeRuntime] * 3) as (first, second, consumer):
        with Reader(shm) as host_reader, TensorReader(host_reader, shm, CPU, consumer) as reader:
            with producing(shm, first) as (gone, publisher):
                attach(reader, publisher)
                old = publisher.publish(noise((100,)), CUDA_IPC, 60.0)
            with producing(shm, second) as (arena, publisher):
                with pytest.raises(ReadNotProven):
                    reader.gather([slice_rows(old, 0, 100)], "UINT8", ())
                attach(reader, publisher)
                reader.close(gone.arena_id, gone.epoch)
                reader.close(gone.arena_id, gone.epoch)
                assert consumer.open_handles() == 1
                ref = publisher.publish(noise((100,), seed=1), CUDA_IPC, 60.0)
                assert ref.slot.epoch == arena.epoch != old.slot.epoch
                batch = reader.gather([slice_rows(ref, 0, 100)], "UINT8", ())
                assert torch.equal(batch, noise((100,), seed=1))
                with pytest.raises(ReadNotProven, match="not open"):
                    reader.gather([slice_rows(old, 0, 100)], "UINT8", ())
                # Released or not: the old producer's slots mean nothing to the new one.
                publisher.release([old.slot])
                assert publisher.statistics()["device_slots_published"] == 1
        assert consumer.calls["open"] == consumer.calls["close"] == 2


def test_memory_of_producers_that_went_unnoticed_is_given_back(shm: Path) -> None:
    with (
        runtimes(FakeGpu(), *[FakeRuntime] * 4) as (*producers, consumer),
        Reader(shm) as host_reader,
        TensorReader(host_reader, shm, CPU, consumer) as reader,
    ):
        for producer in producers:
            with producing(shm, producer) as (_, publisher):
                attach(reader, publisher)
                assert (consumer.open_handles(), reader.arenas_open()) == (1, 2)


@pytest.mark.parametrize("impatient", ["producer", "consumer"])
def test_without_synchronisation_tensors_are_torn(shm: Path, impatient: str) -> None:
    """The negative control: what all other tests here would find if a wait were missing."""
    kinds = [ImpatientRuntime if side == impatient else FakeRuntime for side in ("producer", "consumer")]
    # New in every run, and made where it stays: memory that is used again may hold the bytes of an older one.
    tensor = torch.from_numpy(np.random.default_rng().integers(0, 256, 200 * KIB, np.uint8))
    with (
        runtimes(FakeGpu(delay_s=0), *kinds) as (producer, consumer),
        producing(shm, producer) as (_, publisher),
        Reader(shm) as host_reader,
        TensorReader(host_reader, shm, CPU, consumer) as reader,
    ):
        for announced in publisher.announcement().arenas:
            reader.open(elsewhere(announced.arena))
        runtime = producer if impatient == "producer" else consumer
        runtime.may_land.clear()
        ref = publisher.publish(tensor, CUDA_IPC, 60.0)
        batch = reader.gather([slice_rows(ref, 0, len(tensor))], "UINT8", ())
        assert not torch.equal(batch, tensor), "the fake is not nasty enough"
        land(runtime)
        # That it was the wait: now the bytes are there, in the slot or in what was gathered too early.
        if impatient == "producer":
            batch = reader.gather([slice_rows(ref, 0, len(tensor))], "UINT8", ())
        assert torch.equal(batch, tensor)


def test_an_impatient_consumer_does_not_even_read_the_nonce(shm: Path) -> None:
    kinds = (FakeRuntime, ImpatientRuntime)
    with (
        runtimes(FakeGpu(), *kinds) as (producer, consumer),
        producing(shm, producer) as (_, publisher),
        Reader(shm) as host_reader,
        TensorReader(host_reader, shm, CPU, consumer) as reader,
    ):
        announced = publisher.announcement().arenas[0]
        consumer.may_land.clear()
        assert reader.open(elsewhere(announced.arena)) != announced.nonce
        land(consumer)


@pytest.mark.parametrize(("step", "at"), [("copy", 1), ("copy", 2), ("copy", 3), ("synchronize", 1)])
def test_a_gather_that_fails_waits_for_its_copies_and_the_next_one_works(link: Link, step: str, at: int) -> None:
    tensors = [noise((50 * KIB,), seed=i) for i in range(3)]
    refs = [link.publish(tensor) for tensor in tensors]
    link.consumer.fail(step, at)
    with pytest.raises(ReadNotProven, match="the GPU failed while it copied a tensor"):
        link.gather(*refs)
    assert link.consumer.under_way() == 0
    assert link.reader.bytes_read == 0
    assert torch.equal(link.gather(*refs), torch.cat(tensors))
    link.publisher.release(ref.slot for ref in refs)
    assert link.in_use() == 0


def test_a_slice_that_is_refused_after_a_copy_began_waits_for_it(link: Link) -> None:
    good = link.publish(noise((50 * KIB,)))
    for change in ({"slot": 10**6}, {"arena_id": 1}):
        bad = tensor_pb2.TensorRef()
        bad.CopyFrom(good)
        for name, value in change.items():
            setattr(bad.slot, name, value)
        with pytest.raises(ReadNotProven):
            link.gather(good, bad)
        assert link.consumer.under_way() == 0
    bad.CopyFrom(good)
    bad.nbytes += 1
    with pytest.raises(InvalidRequest):
        link.gather(good, bad)


def test_what_copies_may_still_write_to_is_kept_for_ever(link: Link) -> None:
    ref = link.publish(noise((50 * KIB,)))
    link.consumer.fail("synchronize", times=2)
    with pytest.raises(ReadNotProven, match="the GPU failed"):
        link.gather(ref)
    assert len(link.reader._lost) == 1
    link.consumer.synchronize()


@pytest.mark.parametrize("step", ["copy", "synchronize"])
def test_a_publication_that_fails_loses_no_slot(link: Link, step: str) -> None:
    for _ in range(20):
        link.producer.fail(step)
        with pytest.raises(InternalError, match="the GPU failed"):
            link.publish(noise((200 * KIB,)))
        assert link.producer.under_way() == link.in_use() == 0
    assert torch.equal(link.gather(link.publish(noise((200 * KIB,)))), noise((200 * KIB,)))


def test_a_slot_that_was_used_again_is_not_read(link: Link) -> None:
    first = link.publish(noise((200 * KIB,)))
    link.publisher.release([first.slot])
    for seed in range(2):
        link.publish(noise((200 * KIB,), seed=seed))
    with pytest.raises(ReadNotProven, match="reused"):
        link.gather(first)


def test_a_slot_that_is_used_again_during_the_copy_is_noticed(shm: Path) -> None:
    with linked(shm) as link, ThreadPoolExecutor(1) as thread:
        ref = link.publish(noise((200 * KIB,)))
        other = link.publish(noise((200 * KIB,), seed=1))
        link.consumer.may_land.clear()
        reading = thread.submit(link.gather, ref)
        while not link.consumer.under_way():
            time.sleep(0.001)
        # A selector that releases what is still read.
        link.publisher.release([ref.slot, other.slot])
        link.publish(noise((200 * KIB,), seed=2))
        link.publish(noise((200 * KIB,), seed=3))
        link.consumer.may_land.set()
        with pytest.raises(ReadNotProven, match="reused"):
            reading.result()


def test_a_read_that_ends_after_the_lease_is_not_proven(shm: Path) -> None:
    with linked(shm, gpu=FakeGpu(delay_s=0)) as link:
        link.consumer.delay_s = 0.1
        ref = link.publisher.publish(noise((100,)), CUDA_IPC, 0.15)
        with pytest.raises(ReadNotProven, match="lease"):
            link.gather(ref)


def test_an_arena_stays_open_for_a_thread_that_still_reads_it(shm: Path) -> None:
    with linked(shm) as link, ThreadPoolExecutor(1) as thread:
        ref = link.publish(noise((200 * KIB,)))
        link.consumer.may_land.clear()
        reading = thread.submit(link.gather, ref)
        while not link.consumer.under_way():
            time.sleep(0.001)
        link.reader.close(ref.slot.arena_id, ref.slot.epoch)
        assert link.consumer.calls["close"] == 0
        link.consumer.may_land.set()
        assert torch.equal(reading.result(), noise((200 * KIB,)))
        assert link.consumer.calls["close"] == 1
        with pytest.raises(ReadNotProven, match="not open"):
            link.gather(ref)


def test_threads_that_write_read_and_release_never_see_a_torn_tensor(shm: Path) -> None:
    with linked(shm, gpu=FakeGpu(delay_s=0.0001)) as link:
        failures: list[str] = []

        def work(worker: int) -> None:
            for i in range(60):
                value = worker * 60 + i
                tensor = torch.full((1 + value % 3, 60 * KIB), value % 251, dtype=torch.uint8)
                ref = link.publisher.publish(tensor, RUNGS[value % 3], 60.0, wait_s=20.0)
                if not torch.equal(link.gather(ref, item=(60 * KIB,)), tensor):
                    failures.append(f"torn: {value}")
                link.publisher.release([ref.slot])

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert link.in_use() == 0
