"""Writes this package at another scale: `python models/tvlt/rescale.py --scale 0.5 --out FOLDER`."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mosel.errors import PackageError
from mosel.packages.model_package import load_package

if TYPE_CHECKING:
    from .geometry import Geometry

HERE = Path(__file__).resolve().parent


def write(scale: float, models: Path) -> Path:
    """Writes the package `tvlt` at a scale.

    Args:
        scale: 1, 0.5 or 0.25.
        models: the folder of model folders to write it to; made if it is not there.

    Returns:
        The package's folder.

    Raises:
        PackageError: the scale is another one, or the package's folder is there already.
    """
    here, there = _geometry(load_package(HERE).parameters["scale"]), _geometry(scale)
    text = (HERE / "model.toml").read_text(encoding="utf-8")
    for old, new in zip(_lines(here), _lines(there), strict=True):
        text = text.replace(old, new)
    folder = models / HERE.name
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise PackageError(f"{folder} is there already; expected a folder without '{HERE.name}'") from None
    for file in (*HERE.glob("*.py"), HERE / "accuracy.json", HERE / "README.md"):
        shutil.copyfile(file, folder / file.name)
    (folder / "model.toml").write_text(text, encoding="utf-8")
    return folder


def main(
    scale: Annotated[float, typer.Option(help="1, 0.5 or 0.25.")],
    out: Annotated[Path, typer.Option(help="Folder of model folders to write to.")],
) -> None:
    """Write this package at another scale, and show what share of all multiplications each modality set takes."""
    try:
        folder = write(scale, out)
    except PackageError as error:
        raise typer.BadParameter(str(error)) from None
    there, full = _geometry(scale), _geometry(1)
    typer.echo(f"wrote {folder}")
    typer.echo("modality set   multiplications   of all of them   at scale 1")
    for (name, ratio), count in zip(there.ratios().items(), there.multiplications.values(), strict=True):
        typer.echo(f"{name:12} {count / 1e9:12.3f} x 10^9 {ratio:16.4f} {full.ratios()[name]:12.4f}")


def _geometry(scale: float) -> "Geometry":
    # Run as a script this file has no package to import from.
    geometry: Geometry = load_package(HERE).load_attribute("geometry:Geometry")(scale)
    return geometry


def _lines(geometry: "Geometry") -> list[str]:
    """The lines of model.toml that the scale decides."""
    lines = [f'version = "1-scale{geometry.scale:g}"', f"scale = {geometry.scale:g}"]
    for modality, tokens in geometry.tokens.items():
        lines.append(f"shape = {list(geometry.payloads[modality])}")
        lines.append(f"embedding = {[tokens, geometry.width]}")
    return lines


if __name__ == "__main__":
    typer.run(main)
