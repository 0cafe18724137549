"""How many jobs whose callers wait may be under way: a limit that finds itself. Knows no gRPC, no clock, no sockets.

Beyond some number, more jobs at the same time are not answered faster, only later. That number depends on the models,
the machine and its other programs, so it is found as TCP finds its window: it rises by one while as many jobs as it
allows are answered in good time, and falls when a job takes longer (AIMD: Chiu and Jain, "Analysis of the increase and
decrease algorithms for congestion avoidance", 1989), in proportion to the delay as in Netflix's concurrency-limits.
What is refused for it costs next to nothing, so that the jobs under way have the machine for themselves.
"""

import contextlib
from collections.abc import Iterator

from mosel.errors import Overloaded

# In good time is within so much of the time until the deadline; where that is far away, within a time that everybody
# finds long, or a few times as long as the fastest job took.
_SHARE, _LONG_S, _TIMES_FASTEST = 0.5, 1.0, 4.0
# How far it falls at once, and how far for a job that was refused for want of time.
_LEAST_FACTOR, _MOST_FACTOR, _REFUSED_FACTOR = 0.5, 0.95, 0.8
# Fewer would leave services idle between two jobs.
_LEAST = 8
# Models come and go: how long the fastest job is remembered.
_REMEMBERED_S = 60.0
# Of what answers took lately: the weight of the newest, and how fast it is forgotten while there are none.
_NEWEST, _HALF_LIFE_S = 0.1, 0.5
# Those that are answered are the quick ones.
_LONGER = 1.5


class ConcurrencyLimit:
    """The limit, and how many jobs are under way. All moments are seconds on the driver's clock.

    Args:
        most: it is never higher.
    """

    def __init__(self, most: int) -> None:
        self._limit, self._most, self._least = float(most), most, min(_LEAST, most)
        self._under_way = self._refused = 0
        self._fell_at = self._fastest_at = self._answered_at = float("-inf")
        self._fastest_s = self._last_s = self._takes_s = 0.0

    def check_room(self) -> None:
        """Raises Overloaded if there is no room for one more job."""
        if self._under_way >= int(self._limit):
            raise self._refusal("as many as can be answered in good time at present")

    def check_time(self, left_s: float, now: float) -> None:
        """Raises Overloaded if a job has less time left than answers take at present.

        Where calls wait for their turn longer than they can, none would be answered in time if all were served.
        """
        if left_s < _LONGER * self._takes_s * 0.5 ** ((now - self._answered_at) / _HALF_LIFE_S):
            raise self._refusal(f"and {left_s * 1000:.0f} ms are less than answers take at present")

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """A job is under way inside the block.

        Raises:
            Overloaded: there is no room.
        """
        self.check_room()
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    def answered(self, began: float, now: float, budget_s: float) -> None:
        """A job that is still held was answered; arguments as of `ended`."""
        weight = _NEWEST if now < self._answered_at + _HALF_LIFE_S else 1.0
        self._takes_s += weight * (now - began - self._takes_s)
        self._answered_at = now
        self.ended(began, now, budget_s)

    def ended(self, began: float, now: float, budget_s: float) -> None:
        """A job that is still held was answered, or its deadline passed.

        Args:
            began: when it came.
            now: when it ended.
            budget_s: how long it had from `began` until its deadline.
        """
        took_s = self._last_s = now - began
        if took_s <= self._fastest_s or now > self._fastest_at + _REMEMBERED_S:
            self._fastest_s, self._fastest_at = took_s, now
        good_s = min(_SHARE * budget_s, max(_LONG_S, _TIMES_FASTEST * self._fastest_s))
        if took_s > good_s:
            self._fall(began, now, good_s / took_s)
        elif self._under_way > self._limit / 2:
            self._limit = min(self._limit + 1 / self._limit, self._most)

    def refused(self, began: float, now: float) -> None:
        """A job that is still held was refused, since it could not be answered in time behind the others."""
        self._fall(began, now, _REFUSED_FACTOR)

    def statistics(self) -> dict[str, int]:
        """The limit, and the jobs that were refused for it."""
        return {"concurrency_limit": int(self._limit), "jobs_refused_for_concurrency": self._refused}

    def _refusal(self, why: str) -> Overloaded:
        self._refused += 1
        return Overloaded(f"{self._under_way} jobs are under way, {why}", max(round(self._last_s * 1000), 1))

    def _fall(self, began: float, now: float, factor: float) -> None:
        # Jobs that came before it fell say nothing about what that has done, and few jobs are not too many.
        if began >= self._fell_at and self._under_way > self._least:
            factor = min(max(factor, _LEAST_FACTOR), _MOST_FACTOR)
            self._limit, self._fell_at = max(min(self._limit, self._under_way) * factor, self._least), now
