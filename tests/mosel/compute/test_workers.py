"""The threads of encoders and fusion."""

import asyncio
import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from mosel.compute.workers import Workers
from mosel.deadline import Deadline


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
