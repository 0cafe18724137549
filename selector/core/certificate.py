"""Which mixes of modality sets meet which floor, by a test on calibration rows.

A *level* is a number e: at it, a job may run any mix of sets whose mean score is e at least. Scores are measured on
design rows, so that levels are fixed before a certify row is looked at. The mixes of a level are the convex hull of
its rules: the sets whose own score is e at least, and of each pair of sets the mix that scores just e. Which item of a
job runs which set does not depend on its content, so the accuracy of a mix is a mean, and what all rules of a level
meet, all mixes of it meet. The levels make up a *ladder* from the reference set down.

Fixed-sequence testing: a level is accepted for a floor while the test of each of its rules, and of all levels before,
rejects "is below the floor" (Westfall and Krishen, J. Stat. Plan. Inference 99, 2001). Then with the stated confidence
no rule that is accepted for one floor, fixed in advance, is below it. Each test is a bound of Clopper and Pearson, with
the number of items that independent ones would have to be to say as much (Korn and Graubard, Survey Methodology 24,
1998): items of the same group are alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from mosel.modality import ModalitySet, subsets
from selector.core.quantiles import beta_quantile, t_quantile

Floats = NDArray[np.float64]
Integers = NDArray[np.int32]

# Levels of a ladder, besides those of single sets; and how many sets of a model it mixes at most.
_LEVELS, _MOST_SETS = 64, 16
# Design effects are noisy, so each level takes the mean over so many on either side.
_NEIGHBOURS = 3
# With fewer groups, tests are made at half their level, and bounds are approximate.
_FEW_GROUPS = 30
# Sums of floats.
_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class CalibrationRows:
    """N items that no weight was fitted to, and what a model made of them.

    Attributes:
        sets: the S modality sets.
        answers: [N, S], the index of the largest output.
        labels: [N], the right answer; None if nobody knows.
        groups: [N, C], for each grouping, which group an item belongs to; items of the same group are alike.
        certify: [N], whether an item certifies; the others are design rows.
    """

    sets: Sequence[ModalitySet]
    answers: Integers
    labels: Integers | None
    groups: Integers
    certify: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Ladder:
    """The levels over the sets of what was sent, and what each is guaranteed to meet.

    Attributes:
        reference: the most accurate set, by design rows; what a loss is counted against.
        scores: what an item of each set counts for on design rows, 0..1: accuracy, or agreement with the reference.
        levels: [L], falling.
        bounds: [L], what all mixes of a level, and of those before, have at least on average, 0..1.
        confidence: that of each bound for a floor that was fixed in advance.
        approximate: the rows are of few groups.
    """

    reference: ModalitySet
    scores: Mapping[ModalitySet, float]
    levels: Floats
    bounds: Floats
    confidence: float
    approximate: bool

    @property
    def best(self) -> float:
        """The highest floor that can be guaranteed."""
        return float(self.bounds[0])

    def least(self, floor: float) -> float | None:
        """The mean score that the items of a job need for a floor to be guaranteed; None if nothing guarantees it."""
        accepted = int(np.searchsorted(-self.bounds, -floor + _TOLERANCE, side="right"))
        return float(self.levels[accepted - 1]) if accepted else None

    def guaranteed(self, score: float) -> float:
        """What mixes with a mean score are guaranteed to have on average, 0..1."""
        below = int(np.searchsorted(-self.levels, -score - _TOLERANCE))
        return float(self.bounds[below]) if below < len(self.levels) else 0.0


class Certificates:
    """The ladders of one model, each made when it is first asked for.

    Args:
        rows: the model's calibration rows.
        confidence: of the guarantees, 0.5 to below 1.
    """

    def __init__(self, rows: CalibrationRows, confidence: float) -> None:
        self._rows, self._confidence = rows, confidence
        self._made: dict[tuple[bool, ModalitySet], Ladder | None] = {}

    def of_accuracy(self, sent: ModalitySet) -> Ladder | None:
        """For floors of accuracy over what was sent; None without labels, or without rows of two groups."""
        return self._ladder(sent, of_loss=False)

    def of_loss(self, sent: ModalitySet) -> Ladder | None:
        """For floors of agreement with the reference set: at most e is lost where 1 - e agrees."""
        return self._ladder(sent, of_loss=True)

    def _ladder(self, sent: ModalitySet, *, of_loss: bool) -> Ladder | None:
        key = of_loss, sent
        if key not in self._made:
            make = loss_ladder if of_loss else accuracy_ladder
            self._made[key] = make(self._rows, sent, self._confidence)
        return self._made[key]


def accuracy_ladder(rows: CalibrationRows, sent: ModalitySet, confidence: float) -> Ladder | None:
    """The ladder of accuracy over the sets of what was sent; None without labels, or without rows of two groups."""
    if rows.labels is None:
        return None
    sets, answers = _of_sent(rows, sent)
    right = (answers == rows.labels[:, None]).astype(np.float64)
    return _ladder(rows, sets, _reference(rows, sets, answers), right, confidence)


def loss_ladder(rows: CalibrationRows, sent: ModalitySet, confidence: float) -> Ladder | None:
    """The ladder of agreement with the reference set; needs no labels, None without rows of two groups.

    accuracy(mix) >= accuracy(reference) - P(answers differ).
    """
    sets, answers = _of_sent(rows, sent)
    reference = _reference(rows, sets, answers)
    agrees = (answers == answers[:, [reference]]).astype(np.float64)
    return _ladder(rows, sets, reference, agrees, confidence)


def _of_sent(rows: CalibrationRows, sent: ModalitySet) -> tuple[list[ModalitySet], Integers]:
    sets = subsets(sent)
    places = {modality_set: i for i, modality_set in enumerate(rows.sets)}
    return sets, rows.answers[:, [places[modality_set] for modality_set in sets]]


def _reference(rows: CalibrationRows, sets: Sequence[ModalitySet], answers: Integers) -> int:
    """The most accurate of some sets, on design rows; without labels the largest."""
    if rows.labels is None:
        return len(sets) - 1
    design = ~rows.certify
    means = (answers[design] == rows.labels[design, None]).mean(axis=0) if design.any() else np.zeros(len(sets))
    # Of equals the largest: what was sent is what its caller believes in.
    return int(len(sets) - 1 - np.argmax(means[::-1]))


def _ladder(
    rows: CalibrationRows, sets: Sequence[ModalitySet], reference: int, values: Floats, confidence: float
) -> Ladder | None:
    """The ladder of a value 0..1 that each set has for each item, [N, S]."""
    certify, design = rows.certify, ~rows.certify
    groups = [np.unique(column, return_inverse=True)[1] for column in rows.groups[certify].T]
    fewest = min([int(of_one.max(initial=-1)) + 1 for of_one in groups], default=int(certify.sum()))
    if fewest < 2 or not design.any():
        return None
    scores = values[design].mean(axis=0)
    # Nothing scores as much as the reference, so that the first level is it alone and others are mixed in little by
    # little: half an item less, where rows show no difference.
    others = np.arange(len(sets)) != reference
    scores = np.where(others, np.minimum(scores, scores[reference] - 0.5 / design.sum()), scores)
    kept = _kept(sets, scores, reference)
    levels = _levels(scores[kept])
    rules = _rules(scores[kept], levels)
    approximate = fewest < _FEW_GROUPS
    test = (1 - confidence) / (2 if approximate else 1)
    # Where the reference agrees with itself, all but a share agrees in any case.
    sure = values[:, reference].all() and rules.one == kept.index(reference)
    surely = np.where(sure, 1 - rules.share, 0.0)
    bounds = _bounds(_Sample(values[certify][:, kept], groups, fewest, test), rules, surely, test)
    named = {sets[i]: float(scores[i]) for i in kept}
    return Ladder(sets[reference], named, levels, np.minimum.accumulate(bounds), confidence, approximate)


def _kept(sets: Sequence[ModalitySet], scores: Floats, reference: int) -> list[int]:
    """The sets that are mixed: all if they are few; else those that no smaller one beats, evenly spread by score."""
    if len(sets) <= _MOST_SETS:
        return list(range(len(sets)))
    beaten = [any(scores[j] >= scores[i] and sets[j] < sets[i] for j in range(i)) for i in range(len(sets))]
    unbeaten = sorted((i for i in range(len(sets)) if not beaten[i] or i == reference), key=lambda i: -scores[i])
    spread = np.unique(np.linspace(0, len(unbeaten) - 1, _MOST_SETS).round().astype(int)).tolist()
    return sorted({reference, len(sets) - 1, *(unbeaten[at] for at in spread)})


def _levels(scores: Floats) -> Floats:
    """Falling numbers from the highest score to the lowest, closer near the highest; each set's own among them."""
    falling = scores.max() - (scores.max() - scores.min()) * np.linspace(0, 1, _LEVELS) ** 2
    return np.unique(np.concatenate([falling, scores]))[::-1]


