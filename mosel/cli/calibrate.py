"""`mosel calibrate`: measure again what a model makes of items that no weight was fitted to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mosel.cli.losses import CONFIDENCE
from mosel.cli.options import Device, ModelsFolder

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from mosel.config import Settings
    from mosel.data.samples import Samples
    from mosel.packages.calibration import Calibration
    from mosel.packages.model_package import ModelPackage
    from selector.core.profile import ModelProfile


def calibrate(
    model: Annotated[str, typer.Argument(help="Name of the model, such as digits.")],
    data: Annotated[Path | None, typer.Option(help="Folder with labelled samples. [default: as `mosel data`]")] = None,
    unlabelled: Annotated[
        Path | None, typer.Option(help="Instead: folder with a file `<modality>.npy` per modality, [items, ...].")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Give labelled rows up for unlabelled ones.")] = False,
    models: ModelsFolder = None,
    device: Device = None,
) -> None:
    """Measure accuracies and calibration rows, from which guarantees are made. Starts no services.

    Without labels no accuracy can be guaranteed, but how much is lost at most against running everything.
    """
    from mosel.cli.options import settings_from
    from mosel.compute.networks import choose_device, load_encoder, load_fusion
    from mosel.packages.model_package import find_packages

    settings = settings_from(models, [model], device)
    package = find_packages(settings.models_dir, (model,))[model]
    where = choose_device(settings.device)
    encoders = {modality: load_encoder(package, modality, where) for modality in package.modalities}
    fusion = load_fusion(package, where)
    if unlabelled is None:
        calibration, test = _with_labels(package, encoders, fusion, data)
    else:
        calibration, test = _without_labels(package, encoders, fusion, unlabelled, replace), {}
    _show(calibration, test, _profile(package, settings))


def _with_labels(
    package: "ModelPackage", encoders: "dict[str, nn.Module]", fusion: "nn.Module", data: Path | None
) -> "tuple[Calibration, dict[str, float]]":
    """Calibration rows with labels, and the accuracies on the test split; writes both."""
    from mosel.cli.starting import console
    from mosel.compute.training import score, write_accuracy
    from mosel.data.datasets import find
    from mosel.errors import DatasetError
    from mosel.packages.calibration import read_calibration
    from mosel.packages.content import CALIBRATION_FILE

    if package.samples is None:
        raise DatasetError(
            f"model '{package.name}' has no table [samples] in model.toml; expected a module with labelled items, "
            "or --unlabelled"
        )
    found = find(package, data)
    load = package.load_module(package.samples).load
    splits: dict[str, Samples] = {split: load(found.folder, split) for split in ("calibration", "test")}
    with _progress(sum(map(len, splits.values()))) as advance:
        scores = {split: score(encoders, fusion, samples, advance) for split, samples in splits.items()}
    source = f"the calibration split ({found.origin})"
    written = write_accuracy(package.folder, calibration=scores["calibration"], test=scores["test"], source=source)
    console.print(f"wrote accuracy.json and calibration.npz in {package.folder}", soft_wrap=True, highlight=False)
    return read_calibration(package.folder / CALIBRATION_FILE), written["test"]["sets"]


def _without_labels(
    package: "ModelPackage", encoders: "dict[str, nn.Module]", fusion: "nn.Module", folder: Path, replace: bool
) -> "Calibration":
    """Calibration rows without labels; writes them."""
    from mosel.cli.starting import console
    from mosel.compute.training import score
    from mosel.data.unlabelled import read_unlabelled
    from mosel.errors import ConfigError
    from mosel.packages.calibration import has_labels, save_calibration
    from mosel.packages.content import CALIBRATION_FILE

    file = package.folder / CALIBRATION_FILE
    if not replace and has_labels(file):
        raise ConfigError(f"{file} has labelled rows, which would be lost; --replace gives them up")
    samples = read_unlabelled(folder, package.modalities)
    with _progress(len(samples)) as advance:
        scores = score(encoders, fusion, samples, advance)
    calibration = scores.calibration(package.content_hash, f"{len(samples)} unlabelled items of {folder}")
    save_calibration(file, calibration)
    console.print(f"wrote {file}", soft_wrap=True, highlight=False)
    return calibration


@contextmanager
def _progress(items: int) -> Iterator[Callable[[int], object]]:
    """Shows on standard error how far measuring is; told how many items were done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("items"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("items", total=items)
        yield lambda done: progress.advance(task, done)


def _show(calibration: "Calibration", test: "dict[str, float]", known: "ModelProfile | None") -> None:
    """The rows, what each set makes of them, and what is guaranteed by them."""
    import numpy as np

    from mosel.cli.starting import console

    certify = calibration.certify
    groups = [
        f"{len(np.unique(calibration.groups[certify, column]))} by {grouping}"
        for column, grouping in enumerate(calibration.group_names)
    ]
    console.print(_sets(calibration, test))
    console.print(
        f"{len(certify)} rows: {int(np.sum(~certify))} choose rules, {int(np.sum(certify))} certify them"
        + (f"; groups that certify: {', '.join(groups)}" if groups else ""),
        highlight=False,
    )
    console.print(_losses(calibration, known))
    if known is None:
        console.print("what is saved needs to know what calls cost: `mosel profile` measures it", highlight=False)


def _sets(calibration: "Calibration", test: "dict[str, float]") -> "Table":
    from rich.table import Table

    from mosel.modality import format_set
    from selector.conversions import certificates
    from selector.core.floors import bound_of

    labelled, everything = calibration.is_labelled, max(calibration.sets, key=len)
    known = certificates(calibration, CONFIDENCE)
    ladder = None if known is None else (known.of_accuracy if labelled else known.of_loss)(everything)
    table = Table("modality set")
    for title in ("at least", "expected", "on test") if labelled else ("answers differ from everything's", "at most"):
        table.add_column(title, justify="right")
    compared = calibration.labels if labelled else calibration.answers[:, calibration.sets.index(everything)]
    for column, modality_set in enumerate(calibration.sets):
        share, name = float((calibration.answers[:, column] == compared).mean()), format_set(modality_set)
        bound = bound_of(ladder, {modality_set: 1})
        least = "-" if bound is None else f"{bound if labelled else 1 - bound:.4f}"
        row = (least, f"{share:.4f}", f"{test[name]:.4f}") if labelled else (f"{1 - share:.4f}", least)
        table.add_row(name, *row)
    return table


def _losses(calibration: "Calibration", known: "ModelProfile | None") -> "Table":
    from rich.table import Table

    from mosel.cli.savings import savings

    table = Table("at most worse than everything", title=f"guaranteed at {CONFIDENCE:.0%}")
    for title in ("of it used", "saves", "with rows without end", "half of it used with"):
        table.add_column(title, justify="right")
    for saving in savings(calibration, known):
        rows = saving.rows_for_half
        enough = (
            "far more rows" if rows is None else f"about {rows} rows" if rows > len(calibration.labels) else "these"
        )
        saved = ("-" if share is None else f"{share:.0%}" for share in (saving.saved, saving.most_saved))
        table.add_row(f"{100 * saving.loss:g} points", f"{saving.used:.0%}", *saved, enough)
    return table


def _profile(package: "ModelPackage", settings: "Settings") -> "ModelProfile | None":
    """What calls of the model cost on this hardware, if that was measured."""
    from mosel.profiles.files import load_profile
    from selector.conversions import model_profile

    kept = load_profile(package, settings)
    return None if kept is None else model_profile(kept, package.default_min_accuracy)
