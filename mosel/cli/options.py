"""Options that several commands share, and the settings they make."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mosel.config import Settings

DEFAULT_ADDRESS = "127.0.0.1:8001"

ModelsFolder = Annotated[Path | None, typer.Option("--models", help="Folder of model packages.")]
Models = Annotated[list[str] | None, typer.Option("--model", help="Serve only this model (repeatable).")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
Host = Annotated[str | None, typer.Option(help="Address to listen on.")]
GrpcPort = Annotated[int | None, typer.Option(help="gRPC port; 0 takes a free one.")]
HttpPort = Annotated[int | None, typer.Option(help="HTTP port; 0 takes a free one.")]
MetricsPort = Annotated[int | None, typer.Option(help="Port of Prometheus metrics; 0 takes a free one.")]
Address = Annotated[str, typer.Option(help="The gateway: host:port or unix:/path.")]
DataFolder = Annotated[Path | None, typer.Option("--data", help="Folder with samples; default: MOSEL_DATA.")]


def settings_from(
    models: Path | None = None,
    model: list[str] | None = None,
    device: str | None = None,
    **gateway: str | int | None,
) -> "Settings":
    """The effective settings, with what was given on the command line; `gateway` are flags of its section.

    Raises:
        ConfigError: a setting or a flag is wrong.
    """
    from mosel.config import load_settings

    flags = {
        "models_dir": models,
        "models": tuple(model) if model else None,
        "device": device,
        "gateway": {key: value for key, value in gateway.items() if value is not None} or None,
    }
    return load_settings(**{key: value for key, value in flags.items() if value is not None})
