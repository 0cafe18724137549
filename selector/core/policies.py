"""Which queued jobs give up accuracy, and how much, when some would miss their deadline. Never below a floor.

Jobs stand in deadline order. Every policy begins with each job on its preferred option and changes nothing while
everyone is in time; so jobs move back up as soon as there is slack. What differs is who gives up what:

    all          nobody: jobs have one option, every modality that was sent
    aggressive   every job up to the first predicted miss goes to its cheapest option
    greedy       jobs go to their cheapest option from the head of the queue, until the deficit is gone
    mosel        the options with the greatest total value under which every job is in time

A job that no reassignment can save is dropped, as a last resort, unless a late answer is wanted.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selector.core.forecast import Forecast, ServiceDemand
from selector.core.stages import Remaining

# In units of an item's accuracy: every item answered is worth more than any gain in accuracy.
_DROPPED = -10.0
_LATE = -5.0
# The first jobs of the queue, for which the exact plan is made.
PLANNED_JOBS = 64
_ROUNDS = 3


@dataclass(frozen=True)
class Queued:
    """One job of the queue as a policy sees it.

    Attributes:
        options: what is left to do with each of its options, the preferred one first.
        values: what each option is worth per item.
        cheapest: index of the cheapest option.
        size: items.
        deadline: seconds on the driver's clock.
        committed: it has started: one option, and it is not dropped.
        late_ok: it is not dropped either.
    """

    options: Sequence[Remaining]
    values: Sequence[float]
    cheapest: int
    size: int
    deadline: float
    committed: bool = False
    late_ok: bool = False


# The index of an option for each job of the queue, None: dropped.
Choices = list[int | None]
Policy = Callable[[Sequence[Queued], Forecast], Choices]


def finish_times(queue: Sequence[Queued], forecast: Forecast, choices: Sequence[int | None]) -> list[float | None]:
    """When each job is answered under these choices, in seconds; None for those that are dropped."""
    kept = [job.options[choice] for job, choice in zip(queue, choices, strict=True) if choice is not None]
    times = iter(forecast.finish(kept))
    return [None if choice is None else next(times) for choice in choices]


def in_time(queue: Sequence[Queued], forecast: Forecast, choices: Sequence[int | None]) -> bool:
    """Whether every job that is not dropped is in time under these choices."""
    kept = [(job, job.options[choice]) for job, choice in zip(queue, choices, strict=True) if choice is not None]
    first = min((job.deadline for job, _ in kept), default=math.inf)
    # Mostly there is plenty of time, which is quicker to see than when each job is answered.
    if forecast.latest(left for _, left in kept) <= first:
        return True
    return not _late(queue, finish_times(queue, forecast, choices))


def aggressive(queue: Sequence[Queued], forecast: Forecast) -> Choices:
    """Every job up to the first predicted miss goes to its cheapest option; then up to the next one."""
    return _relieved(queue, forecast, [0] * len(queue), _UpToMiss(queue))


def greedy(queue: Sequence[Queued], forecast: Forecast) -> Choices:
    """Jobs go to their cheapest option from the head of the queue until the deficit of the first miss is gone."""
    give_up = _UpToMiss(queue)

    def until_saved(choices: Choices, miss: int, deficit: float) -> bool:
        changed = False
        while deficit > 0 and give_up.settled <= miss:
            job = queue[give_up.settled]
            now, then = forecast.demands([[job.options[0], job.options[job.cheapest]]], ())[0]
            saved = [seconds - then.seconds.get(resource, 0.0) for resource, seconds in now.seconds.items()]
            deficit -= max(saved, default=0.0)
            changed |= give_up(choices, give_up.settled, 0.0)
        return changed

    return _relieved(queue, forecast, [0] * len(queue), until_saved)


def mosel(queue: Sequence[Queued], forecast: Forecast) -> Choices:
    """The options with the greatest total value under which every job is in time, by dynamic programming.

    A plan that fills all time until the deadlines leaves none for the jobs to come, so it is made for what the reserve
    leaves.
    """
    choices: Choices = [0] * len(queue)
    cautious = forecast.cautious()
    if all(job.committed and len(job.options) == 1 for job in queue):
        return choices
    if in_time(queue, cautious, choices):
        return choices
    if any(len(job.options) > 1 for job in queue):
        choices = _planned(queue, cautious, may_drop=False)
    late = _late(queue, finish_times(queue, forecast, choices))
    if all(queue[i].late_ok for i in late):
        return choices
    if any(not queue[i].committed for i in late):
        choices = aggressive(queue, forecast)
    if None in choices:
        # Some cannot be met even so: which ones are given up is part of the plan.
        choices = _planned(queue, forecast, may_drop=True)
    return _relieved(queue, forecast, choices, _UpToMiss(queue))


def placed(queue: Sequence[Queued], forecast: Forecast, plan: Sequence[int], at: int) -> Choices:
    """A newcomer joins the plan as it is: with its first option that keeps everyone in time and leaves the reserve.

    Args:
        queue: the jobs, with the newcomer.
        forecast: the state of the resources.
        plan: the option that each job has now.
        at: the newcomer's place in the queue.

    Returns:
        That plan; if no option does, what `aggressive` says.
    """
    cautious = forecast.cautious()

    def with_option(option: int) -> Choices:
        return [*plan[:at], option, *plan[at + 1 :]]

    def fits(option: int) -> bool:
        return in_time(queue, cautious, with_option(option))

    options = range(len(queue[at].options))
    # Options of less accuracy cost less, so that it is enough to look at a few.
    first = 0 if fits(0) else bisect.bisect_left(options, True, lo=1, key=fits)
    return with_option(first) if first in options else aggressive(queue, forecast)


POLICIES: dict[str, Policy] = {"all": aggressive, "aggressive": aggressive, "greedy": greedy, "mosel": mosel}


class _UpToMiss:
    """Sends every job up to a miss to its cheapest option; jobs before `settled` are there already."""

    def __init__(self, queue: Sequence[Queued]) -> None:
        self._queue, self.settled = queue, 0

    def __call__(self, choices: Choices, miss: int, deficit: float) -> bool:
        changed = False
        for i in range(self.settled, miss + 1):
            if choices[i] is not None and choices[i] != self._queue[i].cheapest:
                choices[i], changed = self._queue[i].cheapest, True
        self.settled = max(self.settled, miss + 1)
        return changed


def _relieved(
    queue: Sequence[Queued],
    forecast: Forecast,
    choices: Choices,
    give_up: Callable[[Choices, int, float], bool],
) -> Choices:
    """Lets jobs give up accuracy until everyone is in time; those whom that does not save are dropped."""
    hopeless: set[int] = set()
    changed = not in_time(queue, forecast, choices)
    while changed:
        changed = False
        for miss, deficit in _late(queue, finish_times(queue, forecast, choices)).items():
            if miss in hopeless:
                continue
            changed = give_up(choices, miss, deficit)
            if not changed:
                hopeless.add(miss)
                if not (queue[miss].committed or queue[miss].late_ok):
                    choices[miss], changed = None, True
            if changed:
                break
    return choices


def _late(queue: Sequence[Queued], times: Sequence[float | None]) -> dict[int, float]:
    """The jobs that miss their deadline, and by how many seconds."""
    return {
        i: at - job.deadline
        for i, (job, at) in enumerate(zip(queue, times, strict=True))
        if at is not None and at > job.deadline
    }


def _planned(queue: Sequence[Queued], forecast: Forecast, *, may_drop: bool) -> Choices:
    """The most valuable choices that a forecast confirms.

    The programme plans the busiest resource, with costs rounded up to its buckets. Where the forecast still sees a
    miss, that job's deadline is tightened by it and the plan made again. Jobs behind the first 64 go to their cheapest
    option.
    """
    window = queue[:PLANNED_JOBS]
    margins = np.zeros(len(window))
    demands = forecast.demands([job.options for job in window], [job.options[0] for job in window])
    for _ in range(_ROUNDS):
        choices = _most_valuable(window, forecast, demands, margins, may_drop=may_drop)
        choices.extend(job.cheapest for job in queue[PLANNED_JOBS:])
        late = _late(queue, finish_times(queue, forecast, choices))
        if not late:
            break
        for i, seconds in late.items():
            if i < len(window):
                margins[i] += seconds
    return choices


def _most_valuable(
    window: Sequence[Queued],
    forecast: Forecast,
    demands: Sequence[Sequence[ServiceDemand]],
    margins: NDArray[np.float64],
    *,
    may_drop: bool,
) -> Choices:
    """Solves the knapsack whose prefix sums are bounded by the deadlines."""
    busiest = _busiest(demands)
    costs = [[demand.seconds.get(busiest, 0.0) for demand in of_job] for of_job in demands]
    start = forecast.now + forecast.busy_s(busiest)
    horizon = min(max(job.deadline for job in window) - start, sum(max(cost) for cost in costs))
    buckets = min(max(64 * len(window), 256), 2048)
    width = max(horizon, 1e-6) / buckets
    # Rounding makes every job at most one bucket dearer.
    table = _Table(buckets + len(window))
    for job, cost, demand, margin in zip(window, costs, demands, margins, strict=True):
        budget = job.deadline - start - margin
        table.begin()
        for option, seconds in enumerate(cost):
            # What the job takes beyond its share of the resource, because its calls follow each other.
            ends_by = math.floor((budget - max(demand[option].alone_s - seconds, 0.0)) / width)
            table.offer(option, math.ceil(seconds / width), ends_by, job.size * job.values[option])
        if may_drop and not (job.committed or job.late_ok):
            table.offer_drop(job.size * _DROPPED)
        else:
            table.offer_late(job.cheapest, math.ceil(cost[job.cheapest] / width), job.size * _LATE)
    return table.choices()


def _busiest(demands: Sequence[Sequence[ServiceDemand]]) -> str:
    """The resource that the preferred options ask most of."""
    total: dict[str, float] = {}
    for of_job in demands:
        for resource, seconds in of_job[0].seconds.items():
            total[resource] = total.get(resource, 0.0) + seconds
    return max(sorted(total), key=lambda resource: total[resource])


_DROP = -1


class _Table:
    """The greatest value by time used, in buckets, after each job; and the choices that lead there."""

    def __init__(self, buckets: int) -> None:
        self._buckets = buckets
        self._value = np.full(buckets + 1, -np.inf)
        self._value[0] = 0.0
        self._next = self._value
        self._came: list[tuple[NDArray[np.int16], NDArray[np.int32]]] = []

    def begin(self) -> None:
        """The next job; what it is offered follows."""
        self._value = self._next if self._came else self._value
        self._next = np.full(self._buckets + 1, -np.inf)
        self._came.append((np.zeros(self._buckets + 1, np.int16), np.zeros(self._buckets + 1, np.int32)))

    def offer(self, option: int, shift: int, ends_by: int, value: float) -> None:
        """The job may use `shift` buckets of time, if it ends by bucket `ends_by`."""
        last = min(ends_by, self._buckets)
        if last >= shift:
            self._improve(slice(shift, last + 1), self._value[: last + 1 - shift] + value, option, shift)

    def offer_late(self, option: int, shift: int, value: float) -> None:
        """It may end late; time beyond the last bucket counts as the last bucket."""
        self.offer(option, shift, self._buckets, value)
        beyond = self._value[max(self._buckets - shift, 0) :]
        at = int(beyond.argmax())
        self._improve(slice(self._buckets, None), beyond[at : at + 1] + value, option, len(beyond) - 1 - at)

    def offer_drop(self, value: float) -> None:
        """It may use no time and get no answer."""
        self._improve(slice(0, None), self._value + value, _DROP, 0)

    def choices(self) -> Choices:
        """The choices behind the greatest value; every job has one, since it may be dropped or late."""
        at = int(self._next.argmax())
        chosen: Choices = []
        for options, shifts in reversed(self._came):
            chosen.append(None if options[at] == _DROP else int(options[at]))
            at -= int(shifts[at])
        return chosen[::-1]

    def _improve(self, where: slice, values: NDArray[np.float64], option: int, shift: int) -> None:
        better = values > self._next[where]
        self._next[where][better] = values[better]
        options, shifts = self._came[-1]
        options[where][better] = option
        shifts[where][better] = shift
