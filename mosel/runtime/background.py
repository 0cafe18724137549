"""Background tasks, and the supervision of loops that live for ever."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from mosel.runtime import leftovers

R = TypeVar("R")
Loop = Callable[[], Coroutine[Any, Any, NoReturn]]

# A loop that failed begins again after the pause; one that fails so often in a minute cannot go on.
_PAUSE_S, _MOST_FAILURES, _WITHIN_S = 0.2, 5, 60.0

log = logging.getLogger(__name__)


def _unexpected(error: BaseException) -> None:
    log.error("unexpected error", exc_info=error)


def _end_process() -> None:
    leftovers.end_process(1)


class Background:
    """Tasks that nobody has to wait for; their owner ends them with `close`.

    Args:
        failed: told what a task ended with that went wrong; by default it is logged as a bug.
        give_up: called when a loop cannot go on; by default ends the process, which its supervisor starts again.
        pause_s: seconds until a loop that failed begins again.
    """

    def __init__(
        self,
        failed: Callable[[BaseException], None] = _unexpected,
        give_up: Callable[[], None] = _end_process,
        pause_s: float = _PAUSE_S,
    ) -> None:
        self._failed, self._give_up, self._pause_s = failed, give_up, pause_s
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

    def forever(self, loop: Loop, name: str) -> None:
        """Begins a loop that lives until `close`: an error is logged with its traceback, and the loop begins again.

        Where it fails again and again, the process ends: half a service is worse than none.

        Args:
            loop: makes the loop; what it keeps must be sound whenever it begins.
            name: of its task, and in the log.
        """
        self.start(self._supervised(loop, name), name)

    async def close(self) -> None:
        """Gives up what is under way, and waits until it has ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _supervised(self, loop: Loop, name: str) -> None:
        failures: deque[float] = deque(maxlen=_MOST_FAILURES)
        while True:
            try:
                await loop()
            except Exception:
                log.exception("a loop failed, and begins again", extra={"loop": name})
            failures.append(time.monotonic())
            if len(failures) == _MOST_FAILURES and failures[-1] - failures[0] < _WITHIN_S:
                log.critical("a loop cannot go on", extra={"loop": name, "failures": _MOST_FAILURES})
                self._give_up()
                return
            await asyncio.sleep(self._pause_s)

    def _over(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)
