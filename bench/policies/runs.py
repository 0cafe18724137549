"""The runs behind the tables: one policy under one load, simulated or on real services."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.clairvoyant import bound, capacity_ratio, clairvoyant
from bench.items import Items
from bench.knee import LIMIT, crossing, search
from bench.outcomes import Summary, summarise
from bench.serving import serve
from bench.simulation import World, capacity, new_scheduler, simulate
from bench.workload import Arrival, Demands, from_trace, poisson, read_trace
from mosel.launcher import Launcher
from mosel.packages.model_package import ModelPackage

# The loads of real runs around a simulated knee, and how many there may be until misses are seen on both sides of 5 %.
_AROUND, _STEP, _MOST_RUNS = (0.9, 1.08), 1.15, 6
# Where to begin if the simulation has no load with so few misses.
_UNKNOWN = 0.5


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        policy: of the selector.
        slack: of the deadlines, in full latencies of one item.
        t: how far below full accuracy floors may be, 0..1; None for `all`, which runs everything whatever the floor.
        load: offered jobs, as a multiple of the capacity of `all`.
    """

    policy: str
    slack: float
    t: float | None
    load: float


@dataclass(frozen=True)
class Row:
    """A run on real services, and what it showed.

    Attributes:
        rate: jobs per second that were offered.
        late_ok: nothing was refused or dropped for its deadline.
    """

    setting: Setting
    rate: float
    late_ok: bool
    summary: Summary


@dataclass(frozen=True)
class Simulated:
    """Simulated runs of one workload.

    Attributes:
        world: the simulated services.
        demands: what jobs ask for; slack and t are each setting's.
        capacity: jobs per second that `all` answers when it never idles.
        counts: the trace that arrivals follow; None: Poisson.
        seed: of the workload.
        jobs: offered in each run that looks for a load.
    """

    world: World
    demands: Demands
    capacity: float
    counts: tuple[float, ...] | None = None
    seed: int = 0
    jobs: int = 1000

    @classmethod
    def of(cls, world: World, demands: Demands, trace: Path | None = None, seed: int = 0) -> "Simulated":
        """With the capacity of `all` measured by simulation."""
        counts = None if trace is None else read_trace(trace)
        return cls(world, demands, capacity(world, demands, "all"), counts, seed)

    def arrivals(self, setting: Setting, seconds: float) -> Iterator[Arrival]:
        """The jobs of a run."""
        rate = setting.load * self.capacity
        if self.counts is None:
            times = poisson(rate, seconds, self.seed)
        else:
            times = from_trace(self.counts, rate, seconds, self.seed)
        return self.demands.asking(setting.slack, setting.t or 0.0).arrivals(times, self.seed)

    def run(self, setting: Setting, seconds: float) -> Summary:
        """One simulated run."""
        arrivals = self.arrivals(setting, seconds)
        scheduler = new_scheduler(self.world, setting.policy)
        return summarise(simulate(arrivals, scheduler, self.world), seconds)

    def knee(self, policy: str, slack: float, t: float | None, by_items: bool, near: float = 1.0) -> float:
        """The highest load with misses under 5 %, in capacities of `all`.

        Args:
            policy: of the selector; or `clairvoyant`, or `bound`, see `bench.clairvoyant`.
            slack, t: of the workload.
            by_items: misses of items, not of jobs.
            near: where the search begins.
        """

        def miss_ratio(load: float) -> float:
            setting, seconds = Setting(policy, slack, t, load), self.jobs / self.capacity / load
            if policy == "bound":
                return bound(self.world, list(self.arrivals(setting, seconds)))[by_items]
            if policy == "clairvoyant":
                summary = clairvoyant(self.world, list(self.arrivals(setting, seconds)), seconds, by_items)
            else:
                summary = self.run(setting, seconds)
            return summary.item_miss_ratio if by_items else summary.job_miss_ratio

        return search(miss_ratio, near)

    def capacity_ratio(self, slack: float, t: float) -> float:
        """How much less compute the cheapest strategies take than all modalities."""
        setting = Setting("mosel", slack, t, 1.0)
        return capacity_ratio(self.world.profile, list(self.arrivals(setting, self.jobs / self.capacity)))


@dataclass
class Served:
    """Runs on real services.

    Attributes:
        launchers: running services by policy.
        package: the model.
        items: what jobs bring along.
        workload: arrivals and loads are those of its simulated runs.
        seconds: length of a run.
        rows: every run so far.
    """

    launchers: Mapping[str, Launcher]
    package: ModelPackage
    items: Items
    workload: Simulated
    seconds: float
    rows: list[Row] = field(default_factory=list)

    def run(self, setting: Setting, *, late_ok: bool = False) -> Row:
        """One run on real services."""
        arrivals = self.workload.arrivals(setting, self.seconds)
        outcomes = serve(self.launchers[setting.policy], self.package, arrivals, self.items, late_ok=late_ok)
        # Without shedding the services go on after the last arrival.
        length = max(self.seconds, *(outcome.at_s for outcome in outcomes)) if late_ok else self.seconds
        row = Row(setting, setting.load * self.workload.capacity, late_ok, summarise(outcomes, length))
        self.rows.append(row)
        return row

    def around(self, policy: str, slack: float, t: float | None, knee: float) -> Iterator[Row]:
        """Runs below and above a load, and further out until misses are seen on both sides of 5 %.

        Args:
            policy, slack, t: of the runs.
            knee: the simulated load at 5 % misses; NaN if there is none.
        """
        rows: list[Row] = []
        loads = [(_UNKNOWN if math.isnan(knee) else knee) * factor for factor in _AROUND]
        while loads and len(rows) < _MOST_RUNS:
            row = self.run(Setting(policy, slack, t, loads.pop(0)))
            rows.append(row)
            yield row
            loads = loads or _further(rows)


def _further(rows: Sequence[Row]) -> list[float]:
    """A load on a side where the misses of jobs or of items are not yet on the right side of 5 %; none if they are."""
    lowest, *_, highest = sorted(rows, key=lambda row: row.setting.load)
    if max(lowest.summary.job_miss_ratio, lowest.summary.item_miss_ratio) >= LIMIT:
        return [lowest.setting.load / _STEP]
    if min(highest.summary.job_miss_ratio, highest.summary.item_miss_ratio) < LIMIT:
        return [highest.setting.load * _STEP]
    return []


def at_limit(rows: Sequence[Row], by_items: bool) -> tuple[float, float]:
    """The load at which misses reach 5 %, and the items answered in time per second there; NaN if it was not seen."""
    ordered = sorted(rows, key=lambda row: row.setting.load)
    loads = [row.setting.load for row in ordered]
    missed = [row.summary.item_miss_ratio if by_items else row.summary.job_miss_ratio for row in ordered]
    load = crossing(zip(loads, missed, strict=True))
    if load is None:
        return math.nan, math.nan
    return load, float(np.interp(load, loads, [row.summary.items_per_s for row in ordered]))
