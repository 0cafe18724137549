"""Latency curves and model profiles."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selector.core.profile import LatencyCurve, ModelProfile

A, B, AB = frozenset("a"), frozenset("b"), frozenset("ab")

curves = st.dictionaries(st.integers(1, 64), st.floats(0.001, 1e4), min_size=1, max_size=6).map(
    lambda points: LatencyCurve(tuple(sorted(points.items())))
)


@pytest.mark.parametrize(
    ("items", "ms"),
    [
        (0, 0.0),
        (1, 2.0),  # below the first point: that point, a call costs at least that
        (2, 2.0),
        (3, 3.0),
        (4, 4.0),
        (6, 4.5),
        (8, 5.0),  # the cheapest per item: the best batch
        (9, 7.0),  # one whole call, and one of a single item
        (16, 10.0),
        (22, 14.5),
    ],
)
def test_points_are_interpolated_and_larger_work_is_cut_into_calls(items: int, ms: float) -> None:
    assert LatencyCurve(((2, 2.0), (4, 4.0), (8, 5.0))).ms(items) == pytest.approx(ms)


@given(curve=curves)
def test_every_measured_point_is_returned_as_it_is(curve: LatencyCurve) -> None:
    assert [curve.call_ms(size) for size, _ in curve.points] == [ms for _, ms in curve.points]


@given(curve=curves, data=st.data())
def test_a_batch_lies_between_its_neighbours(curve: LatencyCurve, data: st.DataObject) -> None:
    items = data.draw(st.integers(1, curve.max_batch))
    smaller = [ms for size, ms in curve.points if size <= items] or [curve.points[0][1]]
    larger = [ms for size, ms in curve.points if size >= items]
    tolerance = 1e-9 * max(smaller[-1], larger[0])
    assert min(smaller[-1], larger[0]) - tolerance <= curve.call_ms(items) <= max(smaller[-1], larger[0]) + tolerance


@given(curve=curves, items=st.integers(1, 500))
def test_more_work_is_cut_into_calls_of_the_best_batch(curve: LatencyCurve, items: int) -> None:
    whole, rest = divmod(items, curve.best_batch)
    assert curve.ms(items) == pytest.approx(
        whole * curve.call_ms(curve.best_batch) + (curve.call_ms(rest) if rest else 0.0)
    )


@given(curve=curves)
def test_no_measured_batch_is_much_cheaper_per_item_than_the_best_and_no_smaller_one_as_good(
    curve: LatencyCurve,
) -> None:
    per_item = {size: ms / size for size, ms in curve.points}
    good = 1.05 * min(per_item.values())
    assert per_item[curve.best_batch] <= good
    assert all(ms > good for size, ms in per_item.items() if size < curve.best_batch)


def test_the_best_batch_is_where_the_gain_ends() -> None:
    assert LatencyCurve(((1, 4.0), (8, 8.0), (32, 31.0))).best_batch == 8, "0.97 ms an item at 32, 1 ms at 8"
    assert LatencyCurve(((1, 2.0), (8, 16.0))).best_batch == 1


@pytest.mark.parametrize(
    "points",
    [
        (),
        ((0, 1.0),),
        ((2, 1.0), (1, 2.0)),
        ((1, 1.0), (1, 2.0)),
        ((1, -1.0),),
        ((1, math.nan),),
        ((1, math.inf),),
    ],
)
def test_bad_points_are_refused(points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match="rising batch size"):
        LatencyCurve(points)


def test_encoders_run_in_parallel_but_all_of_them_cost() -> None:
    profile = ModelProfile(
        accuracy={A: 0.5, B: 0.6, AB: 0.9},
        samples=10,
        encoders={"a": LatencyCurve(((1, 3.0),)), "b": LatencyCurve(((1, 5.0),))},
        fusion={AB: LatencyCurve(((1, 1.0),))},
    )
    assert profile.idle_latency_ms(AB, 1) == pytest.approx(6.0)
    assert profile.cost_ms(AB, 1) == pytest.approx(9.0)
    assert profile.cost_ms(AB, 3) == pytest.approx(27.0)


def test_items_of_several_sets_share_the_calls_to_an_encoder() -> None:
    profile = ModelProfile(
        accuracy={A: 0.5, B: 0.6, AB: 0.9},
        samples=10,
        encoders={"a": LatencyCurve(((1, 3.0), (4, 6.0))), "b": LatencyCurve(((1, 5.0),))},
        fusion={s: LatencyCurve(((1, 1.0), (4, 1.0))) for s in (A, AB)},
    )
    # 4 rows of a in one call, 1 of b, and a fusion call for each set.
    assert profile.mixed_cost_ms({A: 3, AB: 1}) == pytest.approx(6 + 5 + 1 + 1)
    assert profile.mixed_cost_ms({A: 4}) == pytest.approx(profile.cost_ms(A, 4)) == 7.0


def test_a_set_is_measured_when_its_encoders_and_its_fusion_are() -> None:
    point = LatencyCurve(((1, 1.0),))
    profile = ModelProfile({A: 0.5, B: 0.6, AB: 0.9}, 10, encoders={"a": point}, fusion={A: point, AB: point})
    assert [profile.is_measured(s) for s in (A, B, AB)] == [True, False, False]


def test_the_best_is_the_most_accurate_of_the_candidates() -> None:
    profile = ModelProfile({A: 0.5, B: 0.6, AB: 0.9}, 10)
    assert profile.best([A, B]) == B
    assert profile.best([]) is None
