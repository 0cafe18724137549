"""Arenas in device memory, against a CUDA runtime that forgives nothing."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mosel.errors import ConfigError, InternalError, Overloaded, PayloadTooLarge, ReadNotProven
from mosel.transport.control import NONCE_BYTES
from mosel.transport.device_arena import DeviceArena, DeviceView
from mosel.transport.layout import KIB, MIB
from mosel.transport.slots import Slot
from mosel.v1 import arena_pb2, tensor_pb2
from tests.mosel.transport.fake_cuda import FakeCudaError, FakeGpu, FakeRuntime, runtimes

LARGE = 250 * KIB


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


@pytest.fixture
def pair(gpu: FakeGpu) -> Iterator[list[FakeRuntime]]:
    with runtimes(gpu, FakeRuntime, FakeRuntime) as pair:
        yield pair


@pytest.fixture
def producer(pair: list[FakeRuntime]) -> FakeRuntime:
    return pair[0]


@pytest.fixture
def consumer(pair: list[FakeRuntime]) -> FakeRuntime:
    return pair[1]


@pytest.fixture
def arena(shm: Path, producer: FakeRuntime) -> Iterator[DeviceArena]:
    with DeviceArena(shm, MIB, "setting", producer) as arena:
        yield arena


def announced(arena: DeviceArena) -> arena_pb2.ArenaDescription:
    """As another process sees it."""
    description = arena.announcement().arena
    description.host.pid += 1
    return description


@pytest.fixture
def view(shm: Path, arena: DeviceArena, consumer: FakeRuntime) -> Iterator[DeviceView]:
    view = DeviceView(shm, announced(arena), consumer)
    yield view
    view.close()


def noise(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def write(arena: DeviceArena, tensor: torch.Tensor, lease_s: float = 60.0) -> Slot:
    return arena.write(tensor, time.monotonic() + lease_s)


def idle(arena: DeviceArena) -> bool:
    statistics = arena.statistics()
    return statistics.filling == statistics.published == 0


@pytest.mark.parametrize("nbytes", [0, 1, 64 * KIB, 64 * KIB + 1, 256 * KIB])
def test_what_is_published_is_complete_and_read_at_its_place(arena: DeviceArena, view: DeviceView, nbytes: int) -> None:
    tensor = noise(nbytes)
    slot = write(arena, tensor)
    with view.held():
        assert torch.equal(view.bytes_of(slot.index, nbytes), tensor)
        view.prove(slot.index, slot.generation, time.monotonic_ns() + 60_000_000_000)


def test_the_control_file_holds_neither_slots_nor_nonce(shm: Path, arena: DeviceArena, view: DeviceView) -> None:
    (path,) = shm.iterdir()
    nonce = arena.announcement().nonce
    assert path.stat().st_size == arena.layout.data_start
    assert len(nonce) == NONCE_BYTES
    assert nonce not in path.read_bytes()
    assert view.nonce == nonce


def test_the_announcement_says_what_a_consumer_needs_and_the_handle_is_exported_once(
    arena: DeviceArena, producer: FakeRuntime
) -> None:
    for _ in range(3):
        announcement = arena.announcement()
        assert announcement.arena.rung == tensor_pb2.CUDA_IPC
        assert len(announcement.arena.cuda_handle) == 64
        assert announcement.arena.gpu_uuid == producer.gpu_uuid()
    assert producer.calls["export"] == producer.calls["allocate"] == 1


def field(name: str, value: object) -> Callable[[arena_pb2.ArenaDescription], None]:
    def change(arena: arena_pb2.ArenaDescription) -> None:
        setattr(arena.host if hasattr(arena.host, name) else arena, name, value)

    return change


REFUSED = {
    "another host": (field("boot_id", "other"), "another host"),
    "another clock": (field("time_namespace", 1), "time namespace"),
    "another GPU": (field("gpu_uuid", "GPU-other"), "another GPU"),
    "short handle": (field("cuda_handle", bytes(63)), "the handle has 63 bytes; expected 64"),
    "no handle": (field("cuda_handle", b""), "the handle has 0 bytes; expected 64"),
    "unknown handle": (field("cuda_handle", bytes(64)), "the GPU did not open the arena$"),
    "another arena": (field("arena_id", 1), "not there"),
    "another epoch": (field("epoch", 1), "not there"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_opened_is_refused_with_the_reason(
    shm: Path,
    arena: DeviceArena,
    consumer: FakeRuntime,
    change: Callable[[arena_pb2.ArenaDescription], None],
    reason: str,
) -> None:
    description = announced(arena)
    change(description)
    with pytest.raises(ReadNotProven, match=reason):
        DeviceView(shm, description, consumer)


def test_the_producer_itself_is_refused_before_the_runtime_is_asked(
    shm: Path, arena: DeviceArena, consumer: FakeRuntime
) -> None:
    with pytest.raises(ReadNotProven, match="the producer is this process"):
        DeviceView(shm, arena.announcement().arena, consumer)
    assert consumer.calls["open"] == 0


def test_the_same_number_in_another_pid_namespace_is_another_process(
    shm: Path, arena: DeviceArena, producer: FakeRuntime, consumer: FakeRuntime
) -> None:
    description = arena.announcement().arena
    description.host.pid_namespace += 1
    view = DeviceView(shm, description, consumer)
    view.close()
    with pytest.raises(ReadNotProven, match="the GPU did not open the arena; the producer has another PID namespace"):
        DeviceView(shm, description, producer)


def test_an_arena_in_shared_memory_is_none_in_device_memory(
    shm: Path, arena: DeviceArena, consumer: FakeRuntime
) -> None:
    from mosel.transport.shared_memory import SharedMemoryArena, SharedMemoryView

    with SharedMemoryArena(shm, MIB, "setting") as other:
        description = announced(arena)
        description.arena_id, description.epoch = other.arena_id, other.epoch
        with pytest.raises(ReadNotProven, match="not in device memory"):
            DeviceView(shm, description, consumer)
    with pytest.raises(ReadNotProven, match="not in shared memory"):
        SharedMemoryView(shm, arena.arena_id, arena.epoch)


@pytest.mark.parametrize("step", ["open", "tensor", "copy", "synchronize"])
def test_a_view_that_fails_to_open_leaves_nothing_open_and_names_no_handle(
    shm: Path, arena: DeviceArena, consumer: FakeRuntime, step: str
) -> None:
    consumer.fail(step)
    description = announced(arena)
    with pytest.raises(ReadNotProven, match=r"the GPU did not open the arena$") as caught:
        DeviceView(shm, description, consumer)
    assert caught.value.__suppress_context__
    assert consumer.open_handles() == 0
    view = DeviceView(shm, description, consumer)
    assert view.nonce == arena.announcement().nonce
    view.close()


@pytest.mark.parametrize("step", ["allocate", "tensor", "copy", "synchronize", "export"])
def test_an_arena_that_fails_to_start_leaves_neither_memory_nor_file(
    shm: Path, gpu: FakeGpu, producer: FakeRuntime, step: str
) -> None:
    producer.fail(step)
    with pytest.raises(ConfigError, match=r"the GPU did not give [12] MiB .* lower setting"):
        DeviceArena(shm, 2 * MIB, "setting", producer)
    assert gpu.nbytes_allocated == 0
    assert list(shm.iterdir()) == []


def test_the_memory_is_freed_once_and_what_is_read_afterwards_is_not_proven(
    shm: Path, gpu: FakeGpu, producer: FakeRuntime, consumer: FakeRuntime
) -> None:
    arena = DeviceArena(shm, MIB, "setting", producer)
    slot = write(arena, noise(100))
    view = DeviceView(shm, announced(arena), consumer)
    source = view.bytes_of(slot.index, 100)
    assert torch.equal(source, noise(100))
    arena.close()
    arena.close()
    assert (producer.calls["free"], gpu.nbytes_allocated) == (1, 0)
    assert list(shm.iterdir()) == []
    with view.held():
        assert not torch.equal(source, noise(100))
        with pytest.raises(ReadNotProven, match="reused"):
            view.prove(slot.index, slot.generation, time.monotonic_ns() + 60_000_000_000)
    view.close()


def test_memory_that_cannot_be_given_back_stops_nobody(
    shm: Path, gpu: FakeGpu, producer: FakeRuntime, consumer: FakeRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    arena = DeviceArena(shm, MIB, "setting", producer)
    view = DeviceView(shm, announced(arena), consumer)
    consumer.fail("close")
    view.close()
    producer.fail("free")
    arena.close()
    assert [record.message for record in caplog.records] == ["the GPU failed to give back the memory of an arena"] * 2
    assert list(shm.iterdir()) == []
    # The fake did nothing either time; the check at the end wants it done.
    for runtime, give_back in ((consumer, consumer.close), (producer, producer.free)):
        for mapping in runtime._mappings:
            give_back(mapping.address)


@pytest.mark.parametrize("step", ["copy", "synchronize"])
def test_a_write_that_fails_frees_its_slot_after_the_copy_has_ended(
    arena: DeviceArena, producer: FakeRuntime, view: DeviceView, step: str
) -> None:
    for _ in range(20):
        producer.fail(step)
        with pytest.raises(InternalError, match="the GPU failed while it stored a tensor"):
            write(arena, noise(LARGE))
        assert producer.under_way() == 0
        assert idle(arena)
    slot = write(arena, noise(LARGE))
    assert torch.equal(view.bytes_of(slot.index, LARGE), noise(LARGE))


def test_memory_that_a_copy_may_still_write_to_is_never_used_again(arena: DeviceArena, producer: FakeRuntime) -> None:
    producer.fail("synchronize", times=2)
    with pytest.raises(InternalError, match="while it stored"):
        write(arena, noise(LARGE))
    copies = producer.calls["copy"]
    for _ in range(20):
        with pytest.raises(InternalError, match="the GPU failed before"):
            write(arena, noise(LARGE))
    assert producer.calls["copy"] == copies
    assert idle(arena)
    producer.synchronize()


def test_a_full_arena_waits_for_a_release_or_an_expiry(arena: DeviceArena) -> None:
    with pytest.raises(PayloadTooLarge, match="setting"):
        write(arena, noise(arena.largest_slot + 1))
    slots = []
    with pytest.raises(Overloaded, match="setting"):  # noqa: PT012
        while True:
            slots.append(write(arena, noise(LARGE), lease_s=1.0))
    assert arena.release(slots[0].index, slots[0].generation)
    assert not arena.release(slots[0].index, slots[0].generation)
    assert write(arena, noise(LARGE), 1.0).index == slots[0].index
    again = arena.write(noise(LARGE), time.monotonic() + 60, wait_s=30.0)
    assert again.index in [slot.index for slot in slots[1:]]
    assert arena.statistics().expired_total > 0


def test_a_handle_is_closed_once_when_the_last_reader_is_done(
    shm: Path, arena: DeviceArena, consumer: FakeRuntime
) -> None:
    slot = write(arena, noise(100))
    view = DeviceView(shm, announced(arena), consumer)
    with view.held():
        with view.held():
            view.close()
            view.close()
        assert consumer.open_handles() == 1
        assert torch.equal(view.bytes_of(slot.index, 100), noise(100))
        view.prove(slot.index, slot.generation, time.monotonic_ns() + 60_000_000_000)
    assert consumer.open_handles() == 0
    view.close()
    assert (consumer.calls["open"], consumer.calls["close"]) == (1, 1)
    with pytest.raises(ReadNotProven, match="closed"), view.held():
        pass


@pytest.mark.parametrize(
    ("slot", "nbytes"), [(-1, 0), (10**6, 0), (2**32 - 1, 0), (0, 64 * KIB + 1), (0, -1), (0, 2**63)]
)
def test_a_read_out_of_bounds_is_refused_before_an_address_is_computed(
    view: DeviceView, slot: int, nbytes: int
) -> None:
    with pytest.raises(ReadNotProven, match="does not have"):
        view.bytes_of(slot, nbytes)


def test_the_fake_is_as_nasty_as_it_says(gpu: FakeGpu) -> None:
    here, there = FakeRuntime(gpu), FakeRuntime(gpu)

    def refused(number: int, call: Callable[[], object]) -> None:
        with pytest.raises(FakeCudaError) as caught:
            call()
        assert caught.value.number == number

    address = here.allocate(4096)
    handle = here.export(address)
    refused(201, lambda: here.open(handle))
    refused(1, lambda: here.export(address + 256))
    mine, opened = here.tensor(address, 4096), there.open(handle)
    theirs = there.tensor(opened, 4096)
    here.may_land.clear()
    here.copy(mine, noise(4096))
    assert here.under_way() == 1
    there.synchronize()
    assert not torch.equal(theirs, noise(4096)), "another's synchronisation waits for nothing"
    here.may_land.set()
    here.synchronize()
    assert torch.equal(theirs, noise(4096))
    here.free(address)
    assert (theirs == 0xDD).all()
    there.close(opened)
    refused(1, lambda: here.free(address))
    refused(1, lambda: there.close(opened))
    refused(400, lambda: there.open(handle))
    refused(700, lambda: there.copy(torch.empty(4096, dtype=torch.uint8), theirs))
    assert len(here.violations) == 2
    assert len(there.violations) == 2
    for runtime in (here, there):
        runtime.shut_down()
