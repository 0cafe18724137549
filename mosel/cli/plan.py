"""`mosel plan`: what a job would get, from the profile alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mosel.cli.options import Device, ModelsFolder

if TYPE_CHECKING:
    from rich.table import Table

    from mosel.client import Demand
    from mosel.config import Settings
    from mosel.packages.model_package import ModelPackage
    from mosel.profiles.files import Profile
    from selector.core.jobs import Plan


def plan(
    model: Annotated[str, typer.Argument(help="Name of the model, such as har.")],
    size: Annotated[int, typer.Option(min=1, help="Items of the job.")] = 1,
    min_accuracy: Annotated[float | None, typer.Option(help="Accuracy floor, 0..1.")] = None,
    latency_slo_ms: Annotated[float | None, typer.Option(help="Deadline in milliseconds from now.")] = None,
    effort: Annotated[str | None, typer.Option(help="cheapest or best. [default: cheapest with a floor]")] = None,
    rows: Annotated[int, typer.Option(min=2, help="Rows of the frontier to print at most.")] = 24,
    profile: Annotated[Path | None, typer.Option(help="Profile file. [default: the one for this hardware]")] = None,
    models: ModelsFolder = None,
    device: Device = None,
) -> None:
    """Print the frontier of a job on an idle system, and mark what the job would get. Starts nothing."""
    from mosel.cli.options import settings_from
    from mosel.cli.starting import console
    from mosel.client.demands import checked_demand
    from mosel.packages.model_package import find_packages
    from mosel.profiles.files import needed_profile

    demand = checked_demand({"min_accuracy": min_accuracy, "latency_slo_ms": latency_slo_ms, "effort": effort})
    settings = settings_from(models, [model], device)
    package = find_packages(settings.models_dir, (model,))[model]
    measured = needed_profile(package, settings, profile)
    planned = _plan(package, measured, settings, size, demand)
    kind = "quick profile" if measured.quick else "profile"
    console.print(
        f"{model}, {size} items; {kind} of {measured.measured_on} on {measured.hardware.device}", highlight=False
    )
    console.print(_table(planned, rows))
    if planned.refusal:
        console.print(f"refused: {planned.refusal}", soft_wrap=True, highlight=False)
        raise typer.Exit(1)


def _plan(package: "ModelPackage", measured: "Profile", settings: "Settings", size: int, demand: "Demand") -> "Plan":
    from mosel.modality import FUSION
    from selector.conversions import model_profile
    from selector.core.jobs import Effort, Job
    from selector.core.scheduler import Scheduler

    known = model_profile(measured, package.default_min_accuracy)
    scheduler = Scheduler({package.name: known}, tokens=measured.concurrency, max_queued_items=size)
    for lane in (*package.modalities, FUSION):
        scheduler.lane(lane, True, measured.hardware.device)
    job = Job(
        id=b"",
        model=package.name,
        size=size,
        modalities=frozenset(package.modalities),
        min_accuracy=demand.get("min_accuracy"),
        deadline=(demand.get("latency_slo_ms") or settings.gateway.default_deadline_ms) / 1000,
        effort=Effort(effort) if (effort := demand.get("effort")) else None,
    )
    return scheduler.plan(job, 0.0)


def _table(planned: "Plan", rows: int) -> "Table":
    from rich.table import Table

    from selector.core.frontier import format_strategy, thin

    predicted = dict(planned.frontier)
    strategies = set(thin(tuple(predicted), rows))
    if planned.chosen is not None:
        predicted.setdefault(planned.chosen, planned.latency_ms)
        strategies.add(planned.chosen)
    table = Table("", "items by modality set", "accuracy", "compute ms", "predicted ms")
    for strategy in sorted(strategies, key=lambda strategy: strategy.cost_ms):
        mark = "->" if strategy == planned.chosen else ""
        figures = f"{strategy.accuracy:.4f}", f"{strategy.cost_ms:.2f}", f"{predicted[strategy]:.2f}"
        table.add_row(mark, format_strategy(strategy), *figures)
    if len(strategies) < len(predicted):
        table.caption = f"{len(strategies)} of {len(predicted)} strategies; --rows {len(predicted)} prints all"
    return table
