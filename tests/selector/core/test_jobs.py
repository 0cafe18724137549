"""A job on its way: which item runs which modality set, and where each of them is."""

import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosel.modality import ModalitySet, parse_set
from selector.core.floors import floor_of
from selector.core.jobs import Job, Option, Rows
from selector.core.options import strategy_of
from selector.core.policies import Queued
from selector.core.profile import ModelProfile
from selector.core.work import Work
from tests.selector.support import profile_of

AB, A, B = parse_set("a+b"), parse_set("a"), parse_set("b")


@pytest.fixture
def profile() -> ModelProfile:
    return profile_of({"a": 0.5, "b": 0.6, "a+b": 0.9}, {"a": 1.0, "b": 2.0})


def work_of(
    profile: ModelProfile, *options: dict[ModalitySet, int], floor: float = 0.5, job_id: bytes = b"some job"
) -> Work:
    """A job of as many items as its options have."""
    strategies = [strategy_of(profile, counts) for counts in options]
    size = strategies[0].size
    job = Job(job_id, "model", size, AB, floor, 1.0)
    queued = Queued([], [], 0, size, job.deadline)
    return Work(job, profile, floor_of(profile, job), 0.0, [Option(s, s.accuracy) for s in strategies], queued)


def fused(work: Work, modality_set: ModalitySet) -> tuple[int, ...]:
    """Encodes everything that waits, then takes what one set has for fusion."""
    for modality in "ab":
        if work.waiting(modality):
            work.encoded(work.take(modality, work.waiting(modality)).items)
    return work.take(modality_set, work.waiting(modality_set)).items


def test_a_job_ends_when_its_deadline_is_over_unless_a_late_answer_is_wanted() -> None:
    job = Job(b"id", "model", 1, A, None, deadline=2.0)
    assert job.ends == 2.0
    assert dataclasses.replace(job, expires=5.0, late_ok=True).ends == 5.0


def test_items_wait_for_the_encoders_of_their_set_then_for_fusion(profile: ModelProfile) -> None:
    work = work_of(profile, {AB: 1, A: 2})
    assert (work.waiting("a"), work.waiting("b"), work.uncommitted) == (3, 1, 3)
    rows = work.take("a", 3)
    assert rows == Rows(b"some job", (0, 1, 2))
    assert (work.waiting("a"), work.waiting("b"), work.uncommitted) == (0, 1, 0)
    work.encoded(rows.items)
    assert (work.waiting(A), work.waiting(AB)) == (2, 0)
    work.encoded(work.take("b", 1).items)
    assert work.waiting(AB) == 1
    assert dict(work.unfinished()) == {A: 2, AB: 1}
    work.take(A, 2)
    assert dict(work.unfinished()) == {AB: 1}, "what is in fusion is no longer waited for"


def test_a_plan_may_change_for_what_is_not_committed(profile: ModelProfile) -> None:
    work = work_of(profile, {AB: 4}, {A: 4})
    work.take("b", 1)
    assert (work.uncommitted, dict(work.planned)) == (3, {AB: 3})
    work.options = [Option(strategy_of(profile, {A: 3}), 0.5)]
    work.choose(0)
    assert work.strategy.counts == ((A, 3), (AB, 1))
    assert work.waiting("a") == 4


def test_the_most_accurate_items_are_committed_first(profile: ModelProfile) -> None:
    work = work_of(profile, {A: 3, AB: 2}, floor=0.6)
    work.take("a", 3)
    assert dict(work.planned) == {A: 2}
    assert work.floor_of_rest == pytest.approx((0.6 * 5 - (0.9 + 0.9 + 0.5)) / 2)


def test_what_is_left_needs_less_once_more_was_spent(profile: ModelProfile) -> None:
    work = work_of(profile, {AB: 1, A: 3}, floor=0.6)
    assert work.floor_of_rest == pytest.approx(0.6)
    work.take("b", 1)
    assert work.floor_of_rest == pytest.approx(0.5), "three items at 0.5 and one at 0.9 are 0.6 on average"


def test_rows_that_come_back_wait_again_and_keep_their_order(profile: ModelProfile) -> None:
    work = work_of(profile, {A: 6})
    first = work.take("a", 4)
    assert len(first.items) == 4
    work.put_back("a", first.items)
    assert work.take("a", 6).items == (0, 1, 2, 3, 4, 5)
    work.encoded(range(6))
    again = work.take(A, 6)
    work.put_back(A, again.items)
    assert work.take(A, 6) == again


def test_who_gets_which_set_depends_on_the_job_and_not_on_the_position(profile: ModelProfile) -> None:
    def in_full(job_id: bytes) -> tuple[int, ...]:
        return fused(work_of(profile, {AB: 3, A: 5}, job_id=job_id), AB)

    chosen = [in_full(i.to_bytes(16, "big")) for i in range(400)]
    assert in_full(bytes(16)) == chosen[0], "the same job is cut in the same way"
    shares = Counter(item for items in chosen for item in items)
    # Each of 8 items is one of the 3 in 400 * 3/8 = 150 jobs; five standard deviations are 48.
    assert all(102 <= shares[item] <= 198 for item in range(8))


@settings(deadline=None)
@given(ab=st.integers(0, 6), a=st.integers(0, 6), b=st.integers(0, 6), data=st.data())
def test_however_rows_are_taken_each_item_runs_its_set_once(ab: int, a: int, b: int, data: st.DataObject) -> None:
    counts = {s: n for s, n in ((AB, ab), (A, a), (B, b)) if n} or {A: 1}
    profile = profile_of({"a": 0.5, "b": 0.6, "a+b": 0.9}, {"a": 1.0, "b": 2.0})
    work = work_of(profile, counts)
    taken: Counter[tuple[str, int]] = Counter()
    while open_ := [m for m in "ab" if work.waiting(m)]:
        modality = data.draw(st.sampled_from(open_))
        most = data.draw(st.integers(1, work.waiting(modality)))
        rows = work.take(modality, most)
        assert len(rows.items) == most
        taken.update((modality, item) for item in rows.items)
        work.encoded(rows.items)
        assert dict(work.strategy.counts) == counts
    assert set(taken.values()) == {1}
    sets = {item: s for s in counts for item in work.take(s, work.waiting(s)).items}
    assert Counter(sets.values()) == counts
    assert set(taken) == {(modality, item) for item, s in sets.items() for modality in s}
    assert work.unfinished() == {}
