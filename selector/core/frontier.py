"""The frontier: for a job size, the strategies that no other strategy beats in both accuracy and cost.

Costs are those of a mix as it runs, items of several sets sharing encoder calls. Where all mixes are few they are
looked at, and the frontier is exact: with 3 modalities for up to 10 items. Otherwise the work is bounded whatever the
number of modalities and items, since it is done while calls and answers wait:

* Calls cost something before their first item, so that costs are nearly concave in the number of items. Were they, and
  could items be divided, then a cheapest mix with an accuracy would be a vertex of a polytope with two constraints, and
  run two sets at most. So mixes of two sets are looked at.
* The sets for that are those nearest to the line that the best of them span when a whole job runs one set.
* What is left of concavity, since items and calls are whole, is mended by moving some items of the mixes that are not
  beaten from one set to another, a third one perhaps, twice.

Single sets are all looked at, so jobs of one item have exact frontiers. `bench.frontier` compares with an exact search.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mosel.modality import ModalitySet, format_set
from selector.core.profile import ModelProfile

# So many mixes are looked at if those are all; and in each step otherwise.
_MOST_MIXES, _MOST_IN_STEP = 8192, 3072
# So many sets are mixed with each other.
_MIXED_SETS = 8, 17
# Frontiers that a model keeps.
_KEPT = 128
# Accuracies are summed as whole numbers, so that equal sums are equal in whatever order they were added.
_UNITS = 1e12

Floats = NDArray[np.float64]
Scores = Mapping[ModalitySet, float]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Strategy:
    """How many items of a job run which modality set.

    Attributes:
        counts: items per modality set, each at least one, the sets in the order of their written form.
        accuracy: expected mean over the items, 0..1; or that of other scores, where these were asked for.
        cost_ms: compute time in all services together, items of several sets sharing encoder calls.
    """

    counts: tuple[tuple[ModalitySet, int], ...]
    accuracy: float
    cost_ms: float

    @property
    def size(self) -> int:
        """Items of the job."""
        return sum(count for _, count in self.counts)

    @property
    def modalities(self) -> ModalitySet:
        """Those that are run."""
        return frozenset().union(*(modality_set for modality_set, _ in self.counts))


def format_strategy(strategy: Strategy) -> str:
    """Writes a strategy, `pen` or `3 image+pen, 1 pen`."""
    if len(strategy.counts) == 1:
        return format_set(strategy.counts[0][0])
    return ", ".join(f"{count} {format_set(modality_set)}" for modality_set, count in strategy.counts)


@dataclass(frozen=True, eq=False)
class Frontier:
    """Strategies of one job size, by strictly rising cost and strictly rising accuracy; each is made when asked for.

    Attributes:
        sets: the K sets that they mix.
        counts: [L, K], items.
        accuracy: [L], expected mean over the items, 0..1.
        cost_ms: [L].
        considered: mixes that were compared to find it.
    """

    sets: Sequence[ModalitySet]
    counts: Integers
    accuracy: Floats
    cost_ms: Floats
    considered: int

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, at: int) -> Strategy:
        counts = ((s, count) for s, count in zip(self.sets, self.counts[at].tolist(), strict=True) if count)
        ordered = tuple(sorted(counts, key=lambda entry: format_set(entry[0])))
        return Strategy(ordered, float(self.accuracy[at]), float(self.cost_ms[at]))

    def __iter__(self) -> Iterator[Strategy]:
        return map(self.__getitem__, range(len(self)))

    def thin(self, limit: int, floor: float = 0.0) -> list[Strategy]:
        """At most so many of those with an accuracy, both ends among them, evenly spread in cost."""
        first = int(np.searchsorted(self.accuracy, floor))
        return [self[first + i] for i in _spread(self.cost_ms[first:], limit)]


class Frontiers:
    """The frontiers of one model by scores, modality sets and job size; those that were asked for last are kept.

    Args:
        profile: the model's.
    """

    def __init__(self, profile: ModelProfile) -> None:
        self._profile = profile
        # By the identity of their scores, which are kept with them.
        self._kept: OrderedDict[
            tuple[int, frozenset[ModalitySet], int, frozenset[ModalitySet]], tuple[Scores, Frontier]
        ] = OrderedDict()
        self._computed = self._considered = 0

    def of(self, sets: Iterable[ModalitySet], size: int, scores: Scores | None = None) -> Frontier:
        """The frontier of a job size; every latency of the sets is measured. `scores` as of `frontier`."""
        scores = self._profile.accuracy if scores is None else scores
        wanted = frozenset(sets)
        key = id(scores), wanted, size, frozenset(filter(self._profile.is_path, wanted))
        if len(key[1]) == 1:
            return frontier(self._profile, key[1], size, scores)
        if key not in self._kept:
            found = frontier(self._profile, key[1], size, scores)
            self._kept[key] = scores, found
            self._computed, self._considered = self._computed + 1, self._considered + found.considered
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key][1]

    def statistics(self) -> dict[str, int]:
        """Frontiers that are kept; and since the start those that were computed, and the mixes compared for it."""
        computed = {"frontiers_computed": self._computed, "mixes_compared": self._considered}
        return {"frontiers_kept": len(self._kept)} | computed


def frontier(profile: ModelProfile, sets: Iterable[ModalitySet], size: int, scores: Scores | None = None) -> Frontier:
    """The frontier of one job size.

    Args:
        profile: the model's; every latency of the sets is measured.
        sets: the modality sets that may be run.
        size: items of the job.
        scores: what an item of each set counts for, 0..1; None: its accuracy.

    Raises:
        ValueError: there is no set, or the size is below 1.
    """
    found = sorted(set(sets), key=format_set)
    if not found or size < 1:
        raise ValueError(f"a frontier needs modality sets and a size of at least 1, got {len(found)} sets and {size}")
    scores = profile.accuracy if scores is None else scores
    if len(found) == 1:
        mean, cost = np.array([scores[found[0]]]), np.array([profile.cost_ms(found[0], size)])
        return Frontier(found, np.array([[size]]), mean, cost, 1)
    if size > 1 and math.comb(size + len(found) - 1, size) <= _MOST_MIXES:
        return _Mixes(profile, found, size, scores).unbeaten(_all_mixes(len(found), size))
    ranked, single = _ranked(profile, found, size, scores)
    mixes = _Mixes(profile, [found[i] for i in ranked], size, scores)
    mixed = min(len(ranked), _mixed_sets(size))
    pairs = _mixes_of_two(len(ranked), mixed, size)
    best = mixes.unbeaten(np.concatenate([single, pairs]))
    # Powers of 4, as these are the sizes of calls; doubled first.
    for least in (2, 1, 2, 1) if size > 1 else ():
        if best.considered < _MOST_MIXES:
            items = [least * 4**n for n in range(8) if least * 4**n <= size]
            best = mixes.unbeaten(np.concatenate([best.counts, _moved(best, mixed, items)]), best.considered)
    return best


def thin(strategies: Sequence[Strategy], limit: int) -> tuple[Strategy, ...]:
    """Some strategies by rising cost: at most so many, both ends among them, evenly spread in cost.

    Raises:
        ValueError: the limit is below 2.
    """
    if limit < 2:
        raise ValueError(f"limit is {limit}, but both ends of a frontier are kept")
    return tuple(strategies[i] for i in _spread(np.array([s.cost_ms for s in strategies]), limit))


def _spread(costs: Floats, limit: int) -> list[int]:
    """Indices of some rising costs: at most so many, both ends among them, evenly spread."""
    if len(costs) <= limit:
        return list(range(len(costs)))
    wanted = np.linspace(costs[0], costs[-1], limit)
    nearest: list[int] = np.unique(np.abs(costs - wanted[:, None]).argmin(axis=1)).tolist()
    return nearest


class _Mixes:
    """What mixes of some sets cost; counts are arrays [L, K]."""

    def __init__(self, profile: ModelProfile, sets: Sequence[ModalitySet], size: int, scores: Scores) -> None:
        self._sets, self._size = sets, size
        paths = {s for s in sets if profile.is_path(s)}
        modalities = sorted(frozenset().union(*(s for s in sets if s not in paths)))
        # Those that take one call share none with others.
        shares = [[float(modality in s and s not in paths) for modality in modalities] for s in sets]
        self._has = np.array(shares).reshape(len(sets), len(modalities))
        encoders = [profile.encoders[modality].table(size) for modality in modalities]
        self._encoders = np.array(encoders).reshape(len(modalities), size + 1)
        self._fusion = np.stack([(profile.paths if s in paths else profile.fusion)[s].table(size) for s in sets])
        self._accuracy = np.rint([scores[s] * _UNITS for s in sets]).astype(np.int64)

    def unbeaten(self, counts: Integers, considered: int = 0) -> Frontier:
        """The mixes that no other of these beats."""
        cost = self._sums(self._encoders, (counts @ self._has).astype(np.int64)) + self._sums(self._fusion, counts)
        accuracy = counts @ self._accuracy
        ranked = cost.argsort()
        kept = ranked[_rising(accuracy[ranked])]
        # Of those that cost the same, the last is the most accurate.
        kept = kept[np.append(np.diff(cost[kept]) > 0, True)]
        mean = accuracy[kept] / (self._size * _UNITS)
        return Frontier(self._sets, counts[kept], mean, cost[kept], considered + len(counts))

    def _sums(self, tables: Floats, items: Integers) -> Floats:
        """For each row of numbers of items, the sum over the tables."""
        starts = np.arange(len(tables)) * (self._size + 1)
        return np.asarray(tables.take(items + starts).sum(axis=1))


def _ranked(
    profile: ModelProfile, sets: Sequence[ModalitySet], size: int, scores: Scores
) -> tuple[list[int], Integers]:
    """Which sets a frontier may need: those worth mixing most first, then those that no other beats.

    Returns:
        Indices of the sets; and the mixes that run one of them, [K, K].
    """
    accuracy = np.array([scores[s] for s in sets])
    cost = np.array([profile.cost_ms(s, size) for s in sets])
    by_cost = np.lexsort((-accuracy, cost))
    unbeaten = by_cost[_rising(accuracy[by_cost])].tolist()
    hull: list[int] = []
    for i in unbeaten:
        while len(hull) > 1 and _is_below(accuracy, cost, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    # Free sets are as good as any.
    excess = (cost + 1e-9) / (np.interp(accuracy, accuracy[hull], cost[hull]) + 1e-9)
    nearest: list[int] = np.argsort(excess, kind="stable")[: _mixed_sets(size) if size > 1 else 0].tolist()
    ranked = [*nearest, *(i for i in unbeaten if i not in nearest)]
    return ranked, np.eye(len(ranked), dtype=np.int64) * size


def _mixed_sets(size: int) -> int:
    return max(
        (n for n in range(*_MIXED_SETS) if math.comb(n, 2) * (size - 1) <= _MOST_IN_STEP), default=_MIXED_SETS[0]
    )


def _is_below(accuracy: Floats, cost: Floats, before: int, at: int, after: int) -> bool:
    """Whether a point is not above the line between its neighbours, by accuracy over cost."""
    rise, run = accuracy[after] - accuracy[before], cost[after] - cost[before]
    return bool((accuracy[at] - accuracy[before]) * run <= rise * (cost[at] - cost[before]))


def _all_mixes(sets: int, size: int) -> Integers:
    """Every way to share items among sets."""
    counts, left = np.zeros((1, 0), np.int64), np.array([size])
    for _ in range(sets - 1):
        before = np.repeat(np.arange(len(left)), left + 1)
        taken = np.arange(len(before)) - np.repeat(np.cumsum(left + 1) - left - 1, left + 1)
        counts, left = np.column_stack([counts[before], taken]), left[before] - taken
    return np.column_stack([counts, left])


def _mixes_of_two(sets: int, mixed: int, size: int) -> Integers:
    """Mixes of two of the first sets, with as many numbers of items, evenly spread, as there is room for."""
    one, other = np.triu_indices(mixed, 1)
    most = _MOST_IN_STEP // max(len(one), 1)
    items = np.unique(np.linspace(1, size - 1, min(size - 1, most)).round().astype(np.int64))
    counts = np.zeros((len(one), len(items), sets), np.int64)
    pairs = np.arange(len(one))
    counts[pairs, :, one], counts[pairs, :, other] = items, size - items
    return counts.reshape(-1, sets)


def _moved(best: Frontier, mixed: int, items: Sequence[int]) -> Integers:
    """Mixes with some items moved from one set to another of the first sets; of as many mixes as there is room for."""
    source, target = np.nonzero(~np.eye(best.counts.shape[1], mixed, dtype=bool))
    possible = best.counts[:, source, None] >= np.array(items, np.int64)
    room = max(_MOST_IN_STEP * len(best) // max(int(possible.sum()), 1), 2)
    among = np.array(_spread(best.cost_ms, room))
    mix, move, number = np.nonzero(possible[among])
    counts: Integers = best.counts[among[mix]]
    each = np.arange(len(mix))
    counts[each, source[move]] -= np.take(items, number)
    counts[each, target[move]] += np.take(items, number)
    return counts


def _rising(accuracy: Integers | Floats) -> NDArray[np.bool_]:
    """Which mixes, by rising cost, are more accurate than all before."""
    best = np.maximum.accumulate(accuracy)
    return np.append(True, best[1:] > best[:-1])
