"""The frontier: for a job size, the strategies that no other strategy beats in both accuracy and cost.

A label-setting dynamic programme takes the modality sets one by one. A label is a mix of the sets taken so far, with
its size, the sum of its items' accuracies and its cost; of the labels of one size those are kept that no other beats.
Costs are those of the mix as it runs, items of several sets sharing encoder calls. What it promises:

* Where calls that are merged never cost more than apart, no mix costs less with its sets run apart (the sum of
  `ModelProfile.cost_ms`, the separable cost) than a strategy that is as accurate. Suppose a kept label is no worse than
  a partial mix run apart; items of one more set then add at most what they cost alone. So it holds set by set.
* If no two sets have a modality in common nothing is shared, and the frontier is exact whatever the curves.
* Otherwise an optimum can be missed: what a label's next items cost depends on the encoder calls that it has already,
  and labels are compared by their cost alone. So the sets are taken twice, the most accurate first and the least
  accurate first. Against all mixes of 5 and of 10 items, for 600 random profiles of 3 modalities (`bench.frontier`),
  97 % of the frontiers were exact; the dearest strategy of all was 2.9 % above the optimum.

If the largest size is above 64, labels of all sizes are thinned and the sets are taken once; see `_STEP`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mosel.modality import ModalitySet, format_set
from selector.core.profile import ModelProfile

# Up to this size nothing is thinned.
_LARGEST_EXACT = 64
# Beyond, of the labels between two powers of 1 + _STEP in cost only the most accurate is kept. A label that gets no
# items of a set stays between the same powers, so a mix of s sets is found at most a factor (1 + _STEP) ** s dearer
# than run apart: within 1 % for up to 4 sets, the most that strategies for 256 items of random profiles mixed. A size
# has at most log(dearest / cheapest) / _STEP labels.
_STEP = 0.002
# Accuracies are summed as whole numbers, so that equal sums are equal in whatever order they were added.
_UNITS = 1e12
_ROUNDING_MS = 1e-9

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Strategy:
    """How many items of a job run which modality set.

    Attributes:
        counts: items per modality set, each at least one, the sets in the order of their written form.
        accuracy: expected mean over the items, 0..1.
        cost_ms: compute time in all services together, items of several sets sharing encoder calls.
    """

    counts: tuple[tuple[ModalitySet, int], ...]
    accuracy: float
    cost_ms: float

    @property
    def size(self) -> int:
        """Items of the job."""
        return sum(count for _, count in self.counts)


def frontiers(profile: ModelProfile, sets: Sequence[ModalitySet], max_size: int) -> tuple[tuple[Strategy, ...], ...]:
    """The frontiers of all job sizes up to one.

    Args:
        profile: the model's; every latency of the sets is measured.
        sets: the modality sets that may be run.
        max_size: the largest job, items.

    Returns:
        At index n - 1 the frontier of size n: by strictly rising cost and strictly rising accuracy.

    Raises:
        ValueError: there is no set, or the size is below 1.
    """
    return _search(profile, sets, range(1, max_size + 1))


def frontier(profile: ModelProfile, sets: Sequence[ModalitySet], size: int) -> tuple[Strategy, ...]:
    """The frontier of one job size; see `frontiers`.

    Raises:
        ValueError: there is no set, or the size is below 1.
    """
    return _search(profile, sets, range(size, size + 1))[0]


def thin(strategies: Sequence[Strategy], limit: int) -> tuple[Strategy, ...]:
    """Some strategies of a frontier: at most so many, both ends among them, evenly spread in cost.

    Raises:
        ValueError: the limit is below 2.
    """
    if limit < 2:
        raise ValueError(f"limit is {limit}, but both ends of a frontier are kept")
    if len(strategies) <= limit:
        return tuple(strategies)
    costs = np.array([strategy.cost_ms for strategy in strategies])
    wanted = np.linspace(costs[0], costs[-1], limit)
    nearest = np.abs(costs - wanted[:, None]).argmin(axis=1)
    return tuple(strategies[i] for i in np.unique(nearest))


@dataclass(frozen=True)
class _Tables:
    """A profile as arrays over K sets, M modalities and 0 to N items.

    Attributes:
        sets: the K modality sets.
        accuracy: [K], in units of 1 / _UNITS.
        has: [K, M], whether the set has the modality.
        encoders: [M, N + 1], milliseconds.
        fusion: [K, N + 1], milliseconds.
    """

    sets: tuple[ModalitySet, ...]
    accuracy: Integers
    has: NDArray[np.bool_]
    encoders: Floats
    fusion: Floats

    @classmethod
    def of(cls, profile: ModelProfile, sets: Sequence[ModalitySet], size: int) -> "_Tables":
        """Tables for jobs of up to so many items."""
        ordered = tuple(sorted(set(sets), key=format_set))
        modalities = sorted(frozenset().union(*ordered))
        sizes = range(1, size + 1)
        encoders = [[0.0, *map(profile.encoders[modality].ms, sizes)] for modality in modalities]
        return cls(
            sets=ordered,
            accuracy=np.rint([profile.accuracy[s] * _UNITS for s in ordered]).astype(np.int64),
            has=np.array([[modality in s for modality in modalities] for s in ordered]),
            encoders=np.array(encoders),
            fusion=np.array([[0.0, *map(profile.fusion[s].ms, sizes)] for s in ordered]),
        )

    @property
    def max_size(self) -> int:
        """N."""
        return len(self.fusion[0]) - 1

    @property
    def is_exact(self) -> bool:
        """Whether labels are kept however little they differ."""
        return self.max_size <= _LARGEST_EXACT

    def cost_ms(self, counts: Integers) -> Floats:
        """What mixes cost, [L], given the items of each set, [L, K]."""
        rows = counts @ self.has
        encoding = self.encoders[np.arange(len(self.encoders)), rows].sum(axis=1)
        return np.asarray(encoding + self.fusion[np.arange(len(self.sets)), counts].sum(axis=1))

    def undominated(self) -> list[int]:
        """Indices of the sets that a frontier may need, the least accurate first.

        A set k is dropped for a set j that is as accurate if running j instead costs no more for any count: of every
        mix, all y items of k can then go to j. Modalities that both have keep their rows. The others of j, and j's
        fusion, get y more items, which adds at most the largest rise of their curves over y; k's fusion is spared
        altogether, and the others of k lose y items, which spares at least the smallest rise. Sets go one at a time,
        each for one that is still there, so every mix keeps one that is no worse.

        Thinned frontiers count what the lost items cost alone instead: that keeps what is promised of the separable
        cost, and leaves some 15 of 63 sets instead of up to 55.
        """
        others = self.has[:, None] & ~self.has
        added = others @ _largest_rises(self.encoders) + _largest_rises(self.fusion)[:, None]
        spared = -_largest_rises(-self.encoders) if self.is_exact else self.encoders
        cheaper = (added <= others.swapaxes(0, 1) @ spared + self.fusion + _ROUNDING_MS).all(axis=-1)
        beats = cheaper & (self.accuracy[:, None] >= self.accuracy)
        left = [int(i) for i in np.argsort(self.accuracy, kind="stable")]
        for k in tuple(left):
            if any(beats[j, k] for j in left if j != k):
                left.remove(k)
        return left


def _largest_rises(curves: Floats) -> Floats:
    """The most that y further items add anywhere on a curve, by y."""
    length = curves.shape[1]
    return np.stack([(curves[:, y:] - curves[:, : length - y]).max(axis=1) for y in range(length)], axis=1)


@dataclass(frozen=True)
class _Labels:
    """Mixes of the sets taken so far.

    Attributes:
        size: [L], items, rising.
        accuracy: [L], summed over the items, in units of 1 / _UNITS.
        cost: [L], milliseconds.
        rows: [M, L], items per modality.
    """

    size: Integers
    accuracy: Integers
    cost: Floats
    rows: Integers


def _search(profile: ModelProfile, sets: Sequence[ModalitySet], sizes: range) -> tuple[tuple[Strategy, ...], ...]:
    if not sets or not sizes or sizes[0] < 1:
        raise ValueError(f"a frontier needs modality sets and a size of at least 1, got {len(sets)} sets and {sizes}")
    tables = _Tables.of(profile, sets, sizes[-1])
    order = tables.undominated()
    orders = (order[::-1], order) if tables.is_exact and len(order) > 1 else (order[::-1],)
    counts = np.concatenate([_mixes(tables, order, sizes) for order in orders])
    found, accuracy, cost = counts.sum(axis=1), counts @ tables.accuracy, tables.cost_ms(counts)
    ranked = np.lexsort((-accuracy, cost, found))
    starts = np.searchsorted(found[ranked], [*sizes, sizes[-1] + 1])
    groups = (ranked[start:end] for start, end in itertools.pairwise(starts))
    return tuple(_strategies(tables, counts[group[_rising(accuracy[group])]]) for group in groups)


def _strategies(tables: _Tables, counts: Integers) -> tuple[Strategy, ...]:
    accuracies = (counts @ tables.accuracy) / (counts.sum(axis=1) * _UNITS)
    rows = zip(counts.tolist(), accuracies.tolist(), tables.cost_ms(counts).tolist(), strict=True)
    return tuple(
        Strategy(tuple((s, count) for s, count in zip(tables.sets, row, strict=True) if count), accuracy, cost)
        for row, accuracy, cost in rows
    )


def _mixes(tables: _Tables, order: Sequence[int], sizes: range) -> Integers:
    """Counts, [L, K], of the labels that are left when the sets have been taken in this order."""
    nothing = np.zeros(1, np.int64)
    labels = _Labels(nothing, nothing, np.zeros(1), np.zeros((len(tables.encoders), 1), np.int64))
    steps: list[tuple[Integers, Integers]] = []
    for k in order:
        needed = sizes if k == order[-1] else range(tables.max_size + 1)
        labels, before, added = _extended(tables, labels, k, needed)
        steps.append((before, added))
    counts = np.zeros((len(labels.size), len(tables.sets)), np.int64)
    at = np.arange(len(labels.size))
    for k, (before, added) in zip(reversed(order), reversed(steps), strict=True):
        counts[:, k] = added[at]
        at = before[at]
    return counts


def _extended(tables: _Tables, labels: _Labels, k: int, sizes: range) -> tuple[_Labels, Integers, Integers]:
    """Takes one more set.

    Returns:
        The labels of these sizes that no other beats; for each the index of the label before, and the items added.
    """
    shared = np.flatnonzero(tables.has[k])
    apart = labels.cost - sum(tables.encoders[m][labels.rows[m]] for m in shared)
    kept, accuracies, costs = [], [], []
    for size, end in zip(sizes, np.searchsorted(labels.size, sizes, side="right"), strict=True):
        added = size - labels.size[:end]
        cost = apart[:end] + tables.fusion[k][added]
        for m in shared:
            cost += tables.encoders[m][labels.rows[m, :end] + added]
        accuracy = labels.accuracy[:end] + tables.accuracy[k] * added
        best = np.argsort(cost)
        best = best[_rising(accuracy[best])]
        if not tables.is_exact:
            best = best[_last_of_each_step(cost[best])]
        kept.append(best)
        accuracies.append(accuracy[best])
        costs.append(cost[best])
    before = np.concatenate(kept)
    size_of = np.repeat(np.array(sizes), [len(best) for best in kept])
    added = size_of - labels.size[before]
    rows = labels.rows[:, before] + tables.has[k][:, None] * added
    return _Labels(size_of, np.concatenate(accuracies), np.concatenate(costs), rows), before, added


def _rising(accuracy: Integers) -> NDArray[np.bool_]:
    """Which labels, by rising cost, are more accurate than all before."""
    best = np.maximum.accumulate(accuracy)
    return np.append(True, best[1:] > best[:-1])


def _last_of_each_step(cost: Floats) -> NDArray[np.bool_]:
    """Which of some rising costs is the last between two powers of 1 + _STEP."""
    power = np.floor(np.log(np.maximum(cost, _ROUNDING_MS)) / np.log1p(_STEP))
    return np.append(power[1:] > power[:-1], True)
