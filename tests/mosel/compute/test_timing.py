"""Timing: enough calls, from several threads at once."""

import asyncio
import threading
from statistics import median

import pytest

from mosel.compute.timing import Timing, latency_points
from mosel.compute.workers import Workers
from mosel.deadline import Deadline
from mosel.errors import DeadlineExceeded


def test_fast_calls_are_timed_at_least_as_often_as_asked_for() -> None:
    calls: list[None] = []
    timing = Timing(7)
    timing.run(lambda: calls.append(None))
    assert len(timing.ms) == len(calls) >= 7
    point = timing.point(4)
    assert point.batch_size == 4
    assert point.p50_ms == median(timing.ms)
    assert sum(ms <= point.p95_ms for ms in timing.ms) >= 0.95 * len(timing.ms)


def test_calls_overlap_and_every_size_gets_a_point() -> None:
    overlap = threading.Barrier(2)

    def prepare(size: int) -> threading.Event:
        # Passes only if two threads get here for the same size.
        overlap.wait(timeout=30)
        return threading.Event()

    with Workers(2, 1) as workers:
        reply = asyncio.run(
            latency_points(workers, lambda size: prepare(size).is_set, [1, 8], 3, 2, Deadline.after(30))
        )
    assert [point.batch_size for point in reply.points] == [1, 8]
    assert all(0 <= point.p50_ms <= point.p95_ms for point in reply.points)


def test_nobody_is_timed_for_whom_nobody_waits() -> None:
    with Workers(1, 1) as workers, pytest.raises(DeadlineExceeded, match="measuring"):
        asyncio.run(latency_points(workers, lambda size: lambda: None, [1], 1, 1, Deadline.after(-1)))
