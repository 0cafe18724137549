"""The command `mosel`. Each command is a file of this folder, and imports what it needs when it runs."""

import sys

import typer

from mosel.cli.bench import bench_app
from mosel.cli.calibrate import calibrate
from mosel.cli.config import config
from mosel.cli.data import data_app
from mosel.cli.demo import demo
from mosel.cli.health import health
from mosel.cli.models import models
from mosel.cli.observe import observe
from mosel.cli.plan import plan
from mosel.cli.predict import predict
from mosel.cli.profile import profile
from mosel.cli.reload import reload, unload
from mosel.cli.simulate import simulate
from mosel.cli.status import status
from mosel.cli.token import token
from mosel.cli.train import train
from mosel.cli.up import up
from mosel.errors import MoselError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
COMMANDS = (
    up,
    demo,
    predict,
    plan,
    observe,
    models,
    reload,
    unload,
    status,
    health,
    token,
    config,
    profile,
    calibrate,
    simulate,
    train,
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Runs the command line; an error is one line and exit code 1."""
    try:
        app()
    except MoselError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
