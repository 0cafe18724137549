"""What encoders and fusion share: threads that compute, so that the event loop never waits for a network."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch

from mosel.deadline import Deadline
from mosel.errors import Overloaded

R = TypeVar("R")


@dataclass(frozen=True, eq=False, slots=True)
class _Call:
    """A call that waits for a worker; its answer belongs to the loop."""

    compute: Callable[[], object]
    deadline: Deadline
    step: str
    answer: "asyncio.Future[Any]"


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
        self._torch_threads = torch_threads
        # One queue and one way back for each call: an executor's futures, which any thread may wait for, cost as much
        # as a small network.
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._serve, name=f"compute_{n}", daemon=True) for n in range(workers)]
        self._aside = ThreadPoolExecutor(1, "aside", torch.set_num_threads, (torch_threads,))
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
        if self._waiting >= self._max_waiting:
            raise Overloaded(f"{self._waiting} calls are waiting for {step}")
        self._waiting += 1
        try:
            # No name for the future: this frame is in the traceback of the error that the future holds.
            return await self._begun(compute, deadline, step)
        finally:
            self._waiting -= 1

    async def run_aside(self, work: Callable[[], R]) -> R:
        """Runs what takes long, such as loading networks, beside the calls: one after the other, on one more thread."""
        return await asyncio.get_running_loop().run_in_executor(self._aside, work)

    def statistics(self) -> dict[str, int]:
        """Calls that wait or run, and the threads that torch may use."""
        return {"calls_waiting": self._waiting, "torch_threads": len(self._threads) * self._torch_threads}

    def __enter__(self) -> "Workers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._aside.shutdown(wait=True, cancel_futures=True)
        with contextlib.suppress(queue.Empty):
            while call := self._calls.get_nowait():
                call.answer.cancel()
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def _begun(self, compute: Callable[[], R], deadline: Deadline, step: str) -> "asyncio.Future[R]":
        answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._calls.put(_Call(compute, deadline, step, answer))
        return answer

    def _serve(self) -> None:
        # On each thread itself: with OpenMP the number belongs to the thread that sets it.
        torch.set_num_threads(self._torch_threads)
        with torch.inference_mode():
            while call := self._calls.get():
                if not call.answer.cancelled():
                    result, error = _outcome(call.compute, call.deadline, call.step)
                    # The loop may have ended with everybody who waits.
                    with contextlib.suppress(RuntimeError):
                        call.answer.get_loop().call_soon_threadsafe(_give, call.answer, result, error)
                    # Idle, a thread keeps nothing of its last call.
                    del result, error
                del call


def _outcome(compute: Callable[[], R], deadline: Deadline, step: str) -> tuple[R | None, BaseException | None]:
    """What a call returns, or raises: an error's frames must not lead to who waits for it."""
    try:
        deadline.check(step)
        return compute(), None
    except BaseException as error:  # noqa: BLE001 (whatever it is, whoever waits gets it)
        return None, error


def _give(answer: "asyncio.Future[Any]", result: object, error: BaseException | None) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(result)
    else:
        answer.set_exception(error)
