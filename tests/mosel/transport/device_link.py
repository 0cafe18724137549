"""A producer and a consumer of torch tensors on one fake GPU."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mosel.config import TransportSettings
from mosel.transport import Publisher, Reader, SharedMemoryArena, slice_rows
from mosel.transport.device_arena import DeviceArena
from mosel.transport.layout import MIB
from mosel.transport.object_arena import ObjectArena
from mosel.transport.torch_exchange import TORCH_DTYPES, TensorPublisher, TensorReader
from mosel.v1 import arena_pb2, tensor_pb2
from tests.mosel.transport.fake_cuda import FakeGpu, FakeRuntime, runtimes

CPU = torch.device("cpu")
INLINE, POSIX_SHM = tensor_pb2.INLINE, tensor_pb2.POSIX_SHM
CUDA_IPC, IN_PROCESS = tensor_pb2.CUDA_IPC, tensor_pb2.IN_PROCESS
RUNGS = [INLINE, POSIX_SHM, CUDA_IPC, IN_PROCESS]
ITEM = (3, 5)


@dataclass
class Link:
    """A producer and a consumer on one GPU, attached."""

    producer: FakeRuntime
    consumer: FakeRuntime
    device_arena: DeviceArena
    publisher: TensorPublisher
    reader: TensorReader

    def publish(self, tensor: torch.Tensor, rung: tensor_pb2.Rung.ValueType = CUDA_IPC) -> tensor_pb2.TensorRef:
        return self.publisher.publish(tensor, rung, 60.0)

    def gather(self, *refs: tensor_pb2.TensorRef, dtype: str = "UINT8", item: tuple[int, ...] = ()) -> torch.Tensor:
        return self.reader.gather([slice_rows(ref, 0, ref.shape[0]) for ref in refs], dtype, item)

    def in_use(self) -> int:
        counters = self.publisher.statistics()
        states = ("slots_published", "slots_filling")
        return sum(counters.get(f"{prefix}{state}", 0) for prefix in ("", "device_", "object_") for state in states)


@contextmanager
def producing(
    shm: Path, runtime: FakeRuntime, mib: int = 1, in_process: bool = False, **limits: Any
) -> Iterator[tuple[DeviceArena, TensorPublisher]]:
    transport = TransportSettings(**({"inline_max_kib": 0, "inline_when_full_max_kib": 0} | limits))
    with (
        SharedMemoryArena(shm, mib * MIB, "host setting") as arena,
        DeviceArena(shm, mib * MIB, "device setting", runtime) as device_arena,
        ObjectArena(mib * MIB, "object setting") if in_process else nullcontext() as objects,
    ):
        yield device_arena, TensorPublisher(Publisher(arena, transport, objects), device_arena)


def attach(reader: TensorReader, publisher: TensorPublisher) -> None:
    for announced in publisher.announcement().arenas:
        assert reader.open(elsewhere(announced.arena)) == announced.nonce


def elsewhere(arena: arena_pb2.ArenaDescription) -> arena_pb2.ArenaDescription:
    """As another process sees it."""
    arena.host.pid += 1
    return arena


@contextmanager
def linked(shm: Path, *kinds: type[FakeRuntime], gpu: FakeGpu | None = None, **limits: Any) -> Iterator[Link]:
    with (
        runtimes(gpu or FakeGpu(), *(kinds or (FakeRuntime, FakeRuntime))) as (producer, consumer),
        producing(shm, producer, **limits) as (arena, publisher),
        Reader(shm) as host_reader,
        TensorReader(host_reader, shm, CPU, consumer) as reader,
    ):
        attach(reader, publisher)
        yield Link(producer, consumer, arena, publisher, reader)


def noise(shape: tuple[int, ...], dtype: str = "UINT8", seed: int = 0) -> torch.Tensor:
    """Any bits that the type may have, NaNs and subnormals too."""
    generator, kind = torch.Generator().manual_seed(seed), TORCH_DTYPES[dtype]
    size = torch.empty(shape, dtype=kind).nbytes
    return (
        torch.randint(0, 2 if dtype == "BOOL" else 256, (size,), dtype=torch.uint8, generator=generator)
        .view(kind)
        .reshape(shape)
    )


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
