"""Steps of load: jobs at one rate after another, and what became of them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from bench.outcomes import Ending, Outcome, Summary, summarise
from bench.serving import Gateway, Jobs, send
from bench.workload import Arrival, from_trace, poisson, read_trace


@dataclass(frozen=True)
class Plan:
    """What is sent, and when.

    Attributes:
        rates: jobs per second, one step each.
        seconds: length of a step.
        warm_up_s: seconds at the first rate before the first step, which count nowhere.
        items: of each job.
        min_accuracy: the floor, 0..1, or None.
        max_accuracy_loss: the other kind of floor, or None.
        latency_slo_ms: the deadline in milliseconds; infinite without one.
        trace: requests per second that arrivals follow, scaled to each rate; None: Poisson.
        seed: of all chance.
    """

    rates: tuple[float, ...]
    seconds: float = 10.0
    warm_up_s: float = 2.0
    items: int = 1
    min_accuracy: float | None = None
    max_accuracy_loss: float | None = None
    latency_slo_ms: float = float("inf")
    trace: Path | None = None
    seed: int = 0

    def arrivals(self, rate: float, seconds: float, seed: int) -> Iterator[Arrival]:
        """The jobs of one step.

        Raises:
            ConfigError: the trace cannot be read.
        """
        if self.trace is None:
            times = poisson(rate, seconds, seed)
        else:
            times = from_trace(read_trace(self.trace), rate, seconds, seed)
        demand = self.latency_slo_ms, self.min_accuracy, self.max_accuracy_loss
        return (Arrival(at_s, self.items, *demand) for at_s in times)


@dataclass(frozen=True)
class Step:
    """What became of the jobs of one step.

    Attributes:
        rate: jobs per second that were meant to arrive.
        seconds: for which they did.
        outcomes: one for each, in the order of their times.
        began: when the first second did.
    """

    rate: float
    seconds: float
    outcomes: Sequence[Outcome]
    began: datetime

    @property
    def summary(self) -> Summary:
        """The same figures as those of other runs."""
        return summarise(self.outcomes, self.seconds)

    @property
    def goodput(self) -> float:
        """Jobs per second that were answered within their deadline and as accurately as asked."""
        return sum(outcome.in_time and outcome.meets_floor for outcome in self.outcomes) / self.seconds

    def count(self, ending: Ending) -> int:
        """How many ended so."""
        return sum(outcome.ending is ending for outcome in self.outcomes)

    def ms(self, percent: float, *endings: Ending) -> float:
        """Milliseconds from their time that so many percent of those that ended so did not exceed; NaN if none did."""
        return percentile((outcome.ms for outcome in self.outcomes if outcome.ending in endings), percent)

    def lag_ms(self, percent: float) -> float:
        """How long after their time jobs were sent: much of it means that the sender, not the services, was slow."""
        return percentile((outcome.lag_s * 1000 for outcome in self.outcomes), percent)


def run_steps(gateway: Gateway, jobs: Jobs, plan: Plan) -> Iterator[Step]:
    """Runs each step and waits until its jobs are over.

    Raises:
        MoselError: the gateway cannot be reached, or does not serve the model.
    """
    if plan.warm_up_s:
        send(gateway, jobs, plan.arrivals(plan.rates[0], plan.warm_up_s, plan.seed))
    for number, rate in enumerate(plan.rates, start=1):
        began, arrivals = datetime.now(UTC), plan.arrivals(rate, plan.seconds, plan.seed + number)
        yield Step(rate, plan.seconds, send(gateway, jobs, arrivals), began)


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that so many percent do not exceed, as ghz counts it; NaN without values."""
    listed = np.fromiter(values, float)
    return float(np.percentile(listed, percent, method="inverted_cdf")) if len(listed) else float("nan")
