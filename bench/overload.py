"""What becomes of goodput, latencies and memory under several times the load that can be served.

One core computes the model, which takes at least 10 ms of it for each request; load generator and edge (gateway and
selector) share another. First steps of load find the most requests that are answered in time per second, then so many
times more arrive for a minute, open loop.
"""

import argparse
import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from bench.items import items_of
from bench.load.run import table as steps_table
from bench.load.steps import Plan, Step, run_steps
from bench.machine import machine_line
from bench.null_model import write_null_model
from bench.outcomes import Ending
from bench.serving import Gateway, Jobs
from mosel.config import FREE_PORTS, Settings, load_settings
from mosel.errors import ConfigError
from mosel.launcher import Launcher
from mosel.packages.model_package import ModelPackage, find_packages

# Offered loads that are tried for the peak, in multiples of what the model's core can compute.
_LOADS = (0.6, 0.8, 0.9, 1.0, 1.2, 1.5)
_READY_TIMEOUT_S = 120.0
_WARM_UP_S, _SAMPLE_S = 1.0, 1.0
_MIB = 1024 * 1024
_ON_EDGE = ("gateway", "selector", "generator")

console = Console(width=140, highlight=False)


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        busy_ms: processor time that the model takes for an item.
        modality: of the model `digits`, whose payload is sent.
        slo_ms: the deadline of each request.
        loads: tried for the peak, in multiples of what the model's core can compute.
        step_s: length of each of those steps.
        factor: the overload, in multiples of the peak.
        overload_s: its length.
        realtime: whether the kernel prefers all of this to other programs; root may have it so.
    """

    busy_ms: float = 10.0
    modality: str = "image"
    slo_ms: float = 100.0
    loads: tuple[float, ...] = _LOADS
    step_s: float = 6.0
    factor: float = 3.0
    overload_s: float = 60.0
    realtime: bool = False

    def plan(self, rates: Sequence[float], seconds: float, warm_up_s: float = 0.0) -> Plan:
        """Single requests at these rates."""
        return Plan(tuple(rates), seconds, warm_up_s, latency_slo_ms=self.slo_ms)


@dataclass(frozen=True)
class Result:
    """What was measured.

    Attributes:
        steps: those that look for the peak.
        overload: several times the peak.
        memory: resident MiB of each process, each second of the overload.
        model_s: processor seconds that the model had meanwhile.
        busy_ms: of them, what it takes for a request.
        others: share 0..1 of each core, `model` and `edge`, that other programs had meanwhile.
    """

    steps: Sequence[Step]
    overload: Step
    memory: Mapping[str, Sequence[float]]
    model_s: float
    busy_ms: float
    others: Mapping[str, float]

    @property
    def peak(self) -> float:
        """The most requests per second that were answered in time."""
        return max(step.goodput for step in self.steps)

    @property
    def useful(self) -> float:
        """The share of the model's processor time under overload that went into answers in time."""
        return self.overload.goodput * self.overload.seconds * self.busy_ms / 1000 / self.model_s


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy-ms", type=float, default=10.0, help="processor time that the model takes for an item")
    parser.add_argument("--modality", default="image", help="of the model digits, whose payload is sent")
    parser.add_argument("--slo-ms", type=float, default=100.0, help="deadline of each request")
    parser.add_argument("--factor", type=float, default=3.0, help="the overload, in multiples of the peak")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the overload")
    parser.add_argument("--step-seconds", type=float, default=6.0, help="length of each step before it")
    parser.add_argument("--realtime", action="store_true", help="before other programs on the same cores (root only)")
    given = parser.parse_args()
    options = Options(
        busy_ms=given.busy_ms,
        modality=given.modality,
        slo_ms=given.slo_ms,
        step_s=given.step_seconds,
        factor=given.factor,
        overload_s=given.seconds,
        realtime=given.realtime,
    )
    with tempfile.TemporaryDirectory() as folder, served(Path(folder), options) as (launcher, package):
        console.print(
            machine_line(),
            f"a model of {options.busy_ms:g} ms for an item on one core, generator and edge on another"
            f"{', before other programs' if options.realtime else ''}; one item of "
            f"{sum(payload[:1].nbytes for payload in items_of(package).payloads.values())} bytes a request",
            sep="\n",
        )
        result = measure(launcher, package, options)
    console.print(steps_table(options.plan((), options.step_s), result.steps))
    console.print(_overload_table(result, options), _memory_table(result.memory))


