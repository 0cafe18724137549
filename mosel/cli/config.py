"""`mosel config`: the effective settings."""

import typer


def config() -> None:
    """Print the effective settings: file, then environment; `mosel up` takes some of them as flags too."""
    from mosel.config import config_file, load_settings

    settings = load_settings()
    source = config_file()
    typer.echo(f"# file: {source}{'' if source.exists() else ' (not there)'}")
    for name, value in settings.as_environment().items():
        typer.echo(f"{name}={value}")
