"""Latency curves and model profiles."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selector.profile import LatencyCurve, ModelProfile

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
        (6, 5.0),
        (8, 6.0),
        (9, 8.0),  # one whole call, and one of a single item
        (16, 12.0),
        (22, 17.0),
    ],
)
def test_points_are_interpolated_and_larger_work_is_cut_into_calls(items: int, ms: float) -> None:
    assert LatencyCurve(((2, 2.0), (4, 4.0), (8, 6.0))).ms(items) == pytest.approx(ms)


@given(curve=curves)
def test_every_measured_point_is_returned_as_it_is(curve: LatencyCurve) -> None:
    assert [curve.ms(size) for size, _ in curve.points] == [ms for _, ms in curve.points]


@given(curve=curves, items=st.integers(1, 500))
def test_a_batch_lies_between_its_neighbours_and_chunks_add_up(curve: LatencyCurve, items: int) -> None:
    whole, rest = divmod(items, curve.max_batch)
    assert curve.ms(items) == pytest.approx(whole * curve.ms(curve.max_batch) + curve.ms(rest))
    smaller = [ms for size, ms in curve.points if size <= rest] or [curve.points[0][1]]
    larger = [ms for size, ms in curve.points if size >= rest]
    if rest:
        tolerance = 1e-9 * max(smaller[-1], larger[0])
        assert min(smaller[-1], larger[0]) - tolerance <= curve.ms(rest) <= max(smaller[-1], larger[0]) + tolerance


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


def test_a_set_is_measured_when_its_encoders_and_its_fusion_are() -> None:
    point = LatencyCurve(((1, 1.0),))
    profile = ModelProfile({A: 0.5, B: 0.6, AB: 0.9}, 10, encoders={"a": point}, fusion={A: point, AB: point})
    assert [profile.is_measured(s) for s in (A, B, AB)] == [True, False, False]


def test_the_best_is_the_most_accurate_of_the_candidates() -> None:
    profile = ModelProfile({A: 0.5, B: 0.6, AB: 0.9}, 10)
    assert profile.best([A, B]) == B
    assert profile.best([]) is None
