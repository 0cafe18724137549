"""How much time a newcomer must have to spare, so that few who are admitted are answered late or dropped."""

from collections import OrderedDict

from selector.core.jobs import Job

# Each promise that is broken raises the share by as much as so many that are kept lower it.
_STEP, _KEPT_PER_BROKEN = 0.02, 200
_MOST = 0.5
# Without jobs it is forgotten; slowly, or jobs would not be what decides.
_HALF_LIFE_S = 300.0
# Answers that may still be on their way to the caller.
_ON_THE_WAY = 256


class Promises:
    """What became of the jobs that were admitted, and the share of its time that the next one must have to spare.

    Under overload every job is admitted with as little time to spare as forecasts allow, and these do not know what a
    machine will do next: without anything to spare, half of what they err becomes a broken promise. With it the queue
    is a little shorter, which costs nothing as long as it does not run empty.

    Args:
        reply_s: what an answer takes from here to the caller.
    """

    def __init__(self, reply_s: float) -> None:
        self._reply_s, self._share, self._at = reply_s, 0.0, 0.0
        # Deadlines by job, of answers that should have been in time.
        self._on_the_way: OrderedDict[bytes, float] = OrderedDict()

    def answered(self, job: Job, now: float) -> None:
        """A job was answered, in time or not."""
        if now + self._reply_s > job.deadline:
            self.broken(job, now)
            return
        self._note(-_STEP / _KEPT_PER_BROKEN, now)
        if not job.late_ok:
            self._on_the_way[job.id] = job.deadline
            if len(self._on_the_way) > _ON_THE_WAY:
                self._on_the_way.popitem(last=False)

    def broken(self, job: Job, now: float) -> None:
        """A job that was admitted got no answer in time."""
        if not job.late_ok:
            self._note(_STEP, now)

    def unwanted(self, job_id: bytes, now: float) -> None:
        """The caller of a job that is over stopped waiting: at its deadline, if its answer took longer to get there."""
        deadline = self._on_the_way.pop(job_id, None)
        if deadline is not None and deadline - self._reply_s <= now:
            self._note(_STEP, now)

    def spare_s(self, budget_s: float, ahead_s: float, now: float) -> float:
        """Seconds that a newcomer must have to spare.

        Args:
            budget_s: that it has until its deadline.
            ahead_s: that it is expected to wait; who waits for nobody needs nothing to spare.
            now: seconds on the driver's clock.
        """
        self._fade(now)
        return min(self._share * budget_s, _MOST * ahead_s)

    def _note(self, change: float, now: float) -> None:
        self._fade(now)
        self._share = min(max(self._share + change, 0.0), _MOST)

    def _fade(self, now: float) -> None:
        if now > self._at:
            self._share *= 0.5 ** ((now - self._at) / _HALF_LIFE_S)
            self._at = now
