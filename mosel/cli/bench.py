"""`mosel bench`: load on real services, and comparisons."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from mosel.cli.options import (
    Ca,
    Certificate,
    DataFolder,
    Device,
    Key,
    MaxAccuracyLoss,
    MinAccuracy,
    ModelsFolder,
    Token,
)

if TYPE_CHECKING:
    from mosel.config import Settings

bench_app = typer.Typer(help="Put load on real services.", no_args_is_help=True)

_QUICK_S = 8.0
_READY_TIMEOUT_S = 300.0
_ALL, _SLACKS, _TS = "all,aggressive,greedy,mosel", "1,3.3,20", "3,6,9,12"
Value = TypeVar("Value")


@bench_app.command("load")
def load_command(
    address: Annotated[str, typer.Option(help="A running gateway. [default: services are started]")] = "",
    model: Annotated[str, typer.Option(help="Name of the model. [default: digits, or the first one served]")] = "",
    rates: Annotated[str, typer.Option(help="Jobs per second, a step each.")] = "10,20,40,80",
    seconds: Annotated[float, typer.Option(min=1, help="Length of a step.")] = 10,
    warm_up_s: Annotated[float, typer.Option(min=0, help="At the first rate, before the first step.")] = 2,
    items: Annotated[int, typer.Option(min=1, help="Items of each job.")] = 1,
    min_accuracy: MinAccuracy = None,
    max_accuracy_loss: MaxAccuracyLoss = None,
    latency_slo_ms: Annotated[float | None, typer.Option(help="Deadline of each job. [default: none]")] = None,
    trace: Annotated[Path | None, typer.Option(help="CSV file second,requests. [default: Poisson arrivals]")] = None,
    seed: Annotated[int, typer.Option(help="Of all chance.")] = 0,
    token: Token = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for a report in the shape of ghz's.")] = None,
    data: DataFolder = None,
    models: ModelsFolder = None,
    device: Device = None,
) -> None:
    """Send jobs when they are due, whatever became of those before, and print latencies and goodput of each rate.

    Latencies count from the time at which a job was due. Goodput counts jobs answered within their deadline and as
    accurately as asked.
    """
    from bench.load.run import load
    from bench.load.steps import Plan
    from bench.serving import Gateway
    from mosel.cli.options import settings_from, tls_from
    from mosel.client.demands import checked_demand
    from mosel.config import FREE_PORTS
    from mosel.errors import ConfigError

    floors = {"min_accuracy": min_accuracy, "max_accuracy_loss": max_accuracy_loss}
    demand = checked_demand(floors | {"latency_slo_ms": latency_slo_ms})
    plan = Plan(
        rates=_listed("--rates", rates, float),
        seconds=seconds,
        warm_up_s=warm_up_s,
        items=items,
        min_accuracy=demand.get("min_accuracy"),
        max_accuracy_loss=demand.get("max_accuracy_loss"),
        latency_slo_ms=demand.get("latency_slo_ms") or math.inf,
        trace=trace,
        seed=seed,
    )
    if not plan.rates or not all(0 < rate < math.inf for rate in plan.rates):
        raise ConfigError(f"--rates is '{rates}'; expected jobs per second above 0, separated by commas")
    settings = settings_from(models, None if address else [model or "digits"], device, **FREE_PORTS)
    with _address(address, settings) as where:
        gateway = Gateway(where, token, tls_from(ca, certificate, key))
        load(gateway, model or None, plan, settings.models_dir, data, json_file)


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
    from mosel.packages.model_package import find_packages
    from mosel.profiles.files import needed_profile

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


@contextlib.contextmanager
def _address(address: str, settings: "Settings") -> Iterator[str]:
    """The address of a running gateway: the one given, or one that is started."""
    from mosel.cli.starting import started

    if address:
        yield address
        return
    with started(settings, _READY_TIMEOUT_S) as launcher:
        yield launcher.address


def _policies(names: str) -> tuple[str, ...]:
    from mosel.errors import ConfigError
    from selector.core.policies import POLICIES

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
