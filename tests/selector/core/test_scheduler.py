"""The scheduler core under a virtual clock: the way of jobs through services that fail, come and go."""

import dataclasses
from collections import Counter

import pytest

from mosel.errors import DeadlineUnreachable, ServiceUnavailable
from mosel.modality import FUSION
from selector.core.jobs import NORMAL_PRIORITY, Effort, EncodeCall, FuseCall, Rows, Wait
from selector.core.scheduler import Scheduler
from tests.selector.support import (
    BOTH,
    PEN,
    Driver,
    encode_call,
    fuse_call,
    is_empty,
    job,
    profile_of,
    scheduler_with,
)


@pytest.fixture
def scheduler() -> Scheduler:
    return scheduler_with()


# The way of a job


def test_a_job_goes_through_its_encoders_and_fusion_and_leaves_nothing(scheduler: Scheduler) -> None:
    scheduler.submit(job("a", sent="image+pen"), 0.0)
    calls = [encode_call(scheduler), encode_call(scheduler)]
    assert [call.modality for call in calls] == ["image", "pen"], "the longest first"
    for call in calls:
        assert scheduler.next(0.0) == Wait(10.0)
        assert scheduler.completed(call, 0.01) == []
    fuse = fuse_call(scheduler)
    assert (fuse.modality_set, fuse.rows) == (BOTH, (Rows(b"a", (0,)),))
    assert scheduler.completed(fuse, 0.02) == [b"a"]
    assert scheduler.next(0.02) == Wait(None)
    assert is_empty(scheduler)


def test_jobs_of_one_model_share_a_call_in_deadline_order_up_to_the_best_batch(scheduler: Scheduler) -> None:
    scheduler.submit(job("late", deadline=9, size=7), 0.0)
    scheduler.submit(job("soon", deadline=5), 0.0)
    scheduler.submit(job("next", deadline=6, size=2), 0.0)
    scheduler.submit(job("other", deadline=7, model="two"), 0.0)
    first = encode_call(scheduler)
    assert [(rows.job_id, len(rows.items)) for rows in first.rows] == [(b"soon", 1), (b"next", 2), (b"late", 1)]
    second = encode_call(scheduler)
    assert (second.model, second.rows) == ("two", (Rows(b"other", (0,)),))
    assert isinstance(scheduler.next(0.0), Wait), "two calls are under way"
    for call in (first, second):
        scheduler.completed(call, 0.004)
    fused = [fuse_call(scheduler, 0.004), fuse_call(scheduler, 0.004)]
    assert [call.model for call in fused] == ["one", "two"], "fusion comes first where it completes a job"
    assert fused[0].rows == first.rows


def test_a_level_of_priority_counts_as_some_seconds_of_the_deadline(scheduler: Scheduler) -> None:
    def submitted(name: str, deadline: float, priority: int) -> float:
        one = dataclasses.replace(job(name, deadline), priority=priority)
        scheduler.submit(one, 0.0)
        return one.order

    assert submitted("usual", 10.0, NORMAL_PRIORITY) == 10.0
    assert submitted("last", 10.0, 9) == 30.0
    assert submitted("first", 14.0, 4) == 9.0
    assert submitted("new", 31.0, 1) == 11.0
    served = [rows.job_id for rows in encode_call(scheduler).rows]
    assert served == [b"first", b"usual", b"new", b"last"], "what waits long enough goes before what is new"


def test_a_large_job_lets_urgent_ones_in_between_its_calls() -> None:
    scheduler = scheduler_with(tokens=1)
    scheduler.submit(job("large", deadline=9, size=12), 0.0)
    first = encode_call(scheduler)
    assert len(first.rows[0].items) == 4
    scheduler.submit(job("urgent", deadline=1), 0.001)
    scheduler.completed(first, 0.004)
    second = encode_call(scheduler, 0.004)
    assert [(rows.job_id, len(rows.items)) for rows in second.rows] == [(b"urgent", 1), (b"large", 3)]


