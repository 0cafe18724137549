"""Several encoders of a modality: who gets which call, and what happens when one goes."""

from collections import Counter
from collections.abc import Mapping

import pytest

from mosel.errors import ServiceUnavailable
from mosel.modality import FUSION, parse_set
from selector.core.jobs import EncodeCall, Wait
from selector.core.scheduler import Scheduler
from tests.selector.support import Driver, encode_call, fuse_call, is_empty, job, profile_of

SECOND = "image/2"
# Calls of one row, 10 ms each.
PROFILES = {
    "one": profile_of(
        {"image": 0.7, "pen": 0.6, "image+pen": 0.9}, {"image": ((1, 10.0),), "pen": 2.0}, ((1, 1.0), (8, 1.0))
    )
}
APART = {"image": "gpu", SECOND: "other gpu", "pen": "cpu", FUSION: "cpu"}


def scheduler_on(resources: Mapping[str, str], tokens: int = 1) -> Scheduler:
    scheduler = Scheduler(PROFILES, tokens=tokens)
    for lane, resource in resources.items():
        assert scheduler.lane(lane, True, resource) == []
    return scheduler


def submit(scheduler: Scheduler, count: int, now: float = 0.0, deadline: float = 10.0) -> None:
    for number in range(count):
        scheduler.submit(job(f"{now}/{number}", deadline, sent="image"), now)


def lanes_of(driver: Driver) -> Counter[str]:
    return Counter(call.lane for call in driver.calls if isinstance(call, EncodeCall))


def slow_second(learned_at: float = 0.0) -> Scheduler:
    """A scheduler that knows that the second encoder takes three times as long."""
    scheduler = scheduler_on(APART)
    correction = scheduler._planner.stages.of("one", "image").on(SECOND).correction
    for number in range(50):
        correction.learn(10.0, 30.0, learned_at + number / 1e6)
    return scheduler


def test_two_encoders_answer_twice_as_much_in_the_same_time() -> None:
    ended_at = []
    for resources in ({lane: APART[lane] for lane in ("image", "pen", FUSION)}, APART):
        scheduler = scheduler_on(resources)
        submit(scheduler, 40)
        driver = Driver(scheduler, PROFILES)
        driver.run()
        assert len(driver.answered) == 40
        ended_at.append(max(driver.answered.values()))
    assert ended_at[1] < 0.6 * ended_at[0]
    assert lanes_of(driver) == {"image": 20, SECOND: 20}


def test_the_faster_encoder_gets_more_and_the_slower_its_part() -> None:
    scheduler = scheduler_on(APART)
    submit(scheduler, 80)
    driver = Driver(scheduler, PROFILES, slower={SECOND: 3.0})
    driver.run()
    assert len(driver.answered) == 80
    # In 600 ms the one makes 60 calls, and the other 20.
    assert 55 <= lanes_of(driver)["image"] <= 65
    assert max(driver.answered.values()) < 0.66
    learned = scheduler.corrections(driver.now)
    takes_ms = {lane: learned["one", lane][0] + learned["one", lane][1] * 10 for lane in ("image", SECOND)}
    assert takes_ms == {"image": pytest.approx(10), SECOND: pytest.approx(30, rel=0.2)}


def test_a_call_waits_for_the_faster_encoder_where_it_is_over_earlier() -> None:
    scheduler = slow_second()
    submit(scheduler, 1)
    first = encode_call(scheduler, 0.0001)
    assert first.lane == "image"
    # There it is over after 20 ms, with the other after 30; for a third job it is 30, which is as good.
    submit(scheduler, 1, now=0.0002)
    assert isinstance(scheduler.next(0.0002), Wait)
    submit(scheduler, 1, now=0.0003, deadline=11)
    ahead = encode_call(scheduler, 0.0003)
    assert (ahead.lane, ahead.rows[0].job_id) == (SECOND, b"0.0003/0")
    scheduler.completed(first, 0.0101)
    scheduler.completed(fuse_call(scheduler, 0.0101), 0.0101)
    later = encode_call(scheduler, 0.0101)
    assert (later.lane, later.rows[0].job_id) == ("image", b"0.0002/0")


