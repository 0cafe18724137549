"""What is observed of a model: bounded, drawn without a look at it, and whole or not at all."""

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosel.errors import DeadlineUnreachable, ServiceUnavailable
from mosel.modality import FUSION, format_set
from selector.core.jobs import Effort, Rows, Wait
from selector.core.observation import Observation, Piece, Sample
from selector.core.scheduler import Scheduler
from tests.selector.support import BOTH, PEN, PROFILES, Driver, encode_call, job, scheduler_with

KEY = b"k" * 16


def answers_to(piece: Piece) -> tuple[list[int], list[float]]:
    """Those that say which item and set they are of."""
    sets = ["image", "image+pen", "pen"]
    column = sets.index(format_set(piece.modality_set))
    return [10 * item + column for item in piece.rows.items], [item + column / 4 for item in piece.rows.items]


@given(st.lists(st.tuples(st.sampled_from("jjjnnnnfdt"), st.integers(0, 2**32), st.integers(1, 40)), max_size=80),
       st.sampled_from([0.05, 0.3, 1.0]))  # fmt: skip
def test_samples_are_bounded_and_complete_or_given_up(steps: list[tuple[str, int, int]], share: float) -> None:
    """Jobs are answered, pieces are taken, fused or lost, and time passes, in any order."""
    observation = Observation(PROFILES["one"], share, KEY)
    under_way: list[tuple[Sample, Piece]] = []
    now, added, complete, lost = 0.0, Counter[str](), 0, 0
    for step, number, size in steps:
        if step == "j":
            job_id = number.to_bytes(16, "big")
            items = observation.drawn(job_id, size)
            assert items == observation.drawn(job_id, size)
            assert set(items) <= set(range(size))
            assert math.floor(share * size) <= len(items) <= math.ceil(share * size)
            sample = observation.add(job_id, size, now)
            added["yes" if sample else "no"] += 1
            assert sample is None or (sample.items, sample.size) == (items, size)
        elif step == "n" and (found := observation.next()):
            sample, piece = found
            assert sample.waiting.popleft() is piece
            assert len(piece.rows.items) <= PROFILES["one"].fusion[piece.modality_set].best_batch
            under_way.append((sample, piece))
        elif step in "fd" and under_way:
            sample, piece = under_way.pop(number % len(under_way))
            if sample not in observation.samples:
                continue
            if step == "d":
                observation.drop(sample)
                lost += 1
            elif observation.fused(sample, piece, *answers_to(piece)):
                complete += 1
                expected = np.array(sample.items)[:, None] * 10 + np.arange(3)
                np.testing.assert_array_equal(sample.answers, expected)
                np.testing.assert_array_equal(sample.confidences, expected // 10 + np.arange(3) / 4)
        elif step == "t":
            now += 0.7
            before = len(observation.samples)
            observation.expire(now)
            lost += before - len(observation.samples)
        assert len(observation.samples) <= 4
        assert added["yes"] == complete + lost + len(observation.samples)
    observation.expire(now + 2.0)
    assert observation.samples == []


def test_every_item_has_the_same_chance_whatever_the_size_of_its_job() -> None:
    observation, generator = Observation(PROFILES["one"], 0.2, KEY), random.Random(1)
    for size in (1, 3, 7, 32):
        drawn: Counter[int] = Counter()
        jobs = 20_000 // size
        for _ in range(jobs):
            drawn.update(observation.drawn(generator.randbytes(16), size))
        # By the Chernoff bound, once in a million seeds.
        for item in range(size):
            assert abs(drawn[item] - 0.2 * jobs) < 6 * math.sqrt(0.2 * 0.8 * jobs)


def test_another_key_draws_other_items() -> None:
    ids = [number.to_bytes(16, "big") for number in range(100)]
    one, other = (Observation(PROFILES["one"], 0.5, key) for key in (KEY, b"o" * 16))
    assert [one.drawn(job_id, 8) for job_id in ids] != [other.drawn(job_id, 8) for job_id in ids]


def observed_scheduler(away: str = "", tokens: int = 2) -> tuple[Scheduler, Driver]:
    profiles = {"one": replace(PROFILES["one"], observed=True)}
    scheduler = Scheduler(profiles, tokens=tokens)
    for lane in ("image", "pen", FUSION):
        scheduler.lane(lane, lane != away)
    return scheduler, Driver(scheduler, profiles)


@pytest.mark.parametrize("effort", [None, *Effort])
@pytest.mark.parametrize("floor", [None, 0.0, 0.65, 0.9])
def test_while_a_model_is_observed_floors_save_nothing(floor: float | None, effort: Effort | None) -> None:
    scheduler, driver = observed_scheduler()
    for number in range(3):
        scheduler.submit(job(f"j{number}", size=5, sent="image+pen", floor=floor, effort=effort), 0.0)
    scheduler.submit(job("less", size=5, sent="pen", floor=0.0), 0.0)
    driver.run()
    assert [driver.fused[f"j{number}".encode()] for number in range(3)] == [{BOTH: 5}] * 3
    assert driver.fused[b"less"] == {PEN: 5}


def test_a_job_without_time_for_everything_gets_what_its_floor_allows() -> None:
    # Everything takes 11 ms, pen 3.
    scheduler, driver = observed_scheduler()
    scheduler.submit(job("floor", 0.006, sent="image+pen", floor=0.6), 0.0)
    with pytest.raises(DeadlineUnreachable):
        scheduler.submit(job("none", 0.006, sent="image+pen"), 0.0)
    driver.run()
    assert driver.fused == {b"floor": {PEN: 1}}
    assert driver.answered[b"floor"] <= 0.006


def test_an_encoder_that_is_away_harms_only_those_who_need_it() -> None:
    scheduler, driver = observed_scheduler(away="image")
    work = scheduler.submit(job("floor", sent="image+pen", floor=0.6), 0.0)
    assert work.without == {"image"}
    with pytest.raises(ServiceUnavailable):
        scheduler.submit(job("none", sent="image+pen"), 0.0)
    driver.run()
    assert driver.fused == {b"floor": {PEN: 1}}


def test_a_spare_call_takes_a_token_and_no_other() -> None:
    scheduler = scheduler_with(tokens=2)
    rows = Rows(b"observed 1", (0, 1, 2))
    first, second = (scheduler.spare_call("one", PEN, rows, 0.0) for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first.lane, first.rows, first.modality_set) == (FUSION, (rows,), PEN)
    assert scheduler.spare_call("one", PEN, rows, 0.0) is None
    scheduler.submit(job("j", sent="pen"), 0.0)
    assert scheduler.next(0.0) == Wait(10.0)
    assert scheduler.completed(first, 0.001) == []
    encode_call(scheduler, 0.001)
    scheduler.retire("one")
    assert scheduler.failed(second, 0.002) == []
    assert scheduler.spare_call("one", PEN, rows, 0.002) is not None
    scheduler.lane(FUSION, False)
    assert scheduler.spare_call("one", PEN, rows, 0.002) is None


def test_a_retired_model_stays_for_as_long_as_a_spare_call_reads_it() -> None:
    scheduler = scheduler_with()
    call = scheduler.spare_call("one", BOTH, Rows(b"observed 1", (0,)), 0.0)
    assert call is not None
    scheduler.retire("one")
    assert scheduler.drained() == []
    scheduler.completed(call, 0.001)
    assert scheduler.drained() == ["one"]