def test_a_call_is_not_filled_past_the_slack_of_its_first_job(scheduler: Scheduler) -> None:
    # Alone 2 ms and 1 ms of fusion; in a call of 4, 4 ms and 1 ms.
    for deadline, shares in ((0.0045, False), (0.0055, True)):
        scheduler.submit(job("tight", deadline), 0.0)
        scheduler.submit(job("bulk", deadline=9, size=3), 0.0)
        call = encode_call(scheduler)
        assert (len(call.rows) == 2) == shares
        for name in (b"tight", b"bulk"):
            scheduler.cancelled(name)
        scheduler.completed(call, 0.0)
        assert is_empty(scheduler)


@pytest.mark.parametrize(("tokens", "fused"), [(1, [8]), (2, [4, 4])])
def test_fusion_waits_for_items_that_follow_while_there_is_something_to_encode(tokens: int, fused: list[int]) -> None:
    profiles = {"one": profile_of({"pen": 0.6}, {"pen": ((1, 2.0), (4, 4.0))}, ((1, 5.0), (8, 5.0)))}
    scheduler = Scheduler(profiles, tokens=tokens)
    for name in ("pen", FUSION):
        scheduler.lane(name, up=True)
    scheduler.submit(job("a", size=8), 0.0)
    driver = Driver(scheduler, profiles)
    driver.run()
    sizes = [sum(len(rows.items) for rows in call.rows) for call in driver.calls if isinstance(call, FuseCall)]
    assert sizes == fused


def test_calls_never_exceed_the_tokens_of_their_resource() -> None:
    together, apart = scheduler_with(tokens=1), scheduler_with(tokens=1, fusion_on="gpu")
    for scheduler, expected in ((together, 1), (apart, 2)):
        scheduler.submit(job("a"), 0.0)
        scheduler.completed(encode_call(scheduler), 0.002)
        scheduler.submit(job("b", sent="image"), 0.002)
        calls = 0
        while not isinstance(scheduler.next(0.002), Wait):
            calls += 1
        assert calls == expected


def test_which_items_run_what_depends_on_the_job_not_on_the_position() -> None:
    taken: Counter[int] = Counter()
    for i in range(200):
        scheduler = scheduler_with()
        scheduler.submit(dataclasses.replace(job("", size=4, sent="image+pen", floor=0.67), id=bytes([i])), 0.0)
        call = encode_call(scheduler)
        assert call.modality == "image"
        taken.update(call.rows[0].items)
    # One item of four in full: 0.9 and 3 times 0.6. Each is it 50 times in 200; five standard deviations are 31.
    assert sum(taken.values()) == 200
    assert all(19 <= taken[item] <= 81 for item in range(4))


# Strategies


def test_a_plan_may_change_but_for_the_items_that_are_under_way() -> None:
    scheduler = scheduler_with(tokens=1)
    work = scheduler.submit(job("a", 0.065, size=8, sent="image+pen", floor=0.6, effort=Effort.BEST), 0.0)
    assert work.strategy.counts == ((BOTH, 8),)
    first = encode_call(scheduler)
    assert (first.modality, len(first.rows[0].items), work.started_at) == ("image", 4, 0.0)
    # In full it would end after 50 ms; behind the newcomer's 21 ms that is too late.
    scheduler.submit(job("b", 0.06, size=4, sent="image"), 0.011)
    counts = dict(work.strategy.counts)
    assert 4 <= counts[BOTH] < 8
    assert work.strategy.size == 8


def test_jobs_move_back_up_when_the_queue_empties() -> None:
    scheduler = scheduler_with(tokens=1)
    scheduler.submit(job("first", 0.04, size=4, sent="image"), 0.0)
    waiting = scheduler.submit(job("second", 0.045, size=4, sent="image+pen", floor=0.6, effort=Effort.BEST), 0.0)
    assert waiting.strategy.counts != ((BOTH, 4),)
    assert scheduler.cancelled(b"first")
    assert isinstance(scheduler.next(0.012), EncodeCall)
    assert waiting.strategy.counts == ((BOTH, 4),)


