"""What newcomers must have to spare, after promises that were broken."""

import contextlib

import pytest

from mosel.errors import DeadlineUnreachable, Overloaded
from mosel.modality import FUSION
from selector.core.admission import OfferedLoad, Promises
from selector.core.jobs import Ended
from selector.core.scheduler import Scheduler
from tests.selector.support import Driver, job, profile_of

BUDGET_S, AHEAD_S = 0.1, 1.0
# One item of `pen` takes 10 ms, alone or with others.
PROFILES = {"one": profile_of({"pen": 0.6}, {"pen": ((1, 10.0), (2, 20.0))}, ((1, 0.0), (2, 0.0)))}


IN_TIME, LATE = job("in time", 1.0), job("late", 0.0)


def spare_after(kept: int, broken: int, now: float = 0.0) -> float:
    promises = Promises(reply_s=0.1)
    for promised in [IN_TIME] * kept + [LATE] * broken:
        promises.answered(promised, 0.0)
    return promises.spare_s(BUDGET_S, AHEAD_S, now)


def test_nothing_is_asked_for_as_long_as_promises_are_kept() -> None:
    assert spare_after(kept=50, broken=0) == 0


def test_one_broken_promise_is_made_good_by_two_hundred_kept_ones() -> None:
    promises = Promises(reply_s=0.1)
    promises.broken(LATE, 0.0)
    before = promises.spare_s(BUDGET_S, AHEAD_S, 0.0)
    for _ in range(199):
        promises.answered(IN_TIME, 0.0)
    assert before > promises.spare_s(BUDGET_S, AHEAD_S, 0.0) > 0
    promises.answered(IN_TIME, 0.0)
    assert promises.spare_s(BUDGET_S, AHEAD_S, 0.0) == pytest.approx(0)


def test_never_more_than_half_and_never_of_one_who_waits_for_nobody() -> None:
    assert spare_after(kept=0, broken=10_000) == pytest.approx(BUDGET_S / 2)
    promises = Promises(reply_s=0.1)
    for _ in range(10_000):
        promises.broken(LATE, 0.0)
    assert promises.spare_s(BUDGET_S, 0.0, 0.0) == 0
    assert promises.spare_s(BUDGET_S, 0.02, 0.0) == pytest.approx(0.01)


def test_what_was_long_ago_is_forgotten() -> None:
    assert spare_after(kept=0, broken=5, now=300) == pytest.approx(spare_after(kept=0, broken=5) / 2)
    assert spare_after(kept=0, broken=5, now=10_000) == pytest.approx(0, abs=1e-9)


def test_nothing_grows_with_the_jobs_and_resources_that_there_once_were() -> None:
    promises, offered = Promises(reply_s=0.1), OfferedLoad()
    for i in range(1000):
        promises.answered(job(f"{i}", 10.0), i / 1000)
        offered.add({f"host {i}": 0.1}, 100.0 * i)
    assert len(promises._on_the_way) == 256
    assert offered.shares(100_000.0) == {}
    assert offered._shares == {}


def served(reply_ms: float = 0.0) -> Scheduler:
    scheduler = Scheduler(PROFILES, "mosel", tokens=1, reply_ms=reply_ms)
    for lane in ("pen", FUSION):
        scheduler.lane(lane, True)
    return scheduler


