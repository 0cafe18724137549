"""Counts of what became of requests."""

import time

import pytest

from gateway.inferences import Inferences


def test_an_answered_request_is_split_into_its_stages() -> None:
    done, before = Inferences(), time.time_ns() // 1_000_000
    started = time.monotonic_ns()
    with done.request() as request:
        time.sleep(0.002)
        request.sent()
        time.sleep(0.006)
        request.answer(items=5, queue_ms=1.25, compute_ms=2.5)
    took = time.monotonic_ns() - started
    assert (done.items, done.fail.count) == (5, 0)
    stages = (done.success, done.intake, done.queue, done.compute, done.delivery)
    assert [stage.count for stage in stages] == [1] * 5
    assert (done.queue.ns, done.compute.ns) == (1_250_000, 2_500_000)
    assert done.intake.ns >= 2_000_000
    assert done.success.ns == done.intake.ns + done.queue.ns + done.compute.ns + done.delivery.ns <= took
    assert before <= done.last_ms <= time.time_ns() // 1_000_000


def test_a_request_that_is_not_answered_has_failed() -> None:
    done = Inferences()

    def fail() -> None:
        with done.request() as request:
            request.sent()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (done.fail.count, done.success.count, done.items) == (1, 0, 0)
    assert done.last_ms > 0


def test_measured_times_that_are_more_than_the_whole_never_count_backwards() -> None:
    done = Inferences()
    with done.request() as request:
        request.answer(1, queue_ms=1e6, compute_ms=1e6)
    assert done.delivery.ns == 0
