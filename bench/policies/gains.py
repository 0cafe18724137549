"""What a policy gains over `all`, and what could be gained at all."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from bench.policies.runs import Row, Simulated, at_limit

_CRITERIA = {"jobs": False, "items": True}


@dataclass(frozen=True)
class Gain:
    """Throughput of a policy against that of `all`, each at the load at which 5 % of jobs, or of items, are missed.

    Attributes:
        misses_of: `jobs` or `items`.
        load, items_per_s: of the policy on real services; loads are multiples of the capacity of `all`. NaN if the runs
            did not see 5 %.
        load_of_all, items_per_s_of_all: of `all`.
        gain: of items answered in time.
        simulated: gain in load between simulated runs.
        capacity_ratio: compute of all modalities over that of the cheapest strategies, for the floors drawn.
        clairvoyant: gain in load of a simulated policy that knows all arrivals.
        bound: gain in load that no policy exceeds.
    """

    policy: str
    slack: float
    t: float
    misses_of: str
    load: float
    items_per_s: float
    load_of_all: float
    items_per_s_of_all: float
    gain: float
    simulated: float
    capacity_ratio: float
    clairvoyant: float
    bound: float


@dataclass(frozen=True)
class Speedup:
    """A run without shedding, and that of `all` at the same load."""

    row: Row
    all: Row

    @property
    def gain(self) -> float:
        """Mean completion time of `all` over that of the policy."""
        return self.all.summary.mean_ms / self.row.summary.mean_ms


def speedups_over_all(rows: Sequence[Row]) -> list[Speedup]:
    """Of every run beside that of `all`, if there is one."""
    of_all = [row for row in rows if row.setting.policy == "all"]
    return [Speedup(row, of_all[0]) for row in rows if of_all and row is not of_all[0]]


class Knees:
    """Simulated loads at 5 % misses, each found once; what could be gained at all is computed for one slack only.

    Args:
        simulated: runs the simulations.
        ideal_slack: the slack for which `clairvoyant` and `bound` are computed, which takes minutes for each.
    """

    def __init__(self, simulated: Simulated, ideal_slack: float) -> None:
        self.of = cache(simulated.knee)
        self._ideal_slack = ideal_slack

    def ideal(self, kind: str, slack: float, t: float, by_items: bool, near: float = 1.0) -> float:
        """The load of `clairvoyant` or `bound`; NaN for other slacks."""
        return self.of(kind, slack, t, by_items, near=near) if slack == self._ideal_slack else math.nan


def gains(rows: Sequence[Row], simulated: Simulated, knees: Knees) -> Iterator[Gain]:
    """The gain of every policy, slack and t that was run beside `all`, for jobs and for items."""
    for policy, slack, t in _kinds(rows):
        mine = [row for row in rows if _kind(row) == (policy, slack, t)]
        of_all = [row for row in rows if _kind(row) == ("all", slack, None)]
        for misses_of, by_items in _CRITERIA.items():
            load, items_per_s = at_limit(mine, by_items)
            load_of_all, items_per_s_of_all = at_limit(of_all, by_items)
            base = knees.of("all", slack, None, by_items)
            bound = knees.ideal("bound", slack, t, by_items)
            yield Gain(
                policy,
                slack,
                t,
                misses_of,
                load,
                items_per_s,
                load_of_all,
                items_per_s_of_all,
                gain=items_per_s / items_per_s_of_all,
                simulated=knees.of(policy, slack, t, by_items) / base,
                capacity_ratio=simulated.capacity_ratio(slack, t),
                clairvoyant=knees.ideal("clairvoyant", slack, t, by_items, near=0.9 * bound) / base,
                bound=bound / base,
            )


def _kind(row: Row) -> tuple[str, float, float | None]:
    return row.setting.policy, row.setting.slack, row.setting.t


def _kinds(rows: Iterable[Row]) -> list[tuple[str, float, float]]:
    kinds = dict.fromkeys(_kind(row) for row in rows)
    return [(policy, slack, t) for policy, slack, t in kinds if t is not None]
