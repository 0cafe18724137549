"""What becomes of goodput, latencies and memory under several times the load that can be served.

A real model, nothing pinned: the services, and a load generator in a process of its own, share the cores. First closed
loops find what the services can do; then calls come open loop, at multiples of that, each with a deadline. In the same
run a bare grpc.aio server gets the same: the same networks, one fixed modality set, and a fixed number of calls under
way beyond which it refuses. Rates that the generator does not hold are marked, and say nothing.

python -m bench.overload --factors 0.5 1 2 4 8 --items 1 4
"""

import argparse
import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from bench.bare import Bare
from bench.closed_loop import Payloads, closed_loop
from bench.items import items_of
from bench.machine import machine_line
from bench.open_loop import OpenLoop, Window
from mosel import Client
from mosel.config import FREE_PORTS, PLACEMENTS, Placement, load_settings
from mosel.launcher import Launcher
from mosel.modality import ModalitySet, parse_set
from mosel.packages.model_package import ModelPackage, find_packages
from mosel.tensors import to_proto
from mosel.v1 import gateway_pb2

_READY_TIMEOUT_S, _WARM_UP_S, _SAMPLE_S = 300.0, 1.0, 0.5
# The same calls again and again.
_REQUESTS = 64
# As many jobs as a closed loop keeps under way to find what the services can do, and as the bare server lets in.
_IN_FLIGHT = 16
_MIB = 1024 * 1024

console = Console(width=140, highlight=False)


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        model: of the reference models, or of those in the models folder.
        placement: of the services.
        items: of each job.
        floor: of each job, 0..1, or None.
        slo_ms: the deadline of each call.
        factors: loads, in multiples of what the services can do.
        seconds: length of each.
    """

    model: str = "digits"
    placement: Placement = "single"
    items: int = 1
    floor: float | None = 0.85
    slo_ms: float = 100.0
    factors: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    seconds: float = 6.0


@dataclass(frozen=True)
class Measured:
    """One load.

    Attributes:
        factor: in multiples of what the services can do.
        window: what became of its calls.
        bare: the same of the bare server.
        before_mib, after_mib: resident memory of the services before it, and when it was over.
    """

    factor: float
    window: Window
    bare: Window
    before_mib: float
    after_mib: float


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=PLACEMENTS)
    parser.add_argument("--items", type=int, nargs="+", default=[1, 4], help="of each job")
    parser.add_argument("--floor", type=float, default=0.85, help="accuracy floor of each job; 0: none")
    parser.add_argument("--slo-ms", type=float, default=100.0, help="deadline of each call")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each load")
    given = parser.parse_args()
    console.print(machine_line())
    for placement in given.placements:
        for items in given.items:
            floor, factors = given.floor or None, tuple(given.factors)
            options = Options(given.model, placement, items, floor, given.slo_ms, factors, given.seconds)
            with served(options) as (launcher, package):
                rate, found = measure(launcher, package, options)
            console.print(_table(options, rate, found))


@contextlib.contextmanager
def served(options: Options) -> Iterator[tuple[Launcher, ModelPackage]]:
    """The services, ready, on free ports; they expect floors in expectation only, as the bare server does."""
    settings = load_settings(
        models=(options.model,),
        gateway=FREE_PORTS,
        placement=options.placement,
        selector={"floor_confidence": 0.5},
    )
    package = find_packages(settings.models_dir, settings.models)[options.model]
    with Launcher(settings) as launcher:
        launcher.wait_ready(_READY_TIMEOUT_S)
        yield launcher, package


def measure(launcher: Launcher, package: ModelPackage, options: Options) -> tuple[float, list[Measured]]:
    """What the services can do, in jobs per second, and each load."""
    recorded = items_of(package)
    count = len(recorded.groups)
    chosen = [[(n * options.items + i) % count for i in range(options.items)] for n in range(_REQUESTS)]
    jobs = [{m: rows[some] for m, rows in recorded.payloads.items()} for some in chosen]
    requests = [_request(package, payloads, options) for payloads in jobs]
    rate, modality_set = _capacity(launcher, package, jobs[0], options)
    found = []
    with OpenLoop() as generator, Bare(package.folder, launcher.settings, modality_set, _IN_FLIGHT) as bare:
        for address in (launcher.address, bare.address):
            generator.run(address, requests, rate / 2, _WARM_UP_S, options.slo_ms / 1000)
        for factor in options.factors:
            load = requests, factor * rate, options.seconds, options.slo_ms / 1000
            with _Memory(launcher) as memory:
                window = generator.run(launcher.address, *load)
            found.append(Measured(factor, window, generator.run(bare.address, *load), memory.before, memory.most))
    return rate, found


def _request(package: ModelPackage, payloads: Payloads, options: Options) -> bytes:
    request = gateway_pb2.PredictRequest(model=package.name, min_accuracy=options.floor, effort=gateway_pb2.CHEAPEST)
    for modality, rows in payloads.items():
        request.payloads[modality].CopyFrom(to_proto(rows))
    return request.SerializeToString()


def _capacity(
    launcher: Launcher, package: ModelPackage, payloads: Payloads, options: Options
) -> tuple[float, ModalitySet]:
    """Jobs per second in a closed loop, and the modality set that most items use."""
    with Client(launcher.address) as client:
        used = client.predict(package.name, payloads, min_accuracy=options.floor, effort="cheapest").modality_sets
    load = closed_loop(launcher, package.name, payloads, _IN_FLIGHT, options.seconds / 2, options.floor)
    return load.items_per_s / options.items, parse_set(max(set(used), key=used.count))


class _Memory:
    """The resident memory of all services together, in MiB, when the block begins, and the most inside it."""

    def __init__(self, launcher: Launcher) -> None:
        self._processes = [psutil.Process(child.process.pid) for child in launcher.children.values()]
        self.before = self.most = self._mib()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory")

    def __enter__(self) -> "_Memory":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            self.most = max(self.most, self._mib())

    def _mib(self) -> float:
        return sum(process.memory_info().rss for process in self._processes) / _MIB


def _table(options: Options, rate: float, found: Sequence[Measured]) -> Table:
    floor = "no floor" if options.floor is None else f"floor {options.floor:g}"
    title = (
        f"{options.model}, {options.placement}: jobs of {options.items}, {floor}, {options.slo_ms:g} ms; "
        f"in a closed loop {rate:.0f} jobs/s"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD)
    columns = (
        "times",
        "calls/s",
        "in time/s",
        "bare in time/s",
        "share of bare",
        "answered p99, ms",
        "refused/s",
        "refused p99, ms",
        "memory, MiB",
        "sent late p99, ms",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for one in found:
        ours, bare = one.window, one.bare
        held = "" if ours.is_held and bare.is_held else " not held"
        table.add_row(
            f"{one.factor:g}{held}",
            f"{ours.rate:.0f}",
            f"{ours.goodput:.0f}",
            f"{bare.goodput:.0f}",
            f"{ours.goodput / bare.goodput:.2f}" if bare.goodput else "",
            f"{ours.answered_p99_ms:.0f}",
            f"{ours.refused:.0f}",
            f"{ours.refused_p99_ms:.0f}",
            f"{one.before_mib:.0f} to {one.after_mib:.0f}",
            f"{ours.lag_ms:.1f}, {bare.lag_ms:.1f}",
        )
    return table


if __name__ == "__main__":
    main()
