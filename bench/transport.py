"""What it costs to hand a tensor from one process to another, by size: inside the message, or through shared memory.

A producer and a consumer, each a process with its own event loop, talk over the unix socket that services use. Before
each hand-off the producer has just written every byte of the tensor; the clock runs from there until it has the answer
of a consumer that has the tensor as an array:

    inline          the bytes in the gRPC message; the array lies over the bytes that gRPC delivered
    shm, copied     written into the slot in place; the consumer copies it out and proves the read, as services do
    shm, in place   the same, but the consumer proves the read over the slot itself, without a copy
    memcpy          the consumer copies an array of that size into a new one; nothing else

They are measured in turn, in one run.
"""

import argparse
import multiprocessing
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import uvloop
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from mosel.config import Settings, load_settings
from mosel.runtime.channels import channel_options
from mosel.transport import Reader, SharedMemoryArena, slice_rows
from mosel.transport.exchange import set_slot
from mosel.transport.layout import KIB, MIB
from mosel.v1 import arena_pb2, tensor_pb2

SIZES = tuple(KIB * 4**power for power in range(9))
_ARENA_MIB = 512
_MESSAGE_MIB = 80
_LEASE_S = 30.0
_WARM_UP = 5
# As many hand-offs as move so many bytes, but not more than _MOST and not fewer than _LEAST.
_BYTES, _MOST, _LEAST = 2 * 1024 * MIB, 1000, 100
_SERVICE = "bench.Consumer"
_INLINE, _COPIED, _IN_PLACE, _MEMCPY = _KINDS = ("inline", "shm, copied", "shm, in place", "memcpy")

Times = dict[tuple[str, int], list[float]]
Call = Callable[[tensor_pb2.RowSlice], Awaitable[bytes]]

console = Console(width=140)


def main() -> None:
    """Measures, prints, and plots where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="where to write a plot, PNG")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(transport={"max_message_mib": _MESSAGE_MIB}, run_dir=Path(folder))
        address = f"unix:{folder}/consumer.sock"
        consumer = multiprocessing.get_context("spawn").Process(target=_consume, args=(settings, address), daemon=True)
        consumer.start()
        try:
            times = uvloop.run(_produce(settings, address))
        finally:
            consumer.terminate()
            consumer.join()
    _print(times)
    if arguments.plot:
        _plot(times, arguments.plot)


def _consume(settings: Settings, address: str) -> None:
    uvloop.run(_Consumer(settings).serve(address))


class _Consumer:
    """Answers each hand-off with the first and last byte of the tensor, which no other tensor has."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._reader = Reader(settings.transport.shm_dir)

    async def serve(self, address: str) -> None:
        """Serves until the process is ended."""
        server = grpc.aio.server(options=channel_options(self._settings))
        methods: dict[str, tuple[Any, Any]] = {
            _INLINE: (self._inline, tensor_pb2.RowSlice),
            _COPIED: (self._copied, tensor_pb2.RowSlice),
            _IN_PLACE: (self._in_place, tensor_pb2.RowSlice),
            _MEMCPY: (self._memcpy, tensor_pb2.RowSlice),
            "open": (self._open, arena_pb2.ArenaDescription),
        }
        handlers: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(method, request_deserializer=message.FromString)
            for name, (method, message) in methods.items()
        }
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(_SERVICE, handlers)])
        server.add_insecure_port(address)
        await server.start()
        await server.wait_for_termination()

    async def _open(self, arena: arena_pb2.ArenaDescription, _: Any) -> bytes:
        return self._reader.open(arena)

    async def _inline(self, part: tensor_pb2.RowSlice, _: Any) -> bytes:
        return _ends(np.frombuffer(part.ref.inline, np.uint8))

    async def _copied(self, part: tensor_pb2.RowSlice, _: Any) -> bytes:
        return _ends(self._reader.gather([part], "UINT8", ()))

    async def _in_place(self, part: tensor_pb2.RowSlice, _: Any) -> bytes:
        slot = part.ref.slot
        view = self._reader._views[slot.arena_id, slot.epoch]
        ends = _ends(view.bytes_of(slot.slot, part.ref.nbytes))
        view.prove(slot.slot, slot.generation, slot.lease_expires_ns)
        return ends

    async def _memcpy(self, part: tensor_pb2.RowSlice, _: Any) -> bytes:
        """Answers with the seconds that a copy of so many bytes took, as text."""
        source = np.ones(part.ref.nbytes, np.uint8)
        started = time.perf_counter()
        target = np.empty_like(source)
        target[:] = source
        return str(time.perf_counter() - started).encode()


def _ends(array: NDArray[Any]) -> bytes:
    return bytes((array[0], array[-1]))


