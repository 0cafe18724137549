"""What each hop of a request costs, from requests that turn back after one hop, two, and all of them."""

import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from mosel import Client
from mosel.compute.networks import example_payload
from mosel.errors import Unreachable
from mosel.launcher import Launcher
from mosel.packages.model_package import ModelPackage

_CALLS = 300


def measure_hops(launcher: Launcher, package: ModelPackage, console: Console) -> None:
    """Prints the median milliseconds that each hop adds to a job of one item, one in flight.

    Args:
        launcher: running services whose networks do nothing.
        package: their model.
        console: where to print.
    """
    payloads = {modality: example_payload(package, modality, 1) for modality in package.modalities}
    first = min(payloads)
    with Client(launcher.address, retries=None) as client:

        def refused() -> None:
            try:
                client.predict(package.name, {first: payloads[first]}, min_accuracy=1.0)
            except Unreachable:
                return
            raise AssertionError("a network that does nothing is not always right")

        steps: list[tuple[str, Callable[[], object]]] = [
            ("client - gateway", client.models),
            ("gateway - selector (a job that is refused)", refused),
            ("selector - encoder, selector - fusion", lambda: client.predict(package.name, {first: payloads[first]})),
            ("the other encoders, in parallel", lambda: client.predict(package.name, payloads)),
        ]
        table = Table("hop", "ms, p50", "added", title="hops, one job of one item in flight, networks that do nothing")
        before = 0.0
        for name, call in steps:
            after = _median_ms(call)
            table.add_row(name, f"{after:.2f}", f"{after - before:+.2f}")
            before = after
    console.print(table)


def _median_ms(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(_CALLS):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times)
