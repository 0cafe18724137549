"""Starting the services for a command: progress until they are ready, and a clean end however the command ends."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from mosel.config import Settings
    from mosel.launcher import Launcher

console = Console()


@contextlib.contextmanager
def started(settings: "Settings", ready_timeout_s: float) -> Iterator["Launcher"]:
    """All services, ready, for as long as the body runs. Ctrl-C and SIGTERM end the command quietly.

    Raises:
        MoselError: a service did not start; the message is the one that it gave.
    """
    from mosel.launcher import Launcher

    # A supervisor's SIGTERM takes the services along, and so does SIGINT where a shell had it ignored.
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with Launcher(settings) as launcher:
            _wait(launcher, ready_timeout_s)
            yield launcher
    except KeyboardInterrupt:
        raise typer.Exit from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def drawing(file: Path) -> Iterator[None]:
    """Says where the picture is that the body writes; or that there is none, where what draws is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("matplotlib"):
            raise
        console.print("no picture: matplotlib is not installed (pip install mosel-server[demo])", markup=False)
    else:
        console.print(f"picture: {file}", soft_wrap=True, highlight=False)


def _wait(launcher: "Launcher", timeout_s: float) -> None:
    columns = (
        TextColumn("starting services"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(launcher.services))

        def show(ready: list[str], waiting: list[str]) -> None:
            bar.update(task, completed=len(ready), description=", ".join(waiting) or "measuring latencies")

        launcher.wait_ready(timeout_s, show)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
