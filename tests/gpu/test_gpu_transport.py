"""The transport's contract on a real GPU, between real processes."""

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch

from bench.gpu import peer
from bench.gpu.peer import ConsumerProcess, ProducerProcess, digest, gather, producing, reading, rows_of
from mosel.errors import ReadNotProven
from mosel.transport.control import remove_orphans
from mosel.transport.cupy_ipc import device_ipc_for
from mosel.transport.layout import KIB, MIB
from mosel.transport.torch_exchange import TORCH_DTYPES, TensorPublisher
from mosel.v1 import tensor_pb2

_, REASON = device_ipc_for(torch.device("cuda"))
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600), pytest.mark.skipif(bool(REASON), reason=REASON)]

KILLS = 3
# What the driver keeps for itself, and gives back when it likes.
SLACK_BYTES = 32 * MIB


@pytest.fixture
def shm(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def consumer(shm: Path) -> Iterator[ConsumerProcess]:
    consumer = ConsumerProcess(shm, shm / "socket")
    consumer.wait_ready()
    yield consumer
    consumer.stop()


def noise(nbytes: int, dtype: str = "UINT8") -> torch.Tensor:
    bits = torch.randint(0, 2 if dtype == "BOOL" else 256, (nbytes,), dtype=torch.uint8, device=peer.DEVICE)
    return bits.view(TORCH_DTYPES[dtype]).reshape(4, -1)


def publish(publisher: TensorPublisher, tensor: torch.Tensor) -> tensor_pb2.TensorRef:
    ref = publisher.publish(tensor, tensor_pb2.CUDA_IPC, peer.LEASE_S)
    assert ref.HasField("slot")
    return ref


def gpu_bytes_used() -> int:
    free, total = torch.cuda.mem_get_info(peer.DEVICE)
    return total - free


def wait_until_given_back(before: int) -> None:
    give_up = time.monotonic() + 30
    while gpu_bytes_used() > before + SLACK_BYTES:
        assert time.monotonic() < give_up, f"{gpu_bytes_used() - before} bytes of device memory are lost"
        time.sleep(0.1)


def test_every_dtype_comes_back_bit_for_bit_through_a_handle_that_is_opened_once(
    shm: Path, consumer: ConsumerProcess
) -> None:
    with producing(shm, 64) as (arena, publisher):
        assert consumer.attach(publisher) == consumer.attach(publisher) == ""
        for dtype in TORCH_DTYPES:
            for nbytes in (64, 64 * KIB, 300 * KIB, 16 * MIB):
                tensor = noise(nbytes, dtype)
                ref = publish(publisher, tensor)
                assert consumer.call("Digest", rows_of(ref).SerializeToString()) == digest(tensor)
                publisher.release([ref.slot])
        assert consumer.state()["opened"] == 1
        assert arena.statistics().published == 0
        consumer.call("Close", publisher.announcement().arenas[0].arena.SerializeToString())
        assert consumer.state()["closed"] == 1


def test_tensors_computed_just_before_are_complete(shm: Path, consumer: ConsumerProcess) -> None:
    with producing(shm, 64) as (_, publisher):
        assert consumer.attach(publisher) == ""
        for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                factor = torch.randn(1024, 1024, device=peer.DEVICE)
                result = factor
                for _ in range(50):
                    result = torch.tanh(result @ factor)
                ref = publish(publisher, result)
                assert consumer.call("Digest", rows_of(ref).SerializeToString()) == digest(result)


def test_a_process_cannot_open_its_own_arena(shm: Path) -> None:
    with producing(shm, 1) as (_, publisher), reading(shm) as (_, reader):
        arena = publisher.announcement().arenas[0].arena
        with pytest.raises(ReadNotProven, match="the producer is this process"):
            reader.open(arena)


def test_a_full_circle_of_arenas_leaves_no_device_memory(shm: Path) -> None:
    with producing(shm, 64):
        pass
    before = gpu_bytes_used()
    for _ in range(20):
        with producing(shm, 256):
            assert gpu_bytes_used() >= before + 128 * MIB
    wait_until_given_back(before)


def test_killed_consumers_cost_the_producer_nothing(shm: Path) -> None:
    with producing(shm, 64) as (arena, publisher):
        before = gpu_bytes_used()
        for number in range(KILLS):
            consumer = ConsumerProcess(shm, shm / f"socket-{number}")
            consumer.wait_ready()
            assert consumer.attach(publisher) == ""
            ref = publish(publisher, noise(4 * MIB))
            threading.Timer(random.uniform(0.01, 0.1), consumer.process.kill).start()
            with pytest.raises(grpc.RpcError):  # noqa: PT012
                while True:
                    consumer.call("Gather", rows_of(ref).SerializeToString())
            consumer.stop()
            publisher.release([ref.slot])
        wait_until_given_back(before)
        assert arena.statistics().published == arena.statistics().filling == 0


def test_killed_producers_cost_the_consumer_nothing(shm: Path) -> None:
    with reading(shm) as (ipc, reader):
        before = gpu_bytes_used()
        for _ in range(KILLS):
            producer = ProducerProcess(shm)
            announced = producer.wait_ready()
            assert reader.open(announced.arena) == announced.nonce
            value = 0
            with contextlib.suppress(EOFError, OSError):
                while True:
                    ref = tensor_pb2.TensorRef.FromString(producer.pipe.recv_bytes())
                    assert (gather(reader, rows_of(ref)) == value % 251).all()
                    value += 1
                    if value == 1:
                        threading.Timer(random.uniform(0, 0.1), producer.process.kill).start()
                    producer.pipe.send_bytes(b"")
            # The memory lives as long as somebody has it open.
            assert (gather(reader, rows_of(ref)) == (value - 1) % 251).all()
            reader.close(announced.arena.arena_id, announced.arena.epoch)
            producer.kill()
        assert remove_orphans(shm) > 0
        assert list(shm.iterdir()) == []
        assert ipc.opened == ipc.closed == KILLS
        torch.cuda.empty_cache()
        wait_until_given_back(before)
