"""Starting the services for a command: progress until they are ready, and a clean end however the command ends."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Self

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

    with Interrupts() as interrupts:
        try:
            with Launcher(settings) as launcher:
                _wait(launcher, ready_timeout_s, interrupts)
                yield launcher
        except KeyboardInterrupt:
            raise typer.Exit from None


class Interrupts:
    """Has Ctrl-C and SIGTERM raise KeyboardInterrupt inside the block, and remembers that they came.

    Python drops what is raised inside a callback of a weak reference, such as its imports have: `check` raises again.
    """

    def __init__(self) -> None:
        self._came = False

    def __enter__(self) -> Self:
        # A supervisor's SIGTERM takes the services along, and so does SIGINT where a shell had it ignored.
        self._previous = {number: signal.signal(number, self._interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises KeyboardInterrupt if one came."""
        if self._came:
            raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        raise KeyboardInterrupt


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


def _wait(launcher: "Launcher", timeout_s: float, interrupts: Interrupts) -> None:
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
            interrupts.check()
            bar.update(task, completed=len(ready), description=", ".join(waiting) or "measuring latencies")

        launcher.wait_ready(timeout_s, show)
