"""Do guarantees hold on items exchangeable with those that certified? Random halves of a model's calibration rows.

Of each split one half of the groups certifies and the other is measured. For each floor, the cheapest mix of modality
sets that is guaranteed is taken; the share of the splits in which its accuracy on the other half meets the floor is
told, and the share in which no promise is broken: either it meets the floor, or nothing is guaranteed. The measured
half errs, too: where the guarantee is 0.95, a perfect method shows about 0.88. Both halves are of the same rows, so
where the half that certifies is better than usual, the other is worse: a floor that is rarely guaranteed is then met
less often.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from bench.exchangeable import halves
from mosel.config import load_settings
from mosel.modality import ModalitySet
from mosel.packages.calibration import Calibration
from mosel.packages.model_package import find_packages
from selector.conversions import certificates
from selector.core.certificate import Ladder

POINTS = (1, 2, 3, 6, 9, 12)
_CONFIDENCE = 0.95
_TOLERANCE = 1e-9

console = Console(width=100)


@dataclass(frozen=True)
class Kept:
    """What became of one floor: in how many splits it was guaranteed, and in how many of these it was met."""

    floor: float
    guaranteed: int
    met: int


def main() -> None:
    """Splits and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--splits", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    settings = load_settings(models=(given.model,))
    calibration = find_packages(settings.models_dir, settings.models)[given.model].calibration
    if calibration is None or not calibration.is_labelled:
        raise SystemExit(
            f"error: model '{given.model}' has no labelled calibration rows; `mosel calibrate` writes them"
        )
    table = Table(title=f"{given.model}, {given.splits} random halves, {_CONFIDENCE:.0%}", box=box.SIMPLE_HEAD)
    for column in ("floor", "", "guaranteed in", "of these met in", "no promise broken in"):
        table.add_column(column, justify="right")
    for points, kept in zip(POINTS, measured(calibration, given.splits, given.seed), strict=True):
        met = f"{kept.met / kept.guaranteed:.3f}" if kept.guaranteed else "-"
        kept_in = 1 - (kept.guaranteed - kept.met) / given.splits
        guaranteed = f"{kept.guaranteed / given.splits:.3f}"
        table.add_row(f"{kept.floor:.4f}", f"full - {points}", guaranteed, met, f"{kept_in:.3f}")
    console.print(table)


def measured(calibration: Calibration, splits: int, seed: int) -> list[Kept]:
    """What became of full accuracy less each of `POINTS`, over so many random splits of the certifying rows."""
    everything = max(calibration.sets, key=len)
    right = calibration.answers == calibration.labels[:, None]
    full = float(right[calibration.certify, list(calibration.sets).index(everything)].mean())
    floors = [full - points / 100 for points in POINTS]
    guaranteed, met = np.zeros(len(POINTS), int), np.zeros(len(POINTS), int)
    random = np.random.default_rng(seed)
    for _ in range(splits):
        one, other = halves(calibration.groups, random)
        ladder = _ladder(calibration, one, everything)
        accuracy = right[calibration.certify & other].mean(0)
        by_set = dict(zip(calibration.sets, accuracy.tolist(), strict=True))
        for at, floor in enumerate(floors):
            least = None if ladder is None else ladder.least(floor)
            if ladder is not None and least is not None:
                guaranteed[at] += 1
                met[at] += _accuracy(cheapest_mix(ladder.scores, least), by_set) >= floor
    return [Kept(*of_floor) for of_floor in zip(floors, guaranteed.tolist(), met.tolist(), strict=True)]


def _ladder(calibration: Calibration, one: NDArray[np.bool_], everything: ModalitySet) -> Ladder | None:
    """Certified by one half; the design rows are always the same."""
    kept = ~calibration.certify | one
    rows = {name: getattr(calibration, name)[kept] for name in ("answers", "confidence", "labels", "groups", "certify")}
    known = certificates(replace(calibration, **rows), _CONFIDENCE)
    return None if known is None else known.of_accuracy(everything)


def cheapest_mix(scores: Mapping[ModalitySet, float], least: float) -> Mapping[ModalitySet, float]:
    """The shares of items of at most two sets that score so much with the fewest modalities, then the lowest score."""
    mixes = [{s: 1.0} for s, score in scores.items() if score >= least - _TOLERANCE]
    for above, high in scores.items():
        for below, low in scores.items():
            if high > least > low:
                share = (high - least) / (high - low)
                mixes.append({above: 1 - share, below: share})
    return min(mixes, key=lambda mix: (sum(share * len(s) for s, share in mix.items()), _accuracy(mix, scores)))


def _accuracy(mix: Mapping[ModalitySet, float], by_set: Mapping[ModalitySet, float]) -> float:
    return sum(share * by_set[modality_set] for modality_set, share in mix.items())


if __name__ == "__main__":
    main()
