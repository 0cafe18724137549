"""`mosel plan`: what a job would get, from the profile alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mosel.cli.options import Device, MaxAccuracyLoss, MinAccuracy, ModelsFolder

if TYPE_CHECKING:
    from rich.table import Table

    from gateway.jobs.checks import CheckedJob
    from mosel.client import Demand
    from mosel.config import Settings
    from mosel.packages.model_package import ModelPackage
    from mosel.profiles.files import Profile
    from selector.core.frontier import Strategy
    from selector.core.jobs import Plan
    from selector.core.profile import ModelProfile


def plan(
    model: Annotated[str, typer.Argument(help="Name of the model, such as har.")],
    size: Annotated[int, typer.Option(min=1, help="Items of the job.")] = 1,
    min_accuracy: MinAccuracy = None,
    max_accuracy_loss: MaxAccuracyLoss = None,
    latency_slo_ms: Annotated[float | None, typer.Option(help="Deadline in milliseconds from now.")] = None,
    effort: Annotated[str | None, typer.Option(help="cheapest or best. [default: cheapest with a floor]")] = None,
    rows: Annotated[int, typer.Option(min=2, help="Rows of the frontier to print at most.")] = 24,
    profile: Annotated[Path | None, typer.Option(help="Profile file. [default: the one for this hardware]")] = None,
    models: ModelsFolder = None,
    device: Device = None,
) -> None:
    """Print the frontier of a job on an idle system, and mark what the job would get. Starts nothing."""
    from mosel.cli.options import settings_from
    from mosel.cli.predict import sentence
    from mosel.cli.starting import console
    from mosel.client.assurance import assurance_from
    from mosel.client.demands import checked_demand
    from mosel.packages.model_package import find_packages
    from mosel.profiles.files import needed_profile
    from selector.conversions import assurance_message

    floors = {"min_accuracy": min_accuracy, "max_accuracy_loss": max_accuracy_loss}
    demand = checked_demand(floors | {"latency_slo_ms": latency_slo_ms, "effort": effort})
    settings = settings_from(models, [model], device)
    package = find_packages(settings.models_dir, (model,))[model]
    measured = needed_profile(package, settings, profile)
    known, asked = _known(package, measured, settings), _asked(package, settings, size, demand)
    planned = _plan(known, measured, settings, asked)
    kind = "quick profile" if measured.quick else "profile"
    console.print(
        f"{model}, {size} items; {kind} of {measured.measured_on} on {measured.hardware.device}", highlight=False
    )
    console.print(_table(planned, rows, known, asked))
    if planned.assurance is not None:
        stands_on = assurance_from(assurance_message(planned.assurance, planned.saved, asked.floor_source))
        saves = f"would save {100 * stands_on.saved:.0f} %"
        console.print(sentence(stands_on, saves), soft_wrap=True, highlight=False, markup=False)
    if planned.refusal:
        console.print(f"refused: {planned.refusal}", soft_wrap=True, highlight=False)
        raise typer.Exit(1)


def _known(package: "ModelPackage", measured: "Profile", settings: "Settings") -> "ModelProfile":
    """What is known of the model, with what its calibration rows guarantee."""
    from selector.conversions import certificates, model_profile

    profile = model_profile(measured, package.default_min_accuracy)
    return replace(profile, certificates=certificates(package.calibration, settings.selector.floor_confidence))


def _asked(package: "ModelPackage", settings: "Settings", size: int, demand: "Demand") -> "CheckedJob":
    """The job with the floor that counts, as a gateway would take it from this user."""
    from gateway.jobs.checks import check_spec
    from gateway.jobs.floors import Floors
    from mosel.client.demands import spec_of

    checked = check_spec(spec_of(package.name, size, demand), {package.name: package}, size)
    return Floors(settings.gateway.max_accuracy_loss, lambda _: None).resolve(checked, None)


def _plan(known: "ModelProfile", measured: "Profile", settings: "Settings", asked: "CheckedJob") -> "Plan":
    from mosel.modality import FUSION
    from mosel.v1 import gateway_pb2
    from selector.core.jobs import Effort, Job
    from selector.core.scheduler import Scheduler

    model, refuse = asked.package.name, settings.selector.when_not_guaranteed == "refuse"
    scheduler = Scheduler(
        {model: known}, tokens=measured.concurrency, max_queued_items=asked.size, refuse_unguaranteed=refuse
    )
    # Each lane that comes says anew what is joined; until fusion is there, nothing is.
    joined = known.joined
    for lane in (*asked.modalities, FUSION):
        scheduler.lane(lane, True, measured.hardware.device, joined)
    job = Job(
        id=b"",
        model=model,
        size=asked.size,
        modalities=frozenset(asked.modalities),
        min_accuracy=asked.min_accuracy,
        max_accuracy_loss=asked.max_accuracy_loss,
        deadline=(asked.latency_slo_ms or settings.gateway.default_deadline_ms) / 1000,
        effort=Effort(gateway_pb2.Effort.Name(asked.effort).lower()) if asked.effort else None,
    )
    return scheduler.plan(job, 0.0)


def _table(planned: "Plan", rows: int, known: "ModelProfile", asked: "CheckedJob") -> "Table":
    from rich.table import Table

    from selector.core.frontier import format_strategy, thin

    predicted = dict(planned.frontier)
    strategies = set(thin(tuple(predicted), rows))
    chosen = planned.chosen
    if chosen is not None:
        # The same may differ in the last digit of a sum.
        chosen = next((strategy for strategy in predicted if strategy.counts == chosen.counts), chosen)
        predicted.setdefault(chosen, planned.latency_ms)
        strategies.add(chosen)
    title, bound = _bound(known, asked)
    table = Table("", "items by modality set", "expected", title, "compute ms", "predicted ms")
    for strategy in sorted(strategies, key=lambda strategy: strategy.cost_ms):
        mark = "->" if strategy == chosen else ""
        accuracies = f"{strategy.accuracy:.4f}", bound(strategy)
        times = f"{strategy.cost_ms:.2f}", f"{predicted[strategy]:.2f}"
        table.add_row(mark, format_strategy(strategy), *accuracies, *times)
    if len(strategies) < len(predicted):
        table.caption = f"{len(strategies)} of {len(predicted)} strategies; --rows {len(predicted)} prints all"
    return table


def _bound(known: "ModelProfile", asked: "CheckedJob") -> "tuple[str, Callable[[Strategy], str]]":
    """What is guaranteed of a strategy, as a title and a cell, which is empty without calibration rows."""
    from mosel.client.assurance import rounded_down, rounded_up
    from selector.core.floors import bound_of

    of_loss, sent = asked.max_accuracy_loss is not None, frozenset(asked.modalities)
    ladder = known.loss_ladder(sent) if of_loss else known.accuracy_ladder(sent)

    def cell(strategy: "Strategy") -> str:
        bound = bound_of(ladder, dict(strategy.counts))
        if bound is None:
            return ""
        return rounded_up(1 - bound) if of_loss else rounded_down(bound)

    return ("worse by at most" if of_loss else "at least"), cell
