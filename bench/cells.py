"""How much a number of cells answers, by the simulator: `python -m bench.cells tvlt`.

A cell is gateway, selector, encoders and fusion together, and cells know nothing of each other. So all that the others
change for one of them is when jobs reach it. Many callers, each of which goes round the cells for itself, send every
cell a Poisson stream, as one cell alone gets it. A single caller who goes round sends it every so many-th job of one
such stream, which is more even. Real callers are somewhere between.
"""

import argparse
import statistics
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.knee import LIMIT, search
from bench.machine import profile_line
from bench.outcomes import summarise
from bench.simulation import World, capacity, new_scheduler, simulate, world_and_demands
from bench.workload import Demands
from mosel.config import load_settings
from mosel.packages.model_package import find_packages
from mosel.profiles.files import needed_profile

_POLICY = "mosel"
# As many cells of a number are simulated: they differ in nothing but chance.
_SAMPLED = 4
# Keeps this chance apart from that of the jobs with the same seed.
_STREAM = 3


def main() -> None:
    """Searches, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="that has a profile for this hardware")
    parser.add_argument("--cells", type=int, nargs="+", default=[1, 10, 1000])
    parser.add_argument("--seconds", type=float, default=60, help="simulated, of each cell")
    parser.add_argument("--slack", type=float, default=3.3, help="of deadlines, in full latencies of one item")
    parser.add_argument("--t", type=float, default=0.06, help="how far below full accuracy floors may be")
    arguments = parser.parse_args()
    settings = load_settings()
    package = find_packages(settings.models_dir, (arguments.model,))[arguments.model]
    profile = needed_profile(package, settings, None)
    world, asked = world_and_demands(profile)
    asked = asked.asking(arguments.slack, arguments.t)
    console = Console()
    console.print(profile_line(profile), soft_wrap=True, highlight=False, markup=False)
    title = f"{LIMIT:.0%} of jobs missed, slack {arguments.slack:g}, t {arguments.t * 100:g} points (simulated)"
    table = Table("cells", "callers", "jobs/s of a cell", "jobs/s of all", "of all, one cell away", title=title)
    many = _highest_rate(world, asked, 1, arguments.seconds)
    for cells in arguments.cells:
        table.add_row(*_row(cells, "many", many))
        if cells > 1:
            table.add_row(*_row(cells, "one", _highest_rate(world, asked, cells, arguments.seconds)))
    console.print(table)


def _row(cells: int, callers: str, rate: float) -> list[str]:
    return [f"{cells}", callers, f"{rate:.1f}", f"{rate * cells:.0f}", f"{rate * (cells - 1):.0f}"]


def _highest_rate(world: World, asked: Demands, every: int, seconds: float) -> float:
    """Jobs per second for one cell, which gets every so many-th job of a Poisson stream."""
    unit = capacity(world, asked, _POLICY)

    def missed(load: float) -> float:
        cells = (
            _missed(world, asked, _times(load * unit, every, seconds, seed), seconds, seed) for seed in range(_SAMPLED)
        )
        return statistics.fmean(cells)

    return search(missed) * unit


def _times(rate: float, every: int, seconds: float, seed: int) -> Iterator[float]:
    """Arrivals at one cell: so many gaps of a stream with `every` times the rate, added up."""
    rng = np.random.default_rng((seed, _STREAM))
    at_s = 0.0
    while (at_s := at_s + rng.gamma(every, 1 / (rate * every))) < seconds:
        yield at_s


def _missed(world: World, asked: Demands, times: Iterator[float], seconds: float, seed: int) -> float:
    outcomes = simulate(asked.arrivals(times, seed), new_scheduler(world, _POLICY), world)
    return summarise(outcomes, seconds).job_miss_ratio


if __name__ == "__main__":
    main()
