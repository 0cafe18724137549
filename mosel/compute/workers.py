"""What encoders and fusion share: threads that compute, so that the event loop never waits for a network."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

from mosel.deadline import Deadline
from mosel.errors import Overloaded

R = TypeVar("R")


class Workers:
    """Runs calls on threads of their own; a context manager.

    Two workers with one torch thread each keep two cores busier than one worker with two torch threads: they never wait
    for each other.

    Args:
        workers: calls that run at the same time.
        torch_threads: threads that torch may use inside one call.
        max_waiting: bound on the calls that wait or run.
    """

    def __init__(self, workers: int, torch_threads: int, max_waiting: int = 64) -> None:
        # On each thread itself: with OpenMP the number belongs to the thread that sets it.
        self._executor = ThreadPoolExecutor(workers, "compute", torch.set_num_threads, (torch_threads,))
        self._aside = ThreadPoolExecutor(1, "aside", torch.set_num_threads, (torch_threads,))
        self._torch_threads = workers * torch_threads
        self._waiting, self._max_waiting = 0, max_waiting

    async def run(self, compute: Callable[[], R], deadline: Deadline, step: str) -> R:
        """Runs a call, unless its deadline passes before its turn comes.

        Args:
            compute: what to run, with gradients off.
            deadline: when the result is no longer wanted.
            step: what is about to happen, for messages.

        Raises:
            DeadlineExceeded: the deadline passed first.
            Overloaded: too many calls are waiting.
        """

        def guarded() -> R:
            deadline.check(step)
            with torch.inference_mode():
                return compute()

        if self._waiting >= self._max_waiting:
            raise Overloaded(f"{self._waiting} calls are waiting for {step}")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, guarded)
        finally:
            self._waiting -= 1

    async def run_aside(self, work: Callable[[], R]) -> R:
        """Runs what takes long, such as loading networks, beside the calls: one after the other, on one more thread."""
        return await asyncio.get_running_loop().run_in_executor(self._aside, work)

    def statistics(self) -> dict[str, int]:
        """Calls that wait or run, and the threads that torch may use."""
        return {"calls_waiting": self._waiting, "torch_threads": self._torch_threads}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._aside.shutdown(wait=True, cancel_futures=True)
        self._executor.shutdown(wait=True, cancel_futures=True)
