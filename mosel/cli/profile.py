"""`mosel profile`: measure a model on this machine."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mosel.cli.options import Device, ModelsFolder

if TYPE_CHECKING:
    from mosel.client import Client
    from mosel.config import Settings
    from mosel.data.samples import Samples
    from mosel.launcher import Launcher
    from mosel.packages.model_package import ModelPackage
    from mosel.profiles.files import Profile
    from mosel.v1 import gateway_pb2

_READY_TIMEOUT_S = 600.0
_REPEATS = 30
_LOAD_S = 6
_PLOTTED_ITEMS = 8


def profile(
    model: Annotated[str, typer.Argument(help="Name of the model, such as har.")],
    data: Annotated[Path | None, typer.Option(help="Folder with labelled samples. [default: as `mosel data`]")] = None,
    batch_sizes: Annotated[str | None, typer.Option(help="Such as 1,2,4,8 or 1..32. [default: the setting]")] = None,
    out: Annotated[Path | None, typer.Option(help="Profile file. [default: where `mosel up` looks]")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture, a PNG file. [default: beside the profile]")] = None,
    models: ModelsFolder = None,
    device: Device = None,
) -> None:
    """Measure accuracy and latency of every modality set, for `mosel up`, `mosel plan` and `mosel simulate`."""
    from mosel.cli.options import settings_from
    from mosel.cli.starting import console, started
    from mosel.client import Client
    from mosel.config import FREE_PORTS
    from mosel.packages.model_package import find_packages
    from mosel.profiles.files import profile_file, save_profile
    from mosel.profiles.forms import share_forms

    kept = settings_from(models, [model], device, **FREE_PORTS)
    package = find_packages(kept.models_dir, (model,))[model]
    samples, source = _calibration(package, data)
    with tempfile.TemporaryDirectory(prefix="mosel-profile-") as scratch:
        settings = _measuring(kept, batch_sizes, Path(scratch))
        share_forms(kept.profiles_dir, settings.profiles_dir)
        with started(settings, _READY_TIMEOUT_S) as launcher, Client(launcher.local_address, retries=None) as client:
            quick = _quick(package, launcher.settings)
            with _progress(_steps(quick, samples, settings)) as advance:
                measured = _measure(client, package, quick, samples, launcher, advance)
    measured = measured.model_copy(update={"accuracy_source": source, "measured_on": datetime.now(UTC).date()})
    file = out or profile_file(package, measured.hardware, kept)
    save_profile(measured, file)
    _show(measured, _guaranteed(package, kept))
    console.print(f"profile: {file}", soft_wrap=True, highlight=False)
    _plot(measured, package, plot or file.with_suffix(".png"))


def _calibration(package: "ModelPackage", data: Path | None) -> "tuple[Samples | None, str]":
    """Labelled samples that the training has not seen, if they can be had here; and where accuracies come from."""
    from mosel.data.datasets import find
    from mosel.errors import DatasetError, NoSuchSplit
    from mosel.profiles.files import package_accuracy_source

    try:
        if package.samples is None:
            raise DatasetError(f"model '{package.name}' has no table [samples] in model.toml")
        found = find(package, data)
        samples: Samples = package.load_module(package.samples).load(found.folder, "calibration")
    except DatasetError as error:
        if data is not None and not isinstance(error, NoSuchSplit):
            raise
        return None, f"{package_accuracy_source(package)} ({error})"
    return samples, f"measured here: {len(samples)} samples of the calibration split ({found.origin})"


def _measuring(settings: "Settings", batch_sizes: str | None, profiles_dir: Path) -> "Settings":
    """Settings under which the selector knows no profile, and measures more than at a usual start."""
    selector = {"profile_repeats": max(_REPEATS, settings.selector.profile_repeats)} | (
        {"profile_batch_sizes": _sizes(batch_sizes)} if batch_sizes is not None else {}
    )
    return settings.model_copy(
        update={"profiles_dir": profiles_dir, "selector": settings.selector.model_copy(update=selector)}
    )


def _sizes(text: str) -> tuple[int, ...]:
    from mosel.errors import ConfigError

    first, dots, last = text.partition("..")
    try:
        sizes = (
            tuple(range(int(first), int(last) + 1)) if dots else tuple(sorted({int(part) for part in text.split(",")}))
        )
    except ValueError:
        sizes = ()
    if not sizes or sizes[0] < 1:
        raise ConfigError(f"--batch-sizes is '{text}'; expected numbers from 1, such as 1,2,4,8 or 1..32")
    return sizes


def _quick(package: "ModelPackage", settings: "Settings") -> "Profile":
    """What the selector measured when it started."""
    from mosel.errors import ConfigError
    from mosel.profiles.files import load_profile

    quick = load_profile(package, settings)
    if quick is None:
        raise ConfigError("settings fusion.address and encoders.addresses name TCP addresses; expected sockets (unix:)")
    return quick


def _steps(quick: "Profile", samples: "Samples | None", settings: "Settings") -> int:
    per_set = len(_job_sizes(settings)) + (samples is not None)
    return len(quick.accuracy) * per_set + _LOAD_S


def _job_sizes(settings: "Settings") -> tuple[int, ...]:
    from mosel.profiles.measurement import JOB_SIZES

    return tuple(size for size in JOB_SIZES if size <= settings.gateway.max_items_per_job)


def _measure(
    client: "Client",
    package: "ModelPackage",
    quick: "Profile",
    samples: "Samples | None",
    launcher: "Launcher",
    advance: Callable[[str], None],
) -> "Profile":
    from mosel.compute import networks
    from mosel.profiles.measurement import calls_under_load, end_to_end, measured_accuracy

    sizes = _job_sizes(launcher.settings)
    payloads = {m: networks.example_payload(package, m, sizes[-1]) for m in package.modalities}
    times, calls, edge = end_to_end(client, quick, payloads, sizes, advance)
    changes = {"quick": False, "end_to_end": times, "calls": calls, "edge_ms": edge.ms, "edge_item_ms": edge.item_ms}
    if samples is not None:
        accuracy = measured_accuracy(client, package.name, quick.accuracy, samples, advance)
        changes |= {"accuracy": accuracy, "accuracy_measured": True}
    edge_cpu_s = partial(_edge_cpu_s, launcher)
    loaded, edge_cpu_ms = calls_under_load(client, quick, calls, payloads, _LOAD_S, edge_cpu_s, advance)
    return quick.model_copy(update=changes | {"loaded_calls": loaded, "edge_cpu_ms": edge_cpu_ms})


def _edge_cpu_s(launcher: "Launcher") -> float:
    """Processor time of gateway, selector and this process, which is the client, in seconds.

    Where all services share a process, that is the time of its event loop, which computes nothing.
    """
    import psutil

    client = sum(psutil.Process().cpu_times()[:2])
    if launcher.settings.placement == "single":
        services = psutil.Process(launcher.children["mosel"].process.pid)
        loop = next(thread for thread in services.threads() if thread.id == services.pid)
        return float(client + loop.user_time + loop.system_time)
    edge = (psutil.Process(launcher.children[name].process.pid) for name in ("gateway", "selector"))
    return float(client + sum(sum(process.cpu_times()[:2]) for process in edge))


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[str], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from mosel.cli.starting import console

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=steps)
        yield lambda what: bar.update(task, advance=1, description=what)


def _guaranteed(package: "ModelPackage", settings: "Settings") -> dict[str, tuple[str, str, str]]:
    """What the package's calibration rows tell of each set: at least, worst label, worst group; empty without rows."""
    from gateway.weaknesses import find_weaknesses
    from mosel.cli.models import bound_text, weakness_text
    from mosel.client.assurance import rounded_down, weakness_from
    from mosel.modality import parse_set
    from selector.conversions import certificates
    from selector.core.floors import bound_of

    rows = package.calibration
    if rows is None:
        return {}
    made = certificates(rows, settings.selector.floor_confidence)
    ladder = None if made is None else made.of_accuracy(frozenset(package.modalities))

    def cells(name: str, *worst: "gateway_pb2.Weakness | None") -> tuple[str, str, str]:
        label, group = (weakness_text(part and weakness_from(part)) for part in worst)
        return bound_text(bound_of(ladder, {parse_set(name): 1}), rounded_down), label, group

    found = find_weaknesses(rows, package.output.labels)
    return {name: cells(name, weakest.label, weakest.group) for name, weakest in found.items()}


