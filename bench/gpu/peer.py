"""The processes of bench.gpu.transport and of tests/gpu: a producer here, and consumers and producers elsewhere.

With MOSEL_DEVICE=cpu, host memory stands in for that of the GPU.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import torch

from bench.gpu.host_ipc import HostIpc
from mosel.compute.networks import synchronize
from mosel.config import TransportSettings
from mosel.transport import Publisher, Reader, SharedMemoryArena
from mosel.transport.cupy_ipc import CupyIpc
from mosel.transport.device_arena import DeviceArena
from mosel.transport.layout import KIB, MIB
from mosel.transport.preflight import preflight
from mosel.transport.torch_exchange import TensorPublisher, TensorReader
from mosel.v1 import arena_pb2, tensor_pb2

DEVICE = torch.device("cpu") if os.environ.get("MOSEL_DEVICE") == "cpu" else torch.device("cuda", 0)
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
LEASE_S = 60.0
_SERVICE = "mosel.bench.Consumer"


class CountingIpc(CupyIpc):
    """Counts what must happen once."""

    def __init__(self, device: torch.device) -> None:
        self.opened = self.closed = 0
        super().__init__(device)

    def open(self, handle: bytes) -> int:
        """See `DeviceIpc`."""
        self.opened += 1
        return super().open(handle)

    def close(self, address: int) -> None:
        """See `DeviceIpc`."""
        self.closed += 1
        super().close(address)


def counting_ipc() -> CountingIpc | HostIpc:
    """The memory of `DEVICE`, for this process."""
    return HostIpc() if DEVICE.type == "cpu" else CountingIpc(DEVICE)


def device_mib_used() -> int:
    """Of the whole GPU, by all processes; 0 without one."""
    if DEVICE.type == "cpu":
        return 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(DEVICE)
    return (total - free) // MIB


@contextlib.contextmanager
def producing(shm: Path, mib: int) -> Iterator[tuple[DeviceArena, TensorPublisher]]:
    """A producer in this process; everything that may go through device memory does."""
    limits = TransportSettings(inline_max_kib=0, inline_when_full_max_kib=0)
    with (
        SharedMemoryArena(shm, MIB, "host") as host,
        DeviceArena(shm, mib * MIB, "--arena-mib", counting_ipc()) as arena,
    ):
        yield arena, TensorPublisher(Publisher(host, limits), arena)


@contextlib.contextmanager
def reading(shm: Path) -> Iterator[tuple[CountingIpc | HostIpc, TensorReader]]:
    """A consumer in this process."""
    ipc = counting_ipc()
    with Reader(shm) as host, TensorReader(host, shm, DEVICE, ipc) as reader:
        yield ipc, reader


def rows_of(ref: tensor_pb2.TensorRef) -> tensor_pb2.RowSlice:
    """All of them."""
    return tensor_pb2.RowSlice(ref=ref, row_count=ref.shape[0])


def gather(reader: TensorReader, part: tensor_pb2.RowSlice) -> torch.Tensor:
    """What a ref means, in device memory."""
    return reader.gather([part], tensor_pb2.DataType.Name(part.ref.dtype), tuple(part.ref.shape[1:]))


def digest(tensor: torch.Tensor) -> bytes:
    """Of a tensor's bytes."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).cpu().numpy().data).digest()


def process_state() -> dict[str, int]:
    """What must stay flat: resident MiB and file descriptors."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return {"resident MiB": resident // MIB, "file descriptors": len(list(Path("/proc/self/fd").iterdir()))}


class ConsumerProcess:
    """A consumer in a process of its own, which answers over a Unix socket as the services do.

    Args:
        shm: where shared memory is mounted.
        socket: a path that is free.
    """

    def __init__(self, shm: Path, socket: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        address = f"unix:{socket}"
        self.process = context.Process(target=_consume, args=(str(shm), address, there), daemon=True)
        self.process.start()
        there.close()
        self._channel = grpc.insecure_channel(address, options=OPTIONS)

    def wait_ready(self) -> None:
        """Waits until it serves; EOFError if it ended instead."""
        self._pipe.recv_bytes()

    def call(self, method: str, request: bytes = b"") -> bytes:
        """One call; raises grpc.RpcError when the process dies."""
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(f"/{_SERVICE}/{method}")
        return call(request, timeout=60)

    def attach(self, publisher: TensorPublisher) -> str:
        """Opens a producer's device memory; why not, or nothing."""
        announced = publisher.announcement().arenas[0]
        report = arena_pb2.PreflightReport.FromString(self.call("Open", announced.arena.SerializeToString()))
        return report.reason or ("" if report.nonce == announced.nonce else "another nonce")

    def state(self) -> dict[str, int]:
        """Its counters."""
        state: dict[str, int] = json.loads(self.call("State"))
        return state

    def stop(self) -> None:
        """Ends it, if nobody did before."""
        self._channel.close()
        self._pipe.close()
        self.process.join(30)


