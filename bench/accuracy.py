"""Measured accuracy, and how far to trust it: items of the same recording tell less than independent ones."""

import math
from collections.abc import Sequence

import numpy as np

# Of each labelled item: its group in every grouping, and a number: whether its prediction is right, or a difference.
Scored = Sequence[tuple[tuple[int, ...], float]]


def standard_error(scored: Scored) -> float:
    """Of the mean number, where items of the same group in any grouping are alike; NaN without items.

    The variance of independent items times a design effect, 1 + the sum of (deff_g - 1) over the groupings g, at least
    1, as the certificates have it. deff_g is the variance by the totals of g's groups, against independent items.
    """
    if not scored:
        return math.nan
    values = np.array([value for _, value in scored], np.float64)
    deviations = values - values.mean()
    squares = float(np.square(deviations).sum())
    if squares == 0:
        return 0.0
    effect = 1.0
    for column in zip(*(groups for groups, _ in scored), strict=True):
        _, group = np.unique(column, return_inverse=True)
        totals = np.bincount(group, deviations)
        effect += float(np.square(totals).sum()) / squares * len(totals) / max(len(totals) - 1, 1) - 1
    return math.sqrt(max(effect, 1.0) * squares / max(len(values) - 1, 1) / len(values))
