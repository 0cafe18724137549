"""`mosel data`: the recordings that the models are shown and trained with."""

from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(help="Find or fetch the recordings of the models.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name of the model, such as har.")]
Data = Annotated[Path | None, typer.Option(help="Folder that has the recordings; nothing is fetched then.")]
Models = Annotated[Path | None, typer.Option(help="Folder of model packages. [default: the reference models]")]


@data_app.command("get")
def get_command(name: Name, data: Data = None, models: Models = None) -> None:
    """Find a model's recordings, or fetch them from their publishers, and check them."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from mosel.config import reference_models
    from mosel.data.datasets import describe, get
    from mosel.packages.model_package import find_packages

    package = find_packages(models or reference_models(), (name,))[name]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        found = get(package, data, progress=progress)
    typer.echo(f"{name}: {found.folder} ({found.origin})")
    if package.sources is not None:
        typer.echo(f"licence: {describe(package).licence}")


@data_app.command("list")
def list_command(data: Data = None, models: Models = None) -> None:
    """Show which models' recordings are on this machine, where, and under which licence."""
    from rich.console import Console
    from rich.table import Table

    from mosel.config import reference_models
    from mosel.data.datasets import describe, find
    from mosel.errors import DatasetError
    from mosel.packages.model_package import find_packages

    table = Table("model")
    for column in ("recordings", "licence"):
        table.add_column(column, overflow="fold")
    for name, package in find_packages(models or reference_models()).items():
        if package.sources is None:
            continue
        try:
            found = find(package, data)
            state = f"{found.folder} ({found.origin})"
        except DatasetError as error:
            state = str(error)
        table.add_row(name, state, describe(package).licence)
    Console().print(table)
