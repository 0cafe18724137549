"""Quantiles against sums of binomial probabilities, closed forms and printed tables."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selector.core.quantiles import beta_quantile, incomplete_beta, t_quantile


def at(value: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.array(value)


@given(trials=st.integers(1, 200), share=st.floats(0.01, 0.99), data=st.data())
def test_the_incomplete_beta_function_is_a_tail_of_the_binomial_distribution(
    trials: int, share: float, data: st.DataObject
) -> None:
    successes = data.draw(st.integers(1, trials))
    tail = sum(math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(successes, trials + 1))
    value = incomplete_beta(at(successes), at(trials - successes + 1), at(share))
    assert float(value) == pytest.approx(tail, rel=1e-9, abs=1e-12)


@given(share=st.floats(0.001, 0.999), a=st.floats(0.5, 5000), b=st.floats(0.5, 5000))
def test_a_quantile_has_its_share_below_it(share: float, a: float, b: float) -> None:
    found = beta_quantile(share, at(a), at(b))
    assert float(incomplete_beta(at(a), at(b), found)) == pytest.approx(share, abs=1e-7)


def test_quantiles_that_have_a_closed_form() -> None:
    powers = np.array([1.0, 2.0, 10.0, 500.0])
    np.testing.assert_allclose(beta_quantile(0.05, powers, np.ones(4)), 0.05 ** (1 / powers), rtol=1e-9)
    np.testing.assert_allclose(beta_quantile(0.3, np.ones(4), powers), 1 - 0.7 ** (1 / powers), rtol=1e-9)


@pytest.mark.parametrize(
    ("share", "freedom", "printed"),
    # NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2.
    [(0.95, 1, 6.314), (0.95, 2, 2.920), (0.95, 20, 1.725), (0.95, 100, 1.660), (0.975, 10, 2.228), (0.975, 30, 2.042)],
)
def test_quantiles_of_student_s_t(share: float, freedom: float, printed: float) -> None:
    assert t_quantile(share, freedom) == pytest.approx(printed, abs=5e-4)
