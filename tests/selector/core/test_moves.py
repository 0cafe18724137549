"""Jobs that give up accuracy, and jobs that get it back: what the scheduler says of them."""

from selector.core.jobs import Effort
from selector.core.scheduler import Scheduler
from selector.core.work import Work
from tests.selector.support import BOTH, PEN, PROFILES, Driver, job, scheduler_with


def submit(scheduler: Scheduler, name: str, deadline: float, size: int = 4) -> Work:
    """A job of image and pen that may run either alone."""
    return scheduler.submit(job(name, deadline, size, "image+pen", floor=0.5, effort=Effort.BEST), now=0.0)


def accuracy(work: Work) -> float:
    return work.strategy.accuracy


def test_a_job_that_has_time_is_not_moved() -> None:
    scheduler = scheduler_with()
    work = submit(scheduler, "a", deadline=10.0)
    Driver(scheduler, PROFILES).run()
    assert accuracy(work) == 0.9
    assert not work.degraded
    assert not work.upgraded


def test_a_job_whose_deadline_is_too_close_for_what_it_prefers_is_degraded() -> None:
    scheduler = scheduler_with()
    # Pen alone takes 4 + 1 ms; with the image it would be 20.
    work = submit(scheduler, "a", deadline=0.010)
    driver = Driver(scheduler, PROFILES)
    driver.run()
    assert driver.fused[work.job.id] == {PEN: 4}
    assert work.preferred == 0.9
    assert work.degraded
    assert not work.upgraded


def test_a_job_that_gets_its_time_back_while_it_waits_is_upgraded() -> None:
    scheduler = scheduler_with(tokens=1)
    # At full accuracy, 21 ms each: not all can have that.
    jobs = [submit(scheduler, str(i), deadline=0.100) for i in range(7)]
    work = min(jobs, key=accuracy)
    assert accuracy(work) < 0.9
    for other in jobs:
        assert other is work or scheduler.cancelled(other.job.id)
    driver = Driver(scheduler, PROFILES)
    driver.now = 0.020
    driver.run()
    assert driver.fused[work.job.id] == {BOTH: 4}
    assert work.upgraded
    assert not work.degraded


def test_jobs_that_wait_are_told_from_those_under_way() -> None:
    scheduler = scheduler_with(tokens=1)
    for i in range(3):
        submit(scheduler, f"{i}", deadline=10.0 + i)
    assert scheduler.waiting() == {"one": 3}
    scheduler.next(0.0)
    assert scheduler.waiting() == {"one": 2}
    statistics = scheduler.statistics()
    assert (statistics["jobs"], statistics["jobs_waiting"], statistics["queued_items"]) == (3, 2, 12)
