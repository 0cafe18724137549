"""The limit on jobs under way finds itself, whatever a machine can do."""

import contextlib
import heapq
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.jobs.concurrency import ConcurrencyLimit
from mosel.errors import Overloaded

MOST, LEAST = 256, 8


def limit_of(limit: ConcurrencyLimit) -> int:
    return limit.statistics()["concurrency_limit"]


@dataclass
class Machine:
    """Answers one job after another, each in the same time; jobs wait for their turn."""

    limit: ConcurrencyLimit
    service_s: float
    budget_s: float
    free_at: float = 0.0
    answered: int = 0
    in_time: int = 0

    def run(self, rate: float, seconds: float, begins: float = 0.0) -> None:
        """Jobs come at a rate for some seconds."""
        under_way = list[tuple[float, float, contextlib.ExitStack]]()
        for number in range(int(rate * seconds)):
            now = begins + number / rate
            self._end(under_way, now)
            held = contextlib.ExitStack()
            with contextlib.suppress(Overloaded):
                held.enter_context(self.limit.holding())
                self.free_at = max(self.free_at, now) + self.service_s
                heapq.heappush(under_way, (self.free_at, now, held))
        self._end(under_way, float("inf"))

    def _end(self, under_way: list[tuple[float, float, contextlib.ExitStack]], now: float) -> None:
        while under_way and under_way[0][0] <= now:
            ends, began, held = heapq.heappop(under_way)
            self.limit.answered(began, ends, self.budget_s)
            held.close()
            self.answered += 1
            self.in_time += ends - began <= self.budget_s


def test_below_what_the_machine_can_do_nothing_is_refused() -> None:
    machine = Machine(ConcurrencyLimit(MOST), 0.01, 0.1)
    machine.run(rate=80, seconds=20)
    assert (machine.answered, machine.in_time, limit_of(machine.limit)) == (1600, 1600, MOST)


@pytest.mark.parametrize("factor", [1.5, 3, 10])
def test_under_overload_it_answers_as_much_as_it_can_and_in_time(factor: float) -> None:
    machine = Machine(ConcurrencyLimit(MOST), 0.005, 0.2)
    machine.run(rate=factor * 200, seconds=2)
    settled = machine.answered, machine.in_time
    machine.run(rate=factor * 200, seconds=20, begins=2.0)
    answered, in_time = machine.answered - settled[0], machine.in_time - settled[1]
    assert answered >= 0.95 * 20 * 200
    assert in_time >= 0.98 * answered


def test_after_an_overload_it_rises_as_far_as_it_is_needed() -> None:
    machine = Machine(ConcurrencyLimit(MOST), 0.005, 0.2)
    machine.run(rate=2000, seconds=5)
    low = limit_of(machine.limit)
    assert low < 40
    machine.service_s = 0.001
    machine.run(rate=990, seconds=20, begins=10.0)
    before = machine.answered
    machine.run(rate=900, seconds=5, begins=40.0)
    assert machine.answered - before == 4500


def test_without_deadlines_a_wait_is_still_bounded() -> None:
    machine = Machine(ConcurrencyLimit(MOST), 0.02, 30.0)
    machine.run(rate=500, seconds=20)
    assert limit_of(machine.limit) <= 1.1 / 0.02


def test_slow_jobs_are_not_taken_for_waiting_ones() -> None:
    limit = ConcurrencyLimit(MOST)
    for number in range(200):
        with contextlib.ExitStack() as held:
            for _ in range(LEAST + 4):
                held.enter_context(limit.holding())
            limit.ended(10.0 * number, 10.0 * number + 5.0, 60.0)
    assert limit_of(limit) == MOST


def test_one_job_that_takes_long_by_itself_changes_nothing() -> None:
    limit = ConcurrencyLimit(MOST)
    with limit.holding():
        limit.ended(0.0, 0.5, 0.1)
        limit.refused(0.0, 0.5)
    assert limit_of(limit) == MOST


def test_jobs_refused_for_want_of_time_lower_it_once_for_those_that_came_together() -> None:
    limit = ConcurrencyLimit(MOST)
    with contextlib.ExitStack() as held:
        for _ in range(100):
            held.enter_context(limit.holding())
        for _ in range(10):
            limit.refused(began=0.0, now=0.1)
        assert limit_of(limit) == 80
        limit.refused(began=0.2, now=0.3)
        assert limit_of(limit) == 64


def test_a_refusal_says_why_and_when_to_try_again() -> None:
    limit = ConcurrencyLimit(1)
    with limit.holding():
        limit.ended(1.0, 1.25, 10.0)
        with pytest.raises(
            Overloaded, match="1 jobs are under way, as many as can be answered in good time"
        ) as refused:
            limit.check_room()
    assert refused.value.retry_after_ms == 250
    limit.check_room()
    assert limit.statistics() == {"concurrency_limit": 1, "jobs_refused_for_concurrency": 1}


def test_who_has_less_time_than_answers_take_is_refused_until_that_may_be_over() -> None:
    limit = ConcurrencyLimit(MOST)
    limit.check_time(0.0, 0.0)
    for number in range(100):
        with limit.holding():
            limit.answered(float(number), number + 0.05, 1.0)
    with pytest.raises(Overloaded, match="and 40 ms are less than answers take at present"):
        limit.check_time(0.04, 99.06)
    limit.check_time(0.08, 99.06)
    # Nobody was answered for a while: somebody may try.
    limit.check_time(0.04, 99.06 + 0.5)
    # What is learned then counts at once.
    with limit.holding():
        limit.answered(105.0, 105.005, 1.0)
    limit.check_time(0.008, 105.006)


@given(st.integers(1, 300), st.lists(st.tuples(st.integers(1, 40), st.floats(0, 5), st.floats(0.001, 60)), max_size=60))
def test_it_stays_within_its_bounds_and_holds_nobody(most: int, jobs: list[tuple[int, float, float]]) -> None:
    limit, now = ConcurrencyLimit(most), 0.0
    for together, took_s, budget_s in jobs:
        with contextlib.ExitStack() as held:
            with contextlib.suppress(Overloaded):
                for _ in range(together):
                    held.enter_context(limit.holding())
            limit.ended(now, now + took_s, budget_s)
            now += took_s
        assert min(LEAST, most) <= limit_of(limit) <= most
    limit.check_room()
