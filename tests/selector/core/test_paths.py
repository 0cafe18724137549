"""Encoders and fusion in one call, where fusion says that it encodes itself."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosel.modality import FUSION, parse_set
from selector.core.frontier import frontier
from selector.core.jobs import EncodeCall, FuseCall, Rows, Wait
from selector.core.scheduler import Scheduler
from tests.selector.support import ACCURACY, BOTH, ENCODERS, PEN, Driver, fuse_call, is_empty, job, profile_of

# Calls of up to 4: image+pen 13, 15.7, 18.3, 21 ms, half of which is image, and fusion 1 ms.
FUSING = ((1, 1.0), (4, 1.0))


def joined_with(modalities: Iterable[str] = ("image", "pen"), tokens: int = 2, replica: str = "") -> Scheduler:
    """A scheduler of one model, whose fusion encodes some modalities itself."""
    scheduler = Scheduler({"one": profile_of(ACCURACY, ENCODERS, FUSING)}, tokens=tokens)
    for lane in ("image", "pen", *([replica] if replica else [])):
        assert scheduler.lane(lane, True) == []
    assert scheduler.lane(FUSION, True, joined=frozenset(modalities)) == []
    return scheduler


def test_items_take_one_call_from_payloads_to_answers() -> None:
    scheduler = joined_with()
    scheduler.submit(job("a", size=3, sent="image+pen", floor=0.9), 0.0)
    call = fuse_call(scheduler)
    assert (call.modality_set, call.from_payloads, call.rows) == (BOTH, True, (Rows(b"a", (0, 1, 2)),))
    assert scheduler.next(0.0) == Wait(10.0)
    assert scheduler.completed(call, 0.02) == [b"a"]
    assert is_empty(scheduler)


def test_jobs_share_it() -> None:
    scheduler = joined_with(tokens=1)
    for name in ("a", "b", "c"):
        scheduler.submit(job(name, size=2, sent="image+pen", floor=0.9), 0.0)
    sizes = []
    while isinstance(call := scheduler.next(0.0), FuseCall):
        sizes.append([len(rows.items) for rows in call.rows])
        scheduler.completed(call, 0.0)
    assert sizes == [[2, 2], [2]]
    assert is_empty(scheduler)


def test_the_most_accurate_part_of_a_mix_goes_first() -> None:
    scheduler = joined_with(tokens=1)
    work = scheduler.submit(job("a", size=4, sent="image+pen", floor=0.75), 0.0)
    assert work.planned == {BOTH: 2, PEN: 2}
    first = fuse_call(scheduler)
    assert (first.modality_set, first.from_payloads) == (BOTH, True)
    scheduler.completed(first, 0.0)
    second = fuse_call(scheduler)
    assert (second.modality_set, second.from_payloads) == (PEN, True)
    assert scheduler.completed(second, 0.0) == [b"a"]


def test_sets_with_an_encoder_elsewhere_keep_their_steps() -> None:
    scheduler = joined_with(["pen"])
    scheduler.submit(job("a", sent="pen"), 0.0)
    assert fuse_call(scheduler).from_payloads
    scheduler.submit(job("b", sent="image+pen", floor=0.9), 0.0)
    assert isinstance(scheduler.next(0.0), EncodeCall)


def test_where_a_modality_has_another_encoder_calls_are_spread_over_both() -> None:
    scheduler = joined_with(replica="image/2")
    scheduler.submit(job("a", sent="image+pen", floor=0.9), 0.0)
    assert isinstance(scheduler.next(0.0), EncodeCall)


def test_an_observed_model_keeps_its_embeddings() -> None:
    scheduler = joined_with()
    scheduler.profile_of("one").observed = True
    scheduler.submit(job("a", sent="image+pen"), 0.0)
    assert isinstance(scheduler.next(0.0), EncodeCall)


def test_a_path_that_fails_is_tried_once_more() -> None:
    scheduler = joined_with()
    scheduler.submit(job("a", size=2, sent="image+pen", floor=0.9), 0.0)
    assert scheduler.failed(fuse_call(scheduler), 0.0) == []
    again = fuse_call(scheduler)
    assert again.rows == (Rows(b"a", (0, 1)),)
    assert scheduler.failed(again, 0.0) == [b"a"]
    assert is_empty(scheduler)


def test_it_is_expected_when_it_comes() -> None:
    scheduler = joined_with()
    works = [scheduler.submit(job(str(n), size=4, sent="image+pen", floor=0.9), 0.0) for n in range(3)]
    driver = Driver(scheduler, {"one": scheduler.profile_of("one")})
    driver.run()
    assert [work.predicted for work in works] == pytest.approx([driver.answered[w.job.id] for w in works], rel=0.02)


@given(
    joined=st.sets(st.sampled_from(["image", "pen"])),
    size=st.integers(1, 12),
    sets=st.sets(st.sampled_from([*ACCURACY]), min_size=1),
)
def test_a_frontier_costs_what_its_mixes_cost(joined: set[str], size: int, sets: set[str]) -> None:
    profile = profile_of(ACCURACY, ENCODERS, FUSING)
    profile.joined = frozenset(joined)
    for strategy in frontier(profile, map(parse_set, sets), size):
        assert strategy.cost_ms == pytest.approx(profile.mixed_cost_ms(dict(strategy.counts)))
