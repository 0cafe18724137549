"""What newcomers must leave to those that come after them and have to spare, and what those are told that are refused.

A job is admitted if there is a plan with it that keeps everyone's deadline (`planner`). Plans rest on forecasts, which
do not know which jobs come next, and err a little.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from mosel.errors import DeadlineUnreachable, MoselError, Overloaded
from mosel.modality import ModalitySet
from selector.core.floors import best_of
from selector.core.frontier import format_strategy
from selector.core.jobs import Job
from selector.core.work import Work

# How long the work that arrived is remembered.
_ARRIVALS_S = 2.0
# However much arrives, jobs that are here already get this share.
_MOST_ARRIVING = 0.8
_NOTHING = 1e-6
# Each promise that is broken raises the share to spare by as much as so many that are kept lower it.
_STEP, _KEPT_PER_BROKEN = 0.02, 200
_MOST_SPARE = 0.5
# Without jobs it is forgotten; slowly, or jobs would not be what decides.
_HALF_LIFE_S = 300.0
# Answers that may still be on their way to the caller.
_ON_THE_WAY = 256


class OfferedLoad:
    """The share of each resource that arriving jobs need at least, even if each is run as cheaply as its floor allows.

    Over about the last two seconds.
    """

    def __init__(self) -> None:
        self._shares: dict[str, float] = {}
        self._at = 0.0

    def add(self, seconds: Mapping[str, float], now: float) -> None:
        """A job came, whose cheapest strategy keeps each resource busy for so many seconds."""
        self._fade(now)
        for resource, busy in seconds.items():
            self._shares[resource] = self._shares.get(resource, 0.0) + busy / _ARRIVALS_S

    def shares(self, now: float) -> dict[str, float]:
        """The share 0..1 of each resource."""
        self._fade(now)
        return {resource: min(share, _MOST_ARRIVING) for resource, share in self._shares.items()}

    def _fade(self, now: float) -> None:
        fading = math.exp(-max(now - self._at, 0.0) / _ARRIVALS_S)
        # Resources come and go with the machines that services run on.
        self._shares = {
            resource: faded for resource, share in self._shares.items() if (faded := share * fading) > _NOTHING
        }
        self._at = max(now, self._at)


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
        return min(self._share * budget_s, _MOST_SPARE * ahead_s)

    def _note(self, change: float, now: float) -> None:
        self._fade(now)
        self._share = min(max(self._share + change, 0.0), _MOST_SPARE)

    def _fade(self, now: float) -> None:
        if now > self._at:
            self._share *= 0.5 ** ((now - self._at) / _HALF_LIFE_S)
            self._at = now


def refusal(
    work: Work, now: float, fastest: int, idle_s: float, behind_s: float, fitting: Callable[[], Sequence[ModalitySet]]
) -> MoselError:
    """The error for a job whose deadline cannot be met.

    Args:
        work: the job.
        now: seconds on the driver's clock.
        fastest: index of its fastest option.
        idle_s: seconds that it takes on an idle system.
        behind_s: the same behind what is queued.
        fitting: says which modality sets would meet the deadline on an idle system, whatever the floor.

    Returns:
        DeadlineUnreachable if not even an idle system meets it, with the best that would; else Overloaded. A job that
        may be late can always be met some time: it is refused only for the sake of others.
    """
    budget_s = work.job.deadline - now
    takes = f"{format_strategy(work.options[fastest].strategy)} takes {idle_s * 1000:.1f} ms on an idle system"
    if idle_s <= budget_s or work.job.late_ok:
        retry_after_ms = max(1, round((behind_s - budget_s) * 1000))
        return Overloaded(
            f"the deadline of {budget_s * 1000:.1f} ms cannot be met behind what is queued; {takes}", retry_after_ms
        )
    return DeadlineUnreachable(
        f"the deadline of {budget_s * 1000:.1f} ms cannot be met for {work.job.size} items: of the strategies that "
        f"are accurate enough, {takes}; {best_of(work.profile, fitting())}"
    )
