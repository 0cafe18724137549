"""Device memory between two processes on one GPU: is it right, does it leak, what does it cost. Writes a report.

python -m bench.gpu.transport --out FILE
"""

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import grpc
import torch

from bench.gpu import peer
from bench.gpu.peer import (
    ConsumerProcess,
    ProducerProcess,
    device_mib_used,
    digest,
    gather,
    process_state,
    producing,
    reading,
    rows_of,
)
from mosel.transport.control import remove_orphans
from mosel.transport.cupy_ipc import device_ipc_for
from mosel.transport.layout import KIB, MIB, SLOT_SIZES
from mosel.transport.torch_exchange import TORCH_DTYPES, TensorPublisher
from mosel.v1 import tensor_pb2

_ARENA_MIB = 512
_MESSAGE_BYTES = 256 * KIB
# The driver rounds and caches; a leak of one arena or one message in a thousand is far more.
_SLACK_MIB = 32
_EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@dataclass(frozen=True)
class Scale:
    """How much is measured: sizes in bytes, hand-offs of each, messages for the check of leaks, kills of each side."""

    sizes: Sequence[int]
    repeats: int
    messages: int
    kills: int

    def repeats_of(self, nbytes: int) -> int:
        """Fewer of large ones."""
        return self.repeats if nbytes <= MIB else self.repeats // 5 if nbytes <= 16 * MIB else self.repeats // 15


@dataclass
class Report:
    """Lines of Markdown, and what was not as it should be."""

    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def check(self, holds: bool, what: str) -> None:
        """Adds a line that says whether it holds."""
        self.lines.append(f"* {'yes' if holds else '**NO**'}: {what}")
        if not holds:
            self.failures.append(what)

    def table(self, *rows: tuple[object, ...]) -> None:
        """Adds a table; the first row is its head."""
        head, *body = [f"| {' | '.join(map(str, row))} |" for row in rows]
        self.lines += ["", head, f"|{' --- |' * len(rows[0])}", *body, ""]

    def section(self, title: str) -> None:
        """Adds a heading."""
        self.lines += ["", f"## {title}", ""]
        print(f"{time.strftime('%H:%M:%S')} {title}", flush=True)


