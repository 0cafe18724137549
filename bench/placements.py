"""All services in one process against each in its own: speed, memory and start, side by side.

python -m bench.placements

Windows of both placements alternate, and medians are shown.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.closed_loop import Load, closed_loop
from bench.machine import machine_line
from bench.null_model import NAME as NOTHING
from bench.null_model import write_null_model
from mosel.compute.networks import example_payload
from mosel.config import FREE_PORTS, PLACEMENTS, Placement, Settings, load_settings
from mosel.launcher import Launcher
from mosel.packages.model_package import find_packages

# Model, items of a job, jobs in flight.
_LOADS = ((NOTHING, 1, 1), (NOTHING, 1, 8), (NOTHING, 32, 4), ("digits", 1, 16), ("digits", 8, 8), ("digits", 32, 6))
_MIB = 1024 * 1024

console = Console(width=120)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m bench.placements", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="windows of each kind")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a window")
    arguments = parser.parse_args()
    package = find_packages(load_settings().models_dir, ("digits",))["digits"]
    payloads = {n: {m: example_payload(package, m, n) for m in package.modalities} for n in (1, 8, 32)}
    loads: dict[tuple[Placement, int], list[Load]] = defaultdict(list)
    table = Table("", *PLACEMENTS, "single / services", title=machine_line())
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_null_model(folder, package)
        running = {
            (placement, model): stack.enter_context(_running(settings.model_copy(update={"placement": placement})))
            for placement in PLACEMENTS
            for model, settings in (
                (NOTHING, load_settings(models_dir=folder, gateway=FREE_PORTS)),
                ("digits", load_settings(models=("digits",), gateway=FREE_PORTS)),
            )
        }
        _add(table, "digits, ready again after, s", [running[p, "digits"][1] for p in PLACEMENTS], "{:.1f}")
        kinds = [(p, at) for at in range(len(_LOADS)) for p in PLACEMENTS]
        for _ in track(range(arguments.rounds), "measuring", console=console, transient=True):
            for placement, at in kinds:
                model, items, in_flight = _LOADS[at]
                launcher, _ = running[placement, model]
                load = closed_loop(launcher, model, payloads[items], in_flight, arguments.seconds)
                loads[placement, at].append(load)
        own = [_own_mib(running[p, "digits"][0]) for p in PLACEMENTS]
        _add(table, "digits, memory of the processes alone, MiB", own, "{:.0f}")
        reserved = [_reserved_mib(running[p, "digits"][0]) for p in PLACEMENTS]
        table.add_row("digits, reserved in shared memory, MiB", *(f"{mib:.0f}" for mib in reserved), "")
    for at, (model, items, in_flight) in enumerate(_LOADS):
        name = f"{model}, jobs of {items}, {in_flight} in flight"
        latencies = [statistics.median(load.latency_ms for load in loads[p, at]) for p in PLACEMENTS]
        rates = [statistics.median(load.items_per_s for load in loads[p, at]) for p in PLACEMENTS]
        _add(table, f"{name}, ms", latencies, "{:.2f}")
        _add(table, f"{name}, items/s", rates, "{:.0f}")
    console.print(table)


@contextlib.contextmanager
def _running(settings: Settings) -> Iterator[tuple[Launcher, float]]:
    """Services that are ready, and how many seconds that took when nothing had to be measured."""
    with tempfile.TemporaryDirectory(dir=settings.transport.shm_dir, prefix="mosel-bench-") as folder:
        transport = settings.transport.model_copy(update={"shm_dir": Path(folder)})
        settings = settings.model_copy(update={"transport": transport})
        with Launcher(settings) as launcher:
            # The first start measures latencies and forms, and keeps them.
            launcher.wait_ready(300)
        with Launcher(settings) as launcher:
            started = time.perf_counter()
            launcher.wait_ready(300)
            yield launcher, time.perf_counter() - started


def _own_mib(launcher: Launcher) -> float:
    """What the processes share with no other."""
    children = launcher.children.values()
    return sum(psutil.Process(child.process.pid).memory_full_info().uss for child in children) / _MIB


def _reserved_mib(launcher: Launcher) -> float:
    """Of arenas."""
    files = (file for file in launcher.settings.transport.shm_dir.rglob("*") if file.is_file())
    return sum(file.stat().st_blocks * 512 for file in files) / _MIB


def _add(table: Table, name: str, values: list[float], form: str) -> None:
    table.add_row(name, *(form.format(value) for value in values), f"{values[0] / values[1]:.2f}")


if __name__ == "__main__":
    main()
