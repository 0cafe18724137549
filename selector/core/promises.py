"""How much time a newcomer must have to spare, so that few who are admitted are answered late or dropped."""

# Each promise that is broken raises the share by as much as so many that are kept lower it.
_STEP, _KEPT_PER_BROKEN = 0.02, 200
_MOST = 0.5
# Without jobs it is forgotten; slowly, or jobs would not be what decides.
_HALF_LIFE_S = 300.0


class Promises:
    """What became of the jobs that were admitted, and the share of its time that the next one must have to spare.

    Under overload every job is admitted with as little time to spare as forecasts allow, and these do not know what a
    machine will do next: without anything to spare, half of what they err becomes a broken promise. With it the queue
    is a little shorter, which costs nothing as long as it does not run empty.
    """

    def __init__(self) -> None:
        self._share, self._at = 0.0, 0.0

    def note(self, *, kept: bool, now: float) -> None:
        """A job was answered in time; or late, or not at all for want of time."""
        self._fade(now)
        change = -_STEP / _KEPT_PER_BROKEN if kept else _STEP
        self._share = min(max(self._share + change, 0.0), _MOST)

    def spare_s(self, budget_s: float, ahead_s: float, now: float) -> float:
        """Seconds that a newcomer must have to spare.

        Args:
            budget_s: that it has until its deadline.
            ahead_s: that it is expected to wait; who waits for nobody needs nothing to spare.
            now: seconds on the driver's clock.
        """
        self._fade(now)
        return min(self._share * budget_s, _MOST * ahead_s)

    def _fade(self, now: float) -> None:
        if now > self._at:
            self._share *= 0.5 ** ((now - self._at) / _HALF_LIFE_S)
            self._at = now
