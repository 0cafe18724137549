"""Kills every service again and again under load, and says whether everything that is promised held."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from bench.machine import machine_line
from tests.chaos.run import Options, chaos
from tests.chaos.tables import tables


def main() -> int:
    """Runs it and prints what happened; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="for how long services are killed")
    parser.add_argument("--load", type=float, default=0.5, help="in multiples of what the services can answer")
    parser.add_argument("--trace", type=Path, help="CSV file second,requests that arrivals follow")
    parser.add_argument("--replicas", type=int, default=1, help="of each encoder")
    parser.add_argument("--placement", choices=("single", "services"), default="services")
    parser.add_argument("--seed", type=int, default=0, help="of all chance")
    given = parser.parse_args()
    options = Options(
        seconds=given.minutes * 60,
        load=given.load,
        trace=given.trace,
        replicas=given.replicas,
        placement=given.placement,
        seed=given.seed,
    )
    report = chaos(options)
    console = Console(width=160, highlight=False)
    console.print(machine_line(), tables(report))
    broken = report.wrong() + report.late()
    for line in sorted(set(broken)):
        console.print(f"broken ({broken.count(line)}): {line}", soft_wrap=True, markup=False)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