@contextlib.contextmanager
def served(folder: Path, options: Options) -> Iterator[tuple[Launcher, ModelPackage]]:
    """The services with such a model on one core, and edge and this process on another.

    Args:
        folder: for the model and its profile.
        options: what the model takes.

    Raises:
        ConfigError: this process may use one core only, or may not have it before others.
    """
    like = find_packages(load_settings().models_dir, ("digits",))["digits"]
    package = write_null_model(folder / "models", like, (options.modality,), options.busy_ms)
    with _cores() as (model_core, edge_core):
        scheduled = os.SCHED_RR if options.realtime else os.SCHED_OTHER
        _pin(os.getpid(), {edge_core}, scheduled)  # what it starts inherits that
        with Launcher(_settings(folder)) as launcher:
            for name, child in launcher.children.items():
                if name not in _ON_EDGE:
                    _pin(child.process.pid, {model_core}, scheduled)
            launcher.wait_ready(_READY_TIMEOUT_S)
            yield launcher, package


def measure(launcher: Launcher, package: ModelPackage, options: Options) -> Result:
    """Looks for the peak, then overloads the services."""
    gateway, jobs = Gateway(launcher.address), Jobs(package.name, package.output.labels, items_of(package))
    rates = [load * 1000 / options.busy_ms for load in options.loads]
    steps = [*run_steps(gateway, jobs, options.plan(rates, options.step_s, _WARM_UP_S))]
    peak = max(step.goodput for step in steps)
    before = _Processors.now(launcher)
    with _Memory(launcher) as memory:
        (overload,) = run_steps(gateway, jobs, options.plan([options.factor * peak], options.overload_s))
    used = _Processors.now(launcher).since(before)
    model_s = used.processes[f"encoder/{options.modality}"]
    return Result(steps, overload, memory.mib, model_s, options.busy_ms, used.others())


def _settings(folder: Path) -> Settings:
    # As many workers as cores: two on one core would only make each call take twice as long.
    return load_settings(
        models_dir=folder / "models", profiles_dir=folder / "profiles", workers=1, device="cpu", gateway=FREE_PORTS
    )


@contextlib.contextmanager
def _cores() -> Iterator[tuple[int, int]]:
    """Two cores of those that this process may use, which it may use all of again in the end."""
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        raise ConfigError("an overload is measured on two cores; this process may use one only")
    try:
        model_core, edge_core, *_ = sorted(cores)
        yield model_core, edge_core
    finally:
        _pin(os.getpid(), cores, os.SCHED_OTHER)


def _pin(pid: int, cores: set[int], scheduled: int) -> None:
    """Keeps every thread of a process on these cores under a policy of the kernel's, and those that it starts later."""
    priority = os.sched_param(int(scheduled != os.SCHED_OTHER))
    for thread in psutil.Process(pid).threads():
        try:
            os.sched_setaffinity(thread.id, cores)
            os.sched_setscheduler(thread.id, scheduled, priority)
        except ProcessLookupError:
            continue  # it has ended meanwhile
        except PermissionError:
            raise ConfigError("--realtime: this user may not go before other programs; root may") from None


