"""Quantiles of the Beta and of Student's t distribution, for bounds of shares."""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_TINY = 1e-300
_STEPS, _CLOSE = 100, 1e-10
_lgamma = np.vectorize(math.lgamma, otypes=[np.float64])


def incomplete_beta(a: Floats, b: Floats, x: Floats) -> Floats:
    """The regularised incomplete beta function I_x(a, b): what share of a Beta(a, b) distribution is below x.

    By its continued fraction (DLMF 8.17.22, https://dlmf.nist.gov/8.17.E22), in the half where that converges fast.

    Args:
        a, b: above 0; arrays of one shape.
        x: 0..1, of that shape.
    """
    a, b, x = (np.asarray(values, np.float64) for values in (a, b, x))
    swapped = x > (a + 1) / (a + b + 2)
    a, b, x = np.where(swapped, b, a), np.where(swapped, a, b), np.where(swapped, 1 - x, x)
    with np.errstate(divide="ignore"):
        front = np.exp(_lgamma(a + b) - _lgamma(a) - _lgamma(b) + a * np.log(x) + b * np.log1p(-x)) / a
    below = front * _fraction(a, b, x)
    return np.asarray(np.where(swapped, 1 - below, below))


def beta_quantile(share: float, a: Floats, b: Floats) -> Floats:
    """Below which number a Beta(a, b) distribution has so much of itself: by Newton's method, kept in a bracket."""
    low, high = np.zeros(np.shape(a)), np.ones(np.shape(a))
    log_beta = _lgamma(a) + _lgamma(b) - _lgamma(a + b)
    at = np.asarray(a / (a + b))
    for _ in range(_STEPS):
        excess = incomplete_beta(a, b, at) - share
        low, high = np.where(excess < 0, at, low), np.where(excess < 0, high, at)
        density = np.exp((a - 1) * np.log(at) + (b - 1) * np.log1p(-at) - log_beta)
        newton = at - excess / _apart(density)
        before, at = at, np.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
        if np.all(np.abs(at - before) <= _CLOSE * at):
            break
    return at


@lru_cache(maxsize=64)
def t_quantile(share: float, freedom: float) -> float:
    """Below which number Student's t distribution has so much of itself.

    Args:
        share: 0.5 to below 1.
        freedom: its degrees of freedom, above 0.
    """
    # P(|T| > t) = I_y(freedom / 2, 1 / 2) with y = freedom / (freedom + t^2).
    y = float(beta_quantile(2 * (1 - share), np.array(freedom / 2), np.array(0.5)))
    return math.sqrt(freedom * (1 - y) / y)


def _fraction(a: Floats, b: Floats, x: Floats) -> Floats:
    """The continued fraction, by Lentz's method as Thompson and Barnett modified it (J. Comput. Phys. 64, 1986)."""
    c, d = np.ones(x.shape), 1 / _apart(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 400):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            c, d = _apart(1 + term / c), 1 / _apart(1 + term * d)
            value = value * c * d
        if np.all(np.abs(c * d - 1) < 1e-14):
            break
    return value


def _apart(values: Floats) -> Floats:
    """Keeps divisors away from 0."""
    return np.where(np.abs(values) < _TINY, _TINY, values)
