"""The command `mosel`. Each command is a file of this folder; services are imported by none of them."""

import sys

import typer

from mosel.cli.config import config
from mosel.cli.data import data_app
from mosel.cli.demo import demo
from mosel.cli.health import health
from mosel.cli.models import models
from mosel.cli.predict import predict
from mosel.cli.status import status
from mosel.cli.train import train
from mosel.cli.up import up
from mosel.errors import MoselError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for command in (up, demo, predict, models, status, health, config, train):
    app.command()(command)
app.add_typer(data_app, name="data")


def main() -> None:
    """Runs the command line; an error is one line and exit code 1."""
    try:
        app()
    except MoselError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