def test_the_modality_blind_policy_refuses_rather_than_reassigns() -> None:
    blind, aware = scheduler_with("all"), scheduler_with("mosel")
    hurried = job("a", 0.008, size=4, sent="image+pen", floor=0.6)
    assert aware.submit(hurried, 0.0).strategy.counts == ((PEN, 4),)
    with pytest.raises(DeadlineUnreachable, match=r"the best that could be had is 0\.6 with pen"):
        blind.submit(hurried, 0.0)


# Failures, cancels, services that come and go


def test_a_cancelled_job_does_not_hurt_the_others_in_its_call(scheduler: Scheduler) -> None:
    scheduler.submit(job("a"), 0.0)
    scheduler.submit(job("b"), 0.0)
    call = encode_call(scheduler)
    assert scheduler.cancelled(b"a")
    assert not scheduler.cancelled(b"a")
    scheduler.completed(call, 0.001)
    assert [rows.job_id for rows in fuse_call(scheduler).rows] == [b"b"]


def test_jobs_of_a_failed_call_try_again_once_each_alone(scheduler: Scheduler) -> None:
    for name in "ab":
        scheduler.submit(job(name), 0.0)
    assert scheduler.failed(encode_call(scheduler), 0.01) == []
    alone = [encode_call(scheduler, 0.01), encode_call(scheduler, 0.01)]
    assert [[rows.job_id for rows in call.rows] for call in alone] == [[b"a"], [b"b"]]
    assert scheduler.failed(alone[0], 0.02) == [b"a"]
    scheduler.completed(alone[1], 0.02)
    assert scheduler.completed(fuse_call(scheduler, 0.02), 0.03) == [b"b"]
    assert is_empty(scheduler)


def test_an_item_whose_call_fails_is_tried_once_more_from_the_start(scheduler: Scheduler) -> None:
    scheduler.submit(job("a", sent="image+pen"), 0.0)
    image, pen = encode_call(scheduler), encode_call(scheduler)
    assert (image.modality, pen.modality) == ("image", "pen")
    assert scheduler.failed(image, 0.01) == []
    again = encode_call(scheduler, 0.01)
    # What the call of its first life brings is of no use any more, as if it had failed, too.
    assert scheduler.completed(pen, 0.01) == []
    pen = encode_call(scheduler, 0.01)
    assert {again.modality, pen.modality} == {"image", "pen"}
    scheduler.completed(again, 0.02)
    scheduler.completed(pen, 0.02)
    assert scheduler.failed(fuse_call(scheduler, 0.02), 0.03) == [b"a"]
    assert is_empty(scheduler)


def test_an_item_is_tried_again_with_what_is_left_if_that_meets_the_floor(scheduler: Scheduler) -> None:
    strict = scheduler.submit(job("strict", sent="image+pen", floor=0.8), 0.0)
    loose = scheduler.submit(job("loose", sent="image+pen", floor=0.6, effort=Effort.BEST), 0.0)
    calls = [encode_call(scheduler), encode_call(scheduler)]
    image = next(call for call in calls if call.modality == "image")
    assert len(image.rows) == 2
    assert scheduler.lane("image", up=False) == []
    assert scheduler.failed(image, 0.01) == [b"strict"]
    assert not strict.without
    assert loose.strategy.counts == ((PEN, 1),)
    assert loose.without == {"image"}


def test_a_second_try_that_cannot_be_in_time_is_none(scheduler: Scheduler) -> None:
    scheduler.submit(job("a", deadline=0.05), 0.0)
    assert scheduler.failed(encode_call(scheduler), 0.049) == [b"a"]
    assert is_empty(scheduler)


def test_a_job_says_which_modalities_were_away_that_it_would_have_run(scheduler: Scheduler) -> None:
    scheduler.lane("image", up=False)
    wanted = scheduler.submit(job("a", sent="image+pen", floor=0.6, effort=Effort.BEST), 0.0)
    not_wanted = scheduler.submit(job("b", sent="image+pen", floor=0.6), 0.0)
    assert wanted.without == {"image"}
    assert not not_wanted.without


