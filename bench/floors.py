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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from rich import box
from rich.console import Console
from rich.table import Table

from bench.accuracy import Scored, standard_error
from bench.exchangeable import half_calibrated
from bench.items import Items, items_of
from bench.machine import machine_line
from mosel import AsyncClient, Prediction
from mosel.config import FREE_PORTS, load_settings
from mosel.errors import Unreachable
from mosel.launcher import Launcher
from mosel.packages.model_package import ModelPackage, find_packages

# Fixed before any run, and no accuracy of a profile.
FLOORS = (0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.925, 0.95, 0.97)
LOSSES = (0.01, 0.02, 0.03, 0.06)
_JOB_ITEMS, _IN_FLIGHT = 8, 4
_READY_TIMEOUT_S = 300.0
_ONE_SIDED = 1.645

Groups = tuple[int, ...]


@dataclass
class Answered:
    """What became of the items of all jobs of one floor.

    Attributes:
        items: by number, the groups of each, and whether its prediction is right.
        expected, saved: sums over the items.
        stand_on: what the answers stand on.
        guaranteed: the least accuracy, or the most loss, that an answer guarantees.
    """

    items: dict[int, tuple[Groups, float]] = field(default_factory=dict)
    expected: float = 0.0
    saved: float = 0.0
    stand_on: set[str] = field(default_factory=set)
    guaranteed: list[float] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """Measured, 0..1."""
        return sum(right for _, right in self.items.values()) / len(self.items)

    def add(self, rows: slice, scored: Scored, prediction: Prediction) -> None:
        """One job is answered."""
        said, items = prediction.assurance, rows.stop - rows.start
        self.items.update(zip(range(rows.start, rows.stop), scored, strict=True))
        self.expected += prediction.expected_accuracy * items
        self.saved += said.saved * items
        self.stand_on.add(said.guarantee)
        self.guaranteed += [b for b in (said.guaranteed_accuracy, said.guaranteed_loss) if b is not None]

    def figures(self, worst: Callable[[Iterable[float]], float]) -> tuple[str, str, str]:
        """What the answers stand on, the worst that one guarantees, and what is saved."""
        bound = f"{worst(self.guaranteed):.4f}" if self.guaranteed else "-"
        return "/".join(sorted(self.stand_on)), bound, f"{self.saved / len(self.items):.0%}"


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
    columns = ("floor", "guarantee", "at least", "saved", "expected", "measured", "std. error", "holds")
    table = _table("accuracy by floor", *columns)
    for floor in FLOORS:
        try:
            answered = uvloop.run(_send(address, package, items, jobs, {"min_accuracy": floor}))
        except ExceptionGroup as errors:
            if errors.subgroup(Unreachable) is None:
                raise
            table.add_row(f"{floor:g}", "out of reach")
            continue
        error = standard_error(list(answered.items.values()))
        holds = "yes" if answered.accuracy >= floor - _ONE_SIDED * error else "no"
        means = f"{answered.expected / len(answered.items):.4f}", f"{answered.accuracy:.4f}", f"{error:.4f}"
        table.add_row(f"{floor:g}", *answered.figures(min), *means, holds)
    return table


def _losses(address: str, package: ModelPackage, items: Items, jobs: Sequence[slice]) -> Table:
    columns = (
        "at most",
        "guarantee",
        "guaranteed",
        "saved",
        "everything",
        "measured",
        "lost",
        "standard error",
        "holds",
    )
    table = _table("loss against everything", *columns)
    # Nothing may be lost, so that the reference set is run.
    everything = uvloop.run(_send(address, package, items, jobs, {"max_accuracy_loss": 0.0}))
    for loss in LOSSES:
        answered = uvloop.run(_send(address, package, items, jobs, {"max_accuracy_loss": loss}))
        lost = [(groups, everything.items[item][1] - right) for item, (groups, right) in answered.items.items()]
        realised, error = everything.accuracy - answered.accuracy, standard_error(lost)
        holds = "yes" if realised <= loss + _ONE_SIDED * error else "no"
        means = (f"{everything.accuracy:.4f}", f"{answered.accuracy:.4f}", f"{realised:+.4f}", f"{error:.4f}")
        table.add_row(f"{loss:g}", *answered.figures(max), *means, holds)
    return table


async def _send(
    address: str, package: ModelPackage, items: Items, jobs: Sequence[slice], demand: Mapping[str, Any]
) -> Answered:
    """Sends every item once, in jobs."""
    left, answered = iter(jobs), Answered()

    async def caller(client: AsyncClient) -> None:
        for rows in left:
            prediction = await client.predict(package.name, items.payloads_of(rows), **demand)
            answered.add(rows, items.scored(rows, prediction.labels, package.output.labels), prediction)

    async with AsyncClient(address, retries=None) as client, asyncio.TaskGroup() as group:
        for _ in range(_IN_FLIGHT):
            group.create_task(caller(client))
    return answered


if __name__ == "__main__":
    main()
