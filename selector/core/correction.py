"""How measured call times differ from the profile, learned while running."""

from dataclasses import dataclass

# Weight of what was learned before, per newer measurement, and per time without one.
_MEMORY = 0.95
_HALF_LIFE_S = 2.0
# Weight of the profile, in measurements.
_PRIOR = 1.0
_FACTORS = (0.2, 5.0)


@dataclass
class Correction:
    """Fits `measured = overhead + factor * profiled` by least squares with a fading memory.

    The profile itself counts as two measurements, so what was learned under load fades while nothing confirms it:
    otherwise one busy hour would bar the next.

    Args:
        small_ms: profiled time of the smallest call.
        large_ms: of the largest.
    """

    small_ms: float
    large_ms: float
    _count: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0
    _at: float = 0.0

    def learn(self, profiled_ms: float, measured_ms: float, now: float) -> None:
        """A call took so long; a stalled machine counts as three times the profile at most."""
        self._fade(now)
        measured_ms = min(measured_ms, 3 * self.expected_ms(profiled_ms, now) + 5)
        self._count = _MEMORY * self._count + 1
        self._x = _MEMORY * self._x + profiled_ms
        self._y = _MEMORY * self._y + measured_ms
        self._xx = _MEMORY * self._xx + profiled_ms**2
        self._xy = _MEMORY * self._xy + profiled_ms * measured_ms

    def expected_ms(self, profiled_ms: float, now: float) -> float:
        """What a call is expected to take, in milliseconds; never less than a fifth of its profile."""
        overhead_ms, factor = self.fit(now)
        return max(overhead_ms + factor * profiled_ms, _FACTORS[0] * profiled_ms)

    def fit(self, now: float) -> tuple[float, float]:
        """Overhead in milliseconds, and factor."""
        self._fade(now)
        prior = (self.small_ms, self.large_ms)
        count = self._count + 2 * _PRIOR
        x, y = self._x + _PRIOR * sum(prior), self._y + _PRIOR * sum(prior)
        squares = _PRIOR * sum(ms**2 for ms in prior)
        spread = self._xx + squares - x * x / count
        together = self._xy + squares - x * y / count
        factor = together / spread if spread > 1e-9 else 1.0
        factor = min(max(factor, _FACTORS[0]), _FACTORS[1])
        return (y - factor * x) / count, factor

    def _fade(self, now: float) -> None:
        if now > self._at:
            fading: float = 0.5 ** ((now - self._at) / _HALF_LIFE_S)
            self._count, self._x, self._y = self._count * fading, self._x * fading, self._y * fading
            self._xx, self._xy = self._xx * fading, self._xy * fading
            self._at = now
