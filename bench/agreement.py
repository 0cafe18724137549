"""Does the simulator say what the services do? The same jobs, simulated and on real services, side by side.

Loads are multiples of the policy's own capacity. Away from it, throughput should agree within 10 % and the miss ratio
within 3 points; near it, where misses rise steeply, the load at 5 % misses is compared instead.
"""

import argparse
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.items import items_of
from bench.machine import machine_line, profile_line
from bench.policies.compare import served
from bench.policies.runs import Served, Setting, Simulated, at_limit
from bench.simulation import capacity, world_and_demands
from mosel.config import FREE_PORTS, load_settings
from mosel.packages.model_package import find_packages
from mosel.profiles.files import needed_profile

_LOADS = (0.6, 0.8, 1.3, 1.5)
_SLACK, _T = 3.3, 0.06
_THROUGHPUT, _POINTS, _KNEE = 0.10, 0.03, 0.10

console = Console(width=140)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tvlt")
    parser.add_argument("--profile", type=Path, help="default: the one for this hardware")
    parser.add_argument("--trace", type=Path, help="default: Poisson arrivals")
    parser.add_argument("--policies", default="all,mosel")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a run")
    parser.add_argument("--no-knee", action="store_true", help="compare the four loads only")
    arguments = parser.parse_args()
    settings = load_settings(models=(arguments.model,), gateway=FREE_PORTS)
    package = find_packages(settings.models_dir, settings.models)[arguments.model]
    profile = needed_profile(package, settings, arguments.profile)
    workload = Simulated.of(*world_and_demands(profile), arguments.trace)
    items, policies = items_of(package), tuple(arguments.policies.split(","))
    console.print(
        machine_line(),
        profile_line(profile, package.description),
        sep="\n",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    with served(settings, package, items, workload, arguments.seconds, policies) as services:
        for policy in policies:
            console.print(_loads_table(services, workload, policy))
            if not arguments.no_knee:
                _print_knee(services, workload, policy)


def _loads_table(services: Served, workload: Simulated, policy: str) -> Table:
    table = Table(title=f"{policy}: simulated and real, {services.seconds:g} s each", box=box.SIMPLE_HEAD)
    for column in ("load", "items/s simulated", "real", "differ by", "missed simulated", "real", "differ by", "agree"):
        table.add_column(column, justify="right")
    unit = capacity(workload.world, workload.demands.asking(_SLACK, _T), policy) / workload.capacity
    for load in _LOADS:
        setting = Setting(policy, _SLACK, None if policy == "all" else _T, load * unit)
        expected, real = workload.run(setting, services.seconds), services.run(setting).summary
        throughput = real.items_per_s / expected.items_per_s - 1
        missed = real.job_miss_ratio - expected.job_miss_ratio
        agree = abs(throughput) <= _THROUGHPUT and abs(missed) <= _POINTS
        table.add_row(
            f"{load:g}",
            *(f"{expected.items_per_s:.1f}", f"{real.items_per_s:.1f}", f"{throughput:+.1%}"),
            *(f"{expected.job_miss_ratio:.1%}", f"{real.job_miss_ratio:.1%}", f"{missed * 100:+.1f} points"),
            "yes" if agree else "no",
        )
    return table


def _print_knee(services: Served, workload: Simulated, policy: str) -> None:
    t = None if policy == "all" else _T
    expected = workload.knee(policy, _SLACK, t, by_items=False)
    real, _ = at_limit(list(services.around(policy, _SLACK, t, expected)), by_items=False)
    agree = "yes" if abs(real / expected - 1) <= _KNEE else "no"
    console.print(
        f"{policy}: 5 % of jobs missed at {expected * workload.capacity:.2f} jobs/s simulated, "
        f"{real * workload.capacity:.2f} real, {real / expected - 1:+.1%}; agree: {agree}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