@dataclass(frozen=True, eq=False)
class _Rules:
    """The rules of all levels, flat: mixes of one set with a share of another.

    Attributes:
        level: [P], which level each is of.
        one, other: [P], its sets.
        share: [P], the share of items that run the other.
    """

    level: NDArray[np.intp]
    one: NDArray[np.intp]
    other: NDArray[np.intp]
    share: Floats


def _rules(scores: Floats, levels: Floats) -> _Rules:
    """At each level, the pairs of sets mixed so that they score just it, and the sets that score it by themselves."""
    above, below = scores > levels[:, None] + _TOLERANCE, scores < levels[:, None] - _TOLERANCE
    mixed, one, other = np.nonzero(above[:, :, None] & below[:, None, :])
    share = (scores[one] - levels[mixed]) / (scores[one] - scores[other])
    single, own = np.nonzero(~(above | below))
    return _Rules(
        np.append(mixed, single), np.append(one, own), np.append(other, own), np.append(share, np.zeros(len(own)))
    )


class _Sample:
    """The certify rows: means and design effects of rules.

    Args:
        values: [N, K].
        groups: for each grouping, the group of each row, counted from 0.
        fewest: groups of the grouping that has fewest.
        test: the level of each one-sided test.
    """

    def __init__(self, values: Floats, groups: Sequence[NDArray[np.intp]], fewest: int, test: float) -> None:
        self._means = values.mean(axis=0)
        centred = values - self._means
        self._alone = centred.T @ centred
        self._together = [_between(centred, of_one) for of_one in groups]
        items = len(values)
        self._most = items * (t_quantile(1 - test, items - 1) / t_quantile(1 - test, fewest - 1)) ** 2

    def means(self, rules: _Rules) -> Floats:
        """What each has on average."""
        return np.asarray((1 - rules.share) * self._means[rules.one] + rules.share * self._means[rules.other])

    def effective_items(self, rules: _Rules) -> Floats:
        """How many independent items would say as much of the rules of each level, [L]."""
        alone = _squared(self._alone, rules)
        effects = np.ones(len(alone))
        for together in self._together:
            effects += np.where(alone > _TOLERANCE, _squared(together, rules) / np.maximum(alone, _TOLERANCE), 1.0) - 1
        by_level = np.bincount(rules.level, effects) / np.bincount(rules.level)
        near = np.ones(2 * min(_NEIGHBOURS, (len(by_level) - 1) // 2) + 1)
        pooled = np.convolve(by_level, near, "same") / np.convolve(np.ones(len(by_level)), near, "same")
        return np.asarray(self._most / np.maximum(pooled, 1.0))


def _between(centred: Floats, group: NDArray[np.intp]) -> Floats:
    """Products of the sums over groups, [K, K]."""
    count = int(group.max()) + 1
    sums = np.stack([np.bincount(group, column, count) for column in centred.T])
    return np.asarray(sums @ sums.T) * (count / (count - 1))


def _squared(products: Floats, rules: _Rules) -> Floats:
    """The product of each mix with itself, from those of its sets."""
    one, other, share = rules.one, rules.other, rules.share
    squares = (1 - share) ** 2 * products[one, one] + share**2 * products[other, other]
    return np.asarray(squares + 2 * (1 - share) * share * products[one, other])


def _bounds(sample: _Sample, rules: _Rules, surely: Floats, test: float) -> Floats:
    """For each level, what the worst of its rules has at least on average."""
    means, items = sample.means(rules), sample.effective_items(rules)
    order = np.lexsort((_wilson(means, surely, items[rules.level], test), rules.level))
    worst = order[np.unique(rules.level[order], return_index=True)[1]]
    return _clopper_pearson(means[worst], surely[worst], items, test)


def _wilson(means: Floats, surely: Floats, items: Floats, test: float) -> Floats:
    """About what `_clopper_pearson` says, which is enough to tell which rule is the worst."""
    z, width = NormalDist().inv_cdf(1 - test), 1 - surely
    share = (means - surely) / np.maximum(width, _TOLERANCE)
    spread = z * np.sqrt(np.maximum(share * (1 - share), 0.0) / items + (z / (2 * items)) ** 2)
    return np.asarray(surely + width * (share + z**2 / (2 * items) - spread) / (1 + z**2 / items))


def _clopper_pearson(means: Floats, surely: Floats, items: Floats, test: float) -> Floats:
    """The lower bound of means of numbers from `surely` to 1; none such spread more than those of the two ends."""
    width = 1 - surely
    right = np.clip((means - surely) / np.maximum(width, _TOLERANCE), 0.0, 1.0) * items
    some = right > _TOLERANCE
    right = np.where(some, right, 1.0)
    return np.asarray(surely + width * np.where(some, beta_quantile(test, right, items - right + 1), 0.0))