def main() -> None:
    """Measures and writes the report; exits with 1 where something is not as it should be, or without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where to write the report")
    parser.add_argument("--messages", type=int, default=100_000, help="for the check that nothing leaks")
    parser.add_argument("--kills", type=int, default=20, help="of each side")
    parser.add_argument("--largest-mib", type=int, default=64, help="the largest tensor")
    parser.add_argument("--repeats", type=int, default=300, help="hand-offs of each size, fewer of large ones")
    parser.add_argument("--only-exact", action="store_true", help="only whether tensors arrive as they were")
    arguments = parser.parse_args()
    if peer.DEVICE.type == "cuda" and (reason := device_ipc_for(peer.DEVICE)[1]):
        raise SystemExit(f"not measured: {reason}")
    report, largest = Report(), arguments.largest_mib * MIB
    scale = Scale([n for n in SLOT_SIZES if n <= largest], arguments.repeats, arguments.messages, arguments.kills)
    try:
        with tempfile.TemporaryDirectory(prefix="mosel-bench-", dir="/dev/shm") as shm:
            if arguments.only_exact:
                _measure_exact(report, Path(shm), scale)
            else:
                _measure_all(report, Path(shm), scale)
    finally:
        # What was measured before it broke off, too.
        arguments.out.write_text("\n".join(report.lines) + "\n", encoding="utf-8")
    if report.failures:
        raise SystemExit("not as it should be: " + "; ".join(report.failures))


def _measure_all(report: Report, shm: Path, scale: Scale) -> None:
    _describe_machine(report)
    _measure_exact(report, shm, scale)
    _measure_expandable(report, scale)
    with _attached(shm) as (consumer, publisher):
        _measure_hand_off(report, consumer, publisher, scale)
        _measure_copy_out(report, consumer, publisher, scale)
        _measure_leaks(report, shm, consumer, publisher, scale.messages)
    _measure_killed_consumers(report, shm, scale.kills)
    _measure_killed_producers(report, shm, scale.kills)


@contextlib.contextmanager
def _attached(shm: Path) -> Iterator[tuple[ConsumerProcess, TensorPublisher]]:
    consumer = ConsumerProcess(shm, shm / "socket")
    consumer.wait_ready()
    with producing(shm, _ARENA_MIB) as (arena, publisher):
        if reason := consumer.attach(publisher):
            raise SystemExit(f"not measured: {reason}")
        yield consumer, publisher
        consumer.call("Close", arena.announcement().arena.SerializeToString())
    consumer.stop()


def _describe_machine(report: Report) -> None:
    report.lines += [
        "# Device memory between two processes, measured",
        "",
        f"* date: {time.strftime('%Y-%m-%d')}",
        f"* command: `python -m bench.gpu.transport {' '.join(sys.argv[1:])}`",
        f"* memory: {_memory()}",
        f"* host: {os.cpu_count()} cores ({platform.machine()}), Linux {platform.release()}",
        f"* Python {platform.python_version()}, torch {torch.__version__}, grpcio {grpc.__version__}",
        f"* arena: {_ARENA_MIB} MiB; refs travel over gRPC on a Unix socket; producer and consumer share the device",
    ]


def _memory() -> str:
    if peer.DEVICE.type == "cpu":
        return "of the host, in the place of a GPU's: a rehearsal"
    import cupy

    properties = torch.cuda.get_device_properties(peer.DEVICE)
    return (
        f"{properties.name}, {properties.total_memory // MIB} MiB; driver {_driver()}, CUDA {torch.version.cuda}, "
        f"CuPy {cupy.__version__}"
    )


def _driver() -> str:
    if (program := shutil.which("nvidia-smi")) is None:
        return "unknown"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().partition("\n")[0]


def _noise(nbytes: int, dtype: str = "UINT8") -> torch.Tensor:
    bits = torch.randint(0, 2 if dtype == "BOOL" else 256, (nbytes,), dtype=torch.uint8, device=peer.DEVICE)
    return bits.view(TORCH_DTYPES[dtype]).reshape(16, -1)


def _publish(
    publisher: TensorPublisher, tensor: torch.Tensor, rung: tensor_pb2.Rung.ValueType = tensor_pb2.CUDA_IPC
) -> tensor_pb2.TensorRef:
    return publisher.publish(tensor, rung, peer.LEASE_S)


def _measure_exact(report: Report, shm: Path, scale: Scale) -> None:
    report.section("Are tensors right?")
    wrong, sent = [], 0
    with _attached(shm) as (consumer, publisher):
        for dtype in TORCH_DTYPES:
            for nbytes in scale.sizes:
                tensor = _noise(nbytes, dtype)
                ref = _publish(publisher, tensor)
                if consumer.call("Digest", rows_of(ref).SerializeToString()) != digest(tensor):
                    wrong.append(f"{dtype} {nbytes}")
                publisher.release([ref.slot])
                sent += 1
        opened = consumer.state()["opened"]
    sizes = ", ".join(_size(nbytes) for nbytes in scale.sizes)
    report.check(
        not wrong, f"{sent} tensors arrived bit for bit: {', '.join(TORCH_DTYPES)}, each of {sizes} {wrong or ''}"
    )
    report.check(opened == 1, f"the handle was opened once for all of them (opened: {opened})")


def _measure_expandable(report: Report, scale: Scale) -> None:
    report.section("With PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report"
        command = [sys.executable, "-m", "bench.gpu.transport", "--only-exact", "--out", str(out)]
        command += ["--largest-mib", str(max(scale.sizes) // MIB)]
        done = subprocess.run(command, env=os.environ | _EXPANDABLE, capture_output=True, text=True, check=False)
        report.check(done.returncode == 0, "the same holds")
        if out.exists():
            report.lines += [line for line in out.read_text(encoding="utf-8").splitlines() if line.startswith("*")]


def _measure_hand_off(report: Report, consumer: ConsumerProcess, publisher: TensorPublisher, scale: Scale) -> None:
    report.section("What does a hand-off cost?")
    report.lines.append(
        "From a tensor in device memory of one process to a copy in device memory of the other, acknowledged; ms. Both "
        "ways in turn, in one run. `gRPC` sends the bytes themselves: to the host, through the socket, to the device."
    )
    rows: list[tuple[object, ...]] = [("size", "IPC p50", "IPC worst", "gRPC p50", "gRPC worst", "gRPC / IPC, p50")]
    for nbytes in scale.sizes:
        tensor, times = _noise(nbytes), {tensor_pb2.CUDA_IPC: [], tensor_pb2.INLINE: []}  # type: ignore[var-annotated]
        for number in range(scale.repeats_of(nbytes) + 5):
            for rung, measured in times.items():
                started = time.perf_counter()
                ref = _publish(publisher, tensor, rung)
                consumer.call("Gather", rows_of(ref).SerializeToString())
                if number >= 5:
                    measured.append((time.perf_counter() - started) * 1000)
                publisher.release([ref.slot])
        ipc, inline = times.values()
        ratio = statistics.median(inline) / statistics.median(ipc)
        cells = [f"{value:.3f}" for way in (ipc, inline) for value in (statistics.median(way), max(way))]
        rows.append((_size(nbytes), *cells, f"{ratio:.1f}"))
    report.table(*rows)


def _measure_copy_out(report: Report, consumer: ConsumerProcess, publisher: TensorPublisher, scale: Scale) -> None:
    report.section("How fast is the copy out of the arena?")
    report.lines.append("In the consumer, until the copy is complete and proven; GB/s, median, beside a local copy.")
    rows: list[tuple[object, ...]] = [("size", "out of the arena", "local", "share")]
    for nbytes in scale.sizes:
        ref = _publish(publisher, _noise(nbytes))
        seconds = json.loads(consumer.call("Time", rows_of(ref).SerializeToString()))
        out, local = (nbytes / seconds[way] / 1e9 for way in ("out", "local"))
        rows.append((_size(nbytes), f"{out:.1f}", f"{local:.1f}", f"{out / local:.0%}"))
        publisher.release([ref.slot])
    report.table(*rows)


def _measure_leaks(
    report: Report, shm: Path, consumer: ConsumerProcess, publisher: TensorPublisher, messages: int
) -> None:
    report.section(f"Does anything grow over {messages} messages?")
    tensor = _noise(_MESSAGE_BYTES)

    def send(count: int) -> dict[str, int]:
        for _ in range(count):
            ref = _publish(publisher, tensor)
            consumer.call("Gather", rows_of(ref).SerializeToString())
            publisher.release([ref.slot])
        states = {"producer": process_state(), "consumer": consumer.state()}
        state = {f"{name}: {what}": n for name, of in states.items() for what, n in of.items()}
        return state | {"GPU MiB used": device_mib_used(), "files in shared memory": len(list(shm.iterdir()))}

    before = send(messages // 10)
    after = send(messages - messages // 10)
    report.table(
        ("", f"after {messages // 10}", f"after {messages}"), *[(what, before[what], after[what]) for what in before]
    )
    for what in before:
        slack = _SLACK_MIB if "MiB" in what else 0
        report.check(after[what] <= before[what] + slack, f"flat: {what}")


def _measure_killed_consumers(report: Report, shm: Path, kills: int) -> None:
    report.section(f"{kills} consumers killed while they read")
    before = device_mib_used()
    consumers = [ConsumerProcess(shm, shm / f"socket-{number}") for number in range(kills)]
    wrong = 0
    with producing(shm, 64) as (arena, publisher):
        for consumer in consumers:
            consumer.wait_ready()
            reason, tensor = consumer.attach(publisher), _noise(4 * MIB)
            ref = _publish(publisher, tensor)
            part = rows_of(ref).SerializeToString()
            wrong += bool(reason) or consumer.call("Digest", part) != digest(tensor)
            _kill_soon(consumer.process)
            with contextlib.suppress(grpc.RpcError):
                while True:
                    consumer.call("Gather", part)
            consumer.stop()
            publisher.release([ref.slot])
        statistics_ = arena.statistics()
        report.check(wrong == 0, "each consumer read what was published until it was killed")
        report.check(statistics_.free == arena.layout.slot_count, "every slot of the producer is free afterwards")
    _check_given_back(report, before)


def _measure_killed_producers(report: Report, shm: Path, kills: int) -> None:
    report.section(f"{kills} producers killed while they publish")
    # CUDA loads kernels when they are first used, and keeps their memory.
    _ = bool((_noise(4 * MIB) == 1).all())
    before, torn, read = device_mib_used(), 0, 0
    producers = [ProducerProcess(shm) for _ in range(kills)]
    with reading(shm) as (ipc, reader):
        for producer in producers:
            announced = producer.wait_ready()
            reader.open(announced.arena)
            _kill_soon(producer.process)
            value = 0
            with contextlib.suppress(EOFError, OSError):
                while True:
                    ref = tensor_pb2.TensorRef.FromString(producer.pipe.recv_bytes())
                    torn += not bool((gather(reader, rows_of(ref)) == value % 251).all())
                    value += 1
                    producer.pipe.send_bytes(b"")
            read += value
            reader.close(announced.arena.arena_id, announced.arena.epoch)
            producer.kill()
        report.check(torn == 0, f"none of the {read} tensors read was torn")
        report.check(ipc.opened == ipc.closed == kills, f"{ipc.opened} handles opened, {ipc.closed} closed")
    remove_orphans(shm)
    left = [path.name for path in shm.iterdir() if path.name.startswith("mosel-arena-")]
    report.check(not left, "no arena is left in shared memory")
    _check_given_back(report, before)


def _kill_soon(process: BaseProcess) -> None:
    threading.Timer(random.uniform(0, 0.05), process.kill).start()  # noqa: S311


def _check_given_back(report: Report, before: int) -> None:
    give_up = time.monotonic() + 30
    while device_mib_used() > before + _SLACK_MIB and time.monotonic() < give_up:
        time.sleep(0.2)
    after = device_mib_used()
    report.check(after <= before + _SLACK_MIB, f"device memory was given back: {before} MiB used before, {after} after")


def _size(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


if __name__ == "__main__":
    main()
