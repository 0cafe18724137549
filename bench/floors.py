"""Do accuracy floors hold on labelled items? Jobs at floors of a fixed grid, on real services, against their labels.

At each floor every item is sent once, in jobs; `effort = cheapest`, so that nothing hides behind spare time. The
measured accuracy should be at least the floor minus 1.645 standard errors, in which items of the same recordings are
alike (`bench.accuracy`). With `--losses` the floors are losses against running everything, and both are run on the same
items.

The items are the test split, whose recordings may be harder than those that certify, or with `--split exchangeable` one
half of the groups of the certifying rows, of which only the other half then certifies.
"""

import argparse
import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop
from rich import box
from rich.console import Console
from rich.table import Table

from bench.accuracy import standard_error
from bench.exchangeable import half_calibrated
from bench.items import Items, items_of
from bench.machine import machine_line
from mosel import AsyncClient
from mosel.config import FREE_PORTS, load_settings
from mosel.errors import FloorUnreachable
from mosel.launcher import Launcher
from mosel.packages.model_package import ModelPackage, find_packages

# Fixed before any run, and no accuracy of a profile.
FLOORS = (0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.925, 0.95, 0.97)
LOSSES = (0.01, 0.02, 0.03, 0.06)
_JOB_ITEMS, _IN_FLIGHT = 8, 4
_READY_TIMEOUT_S = 300.0
_ONE_SIDED = 1.645

Groups = tuple[int, ...]
# Of each item by its number: its groups, and whether its prediction is right.
Answered = dict[int, tuple[Groups, float]]

console = Console(width=140)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--data", type=Path, help="folder with the recordings")
    parser.add_argument("--items", type=int, default=10_000, help="items per floor, at most")
    parser.add_argument("--confidence", type=float, help="setting selector.floor_confidence")
    parser.add_argument("--split", choices=("test", "exchangeable"), default="test", help="which items")
    parser.add_argument("--seed", type=int, default=0, help="of the halves of --split exchangeable")
    parser.add_argument("--losses", action="store_true", help="floors are losses against everything: 1, 2, 3, 6 points")
    arguments = parser.parse_args()
    selector = {} if arguments.confidence is None else {"floor_confidence": arguments.confidence}
    kept = load_settings(models=(arguments.model,), gateway=FREE_PORTS, selector=selector)
    package = find_packages(kept.models_dir, kept.models)[arguments.model]
    with _items(package, arguments) as (measured, items):
        if items.labels is None:
            raise SystemExit(f"error: model '{package.name}' cannot be measured: {items.source}")
        settings = kept.model_copy(update={"models_dir": measured.folder.parent})
        jobs = _jobs(min(arguments.items, len(items.labels)))
        console.print(machine_line(), f"model {package.name}: {items.source}", sep="\n")
        with Launcher(settings) as launcher:
            launcher.wait_ready(_READY_TIMEOUT_S)
            table = _losses if arguments.losses else _floors
            console.print(table(launcher.address, package, items, jobs))


@contextmanager
def _items(package: ModelPackage, arguments: argparse.Namespace) -> Iterator[tuple[ModelPackage, Items]]:
    """The package to serve, and labelled items."""
    if arguments.split == "test":
        yield package, items_of(package, arguments.data)
    else:
        with half_calibrated(package, arguments.data, arguments.seed) as halves:
            yield halves


def _jobs(items: int) -> list[slice]:
    return [slice(start, min(start + _JOB_ITEMS, items)) for start in range(0, items, _JOB_ITEMS)]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=f"{title}, jobs of {_JOB_ITEMS} items", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _floors(address: str, package: ModelPackage, items: Items, jobs: Sequence[slice]) -> Table:
    table = _table("accuracy by floor", "floor", "expected", "measured", "standard error", "measured - floor", "holds")
    for floor in FLOORS:
        try:
            expected, answered = uvloop.run(_send(address, package, items, jobs, {"min_accuracy": floor}))
        except ExceptionGroup as errors:
            if errors.subgroup(FloorUnreachable) is None:
                raise
            table.add_row(f"{floor:g}", "out of reach")
            continue
        measured, error = _mean(answered), standard_error(list(answered.values()))
        holds = "yes" if measured - floor >= -_ONE_SIDED * error else "no"
        table.add_row(
            f"{floor:g}", f"{expected:.4f}", f"{measured:.4f}", f"{error:.4f}", f"{measured - floor:+.4f}", holds
        )
    return table


def _losses(address: str, package: ModelPackage, items: Items, jobs: Sequence[slice]) -> Table:
    table = _table(
        "loss against everything", "at most", "everything", "measured", "realised loss", "standard error", "holds"
    )
    _, everything = uvloop.run(_send(address, package, items, jobs, {"effort": "best"}))
    for loss in LOSSES:
        _, answered = uvloop.run(_send(address, package, items, jobs, {"max_accuracy_loss": loss}))
        lost = [(groups, everything[item][1] - right) for item, (groups, right) in answered.items()]
        realised, error = _mean(everything) - _mean(answered), standard_error(lost)
        holds = "yes" if realised <= loss + _ONE_SIDED * error else "no"
        table.add_row(
            f"{loss:g}", f"{_mean(everything):.4f}", f"{_mean(answered):.4f}", f"{realised:+.4f}", f"{error:.4f}", holds
        )
    return table


def _mean(answered: Answered) -> float:
    return sum(right for _, right in answered.values()) / len(answered)


async def _send(
    address: str, package: ModelPackage, items: Items, jobs: Sequence[slice], demand: Mapping[str, Any]
) -> tuple[float, Answered]:
    """The mean expected accuracy, and what became of each item."""
    left, answered, expected = iter(jobs), Answered(), 0.0

    async def caller(client: AsyncClient) -> None:
        nonlocal expected
        for rows in left:
            prediction = await client.predict(package.name, items.payloads_of(rows), **demand)
            scored = items.scored(rows, prediction.labels, package.output.labels)
            answered.update(zip(range(rows.start, rows.stop), scored, strict=True))
            expected += prediction.expected_accuracy * len(prediction.modality_sets)

    async with AsyncClient(address, retries=None) as client, asyncio.TaskGroup() as group:
        for _ in range(_IN_FLIGHT):
            group.create_task(caller(client))
    return expected / len(answered), answered


if __name__ == "__main__":
    main()
