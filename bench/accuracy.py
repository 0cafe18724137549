"""Measured accuracy, and how far to trust it: items from the same recording tell less than independent ones."""

import math
from collections.abc import Sequence

import numpy as np

# Of each labelled item: its source recording, and whether its prediction is right.
Scored = Sequence[tuple[int, bool]]

_RESAMPLES = 1000
# Chance of its own: drawn with the numbers that made the data, resamples would depend on it.
_SEED = 20_240_607


def standard_error(scored: Scored) -> float:
    """Of the share of right predictions: a bootstrap that draws whole recordings; NaN without items."""
    if not scored:
        return math.nan
    recordings, correct = np.array(scored, np.int64).T
    _, cluster = np.unique(recordings, return_inverse=True)
    items, right = np.bincount(cluster), np.bincount(cluster, correct)
    rng = np.random.default_rng(_SEED)
    drawn = rng.multinomial(len(items), np.full(len(items), 1 / len(items)), _RESAMPLES)
    return float(np.std((drawn @ right) / (drawn @ items), ddof=1))
