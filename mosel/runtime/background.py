"""Work that goes on by itself, beside whoever began it."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

R = TypeVar("R")

log = logging.getLogger(__name__)


def _unexpected(error: BaseException) -> None:
    log.error("unexpected error", exc_info=error)


class Background:
    """Tasks that nobody has to wait for; whoever owns them ends them with `close`.

    Args:
        failed: told what a task ended with that went wrong; by default it is logged as a bug.
    """

    def __init__(self, failed: Callable[[BaseException], None] = _unexpected) -> None:
        self._failed = failed
        # The event loop alone would not keep them alive.
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, object], name: str | None = None) -> None:
        """Begins work that nobody waits for; `name` is that of its task."""
        _ = self.task(work, name)

    def task(self, work: Coroutine[Any, Any, R], name: str | None = None) -> "asyncio.Task[R]":
        """Begins work that somebody may wait for."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._over)
        return task

    async def close(self) -> None:
        """Gives up what is under way, and waits until it has ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _over(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)
