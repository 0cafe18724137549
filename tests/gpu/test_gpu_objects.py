"""Tensors that stay on a real GPU, between threads of one process."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mosel.config import TransportSettings
from mosel.transport import ArenaKinds, Reader, open_arenas, slice_rows
from mosel.transport.torch_exchange import TensorPublisher, TensorReader
from mosel.v1 import tensor_pb2

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")]
GPU = torch.device("cuda", 0)
HERE = ArenaKinds(in_process=True, shared=False)
ROUNDS = 200


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[TensorPublisher]:
    with open_arenas(TransportSettings(shm_dir=tmp_path), 64, "setting", HERE) as host:
        yield TensorPublisher(host, None)


@pytest.fixture
def reader(tmp_path: Path, publisher: TensorPublisher) -> Iterator[TensorReader]:
    with Reader(tmp_path) as host, TensorReader(host, tmp_path, GPU, None) as reader:
        (announced,) = publisher.announcement().arenas
        assert reader.open(announced.arena) == announced.nonce
        yield reader


@pytest.mark.parametrize("rows", [1, 4096])
def test_a_tensor_on_the_gpu_stays_where_it_is_whatever_its_size(
    publisher: TensorPublisher, reader: TensorReader, rows: int
) -> None:
    tensor = torch.rand(rows, 64, device=GPU)
    ref = publisher.publish(tensor, tensor_pb2.IN_PROCESS, 60.0)
    one = reader.gather([slice_rows(ref, 0, rows)], "FP32", (64,))
    assert one.data_ptr() == tensor.data_ptr()
    two = reader.gather([slice_rows(ref, 0, rows)] * 2, "FP32", (64,))
    assert two.device == GPU
    assert torch.equal(two, torch.cat([tensor, tensor]))


def test_a_thread_reads_what_another_has_just_computed_while_memory_is_used_again(
    publisher: TensorPublisher, reader: TensorReader
) -> None:
    def encode(number: int) -> tensor_pb2.TensorRef:
        with torch.inference_mode():
            work = torch.full((512, 512), 1.0 / 512, device=GPU)
            for _ in range(20):
                work = work @ work.new_full((512, 512), 1.0 / 512)
            return publisher.publish((work * 0 + number)[:, :64].contiguous(), tensor_pb2.IN_PROCESS, 60.0)

    def fuse(ref: tensor_pb2.TensorRef) -> torch.Tensor:
        with torch.inference_mode():
            rows = reader.gather([slice_rows(ref, 0, 512)], "FP32", (64,))
            publisher.release([ref.slot])
            return (rows * 2).cpu()

    with ThreadPoolExecutor(4) as encoders, ThreadPoolExecutor(1) as fusion:
        refs = encoders.map(encode, range(ROUNDS))
        for number, output in enumerate(fusion.map(fuse, refs)):
            assert torch.equal(output, torch.full((512, 64), 2.0 * number))
    assert publisher.statistics()["object_slots_published"] == 0
