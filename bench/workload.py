"""The workload of the comparisons: when jobs arrive, how large they are, and what they ask for.

It is that of the paper's code release (MOSEL, EMNLP 2024): sizes max(1, int(Normal(1, 6))), a deadline of the full
modality set's latency for that size plus a slack in units of its latency for one item, and a floor drawn uniformly
between the full set's accuracy minus t and that accuracy.
"""

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np

from mosel.errors import ConfigError
from mosel.modality import format_set
from mosel.profiles.files import Profile
from selector.core.profile import ModelProfile

SLACKS = (1.0, 3.3, 20.0)
TS = (0.03, 0.06, 0.09, 0.12)
_SIZE = NormalDist(1, 6)
# Sizes beyond this one do not come up.
_LARGEST = 100
# Streams of chance under one seed.
_TIMES, _JOBS = 0, 1


@dataclass(frozen=True)
class Arrival:
    """One job as it arrives.

    Attributes:
        at_s: seconds from the start of the run.
        size: items.
        deadline_ms: milliseconds from then on; infinite without one.
        min_accuracy: its floor, 0..1, or None.
        max_accuracy_loss: the other kind of floor, or None.
    """

    at_s: float
    size: int
    deadline_ms: float
    min_accuracy: float | None
    max_accuracy_loss: float | None = None


@dataclass(frozen=True)
class Demands:
    """What jobs ask for.

    Attributes:
        full_ms: (size, milliseconds) of jobs on an idle system with every modality, by rising size; at least one.
        full_accuracy: of the full modality set, 0..1.
        least_accuracy: of the least accurate set; no floor is below it.
        slack: time beyond the full latency, in full latencies of one item.
        t: how far below the full accuracy a floor may be, 0..1.
    """

    full_ms: tuple[tuple[int, float], ...]
    full_accuracy: float
    least_accuracy: float
    slack: float = 3.3
    t: float = 0.06

    def asking(self, slack: float, t: float) -> "Demands":
        """The same with another slack and t."""
        return replace(self, slack=slack, t=t)

    def full_latency_ms(self, size: int) -> float:
        """Milliseconds of a job of this size, interpolated; beyond the largest that was measured, extrapolated."""
        points = self.full_ms if len(self.full_ms) > 1 else ((0, 0.0), *self.full_ms)
        at = next((i for i, (measured, _) in enumerate(points) if measured >= size), len(points) - 1)
        (low, low_ms), (high, high_ms) = points[max(at, 1) - 1], points[max(at, 1)]
        return low_ms + (high_ms - low_ms) * (size - low) / (high - low)

    def deadline_ms(self, size: int) -> float:
        """Milliseconds that a job of this size is given."""
        return self.full_latency_ms(size) + self.slack * self.full_latency_ms(1)

    def arrivals(self, times: Iterable[float], seed: int) -> Iterator[Arrival]:
        """A job for each time; the same seed gives the same jobs, whatever the times are."""
        rng = np.random.default_rng((seed, _JOBS))
        for at_s in times:
            size = max(1, int(rng.normal(_SIZE.mean, _SIZE.stdev)))
            floor = max(self.full_accuracy - rng.uniform(0, self.t), self.least_accuracy)
            yield Arrival(at_s, size, self.deadline_ms(size), floor)


def demands(profile: Profile, known: ModelProfile) -> Demands:
    """What jobs of a model ask for; latencies are the profile's end-to-end ones, without them computed from its calls.

    Args:
        profile: as measured.
        known: the same, as the core knows it.
    """
    full = max(known.accuracy, key=len)
    points = tuple((point.size, point.p50_ms) for point in profile.end_to_end.get(format_set(full), ()))
    if not points:
        points = tuple((n, known.idle_latency_ms(full, n) + profile.edge_ms) for n in (1, 2, 4, 8, 16, 32))
    return Demands(points, known.accuracy[full], min(known.accuracy.values()))


def mean_size() -> float:
    """Items per job in the mean: the sum of P(size >= k)."""
    return 1 + sum(1 - _SIZE.cdf(k) for k in range(2, _LARGEST))


def poisson(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Arrival times in seconds, at so many jobs per second in the mean."""
    rng = np.random.default_rng((seed, _TIMES))
    at = rng.exponential(1 / rate)
    while at < seconds:
        yield at
        at += rng.exponential(1 / rate)


def from_trace(counts: tuple[float, ...], rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Arrival times in seconds after a trace that is scaled to so many jobs per second in the mean.

    Args:
        counts: requests of each second; begun again if it is shorter than `seconds`.
        rate: jobs per second over the whole seconds that are used.
        seconds: length; rounded up to a whole one.
        seed: decides where in a second a job arrives, and how fractions of one are rounded.
    """
    rng = np.random.default_rng((seed, _TIMES))
    used = [counts[second % len(counts)] for second in range(math.ceil(seconds))]
    scale = rate * len(used) / sum(used)
    for second, requests in enumerate(used):
        jobs = int(requests * scale + rng.random())
        yield from sorted(second + rng.random() for _ in range(jobs))


def read_trace(file: Path) -> tuple[float, ...]:
    """Requests of each second, from a CSV file with a column `requests`.

    Raises:
        ConfigError: the file is not there or has something else in it.
    """
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            counts = tuple(float(row["requests"]) for row in csv.DictReader(stream))
    except OSError as error:
        raise ConfigError(f"trace {file}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"trace {file}: {error}; expected columns second,requests with numbers") from None
    if not all(math.isfinite(count) and count >= 0 for count in counts) or not sum(counts):
        raise ConfigError(f"trace {file}: requests are {counts[:5]}...; expected numbers >= 0, not all 0")
    return counts