def flooded(drift: float, seconds: float = 6.0) -> tuple[int, int]:
    """Jobs admitted, and jobs answered in time, of the second half, when three times as many come as can be served.

    Calls take longer or shorter than they are profiled by turns.
    """
    scheduler = served()
    driver = Driver(scheduler, PROFILES, lambda number: 1 + drift * (1 if number // 20 % 2 else -1))
    deadlines: dict[bytes, float] = {}
    for i in range(int(seconds * 300)):
        at = i / 300
        driver.run(until=at)
        with contextlib.suppress(Overloaded):
            work = scheduler.submit(job(f"{i}", at + 0.1), driver.now)
            if at > seconds / 2:
                deadlines[work.job.id] = work.job.deadline
    driver.run()
    kept = sum(driver.answered.get(name, 2 * end) <= end for name, end in deadlines.items())
    return len(deadlines), kept


@pytest.mark.parametrize("drift", [0.1, 0.2])
def test_who_is_admitted_under_overload_is_answered_in_time(drift: float) -> None:
    admitted, kept = flooded(drift)
    assert kept > 0.95 * admitted
    # The core is never idle for it: 100 a second can be served.
    assert kept > 0.93 * 3 * 100


def test_without_errors_nothing_is_given_away() -> None:
    admitted, kept = flooded(0.0)
    assert kept == admitted
    assert kept > 0.97 * 3 * 100


def is_spare_asked_for(scheduler: Scheduler, now: float) -> bool:
    """Whether promises were broken: 10 ms for the one ahead and for itself, 1 for its answer, hardly any to spare."""
    scheduler.submit(job("ahead", now + 0.02), now)
    try:
        scheduler.submit(job("b", now + 0.0212), now)
    except Overloaded:
        return True
    return False


@pytest.mark.parametrize(
    ("stops_at", "broken"), [(0.05, False), (0.0995, True)], ids=["before its deadline", "at its deadline"]
)
def test_a_caller_that_waits_until_its_time_is_over_was_promised_too_much(stops_at: float, broken: bool) -> None:
    scheduler = served(reply_ms=1)
    scheduler.submit(job("a", 0.1), 0.0)
    scheduler.unwanted(b"a", stops_at)
    scheduler.cancelled(b"a")
    assert is_spare_asked_for(scheduler, stops_at) == broken


@pytest.mark.parametrize(
    ("stops_at", "late_ok", "broken"),
    [(0.05, False, False), (0.0995, False, True), (0.15, False, True), (0.15, True, False)],
)
def test_an_answer_that_is_on_its_way_when_the_time_is_over_was_promised_too_much(
    stops_at: float, late_ok: bool, broken: bool
) -> None:
    scheduler = served(reply_ms=1)
    driver = Driver(scheduler, PROFILES)
    scheduler.submit(job("a", 0.1, late_ok=late_ok), 0.0)
    driver.run()
    assert driver.answered.keys() == {b"a"}
    scheduler.unwanted(b"a", stops_at)
    scheduler.unwanted(b"a", stops_at)
    assert is_spare_asked_for(scheduler, stops_at) == broken


def test_callers_of_jobs_that_were_never_admitted_were_promised_nothing() -> None:
    scheduler = served(reply_ms=1)
    for i in range(50):
        with pytest.raises(DeadlineUnreachable):
            scheduler.submit(job(f"{i}", 0.001), 0.0)
        scheduler.unwanted(f"{i}".encode(), 0.002)
    scheduler.unwanted(b"unknown", 0.002)
    assert not is_spare_asked_for(scheduler, 0.002)


def test_a_promise_is_broken_once() -> None:
    def spare_after_one(*, crossed: bool) -> float:
        scheduler = served(reply_ms=1)
        scheduler.submit(job("a", 0.1), 0.0)
        assert isinstance(scheduler.next(0.2), Ended)
        if crossed:
            scheduler.unwanted(b"a", 0.2)
        return scheduler._planner.promises.spare_s(BUDGET_S, AHEAD_S, 0.2)

    assert spare_after_one(crossed=True) == spare_after_one(crossed=False) > 0


def test_on_several_resources_no_plan_is_given_up_unseen() -> None:
    scheduler = Scheduler(PROFILES, "mosel", tokens=1)
    scheduler.lane("pen", True, "cpu")
    scheduler.lane(FUSION, True, "gpu")
    for name in ("a", "b"):
        scheduler.submit(job(name, 0.025), 0.0)
    with pytest.raises(Overloaded):
        scheduler.submit(job("c", 0.025), 0.0)
