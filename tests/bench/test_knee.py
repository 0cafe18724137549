import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.knee import LIMIT, crossing, search


@given(st.floats(0.1, 10), st.floats(0.5, 20))
def test_the_load_at_the_limit_is_found_to_one_percent(knee: float, steepness: float) -> None:
    found = search(lambda load: LIMIT * (load / knee) ** steepness)
    assert knee / 1.011 <= found <= knee * 1.001


def test_few_loads_are_tried() -> None:
    tried: list[float] = []

    def miss_ratio(load: float) -> float:
        tried.append(load)
        return 0.0 if load < 3 else 1.0

    search(miss_ratio)
    assert len(tried) <= 12


def test_what_never_misses_and_what_always_misses_ends_the_search() -> None:
    assert search(lambda load: 0.0) >= 12
    assert math.isnan(search(lambda load: 1.0))


def test_the_crossing_is_interpolated() -> None:
    assert crossing([(1.0, 0.01), (1.4, 0.09), (0.8, 0.0), (2.0, 0.3)]) == pytest.approx(1.2)


def test_the_crossing_lies_behind_the_last_load_that_is_fine() -> None:
    assert crossing([(1.0, 0.06), (1.1, 0.04), (1.2, 0.06)]) == pytest.approx(1.15)


@pytest.mark.parametrize("ratios", [[], [0.01, 0.02], [0.06, 0.2]])
def test_a_crossing_that_was_not_seen_is_none(ratios: list[float]) -> None:
    assert crossing(enumerate(ratios)) is None


def test_no_miss_ratio_is_no_miss() -> None:
    # A run without jobs has none.
    assert crossing([(1.0, math.nan), (2.0, 0.1)]) is None