def _show(measured: "Profile", guaranteed: Mapping[str, tuple[str, str, str]]) -> None:
    from rich.table import Table

    from mosel.cli.starting import console

    hardware = measured.hardware
    console.print(
        f"{measured.model} {measured.version} on {hardware.device}: {hardware.cpu}, {hardware.cores:g} cores, "
        f"{hardware.workers} workers; torch {measured.versions.torch}\naccuracy: {measured.accuracy_source}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    sizes = [point.size for point in next(iter(measured.end_to_end.values()))]
    shown = sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})
    known = ("at least", "worst label", "worst group") if guaranteed else ()
    sets = Table(
        "modality set", "expected", "95 % interval", *known, *(f"p50 / p95 ms, {size} items" for size in shown)
    )
    for name, accuracy in sorted(measured.accuracy.items(), key=lambda entry: entry[1].value):
        times = [f"{p.p50_ms:.2f} / {p.p95_ms:.2f}" for p in measured.end_to_end[name] if p.size in shown]
        sets.add_row(
            name,
            f"{accuracy.value:.4f}",
            f"{accuracy.low:.4f} to {accuracy.high:.4f}",
            *guaranteed.get(name, ()),
            *times,
        )
    console.print(sets)
    calls = Table("calls to", "overhead ms", "factor", "more ms under load", "factor")
    for lane, call in measured.calls.items():
        numbers = (call, measured.loaded_calls[lane])
        calls.add_row(lane, *(f"{n:.3f}" for call in numbers for n in (call.overhead_ms, call.factor)))
    console.print(calls)


def _plot(measured: "Profile", package: "ModelPackage", file: Path) -> None:
    from mosel.cli.starting import drawing
    from mosel.modality import format_set
    from selector.conversions import model_profile
    from selector.core.frontier import frontier

    with drawing(file):
        from mosel.profiles.plot import write_plot

        known = model_profile(measured, package.default_min_accuracy)
        costs = {format_set(s): known.cost_ms(s, _PLOTTED_ITEMS) for s in known.accuracy}
        strategies = frontier(known, list(known.accuracy), _PLOTTED_ITEMS)
        write_plot(file, measured, _PLOTTED_ITEMS, costs, [(s.cost_ms, s.accuracy) for s in strategies])
