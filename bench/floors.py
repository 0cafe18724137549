"""Do accuracy floors hold on labelled items? Jobs at floors of a fixed grid, on real services, against their labels.

At each floor every test item is sent once, in jobs; `effort = cheapest`, so that nothing hides behind spare time. The
measured accuracy should be at least the floor minus 1.96 standard errors, by a bootstrap over source recordings.
"""

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

import uvloop
from rich import box
from rich.console import Console
from rich.table import Table

from bench.accuracy import Scored, standard_error
from bench.items import Items, items_of
from bench.machine import machine_line
from mosel import AsyncClient
from mosel.config import FREE_PORTS, load_settings
from mosel.errors import FloorUnreachable
from mosel.launcher import Launcher
from mosel.packages.model_package import ModelPackage, find_packages

# Fixed before any run, and no accuracy of a profile.
FLOORS = (0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.925, 0.95, 0.97)
_JOB_ITEMS, _IN_FLIGHT = 8, 4
_READY_TIMEOUT_S = 300.0

console = Console(width=140)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--data", type=Path, help="folder with the recordings")
    parser.add_argument("--items", type=int, default=10_000, help="test items per floor, at most")
    parser.add_argument("--confidence", type=float, default=0.5, help="setting selector.floor_confidence")
    arguments = parser.parse_args()
    selector = {"floor_confidence": arguments.confidence}
    settings = load_settings(models=(arguments.model,), gateway=FREE_PORTS, selector=selector)
    package = find_packages(settings.models_dir, settings.models)[arguments.model]
    items = items_of(package, arguments.data)
    if items.labels is None:
        raise SystemExit(f"error: model '{package.name}' cannot be measured: {items.source}")
    jobs = _jobs(min(arguments.items, len(items.labels)))
    sources = len(set(items.recordings.tolist()))
    console.print(machine_line(), f"model {package.name}: {items.source} from {sources} recordings", sep="\n")
    table = Table(
        title=f"accuracy by floor, confidence {arguments.confidence:g}, jobs of {_JOB_ITEMS} items", box=box.SIMPLE_HEAD
    )
    for column in (
        "floor",
        "expected",
        "measured",
        "standard error",
        "measured - floor",
        "in standard errors",
        "holds",
    ):
        table.add_column(column, justify="right")
    with Launcher(settings) as launcher:
        launcher.wait_ready(_READY_TIMEOUT_S)
        for floor in FLOORS:
            table.add_row(f"{floor:g}", *_measure(launcher.address, package, items, jobs, floor))
    console.print(table)


def _jobs(items: int) -> list[slice]:
    return [slice(start, min(start + _JOB_ITEMS, items)) for start in range(0, items, _JOB_ITEMS)]


def _measure(address: str, package: ModelPackage, items: Items, jobs: Sequence[slice], floor: float) -> list[str]:
    try:
        expected, scored = uvloop.run(_send(address, package, items, jobs, floor))
    except ExceptionGroup as errors:
        if errors.subgroup(FloorUnreachable) is None:
            raise
        return ["out of reach"] + [""] * 5
    measured, error = sum(right for _, right in scored) / len(scored), standard_error(scored)
    above = measured - floor
    holds = "yes" if above >= -1.96 * error else "no"
    return [f"{expected:.4f}", f"{measured:.4f}", f"{error:.4f}", f"{above:+.4f}", f"{above / error:+.1f}", holds]


async def _send(
    address: str, package: ModelPackage, items: Items, jobs: Sequence[slice], floor: float
) -> tuple[float, Scored]:
    """The mean expected accuracy, and what became of each item."""
    left, scored, expected = iter(jobs), list[tuple[int, bool]](), 0.0

    async def caller(client: AsyncClient) -> None:
        nonlocal expected
        for rows in left:
            prediction = await client.predict(package.name, items.payloads_of(rows), min_accuracy=floor)
            scored.extend(items.scored(rows, prediction.labels, package.output.labels))
            expected += prediction.expected_accuracy * len(prediction.modality_sets)

    async with AsyncClient(address, retries=None) as client, asyncio.TaskGroup() as group:
        for _ in range(_IN_FLIGHT):
            group.create_task(caller(client))
    return expected / len(scored), scored


if __name__ == "__main__":
    main()