@dataclass(frozen=True)
class _Processors:
    """Processor seconds: of each process, and of everything on its core."""

    at: float
    processes: dict[str, float]
    cores: dict[str, float]

    @classmethod
    def now(cls, launcher: Launcher) -> "_Processors":
        processes = _processes(launcher)
        used = {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
        (model,), (edge,) = (os.sched_getaffinity(processes[name].pid) for name in ("fusion", "gateway"))
        times = psutil.cpu_times(percpu=True)
        busy = {
            name: sum(times[core]) - times[core].idle - times[core].iowait
            for name, core in (("model", model), ("edge", edge))
        }
        return cls(time.monotonic(), used, busy)

    def since(self, before: "_Processors") -> "_Processors":
        processes = {name: seconds - before.processes[name] for name, seconds in self.processes.items()}
        cores = {name: seconds - before.cores[name] for name, seconds in self.cores.items()}
        return _Processors(self.at - before.at, processes, cores)

    def others(self) -> dict[str, float]:
        """The share of each core that went to other programs."""
        own = {"edge": sum(self.processes[name] for name in _ON_EDGE)}
        own["model"] = sum(self.processes.values()) - own["edge"]
        return {name: max(busy - own[name], 0.0) / self.at for name, busy in self.cores.items()}


def _processes(launcher: Launcher) -> dict[str, psutil.Process]:
    processes = {name: psutil.Process(child.process.pid) for name, child in launcher.children.items()}
    return processes | {"generator": psutil.Process()}


class _Memory:
    """Notes the resident memory of all processes each second inside the block; `mib` by name."""

    def __init__(self, launcher: Launcher) -> None:
        self._processes = _processes(launcher)
        self.mib: dict[str, list[float]] = {name: [] for name in self._processes}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory")

    def __enter__(self) -> "_Memory":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            for name, process in self._processes.items():
                self.mib[name].append(process.memory_info().rss / _MIB)
            if self._over.wait(_SAMPLE_S):
                return


def _overload_table(result: Result, options: Options) -> Table:
    overload, admitted = result.overload, (Ending.ANSWERED, Ending.EXPIRED)
    title = f"{options.factor:g} times the peak for {overload.seconds:g} s: {overload.rate:.0f} requests/s"
    shown = Table(title=title, box=box.SIMPLE_HEAD, show_header=False)
    (p50, p99), (refused_p50, refused_p99) = (
        [overload.ms(percent, *endings) for percent in (50, 99)] for endings in (admitted, (Ending.REFUSED,))
    )
    rows = {
        "peak goodput": f"{result.peak:.1f} requests/s in time",
        "goodput under overload": f"{overload.goodput:.1f} requests/s in time, {overload.goodput / result.peak:.1%}",
        "processor time of the model": f"{result.model_s:.1f} s, {result.useful:.1%} of it for answers in time",
        "admitted": f"{sum(map(overload.count, admitted))}, of which late {overload.summary.endings.get('late', 0)}, "
        f"expired {overload.count(Ending.EXPIRED)}",
        "p50, p99 of admitted": f"{p50:.1f} ms, {p99:.1f} ms; deadline {options.slo_ms:g} ms",
        "refused": f"{overload.count(Ending.REFUSED)}, p50 {refused_p50:.2f} ms, p99 {refused_p99:.2f} ms",
        "other programs had": ", ".join(f"{share:.0%} of the {core}'s core" for core, share in result.others.items()),
        "failed otherwise": str(overload.count(Ending.FAILED)),
        "sent late by the generator": f"p50 {overload.lag_ms(50):.2f} ms, p99 {overload.lag_ms(99):.2f} ms",
    }
    for name, figures in rows.items():
        shown.add_row(name, figures)
    return shown


def _memory_table(memory: Mapping[str, Sequence[float]]) -> Table:
    """Where each process began and ended, and how much a minute it grew over the second half."""
    shown = Table(title="resident memory during the overload (MiB)", box=box.SIMPLE_HEAD)
    for column in ("process", "at first", "half-way", "in the end", "a minute, second half"):
        shown.add_column(column, justify="left" if column == "process" else "right")
    for name, mib in memory.items():
        half = np.asarray(mib[len(mib) // 2 :])
        slope = float(np.polyfit(np.arange(len(half)) * _SAMPLE_S / 60, half, 1)[0]) if len(half) > 1 else 0.0
        shown.add_row(name, *(f"{value:.1f}" for value in (mib[0], half[0], mib[-1])), f"{slope:+.2f}")
    return shown


if __name__ == "__main__":
    main()
