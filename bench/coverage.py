"""Are guaranteed floors met as often as they say? Calibrations drawn from populations whose accuracies are known.

Each calibration draws rows, makes the ladders that the selector would make, and looks floors up. A floor is met if the
worst mix that a job may run at it has it, by the population's own accuracies. Beside it stands what comes of taking
what was measured at its word. Nothing here depends on time or hardware.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from mosel.config import load_settings
from mosel.modality import ModalitySet, format_set, parse_set, subsets
from mosel.packages.calibration import Calibration
from mosel.packages.model_package import find_package
from selector.core.certificate import CalibrationRows, Ladder, accuracy_ladder, loss_ladder

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
# Below what everything has, and what may be lost against it.
DROPS = (0.01, 0.02, 0.03, 0.06, 0.09, 0.12)
LOSSES = (0.01, 0.02, 0.03, 0.06)
_LABELS = 10
# Of the latent normal variables of two sets on one item; and of wrong answers, how many are wrong alike.
_ALIKE, _WRONG_ALIKE = 0.35, 0.3
_MANY = 200_000
_DIGITS = {"audio": 0.859, "image": 0.665, "pen": 0.626, "audio+image": 0.952, "audio+pen": 0.944, "image+pen": 0.9}

console = Console(width=140)
_normal = NormalDist()


@dataclass(frozen=True, eq=False)
class Grouping:
    """Items of the same group are alike.

    Attributes:
        groups: how many there are in a calibration.
        covariance: [S, S], of what they add to the latent normal variables of each set.
    """

    groups: int
    covariance: Floats


@dataclass(frozen=True, eq=False)
class Population:
    """Items, endlessly many, on which the accuracy of every modality set is known.

    Attributes:
        accuracy: by modality set, 0..1.
        groupings: crossed with each other.
        design, certify: rows of a calibration.
    """

    accuracy: Mapping[ModalitySet, float]
    groupings: Sequence[Grouping] = ()
    design: int = 500
    certify: int = 1500

    @property
    def sets(self) -> Sequence[ModalitySet]:
        """The modality sets, the one of everything last."""
        return tuple(self.accuracy)

    @cached_property
    def disagreement(self) -> Floats:
        """[S], how often each set answers otherwise than everything, by many independent items."""
        answers = self._answers(np.random.default_rng(1), _MANY, ())[0]
        return np.asarray((answers != answers[:, -1:]).mean(axis=0))

    def calibration(self, rng: np.random.Generator) -> CalibrationRows:
        """One calibration; label 0 is always right."""
        rows = self.design + self.certify
        answers, groups = self._answers(rng, rows, self.groupings)
        certify = np.arange(rows) >= self.design
        return CalibrationRows(self.sets, answers, np.zeros(rows, np.int32), groups, certify)

    def _answers(
        self, rng: np.random.Generator, rows: int, groupings: Sequence[Grouping]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        latent = math.sqrt(_ALIKE) * rng.standard_normal((rows, 1))
        latent = latent + math.sqrt(1 - _ALIKE) * rng.standard_normal((rows, len(self.sets)))
        variance, groups = np.ones(len(self.sets)), np.zeros((rows, len(groupings)), np.int32)
        for column, grouping in enumerate(groupings):
            groups[:, column] = rng.integers(grouping.groups, size=rows)
            effects = rng.multivariate_normal(np.zeros(len(self.sets)), grouping.covariance, grouping.groups)
            latent += effects[groups[:, column]]
            variance += np.diag(grouping.covariance)
        # Over all groups, sums of normal variables are normal, so that this share is below.
        bound = np.array([_normal.inv_cdf(accuracy) for accuracy in self.accuracy.values()]) * np.sqrt(variance)
        wrong = rng.integers(1, _LABELS, (rows, len(self.sets)))
        alike = rng.random((rows, 1)) < _WRONG_ALIKE
        return np.where(latent < bound, 0, np.where(alike, wrong[:, :1], wrong)).astype(np.int32), groups


@dataclass(frozen=True)
class Coverage:
    """What became of one floor over many calibrations, as shares of them.

    Attributes:
        met: the worst mix allowed at it has it; also where nothing was certified, and so nothing promised.
        certified: it was guaranteed at all.
        saving: it was, by less than everything.
        met_by_expectation: of mixes that were measured to have it, as many have it.
    """

    met: float
    certified: float
    saving: float
    met_by_expectation: float


def coverage_of_accuracy(population: Population, calibrations: int, seed: int = 0) -> dict[float, Coverage]:
    """Of floors so far below the accuracy of everything."""
    truth = np.array([*population.accuracy.values()])
    floors = {drop: float(truth[-1] - drop) for drop in DROPS}

    def measured(rows: CalibrationRows) -> Floats:
        return np.asarray((rows.answers == 0).mean(axis=0))

    return _coverage(population, calibrations, seed, accuracy_ladder, truth, floors, measured)


def coverage_of_loss(population: Population, calibrations: int, seed: int = 0) -> dict[float, Coverage]:
    """Of at most so much lost against everything, by agreement."""

    def measured(rows: CalibrationRows) -> Floats:
        return np.asarray((rows.answers == rows.answers[:, -1:]).mean(axis=0))

    floors = {loss: 1 - loss for loss in LOSSES}
    return _coverage(population, calibrations, seed, loss_ladder, 1 - population.disagreement, floors, measured)


def _coverage(
    population: Population,
    calibrations: int,
    seed: int,
    make: Callable[[CalibrationRows, ModalitySet, float], Ladder | None],
    truth: Floats,
    floors: Mapping[float, float],
    measured: Callable[[CalibrationRows], Floats],
) -> dict[float, Coverage]:
    rng, everything = np.random.default_rng(seed), population.sets[-1]
    seen = np.zeros((len(floors), 4))
    for _ in range(calibrations):
        rows = population.calibration(rng)
        ladder, means = make(rows, everything, CONFIDENCE), measured(rows)
        for floor, counts in zip(floors.values(), seen, strict=True):
            least = None if ladder is None else ladder.least(floor)
            if ladder is None or least is None:
                counts += 1, 0, 0, 0
            else:
                scores = np.array([ladder.scores[s] for s in population.sets])
                worst = min(score for _, score in mixes(scores, truth, least))
                counts += worst >= floor, 1, least < ladder.levels[0], 0
            of_everything = [score >= floor for other, score in mixes(means, truth, floor) if other == len(means) - 1]
            counts[3] += np.mean(of_everything) if of_everything else 1
    return {drop: Coverage(*map(float, counts / calibrations)) for drop, counts in zip(floors, seen, strict=True)}


def mixes(scores: Floats, truth: Floats, least: float) -> Iterator[tuple[int, float]]:
    """The mixes of one or two sets that score just so much, or sets that score more: the first set, and the truth."""
    for one in np.flatnonzero(scores >= least - 1e-9).tolist():
        yield one, truth[one]
        for other in np.flatnonzero(scores < least - 1e-9).tolist():
            share = (scores[one] - least) / (scores[one] - scores[other])
            yield one, (1 - share) * truth[one] + share * truth[other]


def populations() -> dict[str, Population]:
    """Rows that are independent, and rows in crossed groups, about as those of digits."""
    accuracy = {parse_set(name): value for name, value in _DIGITS.items()} | {parse_set("audio+image+pen"): 0.981}
    ones = np.ones((7, 7))
    crossed = (Grouping(80, 0.02 * ones + np.diag(np.full(7, 0.02))), Grouping(40, 0.05 * ones))
    return {"independent rows": Population(accuracy), "crossed groups": Population(accuracy, crossed)}


def like(calibration: Calibration, design: int, certify: int, groups: int) -> Population:
    """A population like labelled calibration rows: their accuracies, and what varies between their first groups."""
    everything = max(calibration.sets, key=len)
    sets = [s for s in subsets(everything) if s != everything] + [everything]
    right = (calibration.answers == calibration.labels[:, None])[:, [list(calibration.sets).index(s) for s in sets]]
    of_group = np.unique(calibration.groups[:, 0], return_inverse=True)[1]
    sizes = np.bincount(of_group)
    shares = np.stack([np.bincount(of_group, column) for column in right.T], axis=1)
    # Half an item more of each keeps the quantile finite.
    latent = np.vectorize(_normal.inv_cdf)((shares + 0.5) / (sizes[:, None] + 1))
    accuracy = {s: float(value) for s, value in zip(sets, right.mean(axis=0), strict=True)}
    return Population(accuracy, (Grouping(groups, np.cov(latent.T)),), design, certify)


def main() -> None:
    """Draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrations", type=int, default=1000)
    parser.add_argument("--people", type=int, default=21, help="of the population like the rows of har")
    parser.add_argument("--people-calibrations", type=int, default=2000)
    arguments = parser.parse_args()
    for name, population in populations().items():
        _print(f"accuracy, {name}", coverage_of_accuracy(population, arguments.calibrations), "full -")
        _print(f"loss, {name}", coverage_of_loss(population, arguments.calibrations), "at most ")
    calibration = find_package(load_settings().models_dir, "har").calibration
    if calibration is not None:
        rows, people = len(calibration.labels), arguments.people
        design = rows // 5
        like_har = like(calibration, design, rows - design, people)
        found = coverage_of_accuracy(like_har, arguments.people_calibrations)
        _print(f"accuracy, {people} people like those of har ({_sets(like_har)})", found, "full -")


def _print(title: str, found: Mapping[float, Coverage], prefix: str) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("floor", "met", "certified", "by less than everything", "met, taking measurements at their word"):
        table.add_column(column, justify="right")
    for drop, coverage in found.items():
        shares = (coverage.met, coverage.certified, coverage.saving, coverage.met_by_expectation)
        table.add_row(f"{prefix}{drop * 100:g}", *(f"{share:.3f}" for share in shares))
    console.print(table)


def _sets(population: Population) -> str:
    return ", ".join(f"{format_set(s)} {accuracy:.3f}" for s, accuracy in population.accuracy.items())


if __name__ == "__main__":
    main()
