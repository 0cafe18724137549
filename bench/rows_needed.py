"""How many calibration rows, of how many groups, guarantee which floor? The chance that a calibration does.

For populations as those of `bench.coverage`: independent rows, and rows of people as different as those of `har`.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table

from bench.coverage import Population, coverage_of_accuracy, like, populations
from mosel.config import load_settings
from mosel.packages.model_package import find_package

_ROWS = (200, 500, 1000, 2000, 5000)
_PEOPLE = (9, 21, 30, 60, 100)
_ROWS_EACH = 300
_DROPS = (0.01, 0.02, 0.03, 0.06, 0.09)

console = Console(width=100)


def main() -> None:
    """Draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrations", type=int, default=200)
    arguments = parser.parse_args()
    independent = populations()["independent rows"]
    rows = {f"{count} rows": replace(independent, design=count // 4, certify=count) for count in _ROWS}
    console.print(_table("independent rows, everything right in 98.1 %", rows, arguments.calibrations))
    calibration = find_package(load_settings().models_dir, "har").calibration
    if calibration is not None:
        people = {
            f"{count} people": like(calibration, count * _ROWS_EACH // 4, count * _ROWS_EACH, count)
            for count in _PEOPLE
        }
        title = f"{_ROWS_EACH} rows of each person, everything right in {_everything(people):.1%}"
        console.print(_table(title, people, arguments.calibrations))


def _everything(people: Mapping[str, Population]) -> float:
    """The accuracy of everything in these populations, which is the same in all."""
    return [*next(iter(people.values())).accuracy.values()][-1]


def _table(title: str, by_name: Mapping[str, Population], calibrations: int) -> Table:
    table = Table(title=f"chance that a floor is guaranteed: {title}", box=box.SIMPLE_HEAD)
    table.add_column("certified by")
    for drop in _DROPS:
        table.add_column(f"full - {drop * 100:g}", justify="right")
    for name, population in by_name.items():
        found = coverage_of_accuracy(population, calibrations)
        table.add_row(name, *(f"{found[drop].certified:.2f}" for drop in _DROPS))
    return table


if __name__ == "__main__":
    main()
