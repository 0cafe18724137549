"""The threads of encoders and fusion."""

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from mosel.compute.workers import Workers
from mosel.deadline import Deadline
from mosel.errors import DeadlineExceeded


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers(workers=1, torch_threads=1) as workers:
        yield workers


async def test_what_runs_aside_takes_no_worker_and_runs_one_after_the_other(workers: Workers) -> None:
    order: list[str] = []
    go_on = threading.Event()

    def slow(name: str) -> int:
        order.append(name)
        assert go_on.wait(30)
        order.append(name)
        return torch.get_num_threads()

    aside = [asyncio.create_task(workers.run_aside(partial(slow, name))) for name in "ab"]
    assert await workers.run(lambda: 7, Deadline.after(30), "a call") == 7
    go_on.set()
    assert await asyncio.gather(*aside) == [1, 1]
    assert order == ["a", "a", "b", "b"]


async def test_a_call_that_was_cancelled_before_its_turn_never_runs(workers: Workers) -> None:
    go_on, ran = threading.Event(), list[str]()
    first = asyncio.create_task(workers.run(lambda: go_on.wait(30), Deadline.after(30), "a call"))
    second = asyncio.create_task(workers.run(lambda: ran.append("second"), Deadline.after(30), "a call"))
    await asyncio.sleep(0)
    assert workers.statistics()["calls_waiting"] == 2
    second.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await second
    go_on.set()
    assert await first
    await workers.run(lambda: ran.append("third"), Deadline.after(30), "a call")
    assert ran == ["third"]
    assert workers.statistics()["calls_waiting"] == 0


async def test_what_a_call_raises_reaches_who_waits_and_gradients_are_off(workers: Workers) -> None:
    def wrong() -> None:
        raise LookupError(str(torch.is_inference_mode_enabled()))

    with pytest.raises(LookupError, match="True"):
        await workers.run(wrong, Deadline.after(30), "a call")
    with pytest.raises(DeadlineExceeded, match="before a call"):
        await workers.run(wrong, Deadline.after(0), "a call")


@pytest.mark.parametrize("fails", [False, True])
async def test_an_idle_worker_keeps_nothing_of_its_last_call(workers: Workers, fails: bool) -> None:
    class Large:
        """Stands for a batch."""

    gone = threading.Event()

    async def call() -> None:
        large = Large()
        weakref.finalize(large, gone.set)

        def compute(large: Large = large) -> Large:
            if fails:
                raise LookupError
            return large

        with contextlib.suppress(LookupError):
            await workers.run(compute, Deadline.after(30), "a call")

    gc.collect()
    gc.disable()
    try:
        await call()
        # The thread lets go a moment after it has answered.
        assert await asyncio.to_thread(gone.wait, 30)
    finally:
        gc.enable()
