"""`mosel observe`: what a running system would save of a model, on its own traffic."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mosel.cli.options import DEFAULT_ADDRESS, Address, Ca, Certificate, Key, ModelsFolder, Token, connect

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from mosel.cli.prospects import Prospect
    from mosel.client import Client, ObservedItems, ObserveEvent
    from mosel.errors import MoselError
    from mosel.packages.calibration import Calibration
    from mosel.packages.model_package import ModelPackage

_BAR = 20


class _Observed:
    """What was told so far, and what it ended with if that was an error."""

    def __init__(self) -> None:
        self.jobs: list[ObservedItems] = []
        self.last: ObserveEvent | None = None
        self.error: MoselError | None = None

    @property
    def items(self) -> int:
        """Those that were observed."""
        return sum(len(items.answers) for items in self.jobs)

    @property
    def per_s(self) -> float:
        """The same in a second."""
        return self.items / self.last.seconds if self.last and self.last.seconds else 0.0


def observe(
    model: Annotated[str, typer.Argument(help="Name of the model, such as digits.")],
    items: Annotated[int, typer.Option(min=2, help="Items to observe; Ctrl-C earlier shows what there is.")] = 2000,
    share: Annotated[float, typer.Option(help="Share of the items that are observed, above 0 to 1.")] = 1.0,
    save: Annotated[
        bool, typer.Option("--save", help="Keep what was observed as the model's calibration.npz.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Picture, a PNG file.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Profile file. [default: the one for this hardware]")] = None,
    models: ModelsFolder = None,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
) -> None:
    """Show what callers of a model would save if they accepted a loss. They notice nothing, and need no labels.

    Meanwhile everything that they send is run, so that floors save nothing; some items are fused at every modality set
    besides, when nothing else is to be computed.
    """
    from mosel.cli.options import settings_from
    from mosel.cli.prospects import prospects, rows_of
    from mosel.cli.starting import console
    from mosel.errors import ServiceUnavailable
    from mosel.packages.model_package import find_packages
    from mosel.profiles.files import needed_profile

    settings = settings_from(models, [model])
    package = find_packages(settings.models_dir, (model,))[model]
    measured = needed_profile(package, settings, profile)
    if save:
        _check_replaceable(package)
    with connect(address, token, ca, certificate, key) as client:
        seen = _observed(client, model, items, share)
    if seen.last is None or not seen.jobs:
        raise seen.error or ServiceUnavailable(f"no item of model '{model}' was observed: {_traffic(seen)}")
    rows = rows_of(
        package, seen.last.modality_sets, seen.jobs, f"observed: {seen.items} items of {len(seen.jobs)} jobs"
    )
    found = prospects(rows, measured, [items.size for items in seen.jobs])
    console.print(
        f"{model}: {seen.items} items of {len(seen.jobs)} jobs were observed; {_traffic(seen)}", highlight=False
    )
    _show(found, seen, package)
    if save:
        _save(package, seen.last.revision, rows)
    if plot is not None and found:
        _plot(plot, f"{model}: compute saved, by {seen.items} items", found)
    if seen.error is not None:
        raise seen.error


def _observed(client: "Client", model: str, items: int, share: float) -> _Observed:
    """What is told until there is enough, Ctrl-C, or an error."""
    from mosel.errors import MoselError

    seen = _Observed()
    with closing(client.observe(model, share=share)) as events, _progress(items) as show:
        try:
            for event in events:
                seen.jobs += event.observed
                seen.last = event
                show(seen)
                if seen.items >= items:
                    break
        except KeyboardInterrupt:
            pass
        except MoselError as error:
            seen.error = error
    return seen


@contextmanager
def _progress(items: int) -> "Iterator[Callable[[_Observed], None]]":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from mosel.cli.starting import console

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("waiting for callers", total=items)

        def show(seen: _Observed) -> None:
            description = _traffic(seen) if seen.jobs else "waiting for callers"
            bar.update(task, completed=min(seen.items, items), description=description)

        yield show


def _traffic(seen: _Observed) -> str:
    """What callers sent meanwhile, and what observing cost."""
    event = seen.last
    if event is None or not event.items:
        return "callers sent nothing"
    computed = event.compute_ms + event.observing_ms
    cost = event.observing_ms / computed if computed else 0.0
    return f"{event.items / event.seconds:.3g} items/s answered; observing took {cost:.1%} of the compute"


def _show(found: "Sequence[Prospect]", seen: _Observed, package: "ModelPackage") -> None:
    from mosel.cli.starting import console

    assert seen.last is not None
    if seen.last.others:
        console.print(
            f"not observed: {seen.last.others} items of jobs that fixed their modalities, sent less than the model "
            "has, or had no time for everything",
            highlight=False,
        )
    if not found:
        console.print("too few jobs to guarantee anything: observe longer", highlight=False)
        return
    console.print(_table(found, seen))
    console.print(
        "At most so much worse than everything: guaranteed at 95 % for one loss that is fixed in advance, over all "
        "items of traffic like this. Times and throughput are predicted from the profile, for jobs of these sizes.",
        highlight=False,
    )
    # The smallest loss that brings half of what the largest does.
    chosen = next(prospect for prospect in found if prospect.saved >= found[-1].saved / 2)
    console.print(
        f"to switch it on: max_accuracy_loss = {chosen.loss:g} in {package.folder / 'model.toml'}, "
        f"or MOSEL_GATEWAY__MAX_ACCURACY_LOSS={chosen.loss:g}; it needs these rows, which --save keeps",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _table(found: "Sequence[Prospect]", seen: _Observed) -> "Table":
    from rich.table import Table

    table = Table("at most worse", title=f"guaranteed by {seen.items} items")
    for title in ("saves", "", "p50 ms", "items/s", "can save", "most of that with"):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    for prospect in found:
        before, after = prospect.before, prospect.after
        table.add_row(
            "1 point" if prospect.loss == 0.01 else f"{100 * prospect.loss:g} points",
            f"{prospect.saved:.0%}",
            "█" * round(_BAR * prospect.saved),
            f"{before.p50_ms:.1f} -> {after.p50_ms:.1f}",
            f"{before.items_per_s:.0f} -> {after.items_per_s:.0f}",
            f"{prospect.most_saved:.0%}",
            _until(prospect, seen),
        )
    return table


def _until(prospect: "Prospect", seen: _Observed) -> str:
    """How many items it takes to guarantee most of what can be saved, and how long that is at this traffic."""
    from datetime import timedelta

    if not prospect.most_saved:
        return "-"
    if prospect.items_for_most <= seen.items:
        return "these"
    wait = timedelta(seconds=round(prospect.items_for_most / seen.per_s))
    return f"{prospect.items_for_most} items, {wait}"


def _check_replaceable(package: "ModelPackage") -> None:
    """Raises ConfigError if what is to be saved would replace labelled rows."""
    from mosel.errors import ConfigError
    from mosel.packages.calibration import has_labels
    from mosel.packages.content import CALIBRATION_FILE

    if has_labels(package.folder / CALIBRATION_FILE):
        raise ConfigError(
            f"{package.folder} has labelled calibration rows; --save would replace them by unlabelled ones"
        )


def _save(package: "ModelPackage", revision: str, rows: "Calibration") -> None:
    from mosel.cli.starting import console
    from mosel.errors import ConfigError
    from mosel.packages.calibration import save_calibration
    from mosel.packages.content import CALIBRATION_FILE

    if revision != package.revision:
        raise ConfigError(
            f"nothing is saved: the services run revision {revision} of model '{package.name}', "
            f"and {package.folder} is {package.revision}"
        )
    file = package.folder / CALIBRATION_FILE
    save_calibration(file, rows)
    console.print(
        f"rows: {file}; `mosel reload {package.name}` has the services use them", soft_wrap=True, highlight=False
    )


def _plot(file: Path, title: str, found: "Sequence[Prospect]") -> None:
    from mosel.cli.starting import drawing

    with drawing(file):
        from mosel.profiles.savings_plot import write_savings_plot

        write_savings_plot(file, title, [(p.loss, p.saved, p.most_saved) for p in found])
