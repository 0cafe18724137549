"""`mosel train`: run a model package's own training script on its recordings."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    model: Annotated[str, typer.Argument(help="Name of the model, such as har.")],
    out: Annotated[Path, typer.Option(help="Folder for the weights, their accuracies and the report.")],
    data: Annotated[Path | None, typer.Option(help="Folder that has the recordings.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    models: Annotated[
        Path | None, typer.Option(help="Folder of model packages. [default: the reference models]")
    ] = None,
) -> None:
    """Train a model again and write its weights and accuracies to a folder of their own."""
    from mosel.config import reference_models
    from mosel.data.datasets import find
    from mosel.errors import PackageError
    from mosel.packages.model_package import find_packages

    package = find_packages(models or reference_models(), (model,))[model]
    if package.train is None:
        raise PackageError(f"{package.folder / 'model.toml'}: no table [train], so this model cannot be trained here")
    main = package.load_attribute(f"{package.train}:main")
    found = find(package, data)
    typer.echo(f"training {model} on {found.folder} ({found.origin})")
    main(found.folder, out, seed)
    typer.echo(f"wrote {out}")