class ProducerProcess:
    """A producer in a process of its own, which publishes until it is killed.

    Args:
        shm: where shared memory is mounted.
    """

    def __init__(self, shm: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_produce, args=(str(shm), there), daemon=True)
        self.process.start()
        there.close()

    def wait_ready(self) -> arena_pb2.AnnouncedArena:
        """Its device memory."""
        return arena_pb2.AnnouncedArena.FromString(self.pipe.recv_bytes())

    def kill(self) -> None:
        """Ends it with SIGKILL."""
        self.process.kill()
        self.process.join(30)
        self.pipe.close()


def _consume(shm: str, address: str, pipe: Connection) -> None:
    with reading(Path(shm)) as (ipc, reader), ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads, options=OPTIONS)
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            name: grpc.unary_unary_rpc_method_handler(_answering(answer))
            for name, answer in _methods(ipc, reader).items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, methods),))
        server.add_insecure_port(address)
        server.start()
        pipe.send_bytes(b"ready")
        with contextlib.suppress(EOFError, OSError):
            pipe.recv_bytes()
        server.stop(None).wait()


def _answering(answer: Callable[[bytes], bytes]) -> Callable[[bytes, grpc.ServicerContext], bytes]:
    return lambda request, context: answer(request)


def _methods(ipc: CountingIpc | HostIpc, reader: TensorReader) -> dict[str, Callable[[bytes], bytes]]:
    def state(_: bytes) -> bytes:
        return json.dumps(process_state() | {"opened": ipc.opened, "closed": ipc.closed}).encode()

    def opened(request: bytes) -> bytes:
        arena = arena_pb2.ArenaDescription.FromString(request)
        return preflight(reader, arena_pb2.OpenArenaRequest(arena=arena)).SerializeToString()

    def closed(request: bytes) -> bytes:
        arena = arena_pb2.ArenaDescription.FromString(request)
        reader.close(arena.arena_id, arena.epoch)
        return b""

    def gathered(request: bytes) -> bytes:
        gather(reader, tensor_pb2.RowSlice.FromString(request))
        return b""

    def digested(request: bytes) -> bytes:
        return digest(gather(reader, tensor_pb2.RowSlice.FromString(request)))

    def timed(request: bytes) -> bytes:
        return json.dumps(_copy_times(reader, tensor_pb2.RowSlice.FromString(request))).encode()

    return {"State": state, "Open": opened, "Close": closed, "Gather": gathered, "Digest": digested, "Time": timed}


def _copy_times(reader: TensorReader, part: tensor_pb2.RowSlice, repeats: int = 30) -> dict[str, float]:
    """Seconds to copy a tensor out of the arena, proven, and to copy as much inside this process; medians."""
    source = gather(reader, part)

    def local() -> Any:
        target = torch.empty_like(source).copy_(source)
        synchronize(DEVICE)
        return target

    return {"out": _median_s(lambda: gather(reader, part), repeats), "local": _median_s(local, repeats)}


def _median_s(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 3):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def _produce(shm: str, pipe: Connection) -> None:
    """Publishes tensors that hold one value each, as fast as they are released."""
    with producing(Path(shm), 16) as (_, publisher):
        pipe.send_bytes(publisher.announcement().arenas[0].SerializeToString())
        value = 0
        while True:
            tensor = torch.full((4, 128 * KIB), value % 251, dtype=torch.uint8, device=DEVICE)
            ref = publisher.publish(tensor, tensor_pb2.CUDA_IPC, LEASE_S, 10.0)
            try:
                pipe.send_bytes(ref.SerializeToString())
                pipe.recv_bytes()
            except (EOFError, OSError):
                return
            publisher.release([ref.slot])
            value += 1