def test_nobody_waits_long_for_an_encoder_that_hangs() -> None:
    scheduler = slow_second()
    submit(scheduler, 1)
    assert encode_call(scheduler, 0.0001).lane == "image"
    submit(scheduler, 1, now=0.0002)
    assert isinstance(scheduler.next(0.0002), Wait)
    assert encode_call(scheduler, 0.05).lane == SECOND


def test_on_one_resource_encoders_take_turns_and_share_its_tokens() -> None:
    scheduler = scheduler_on(dict.fromkeys(APART, "cpu"), tokens=2)
    submit(scheduler, 6)
    calls = [encode_call(scheduler), encode_call(scheduler)]
    assert {call.lane for call in calls} == {"image", SECOND}
    assert isinstance(scheduler.next(0.0), Wait), "two calls are under way"
    scheduler.completed(calls[0], 0.01)
    scheduler.completed(fuse_call(scheduler, 0.01), 0.011)
    assert encode_call(scheduler, 0.011).lane == calls[0].lane


def test_what_one_encoder_leaves_the_other_takes_over_until_it_is_back() -> None:
    scheduler = scheduler_on(APART)
    submit(scheduler, 20)
    driver = Driver(scheduler, PROFILES)
    driver.run(until=0.005)
    assert set(lanes_of(driver)) == {"image", SECOND}
    for gone, left in (("image", SECOND), (SECOND, "image")):
        assert scheduler.lane(gone, up=False) == [], "the other can do it"
        assert scheduler.is_up(parse_set("image"))
        before = lanes_of(driver)
        driver.run(until=driver.now + 0.05)
        assert set(lanes_of(driver) - before) == {left}
        assert scheduler.lane(gone, True, APART[gone]) == []
    driver.run()
    assert len(driver.answered) == 20
    assert is_empty(scheduler)


def test_work_is_lost_when_the_last_encoder_goes() -> None:
    scheduler = scheduler_on(APART)
    submit(scheduler, 4)
    assert scheduler.lane("image", up=False) == []
    assert len(scheduler.lane(SECOND, up=False)) == 4
    with pytest.raises(ServiceUnavailable, match="encoder/image is away"):
        submit(scheduler, 1, now=1.0)
    assert scheduler.lane(SECOND, True, "other gpu") == []
    submit(scheduler, 1, now=1.0)
    assert encode_call(scheduler, 1.0).lane == SECOND


@pytest.mark.parametrize("lacks", ["image", SECOND])
def test_no_call_goes_where_the_model_is_not(lacks: str) -> None:
    profile = profile_of({"image": 0.7}, {"image": ((1, 10.0),)}, 1.0)
    scheduler = scheduler_on(APART)
    scheduler.load("part", profile)
    profile.lacking.add(lacks)
    has = ({"image", SECOND} - {lacks}).pop()
    scheduler.submit(job("a", sent="image", model="part", size=4), 0.0)
    driver = Driver(scheduler, PROFILES | {"part": profile})
    driver.run()
    assert lanes_of(driver) == {has: 4}
    assert driver.answered[b"a"] == pytest.approx(0.041)
    scheduler.submit(job("b", sent="image", model="part"), driver.now)
    submit(scheduler, 1, now=driver.now)
    assert scheduler.lane(has, up=False) == [b"b"], "the other model goes on"
    assert not scheduler.is_up(parse_set("image"), profile.lacking)
    assert scheduler.is_up(parse_set("image"))


def test_promises_count_on_every_encoder() -> None:
    for lanes, expected_s in ((("image", "pen", FUSION), 0.081), (tuple(APART), 0.041)):
        scheduler = scheduler_on({lane: APART[lane] for lane in lanes})
        work = scheduler.submit(job("a", sent="image", size=8), 0.0)
        assert work.predicted == pytest.approx(expected_s)
