"""Whether a second encoder of a modality helps, by the simulator: `python -m bench.replicas`.

The model is the example of `bench.decisions`, whose costliest encoder is that of `video`. A *resource* is what calls
compete for, such as a GPU; each makes as many calls at the same time as the other.
"""

import argparse
import dataclasses

from rich.console import Console
from rich.table import Table

from bench.example import example
from bench.knee import LIMIT, search
from bench.machine import machine_line
from bench.outcomes import summarise
from bench.simulation import World, capacity, new_scheduler, simulate
from bench.workload import Demands, poisson
from mosel.modality import FUSION, lane_of

_POLICY = "mosel"
_COSTLY, _SECOND = "video", "second"
_REPLICA = lane_of(_COSTLY, 2)


def main() -> None:
    """Searches, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="simulated, of each load")
    parser.add_argument("--slack", type=float, default=3.3, help="of deadlines, in full latencies of one item")
    parser.add_argument("--t", type=float, default=0.06, help="how far below full accuracy floors may be")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    world, asked = example()
    asked = asked.asking(arguments.slack, arguments.t)
    console = Console(width=140)
    console.print(machine_line(), highlight=False)
    title = f"slack {arguments.slack:g}, t {arguments.t * 100:g} points (simulated)"
    table = Table("services", "jobs/s, every modality", f"jobs/s, {LIMIT:.0%} missed, policy {_POLICY}", title=title)
    for name, changed in _worlds(world).items():
        rate = _highest_rate(changed, asked, arguments.seconds, arguments.seed)
        table.add_row(name, f"{capacity(changed, asked, 'all'):.1f}", f"{rate:.1f}")
    console.print(table)


def _worlds(world: World) -> dict[str, World]:
    twice = {lane_of(modality, 2): _SECOND for modality in world.profile.encoders}

    def on(resources: dict[str, str], drift: float = 1.0) -> World:
        return dataclasses.replace(world, resources=resources, drift={_REPLICA: drift})

    return {
        "one resource": world,
        f"one resource, two encoders of {_COSTLY}": on({_REPLICA: world.lanes[_COSTLY]}),
        f"{_COSTLY} on a second resource": on({_COSTLY: _SECOND}),
        "fusion on a second resource": on({FUSION: _SECOND}),
        f"a second encoder of {_COSTLY} on a second resource": on({_REPLICA: _SECOND}),
        "the same, half as fast there": on({_REPLICA: _SECOND}, drift=2.0),
        "a second encoder of every modality there": on(twice),
    }


def _highest_rate(world: World, asked: Demands, seconds: float, seed: int) -> float:
    unit = capacity(world, asked, "all")

    def missed(load: float) -> float:
        arrivals = asked.arrivals(poisson(load * unit, seconds, seed), seed)
        return summarise(simulate(arrivals, new_scheduler(world, _POLICY), world), seconds).job_miss_ratio

    return search(missed) * unit


if __name__ == "__main__":
    main()