def test_a_service_that_goes_loses_the_jobs_that_cannot_do_without(scheduler: Scheduler) -> None:
    scheduler.submit(job("needs", sent="image"), 0.0)
    scheduler.submit(job("not", sent="pen"), 0.0)
    flexible = scheduler.submit(job("flexible", sent="image+pen", floor=0.6, effort=Effort.BEST), 0.0)
    assert flexible.strategy.counts == ((BOTH, 1),)
    assert scheduler.lane("image", up=False) == [b"needs"]
    assert flexible.strategy.counts == ((PEN, 1),)
    with pytest.raises(ServiceUnavailable, match="encoder/image is away"):
        scheduler.submit(job("again", sent="image"), 0.0)
    assert sorted(scheduler.lane(FUSION, up=False)) == [b"flexible", b"not"]
    assert is_empty(scheduler)


def test_a_service_that_is_about_to_go_serves_the_jobs_that_it_has_and_no_others(scheduler: Scheduler) -> None:
    scheduler.submit(job("before", sent="image", size=6), 0.0)
    scheduler.leaving("image")
    with pytest.raises(ServiceUnavailable, match="encoder/image is away"):
        scheduler.submit(job("after", sent="image"), 0.0)
    flexible = scheduler.submit(job("flexible", sent="image+pen", floor=0.6, effort=Effort.BEST), 0.0)
    assert flexible.strategy.counts == ((PEN, 1),)
    answered: list[bytes] = []
    while not isinstance(call := scheduler.next(0.0), Wait):
        assert isinstance(call, EncodeCall | FuseCall)
        answered += scheduler.completed(call, 0.01)
    assert sorted(answered) == [b"before", b"flexible"]
    assert scheduler.lane("image", up=False) == []
    scheduler.lane("image", up=True)
    scheduler.submit(job("again", sent="image"), 0.0)


def test_with_another_encoder_new_jobs_do_not_notice_that_one_is_about_to_go(scheduler: Scheduler) -> None:
    scheduler.lane("image/2", up=True)
    scheduler.leaving("image")
    scheduler.submit(job("a", sent="image"), 0.0)
    assert encode_call(scheduler).lane == "image/2"


def test_a_call_that_a_service_took_before_it_went_decides_over_its_job(scheduler: Scheduler) -> None:
    for name, well in (("a", True), ("b", False)):
        scheduler.submit(job(name, sent="image"), 0.0)
        call = encode_call(scheduler)
        assert scheduler.lane("image", up=False) == []
        if well:
            scheduler.completed(call, 0.01)
            assert scheduler.completed(fuse_call(scheduler, 0.01), 0.02) == [b"a"]
        else:
            assert scheduler.failed(call, 0.01) == [b"b"]
        scheduler.lane("image", up=True)
    assert is_empty(scheduler)


def test_a_service_that_goes_loses_a_job_that_needs_more_of_it(scheduler: Scheduler) -> None:
    scheduler.submit(job("a", sent="image", size=6), 0.0)
    call = encode_call(scheduler)
    assert scheduler.lane("image", up=False) == [b"a"]
    assert scheduler.completed(call, 0.01) == []
    assert is_empty(scheduler)


def test_nothing_is_kept_of_jobs_that_are_over_before_one_that_lasts(scheduler: Scheduler) -> None:
    scheduler.submit(job("lasts", deadline=1.0), 0.0)
    for i in range(1000):
        scheduler.submit(job(f"{i}", deadline=1000.0), 0.0)
        assert scheduler.cancelled(f"{i}".encode())
    assert len(scheduler._expiry) < 100
    assert scheduler.cancelled(b"lasts")
    assert scheduler.next(0.0) == Wait(None)
    assert scheduler._expiry == []
    assert is_empty(scheduler)
