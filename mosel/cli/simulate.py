"""`mosel simulate`: the scheduler on a virtual clock."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mosel.cli.options import Device, ModelsFolder

if TYPE_CHECKING:
    from mosel.profiles.files import Profile


def simulate(
    profile: Annotated[str, typer.Option(help="Profile file, or name of a model that has one for this hardware.")],
    trace: Annotated[Path | None, typer.Option(help="CSV file second,requests. [default: Poisson arrivals]")] = None,
    policy: Annotated[str, typer.Option(help="all, aggressive, greedy or mosel.")] = "mosel",
    rate: Annotated[float, typer.Option(min=0.001, help="Jobs per second in the mean.")] = 10,
    seconds: Annotated[float, typer.Option(min=1, help="Length of the run.")] = 60,
    slack: Annotated[float, typer.Option(min=0, help="Of deadlines, in full latencies of one item.")] = 3.3,
    t: Annotated[float, typer.Option(min=0, max=1, help="How far below full accuracy floors may be.")] = 0.06,
    late_ok: Annotated[bool, typer.Option(help="Refuse and drop no job for its deadline.")] = False,
    seed: Annotated[int, typer.Option(help="Of all chance.")] = 0,
    models: ModelsFolder = None,
    device: Device = None,
) -> None:
    """Run the scheduler against simulated services, as a profile describes them, and print what became of the jobs."""
    import dataclasses

    from bench.machine import profile_line
    from bench.outcomes import summarise
    from bench.policies.tables import summary_table
    from bench.simulation import new_scheduler, simulate, world_and_demands
    from bench.workload import from_trace, poisson, read_trace
    from mosel.cli.starting import console
    from mosel.errors import ConfigError
    from selector.core.policies import POLICIES

    if policy not in POLICIES:
        raise ConfigError(f"--policy is '{policy}'; expected one of {', '.join(POLICIES)}")
    measured = _profile(profile, models, device)
    world, demands = world_and_demands(measured)
    world = dataclasses.replace(world, seed=seed)
    times = poisson(rate, seconds, seed) if trace is None else from_trace(read_trace(trace), rate, seconds, seed)
    arrivals = demands.asking(slack, t).arrivals(times, seed)
    outcomes = simulate(arrivals, new_scheduler(world, policy), world, late_ok=late_ok)
    console.print(profile_line(measured), soft_wrap=True, highlight=False, markup=False)
    title = f"{policy}, {rate:g} jobs/s for {seconds:g} s, slack {slack:g}, t {t * 100:g} points (simulated)"
    console.print(summary_table(summarise(outcomes, seconds), title))


def _profile(name: str, models: Path | None, device: str | None) -> "Profile":
    """The profile that a file has, or the kept one of a model.

    Raises:
        ConfigError: there is none.
    """
    from mosel.cli.options import settings_from
    from mosel.packages.model_package import find_packages
    from mosel.profiles.files import needed_profile, read_profile

    if Path(name).suffix == ".json":
        return read_profile(Path(name))
    settings = settings_from(models, [name], device)
    return needed_profile(find_packages(settings.models_dir, (name,))[name], settings, None)
