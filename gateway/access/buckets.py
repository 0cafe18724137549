"""Token buckets: so much a second on average, and so much at once. Knows no clock: time is an argument."""

# Sums of rounded numbers may miss what they should be by as little.
_ROUNDING = 1e-9


class TokenBucket:
    """Fills at a constant rate up to its capacity; what is taken may leave it in debt.

    Args:
        rate: what comes in a second.
        capacity: the most that it holds; it is full at first.
        now: seconds.
    """

    def __init__(self, rate: float, capacity: float, now: float) -> None:
        self._rate, self._capacity = rate, capacity
        self._level, self._at = capacity, now

    def wait_s(self, least: float, now: float) -> float:
        """Seconds until it holds so much, if nothing is taken; 0 if it does now."""
        missing = least - self._filled(now)
        return missing / self._rate if missing > _ROUNDING * (self._rate + self._capacity) else 0.0

    def take(self, amount: float, now: float) -> None:
        """Takes an amount, be it there or not."""
        self._level, self._at = self._filled(now) - amount, now

    def limit(self, rate: float, capacity: float, now: float) -> None:
        """Goes on with another rate and capacity."""
        self._level, self._at = min(self._filled(now), capacity), now
        self._rate, self._capacity = rate, capacity

    def _filled(self, now: float) -> float:
        return min(self._level + (now - self._at) * self._rate, self._capacity)
