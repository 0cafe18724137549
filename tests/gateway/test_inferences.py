"""Counts of what became of requests."""

import time

from gateway.inferences import Inferences


def test_an_answered_request_is_split_into_its_stages() -> None:
    done, now_ms = Inferences(), time.time_ns() // 1_000_000
    done.answered(5, total_ns=9_000_000, intake_ns=2_000_000, queue_ns=1_250_000, compute_ns=2_500_000)
    assert (done.items, done.fail.count) == (5, 0)
    stages = (done.success, done.intake, done.queue, done.compute, done.delivery)
    assert [stage.count for stage in stages] == [1] * 5
    assert (done.queue.ns, done.compute.ns, done.delivery.ns) == (1_250_000, 2_500_000, 3_250_000)
    assert now_ms - 10 <= done.last_ms <= time.time_ns() // 1_000_000 - 9


def test_a_request_that_is_not_answered_has_failed() -> None:
    done = Inferences()
    done.failed(3)
    assert (done.fail.count, done.fail.ns, done.success.count, done.items) == (1, 3, 0, 0)
    assert done.last_ms > 0


def test_measured_times_that_are_more_than_the_whole_never_count_backwards() -> None:
    done = Inferences()
    done.answered(1, total_ns=1, intake_ns=0, queue_ns=10, compute_ns=10)
    assert done.delivery.ns == 0
