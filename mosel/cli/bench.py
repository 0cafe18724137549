"""`mosel bench`: comparisons on real services."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from mosel.cli.options import DataFolder, Device, ModelsFolder

if TYPE_CHECKING:
    pass

bench_app = typer.Typer(help="Compare on real services.", no_args_is_help=True)

_QUICK_S = 8.0
_ALL, _SLACKS, _TS = "all,aggressive,greedy,mosel", "1,3.3,20", "3,6,9,12"
Value = TypeVar("Value")


@bench_app.callback()
def bench() -> None:
    """Keeps `policies` a command of its own while it is the only one."""


@bench_app.command("policies")
def policies_command(
    model: Annotated[str, typer.Option(help="Name of the model.")] = "tvlt",
    policies: Annotated[str, typer.Option(help="Which ones; gains are over all.")] = _ALL,
    slack: Annotated[str, typer.Option(help="Slacks of deadlines, in full latencies of one item.")] = _SLACKS,
    t: Annotated[str, typer.Option(help="How far below full accuracy floors may be, in points.")] = _TS,
    loads: Annotated[str, typer.Option(help="In capacities of all. [default: around 5 % misses]")] = "",
    seconds: Annotated[float, typer.Option(min=1, help="Length of a run.")] = 30,
    trace: Annotated[Path | None, typer.Option(help="CSV file second,requests. [default: Poisson arrivals]")] = None,
    saturated_trace: Annotated[Path | None, typer.Option(help="The same for the runs without shedding.")] = None,
    saturated_s: Annotated[float, typer.Option(min=0, help="Length of those runs; 0: none.")] = 290,
    quick: Annotated[bool, typer.Option(help="A few short runs: all and mosel, slack 3.3, t 6.")] = False,
    profile: Annotated[Path | None, typer.Option(help="Profile file. [default: the one for this hardware]")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results (JSON, CSV) and a picture.")] = None,
    data: DataFolder = None,
    models: ModelsFolder = None,
    device: Device = None,
) -> None:
    """Run the same jobs under each policy, and print throughput, misses, completion times and accuracy."""
    from bench.policies.compare import Options, compare
    from mosel.cli.options import settings_from
    from mosel.config import FREE_PORTS
    from mosel.model_package import find_packages
    from mosel.profiles import needed_profile

    options = Options(
        policies=_policies(policies),
        slacks=_listed("--slack", slack, float),
        ts=tuple(points / 100 for points in _listed("--t", t, float)),
        loads=_listed("--loads", loads, float),
        seconds=seconds,
        trace=trace,
        saturated_trace=saturated_trace,
        saturated_s=saturated_s,
        data=data,
    )
    if quick:
        options = Options(("all", "mosel"), (3.3,), (0.06,), seconds=_QUICK_S, saturated_s=0, data=data)
    settings = settings_from(models, [model], device, **FREE_PORTS)
    package = find_packages(settings.models_dir, (model,))[model]
    compare(settings, package, needed_profile(package, settings, profile), options, out)


def _policies(names: str) -> tuple[str, ...]:
    from mosel.errors import ConfigError
    from selector.policies import POLICIES

    listed = _listed("--policies", names, str)
    for policy in listed:
        if policy not in POLICIES:
            raise ConfigError(f"--policies has '{policy}'; expected some of {', '.join(POLICIES)}")
    return listed


def _listed(option: str, text: str, kind: Callable[[str], Value]) -> tuple[Value, ...]:
    """Values separated by commas.

    Raises:
        ConfigError: one of them is no such value.
    """
    from mosel.errors import ConfigError

    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"{option} is '{text}'; expected numbers separated by commas") from None
