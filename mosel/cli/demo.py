"""`mosel demo`: the whole idea on real recordings."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mosel.cli.options import DataFolder, Device

if TYPE_CHECKING:
    from rich.console import Console

    from mosel.client import Client, ModelInfo
    from mosel.config import Settings
    from mosel.data.datasets import FoundData
    from mosel.data.samples import Samples
    from mosel.packages.model_package import ModelPackage
    from mosel.profiles.labelled_run import Row, Setting

_JOB_ITEMS, _IN_FLIGHT = 4, 4
# Under the tight deadline a job is large and alone, so that its time is computation, not hops or other jobs.
_TIGHT_JOB_ITEMS = 32
_READY_TIMEOUT_S = 120.0
_COLUMNS = 100


def demo(
    model: Annotated[str | None, typer.Option(help="[default: digits where its data is found, else har]")] = None,
    data: DataFolder = None,
    items: Annotated[int, typer.Option(min=1, help="Test items per setting.")] = 520,
    plot: Annotated[Path | None, typer.Option(help="Also write a picture of the results, a PNG file.")] = None,
    device: Device = None,
) -> None:
    """Start everything, send real test items at several floors and deadlines, and print what was run."""
    from mosel.cli.options import settings_from
    from mosel.cli.starting import console, started
    from mosel.client import Client
    from mosel.config import FREE_PORTS

    if not console.is_terminal:
        console.width = max(console.width, _COLUMNS)  # the tables fit, in a file too
    begin = time.monotonic()
    settings = settings_from(None, None, device, **FREE_PORTS)
    package, found, reason = _choose(settings, model, data)
    console.print(reason, soft_wrap=True, highlight=False)
    settings = settings.model_copy(update={"models": (package.name,)})
    samples = _test_items(package, found, items)
    with started(settings, _READY_TIMEOUT_S) as launcher, Client(launcher.local_address, retries=None) as client:
        served = next(info for info in client.models() if info.name == package.name)
        rows = _show_floors(console, client, served, samples)
        _show_deadline(console, client, served, samples, [row.setting for row in rows])
        _show_transport(console, client, settings)
        if plot is not None:
            from mosel.demo.plot import write_plot

            write_plot(plot, served, rows)
            console.print(f"picture: {plot}", soft_wrap=True, highlight=False)
    console.print(f"stopped; {time.monotonic() - begin:.1f} s in all", highlight=False)


def _choose(settings: "Settings", model: str | None, data: Path | None) -> "tuple[ModelPackage, FoundData, str]":
    """The model, its recordings, and one line that says why these."""
    from mosel.data.datasets import find
    from mosel.errors import DatasetError
    from mosel.packages.model_package import find_packages

    names = ("digits", "har") if model is None else (model,)
    packages = find_packages(settings.models_dir, names)
    if model is not None:
        found = _get(packages[model], data)
        return packages[model], found, f"model {model}, as asked for; its recordings: {found.origin}"
    try:
        found = find(packages["digits"], data)
    except DatasetError:
        found = _get(packages["har"], data)
        why = "digits has no recordings here, see `mosel data list`"
        return packages["har"], found, f"model har ({why}); its recordings: {found.origin}"
    return packages["digits"], found, f"model digits, whose recordings were found: {found.origin}"


def _get(package: "ModelPackage", data: Path | None) -> "FoundData":
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from mosel.cli.starting import console
    from mosel.data.datasets import get

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        return get(package, data, progress=progress)


def _test_items(package: "ModelPackage", found: "FoundData", items: int) -> "Samples":
    """A random selection of the test split, the same in every run: the split itself is ordered."""
    import numpy as np

    from mosel.errors import DatasetError

    if package.samples is None:
        raise DatasetError(f"model '{package.name}' has no section 'samples' in model.toml; the demo needs test items")
    samples: Samples = package.load_module(package.samples).load(found.folder, "test")
    rows = np.random.default_rng(0).permutation(len(samples))[:items]
    return samples.take(rows.astype(np.int64))


def _show_floors(console: "Console", client: "Client", model: "ModelInfo", samples: "Samples") -> "list[Row]":
    from mosel.demo.plan import choose_settings
    from mosel.demo.tables import floors_table
    from mosel.profiles.labelled_run import Setting, measure

    how = Setting(None, _JOB_ITEMS, _IN_FLIGHT)
    measure(client, model.name, samples.take(slice(0, 64)), how)  # warms up
    rows = [measure(client, model.name, samples, setting) for setting in choose_settings(model.sets, how)]
    console.print(
        f"\n{len(samples)} test items per floor, in jobs of {_JOB_ITEMS}, {_IN_FLIGHT} jobs in flight", highlight=False
    )
    console.print(floors_table(rows, rows[0].accuracy))
    _show_remarks(console, rows, rows[0].accuracy)
    confidence = max(row.assurance.confidence for row in rows)
    sure = f", at {100 * confidence:g} % confidence" if confidence else ""
    console.print(
        f"worse: than everything; guaranteed: for items like the calibration rows{sure}\n"
        "expected: by the profile; measured: on these test items, ± the binomial standard error\n"
        "saved: compute, against everything",
        highlight=False,
    )
    return rows


def _show_deadline(
    console: "Console", client: "Client", model: "ModelInfo", samples: "Samples", settings: "Sequence[Setting]"
) -> None:
    from mosel.demo.plan import full_set, tight_deadline_ms, without_slowest
    from mosel.demo.tables import deadline_table
    from mosel.profiles.labelled_run import Setting, measure

    full, fast = full_set(model.sets), without_slowest(model.sets)
    if fast is None:
        return
    size = min(_TIGHT_JOB_ITEMS, len(samples))
    samples = samples.take(slice(0, len(samples) // size * size))  # a smaller job could keep a deadline made for others
    without, everything = (
        measure(client, model.name, samples, Setting(None, size, 1, modalities=tuple(name.split("+"))))
        for name in (fast, full)
    )
    deadline_ms = tight_deadline_ms(without.p50_ms, everything.p50_ms)
    tight = [replace(setting, job_items=size, in_flight=1, deadline_ms=deadline_ms) for setting in settings]
    rows = [measure(client, model.name, samples, setting) for setting in tight]
    console.print(
        f"\nthe same with a deadline of {deadline_ms:.1f} ms: {len(samples)} items in jobs of {size}, one at a time\n"
        f"(measured now: {fast} takes {without.p50_ms:.1f} ms, {full} {everything.p50_ms:.1f} ms)",
        highlight=False,
    )
    console.print(deadline_table(rows, everything.accuracy))
    _show_remarks(console, rows, everything.accuracy)
    if refusal := next((row.refusal for row in reversed(rows) if row.refusal), None):
        console.print(f"a refusal: {refusal}", soft_wrap=True, highlight=False)


def _show_remarks(console: "Console", rows: "Sequence[Row]", everything: float) -> None:
    from mosel.demo.tables import remarks

    for remark in remarks(rows, everything):
        console.print(remark, soft_wrap=True, highlight=False)


def _show_transport(console: "Console", client: "Client", settings: "Settings") -> None:
    services = client.status()
    slots = sum(value for s in services for name, value in s.counters.items() if name.endswith("slots_acquired_total"))
    rungs = sorted({edge.rung for service in services for edge in service.edges})
    console.print(
        f"\ntransport: {', '.join(rungs)}: {slots} tensors, and those up to {settings.transport.inline_max_kib} KiB "
        "inside messages",
        highlight=False,
    )
