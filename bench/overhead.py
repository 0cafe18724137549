"""What the services cost: the networks called directly, the services, and services whose networks do nothing.

The three are measured side by side, in turn, in short windows of one run; medians are shown.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.closed_loop import Load, closed_loop
from bench.direct import Direct
from bench.hops import measure_hops
from bench.null_model import NAME as NOTHING
from bench.null_model import write_null_model
from mosel.compute.networks import example_payload
from mosel.config import FREE_PORTS, Settings, load_settings
from mosel.launcher import Launcher
from mosel.packages.model_package import ModelPackage, find_packages

# Jobs in flight that saturate the services, by job size; a single one shows the latency of an unloaded system.
_IN_FLIGHT = {1: 16, 8: 8, 32: 6}
_COLUMNS = ("direct", "services", "nothing")

console = Console(width=140)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--rounds", type=int, default=5, help="windows of each kind; medians are shown")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a window")
    arguments = parser.parse_args()
    package = find_packages(load_settings().models_dir, (arguments.model,))[arguments.model]
    with tempfile.TemporaryDirectory() as folder:
        null_package = write_null_model(Path(folder), package)
        settings = load_settings(models=(package.name,), gateway=FREE_PORTS)
        null_settings = load_settings(models_dir=Path(folder), gateway=FREE_PORTS)
        with (
            Launcher(settings) as real,
            Launcher(null_settings) as null,
            Direct(package.folder, settings) as direct,
        ):
            for launcher in (real, null):
                launcher.wait_ready(120)
            bench = _Bench(package, null_package, real, null, direct, arguments.seconds)
            bench.run(arguments.rounds)
            _print_machine(settings, package, arguments.rounds, arguments.seconds)
            bench.print_throughput()
            bench.print_latency()
            bench.print_cpu()
            measure_hops(null, null_package, console)


class _Bench:
    """The measured windows, by (column, job size, saturated or not)."""

    def __init__(
        self,
        package: ModelPackage,
        null_package: ModelPackage,
        real: Launcher,
        null: Launcher,
        direct: Direct,
        seconds: float,
    ) -> None:
        self._services = {"services": (real, package.name), "nothing": (null, NOTHING)}
        self._direct, self._seconds = direct, seconds
        self._payloads = {
            size: {modality: example_payload(package, modality, size) for modality in package.modalities}
            for size in _IN_FLIGHT
        }
        self._loads: dict[tuple[str, int, bool], list[Load]] = defaultdict(list)
        self.direct_threads = _fastest_threads(direct, min(seconds, 0.7))

    def run(self, rounds: int) -> None:
        """Measures every kind of window in turn, so many times."""
        kinds = [(c, size, full) for size in _IN_FLIGHT for full in (True, False) for c in _COLUMNS]
        for _ in track(range(rounds), "measuring", console=console, transient=True):
            for column, size, saturated in kinds:
                self._loads[column, size, saturated].append(self._measure(column, size, saturated))

    def _measure(self, column: str, size: int, saturated: bool) -> Load:
        if column == "direct":
            times = self._direct.run(size, self.direct_threads[size], self._seconds)
            return Load(size * len(times) / sum(times), statistics.median(times) * 1000, {})
        launcher, model = self._services[column]
        in_flight = _IN_FLIGHT[size] if saturated else 1
        return closed_loop(launcher, model, self._payloads[size], in_flight, self._seconds)

    def _median(self, column: str, size: int, saturated: bool, what: str) -> float:
        return float(statistics.median(getattr(load, what) for load in self._loads[column, size, saturated]))

    def print_throughput(self) -> None:
        """Items per second, saturated, and how much of the direct call's the services reach."""
        table = Table("job size", *_COLUMNS, "services / direct", title="throughput, saturated (items/s)")
        for size in _IN_FLIGHT:
            values = [self._median(column, size, True, "items_per_s") for column in _COLUMNS]
            table.add_row(str(size), *(f"{value:.0f}" for value in values), f"{values[1] / values[0]:.0%}")
        console.print(table)

    def print_latency(self) -> None:
        """Milliseconds per job with one in flight, and what the services add."""
        table = Table("job size", *_COLUMNS, "services - direct", title="latency, one job in flight (ms, p50)")
        for size in _IN_FLIGHT:
            values = [self._median(column, size, False, "latency_ms") for column in _COLUMNS]
            table.add_row(str(size), *(f"{value:.2f}" for value in values), f"{values[1] - values[0]:+.2f}")
        console.print(table)

    def print_cpu(self) -> None:
        """Where the processor time of a saturated job goes."""
        names = sorted({name for load in self._loads["services", 1, True] for name in load.cpu_ms})
        table = Table("services, job size", *names, "sum", title="processor time per job, saturated (ms)")
        for column in ("services", "nothing"):
            for size in _IN_FLIGHT:
                loads = self._loads[column, size, True]
                values = [statistics.median(load.cpu_ms[name] for load in loads) for name in names]
                table.add_row(f"{column} {size}", *(f"{value:.2f}" for value in values), f"{sum(values):.2f}")
        console.print(table)


def _fastest_threads(direct: Direct, seconds: float) -> dict[int, int]:
    """The number of torch threads with which the direct call is fastest, by job size: the hardest limit."""
    candidates = sorted({1, os.cpu_count() or 1, 2 * (os.cpu_count() or 1)})
    return {
        size: min(candidates, key=lambda threads: statistics.median(direct.run(size, threads, seconds)))
        for size in _IN_FLIGHT
    }


def _print_machine(settings: Settings, package: ModelPackage, rounds: int, seconds: float) -> None:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    console.print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), load {load}, Python "
        f"{platform.python_version()}, torch {torch.__version__}; model {package.name}; "
        f"{rounds} windows of {seconds:g} s each; {settings.workers} workers a service, 1 torch thread each"
    )


if __name__ == "__main__":
    main()
