"""How much a number of cells answers, by the simulator: `python -m bench.cells --profile tvlt`.

A cell is gateway, selector, encoders and fusion together, and cells know nothing of each other. So all that the others
change for one of them is when jobs reach it. Many callers, each of which goes round the cells for itself, send every
cell a Poisson stream, as one cell alone gets it. A single caller who goes round sends it each so many-th job of one
stream, which is more even. Both are simulated, for the cells that are asked for.
"""

import argparse
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.knee import LIMIT, search
from bench.machine import profile_line
from bench.outcomes import summarise
from bench.simulation import World, capacity, new_scheduler, simulate, world_and_demands
from bench.workload import Demands, poisson
from mosel.config import load_settings
from mosel.model_package import find_packages
from mosel.profiles import needed_profile, read_profile

# As many cells of a number are simulated; they differ in nothing but chance.
_SAMPLED = 4
_POLICY = "mosel"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", required=True, help="profile file, or a model that has one for this hardware")
    parser.add_argument("--cells", type=int, nargs="+", default=[1, 10, 1000])
    parser.add_argument("--seconds", type=float, default=120, help="simulated, for each cell")
    parser.add_argument("--slack", type=float, default=3.3, help="of deadlines, in full latencies of one item")
    parser.add_argument("--t", type=float, default=0.06, help="how far below full accuracy floors may be")
    arguments = parser.parse_args()
    name = arguments.profile
    if name.endswith(".json"):
        profile = read_profile(Path(name))
    else:
        settings = load_settings()
        profile = needed_profile(find_packages(settings.models_dir, (name,))[name], settings, None)
    world, demands = world_and_demands(profile)
    demands = demands.asking(arguments.slack, arguments.t)
    console = Console()
    console.print(profile_line(profile), soft_wrap=True, highlight=False, markup=False)
    title = f"slack {arguments.slack:g}, t {arguments.t * 100:g} points, {LIMIT:.0%} of jobs missed (simulated)"
    table = Table("cells", "callers", "jobs/s of a cell", "jobs/s of all", "of all, one cell away", title=title)
    for cells in arguments.cells:
        for callers in ("many", "one") if cells > 1 else ("many",):
            rate = _highest_rate(world, demands, cells if callers == "one" else 1, arguments.seconds)
            whole = f"{rate * cells:.0f}"
            table.add_row(f"{cells}", callers, f"{rate:.1f}", whole, f"{rate * (cells - 1):.0f}")
    console.print(table)


def _highest_rate(world: World, demands: Demands, every: int, seconds: float) -> float:
    """Jobs per second for one cell, which gets each `every`-th job of a Poisson stream."""
    unit = capacity(world, demands, _POLICY)

    def missed(load: float) -> float:
        return statistics.fmean(
            _missed(world, demands, _times(load * unit, every, seconds, seed), seconds, seed)
            for seed in range(_SAMPLED)
        )

    return search(missed) * unit


def _times(rate: float, every: int, seconds: float, seed: int) -> Iterator[float]:
    return itertools.islice(poisson(rate * every, seconds, seed), 0, None, every)


def _missed(world: World, demands: Demands, times: Iterator[float], seconds: float, seed: int) -> float:
    outcomes = simulate(demands.arrivals(times, seed), new_scheduler(world, _POLICY), world)
    return summarise(outcomes, seconds).job_miss_ratio


if __name__ == "__main__":
    main()
