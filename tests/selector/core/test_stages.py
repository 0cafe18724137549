"""What measured call times teach about the next ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selector.core.stages import Correction

SMALL_MS, LARGE_MS = 2.0, 20.0
MINUTE = 60.0


def taught(factor: float, overhead_ms: float, calls: int = 200) -> Correction:
    """A correction that saw calls of every size, a millisecond apart."""
    correction = Correction(SMALL_MS, LARGE_MS)
    for i in range(calls):
        profiled = SMALL_MS + (LARGE_MS - SMALL_MS) * (i % 7) / 6
        correction.learn(profiled, overhead_ms + factor * profiled, i / 1000)
    return correction


def test_nothing_measured_means_the_profile() -> None:
    correction = Correction(SMALL_MS, LARGE_MS)
    assert correction.fit(0.0) == pytest.approx((0.0, 1.0))
    assert correction.expected_ms(7.5, 0.0) == pytest.approx(7.5)


def test_it_learns_a_factor_and_an_overhead() -> None:
    overhead_ms, factor = taught(1.3, 2.0).fit(0.2)
    assert factor == pytest.approx(1.3, abs=0.1)
    assert overhead_ms == pytest.approx(2.0, abs=0.5)


@given(factor=st.floats(0.7, 1.5), overhead_ms=st.floats(0, 5), profiled_ms=st.floats(SMALL_MS, LARGE_MS))
def test_what_a_drifted_machine_takes_is_predicted(factor: float, overhead_ms: float, profiled_ms: float) -> None:
    true_ms = overhead_ms + factor * profiled_ms
    drift = abs(true_ms - profiled_ms)
    # The profile keeps two of about twenty measurements' weight.
    error = abs(taught(factor, overhead_ms).expected_ms(profiled_ms, 0.2) - true_ms)
    assert error <= 0.15 * max(drift, abs(factor - 1) * LARGE_MS + overhead_ms)


def test_what_was_learned_is_forgotten_when_nothing_confirms_it() -> None:
    correction = taught(3.0, 5.0)
    later = [correction.expected_ms(10.0, now) for now in (0.2, 2.0, 5.0, 10.0, MINUTE)]
    assert later == sorted(later, reverse=True)
    assert later[0] > 30
    assert later[-1] == pytest.approx(10.0)


def test_one_stalled_call_counts_for_little() -> None:
    correction = taught(1.0, 0.0)
    correction.learn(10.0, 60_000.0, 0.2)
    stalled = correction.expected_ms(10.0, 0.2)
    assert 10.0 < stalled < 13.0
    for i in range(60):
        correction.learn(10.0, 10.0, 0.2 + i / 1000)
    assert correction.expected_ms(10.0, 0.26) == pytest.approx(10.0, abs=0.2)


def test_calls_of_one_size_teach_an_overhead_for_every_size() -> None:
    correction = Correction(4.0, 4.0)
    for i in range(200):
        correction.learn(4.0, 6.0, i / 1000)
    assert correction.fit(0.2) == pytest.approx((2.0, 1.0), abs=0.25)


def test_no_call_is_expected_to_take_nothing() -> None:
    correction = taught(0.0, 0.0)
    assert correction.expected_ms(SMALL_MS, 0.2) == pytest.approx(0.2 * SMALL_MS)
    assert correction.expected_ms(LARGE_MS, 0.2) >= 0.2 * LARGE_MS


def test_a_machine_that_recovers_is_believed_soon_however_long_it_was_slow() -> None:
    correction = taught(1.5, 0.0, calls=5000)
    for i in range(100):
        correction.learn(10.0, 10.0, 5.0 + i / 1000)
    assert correction.expected_ms(10.0, 5.1) == pytest.approx(10.0, abs=0.1)
