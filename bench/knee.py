"""The highest load at which misses stay under a limit."""

import math
from collections.abc import Callable, Iterable

LIMIT = 0.05
# Loads of a search, in multiples of a capacity, and how close it comes.
_LOWEST, _HIGHEST, _CLOSE = 0.05, 12.0, 1.01


def search(miss_ratio: Callable[[float], float], near: float = 1.0) -> float:
    """The highest load with a miss ratio under the limit, to 1 %, for a ratio that rises with load.

    Args:
        miss_ratio: of a load; asked some ten times.
        near: where to begin.

    Returns:
        NaN if even the lowest load is too high, as where services are slower than deadlines allow.
    """
    low, high, step = near, near, 1.3
    while miss_ratio(low) >= LIMIT:
        low, high = low / step, low
        if low < _LOWEST:
            return math.nan
    while low == high < _HIGHEST and miss_ratio(high * step) < LIMIT:
        low = high = high * step
    high = high * step if low == high else high
    while high / low > _CLOSE:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if miss_ratio(middle) < LIMIT else (low, middle)
    return low


def crossing(points: Iterable[tuple[float, float]]) -> float | None:
    """The load at which the miss ratio reaches the limit, between the last load below it and the next one above.

    Args:
        points: (load, miss ratio), in any order.

    Returns:
        Interpolated linearly; None if no load is below the limit or none behind it is above.
    """
    ordered = sorted(points)
    below = max((i for i, (_, ratio) in enumerate(ordered) if ratio < LIMIT), default=None)
    if below is None or below + 1 == len(ordered):
        return None
    (low, low_ratio), (high, high_ratio) = ordered[below], ordered[below + 1]
    return low + (high - low) * (LIMIT - low_ratio) / (high_ratio - low_ratio)
