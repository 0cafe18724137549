"""What became of jobs, and the summary of a run: the same for simulated and for real ones."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from bench.accuracy import Scored, standard_error
from bench.workload import Arrival
from mosel.errors import MoselError

# Sums of floats: a floor equal to a strategy's accuracy is met by it.
_TOLERANCE = 1e-6
# Completion times are counted in classes this much apart, so that a long run needs no more memory than a short one.
_CLASS = math.log(1.01)


class Ending(StrEnum):
    """How a job ends."""

    ANSWERED = "answered"
    REFUSED = "refused"  # at once
    EXPIRED = "expired"  # dropped, or out of time, after it was admitted
    FAILED = "failed"
    CANCELLED = "cancelled"  # by the caller


@dataclass(frozen=True)
class Outcome:
    """What became of one job.

    Attributes:
        arrival: what was asked for.
        ending: how it ended.
        at_s: when the caller knew, in seconds from the start of the run.
        counts: items by modality set, if it was answered.
        expected_accuracy: over its items, 0..1, if it was answered.
        scored: its labelled items, if it has such and was answered.
        error: what its caller got instead of an answer, from real services.
        lag_s: how long after its time it was sent, because whoever sends was busy.
    """

    arrival: Arrival
    ending: Ending
    at_s: float
    counts: tuple[tuple[str, int], ...] = ()
    expected_accuracy: float = 0.0
    scored: Scored = ()
    error: MoselError | None = None
    lag_s: float = 0.0

    @property
    def ms(self) -> float:
        """Milliseconds from arrival to the end, queueing included."""
        return (self.at_s - self.arrival.at_s) * 1000

    @property
    def in_time(self) -> bool:
        """It was answered before its deadline."""
        return self.ending is Ending.ANSWERED and self.ms <= self.arrival.deadline_ms

    @property
    def meets_floor(self) -> bool:
        """It was answered, as accurately as asked."""
        floor = self.arrival.min_accuracy or 0.0
        return self.ending is Ending.ANSWERED and self.expected_accuracy >= floor - _TOLERANCE


@dataclass(frozen=True)
class Summary:
    """What a run showed. Jobs that their caller cancelled count nowhere.

    Attributes:
        seconds: length of the run.
        jobs, items: that were offered.
        jobs_per_s, items_per_s: answered in time.
        job_miss_ratio, item_miss_ratio: late, refused, dropped, expired or failed, as a share of what was offered.
        mean_ms: mean completion time of answered jobs, queueing included.
        p99_ms: the same, not exceeded by 99 % of them; known to 1 %.
        expected_accuracy: mean over answered items; NaN without any.
        measured_accuracy: against the labels; NaN without any.
        standard_error: of the measured accuracy, where items of the same recordings are alike (`bench.accuracy`).
        below_floor: answered jobs whose expected accuracy is below their floor.
        shares: of answered items by modality set.
        endings: jobs by how they ended; `late` are some of the answered ones.
    """

    seconds: float
    jobs: int
    items: int
    jobs_per_s: float
    items_per_s: float
    job_miss_ratio: float
    item_miss_ratio: float
    mean_ms: float
    p99_ms: float
    expected_accuracy: float
    measured_accuracy: float
    standard_error: float
    below_floor: int
    shares: dict[str, float]
    endings: dict[str, int]


@dataclass
class Tally:
    """Adds outcomes up, in memory that does not grow with their number (but for labelled items)."""

    _endings: Counter[str] = field(default_factory=Counter)
    _offered: Counter[str] = field(default_factory=Counter)
    _in_time: Counter[str] = field(default_factory=Counter)
    _sets: Counter[str] = field(default_factory=Counter)
    _times: Counter[int] = field(default_factory=Counter)
    _ms: float = 0.0
    _accuracy: float = 0.0
    _below_floor: int = 0
    _scored: list[tuple[tuple[int, ...], float]] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """One more job."""
        self._endings[outcome.ending.value] += 1
        if outcome.ending is Ending.CANCELLED:
            return
        size = outcome.arrival.size
        self._offered.update(jobs=1, items=size)
        if outcome.in_time:
            self._in_time.update(jobs=1, items=size)
        if outcome.ending is Ending.ANSWERED:
            self._endings["late"] += not outcome.in_time
            self._add_answer(outcome)

    def _add_answer(self, outcome: Outcome) -> None:
        self._ms += outcome.ms
        self._times[math.ceil(math.log(max(outcome.ms, 1e-3)) / _CLASS)] += 1
        self._accuracy += outcome.expected_accuracy * outcome.arrival.size
        self._below_floor += not outcome.meets_floor
        self._sets.update(dict(outcome.counts))
        self._scored.extend(outcome.scored)

    def summary(self, seconds: float) -> Summary:
        """What has been added, as a run of so many seconds."""
        offered, in_time, answered = self._offered, self._in_time, self._endings[Ending.ANSWERED.value]
        items = self._sets.total()
        right = sum(correct for _, correct in self._scored)
        return Summary(
            seconds=seconds,
            jobs=offered["jobs"],
            items=offered["items"],
            jobs_per_s=in_time["jobs"] / seconds,
            items_per_s=in_time["items"] / seconds,
            job_miss_ratio=1 - _share(in_time["jobs"], offered["jobs"]),
            item_miss_ratio=1 - _share(in_time["items"], offered["items"]),
            mean_ms=_share(self._ms, answered),
            p99_ms=self._percentile(99),
            expected_accuracy=_share(self._accuracy, items),
            measured_accuracy=_share(right, len(self._scored)),
            standard_error=standard_error(self._scored),
            below_floor=self._below_floor,
            shares={name: count / items for name, count in sorted(self._sets.items())},
            endings=dict(self._endings),
        )

    def _percentile(self, percent: float) -> float:
        left = self._times.total() * percent / 100
        for at, count in sorted(self._times.items()):
            left -= count
            if left <= 0:
                return math.exp(at * _CLASS)
        return math.nan


def summarise(outcomes: Iterable[Outcome], seconds: float) -> Summary:
    """The summary of a run of so many seconds."""
    tally = Tally()
    for outcome in outcomes:
        tally.add(outcome)
    return tally.summary(seconds)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
