"""What the selector refused a moment ago, which holds for others that ask for no less. Knows no gRPC and no sockets.

The hint of a refusal says when a job like it could be answered again; nobody need ask before. So under overload most
jobs are refused here, before they touch the arena, and the selector's time goes to those that it can serve.
"""

import time
from collections import deque
from dataclasses import dataclass

from gateway.jobs.checks import CheckedJob
from mosel.deadline import Deadline
from mosel.errors import Overloaded

_KEPT = 16


@dataclass(frozen=True)
class _Refusal:
    """One job that was refused.

    Attributes:
        answered_at: when it could have been answered, had it not been refused.
        until: when the hint says to try again. Both are moments on this host's monotonic clock.
    """

    job: CheckedJob
    answered_at: float
    until: float

    def covers(self, job: CheckedJob, deadline: float, now: float) -> bool:
        """Whether a job asks for no less, and by a time at which it could not be answered either."""
        mine = self.job
        return (
            now < self.until
            and deadline < self.answered_at
            and job.package is mine.package
            and job.size >= mine.size
            and job.modalities == mine.modalities
            and job.available == mine.available
            and job.exact == mine.exact
            and job.priority == mine.priority
            and _is_at_least(job.min_accuracy, mine.min_accuracy)
            # Whoever may lose less asks for more.
            and _is_at_least(mine.max_accuracy_loss, job.max_accuracy_loss)
        )


class Refusals:
    """The last refusals for want of time."""

    def __init__(self) -> None:
        self._count = 0
        self._recent: deque[_Refusal] = deque(maxlen=_KEPT)

    def note(self, job: CheckedJob, due: Deadline, error: Overloaded) -> None:
        """The selector refused a job. One that may be late is refused for other reasons, and says nothing."""
        if job.late_ok:
            return
        now, wait_s = time.monotonic(), error.retry_after_ms / 1000
        self._recent.append(_Refusal(job, due.at + wait_s, now + wait_s))

    def check(self, job: CheckedJob, due: Deadline) -> None:
        """Raises Overloaded if the selector would refuse a job, too."""
        now, deadline = time.monotonic(), due.at
        for refusal in () if job.late_ok else self._recent:
            if refusal.covers(job, deadline, now):
                self._count += 1
                wait_ms = max(round((refusal.answered_at - deadline) * 1000), 1)
                raise Overloaded(
                    f"the deadline of {(deadline - now) * 1000:.1f} ms cannot be met behind what is queued: "
                    "a job that asked for no more was refused a moment ago",
                    wait_ms,
                )

    def statistics(self) -> dict[str, int]:
        """Jobs that were refused here, and not asked about."""
        return {"jobs_refused_unasked": self._count}


def _is_at_least(floor: float | None, other: float | None) -> bool:
    """Whether a floor is no lower than another of its kind; one that is not there compares with its like alone."""
    if floor is None or other is None:
        return floor is other
    return floor >= other