class _Producer:
    """Hands tensors off and takes the time.

    Args:
        arena: for tensors in shared memory.
        channel: to the consumer.
    """

    def __init__(self, arena: SharedMemoryArena, channel: grpc.aio.Channel) -> None:
        self._arena, self._count = arena, 0
        self._source = np.zeros(SIZES[-1], np.uint8)
        self._calls: dict[str, Call] = {
            kind: channel.unary_unary(f"/{_SERVICE}/{kind}", tensor_pb2.RowSlice.SerializeToString) for kind in _KINDS
        }

    async def hand_off(self, kind: str, nbytes: int) -> float:
        """Seconds that one hand-off took."""
        self._count = (self._count + 1) % 251
        ref = tensor_pb2.TensorRef(dtype=tensor_pb2.UINT8, shape=[nbytes], nbytes=nbytes)
        if kind == _MEMCPY:
            return float(await self._calls[kind](slice_rows(ref, 0, nbytes)))
        handed = self._inline if kind == _INLINE else self._slot
        seconds, answer = await handed(ref, self._calls[kind])
        if answer != bytes((self._count, self._count)):
            raise AssertionError("the consumer has another tensor")
        return seconds

    async def _inline(self, ref: tensor_pb2.TensorRef, call: Call) -> tuple[float, bytes]:
        data = self._source[: ref.nbytes]
        data[:] = self._count
        started = time.perf_counter()
        ref.inline = data.tobytes()
        answer = await call(slice_rows(ref, 0, ref.nbytes))
        return time.perf_counter() - started, answer

    async def _slot(self, ref: tensor_pb2.TensorRef, call: Call) -> tuple[float, bytes]:
        started = time.perf_counter()
        expires_at = time.monotonic() + _LEASE_S
        with self._arena.filling(ref.nbytes, expires_at, 0.0) as slot:
            filling = time.perf_counter()
            with self._arena.writable(slot, ref.nbytes) as target:
                np.frombuffer(target, np.uint8)[:] = self._count
            filled = time.perf_counter()
        set_slot(ref, self._arena, slot, expires_at)
        answer = await call(slice_rows(ref, 0, ref.nbytes))
        self._arena.release(slot.index, slot.generation)
        return time.perf_counter() - started - (filled - filling), answer


async def _produce(settings: Settings, address: str) -> Times:
    times: Times = defaultdict(list)
    channel = grpc.aio.insecure_channel(address, channel_options(settings))
    with SharedMemoryArena(settings.transport.shm_dir, _ARENA_MIB * MIB, "the arena of this benchmark") as arena:
        async with channel:
            opened: Any = channel.unary_unary(f"/{_SERVICE}/open", arena_pb2.ArenaDescription.SerializeToString)
            announced = arena.announcement()
            if await opened(announced.arena, wait_for_ready=True) != announced.nonce:
                raise AssertionError("the consumer does not reach the arena")
            producer = _Producer(arena, channel)
            for nbytes in SIZES:
                for turn in range(_WARM_UP + _turns(nbytes)):
                    for kind in _KINDS:
                        seconds = await producer.hand_off(kind, nbytes)
                        if turn >= _WARM_UP:
                            times[kind, nbytes].append(seconds)
    return times


def _turns(nbytes: int) -> int:
    return max(_LEAST, min(_MOST, _BYTES // nbytes))


def _percentile(times: Times, kind: str, nbytes: int, percent: float) -> float:
    """Milliseconds."""
    return float(np.percentile(times[kind, nbytes], percent) * 1000)


def _print(times: Times) -> None:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    console.print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), load {load}, "
        f"Python {platform.python_version()}, grpcio {grpc.__version__}"
    )
    columns = [f"{kind} {name}" for kind in _KINDS[:-1] for name in ("p50", "p99")]
    table = Table(
        "size", "hand-offs", *columns, "memcpy p50", "apart from the copy", "inline / copied", "inline / in place",
        title="hand-off of one tensor (ms)",
    )  # fmt: skip
    for nbytes in SIZES:
        cells = [f"{_percentile(times, k, nbytes, p):.2f}" for k in _KINDS[:-1] for p in (50, 99)]
        inline, copied, in_place, memcpy = (_percentile(times, kind, nbytes, 50) for kind in _KINDS)
        table.add_row(
            _name(nbytes),
            str(_turns(nbytes)),
            *cells,
            f"{memcpy:.3f}",
            f"{copied - memcpy:.2f}",
            f"{inline / copied:.1f}",
            f"{inline / in_place:.1f}",
        )
    console.print(table)


def _name(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


def _plot(times: Times, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    styles = {_INLINE: "#cc4455", _COPIED: "#2b638f", _IN_PLACE: "#3a9a6b", _MEMCPY: "#888888"}
    shifts = {_COPIED: 5, _MEMCPY: -6}
    for kind, colour in styles.items():
        p50, p99 = ([_percentile(times, kind, nbytes, percent) for nbytes in SIZES] for percent in (50, 99))
        axes.plot(SIZES, p50, color=colour, marker="o", markersize=4, linestyle=":" if kind == _MEMCPY else "-")
        if kind != _MEMCPY:
            axes.fill_between(SIZES, p50, p99, color=colour, alpha=0.12, linewidth=0)
        label = "memcpy alone" if kind == _MEMCPY else kind
        axes.annotate(
            label, (SIZES[-1], p50[-1]), (8, shifts.get(kind, 0)), "data", "offset points", va="center", color=colour
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(SIZES, [_name(nbytes) for nbytes in SIZES])
    axes.set_xlim(right=SIZES[-1] * 4)
    axes.set_xlabel("tensor")
    axes.set_ylabel("milliseconds (log scale)")
    axes.set_title("hand-off between two processes: lines are medians, bands reach to p99")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
