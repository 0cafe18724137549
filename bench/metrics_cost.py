"""What it costs to be seen: metrics that are scraped, a log line for each request, and traces.

Services whose networks do nothing, with one of these and without, are measured in turn, in short windows; what is
shown is the median of the ratios of neighbouring windows. The processor time of services is steadier than throughput.
"""

import argparse
import contextlib
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
from rich.console import Console
from rich.table import Table

from bench.closed_loop import Load, closed_loop
from bench.null_model import NAME, write_null_model
from mosel.compute.networks import example_payload
from mosel.config import FREE_PORTS, Settings, load_settings
from mosel.launcher import Launcher
from mosel.packages.model_package import ModelPackage, find_packages

# Prometheus asks every 15 s, or less often; here that would be once in some windows and never in others.
_SCRAPE_EVERY_S = 1.0
_IN_FLIGHT = 16

console = Console(width=140)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="digits", help="whose shapes the jobs have")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of windows")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a window")
    arguments = parser.parse_args()
    package = find_packages(load_settings().models_dir, (arguments.model,))[arguments.model]
    with tempfile.TemporaryDirectory() as folder, _sink() as endpoint:
        null = write_null_model(Path(folder), package)
        variants = [
            _Variant("metrics, scraped every second", _settings(folder)),
            _Variant("the same, and a log line for each request", _settings(folder, access_log=True)),
            _Variant("the same, and every request traced", _settings(folder, True, endpoint)),
        ]
        table = Table(
            "beside services that time, log and trace nothing", "jobs/s", "latency", "processor", "ms per job"
        )
        with _Unseen(_settings(folder)) as baseline:
            baseline.wait_ready(120)
            for variant in variants:
                with Launcher(variant.settings) as launcher:
                    launcher.wait_ready(120)
                    pairs = [_pair(baseline, launcher, null, arguments.seconds) for _ in range(arguments.rounds)]
                    table.add_row(variant.name, *_row(pairs))
    console.print(table)
    console.print(
        f"{time.strftime('%Y-%m-%d')}, {arguments.rounds} pairs of windows of {arguments.seconds:g} s, jobs of "
        f"one item, {_IN_FLIGHT} in flight (latency: one)"
    )


@dataclass(frozen=True)
class _Variant:
    name: str
    settings: Settings


@dataclass(frozen=True)
class _Seen:
    """Windows with jobs in flight that saturate the services, and with one."""

    full: Load
    single: Load

    @property
    def processor_ms(self) -> float:
        """Of all services together, for one job."""
        return sum(ms for name, ms in self.full.cpu_ms.items() if name != "client")


class _Unseen(Launcher):
    def _start(self, name: str, module: str, *arguments: str) -> None:
        super()._start(name, "bench.unseen", module, *arguments)


def _settings(folder: str, access_log: bool = False, endpoint: str = "") -> Settings:
    return load_settings(
        models_dir=Path(folder),
        gateway=FREE_PORTS | {"access_log": access_log},
        tracing={"otlp_endpoint": endpoint},
    )


def _pair(baseline: Launcher, launcher: Launcher, package: ModelPackage, seconds: float) -> tuple[_Seen, _Seen]:
    without = _measure(baseline, package, seconds)
    with _scraping(launcher.metrics_address):
        return without, _measure(launcher, package, seconds)


def _measure(launcher: Launcher, package: ModelPackage, seconds: float) -> _Seen:
    payloads = {modality: example_payload(package, modality, 1) for modality in package.modalities}
    full = closed_loop(launcher, NAME, payloads, _IN_FLIGHT, seconds)
    return _Seen(full, closed_loop(launcher, NAME, payloads, 1, seconds / 2))


def _row(pairs: list[tuple[_Seen, _Seen]]) -> list[str]:
    def ratio(values: list[float]) -> str:
        return f"x {statistics.median(values):.3f} ({min(values):.2f} to {max(values):.2f})"

    jobs = [seen.full.items_per_s / without.full.items_per_s for without, seen in pairs]
    latency = [seen.single.latency_ms / without.single.latency_ms for without, seen in pairs]
    processor = [seen.processor_ms / without.processor_ms for without, seen in pairs]
    before, after = (statistics.median(pair[i].processor_ms for pair in pairs) for i in (0, 1))
    return [ratio(jobs), ratio(latency), ratio(processor), f"{before:.2f} -> {after:.2f}"]


@contextlib.contextmanager
def _scraping(url: str) -> Iterator[None]:
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(_SCRAPE_EVERY_S):
            with urllib.request.urlopen(url) as page:  # noqa: S310 (our own)
                page.read()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def _sink() -> Iterator[str]:
    """A collector that looks at nothing; its address."""
    server = grpc.server(ThreadPoolExecutor(2))
    take: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
    service = "opentelemetry.proto.collector.trace.v1.TraceService"
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {"Export": take})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop(None)


if __name__ == "__main__":
    main()
