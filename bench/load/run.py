"""The whole of `mosel bench load`: steps of load on a gateway, a table, and a report."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.items import Items, items_of, random_items
from bench.load.report import About, report
from bench.load.steps import Plan, Step, run_steps
from bench.machine import machine_line
from bench.outcomes import Ending
from bench.serving import Gateway, Jobs
from mosel import Client
from mosel.client.answers import ModelInfo
from mosel.errors import ModelNotFound, MoselError
from mosel.packages.model_package import find_packages

console = Console(width=140, highlight=False)
_COLUMNS = ("offered /s", "jobs", "goodput /s", "items /s in time", "missed", "p50 ms", "p90 ms", "p99 ms", "accuracy")
_ENDINGS = ("late", "refused", "refused p50 ms", "expired", "failed", "send lag p99 ms")


def load(
    gateway: Gateway, model: str | None, plan: Plan, models: Path, data: Path | None, json_file: Path | None
) -> None:
    """Runs everything, prints a table, and writes the report.

    Args:
        gateway: a running one.
        model: which model; None: the first that it serves.
        plan: what is sent, and when.
        models: folder of packages, where the model's samples may be found.
        data: folder with labelled recordings; None: wherever they are found.
        json_file: for the report; None: none is written.

    Raises:
        MoselError: the gateway cannot be reached, does not serve the model, or there are fewer items than in a job.
    """
    info = _served(gateway, model)
    items = _items(info, plan.items, models, data)
    about = About(gateway, info.name, items.source, plan)
    console.print(
        machine_line(), f"{info.name} at {gateway.address}; {items.source}", sep="\n", markup=False, soft_wrap=True
    )
    steps = []
    for step in run_steps(gateway, Jobs(info.name, info.labels, items), plan):
        steps.append(step)
        console.print(f"{step.rate:g} jobs/s: {step.goodput:.1f} answered in time and accurately enough", markup=False)
    console.print(table(plan, steps))
    if json_file is not None:
        json_file.write_text(json.dumps(report(about, steps), indent=1) + "\n")
        console.print(f"report: {json_file}", soft_wrap=True, markup=False)


def table(plan: Plan, steps: Sequence[Step]) -> Table:
    """One line per step. Times are of answers, from the scheduled time of each job."""
    floor = "no floor" if plan.min_accuracy is None else f"floor {plan.min_accuracy:g}"
    if plan.max_accuracy_loss is not None:
        floor = f"at most {plan.max_accuracy_loss:g} worse than everything"
    slo = "no SLO" if math.isinf(plan.latency_slo_ms) else f"SLO {plan.latency_slo_ms:g} ms"
    title = f"open loop, {plan.items} items a job, {floor}, {slo}, {plan.seconds:g} s a step"
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (*_COLUMNS, *_ENDINGS):
        shown.add_column(column.replace(" ", "\n"), justify="right")
    for step in steps:
        summary = step.summary
        answers = [_number(step.ms(percent, Ending.ANSWERED), ".1f") for percent in (50, 90, 99)]
        shown.add_row(
            f"{step.rate:g}",
            str(summary.jobs),
            f"{step.goodput:.1f}",
            f"{summary.items_per_s:.1f}",
            _number(summary.job_miss_ratio, ".1%"),
            *answers,
            _number(summary.expected_accuracy, ".4f"),
            str(summary.endings.get("late", 0)),
            str(step.count(Ending.REFUSED)),
            _number(step.ms(50, Ending.REFUSED), ".1f"),
            str(step.count(Ending.EXPIRED)),
            str(step.count(Ending.FAILED)),
            _number(step.lag_ms(99), ".1f"),
        )
    return shown


def _served(gateway: Gateway, model: str | None) -> ModelInfo:
    """What a gateway says of a model."""
    with Client(gateway.address, token=gateway.token, tls=gateway.tls) as client:
        served = {info.name: info for info in client.models()}
    if not served:
        raise ModelNotFound(f"the gateway at {gateway.address} serves no model")
    name = model or next(iter(served))
    if name not in served:
        raise ModelNotFound(f"model is '{name}'; the gateway at {gateway.address} serves {', '.join(served)}")
    return served[name]


def _items(info: ModelInfo, size: int, models: Path, data: Path | None) -> Items:
    """Real items if the model's package is here, and is what the gateway serves; else random ones."""
    try:
        package = find_packages(models, (info.name,))[info.name]
    except MoselError:
        items = random_items(info.modalities, f"no package of '{info.name}' in {models}", size)
    else:
        shapes = {name: (spec.dtype, spec.shape) for name, spec in package.modalities.items()}
        if shapes == {name: (spec.dtype, spec.shape) for name, spec in info.modalities.items()}:
            items = items_of(package, data, size)
        else:
            items = random_items(info.modalities, f"{package.folder} is another '{info.name}'", size)
    items.check_size(size)
    return items


def _number(value: float, how: str) -> str:
    return "-" if math.isnan(value) else format(value, how)
