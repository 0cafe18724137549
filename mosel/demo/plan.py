"""The settings of the demo, derived from what is measured of the model at hand: the same rules for any model."""

import math
from collections.abc import Mapping
from dataclasses import replace

from mosel.client import SetInfo
from mosel.modality import format_set, parse_set
from mosel.profiles.labelled_run import Setting

LOSSES = (0.01, 0.03, 0.06)
_FLOORS = 3

Sets = Mapping[str, SetInfo]


def full_set(sets: Sets) -> str:
    """The modality set with every modality."""
    return format_set(frozenset().union(*map(parse_set, sets)))


def frontier(sets: Sets, worth: Mapping[str, float]) -> list[str]:
    """The modality sets to which none is both cheaper and worth at least as much, cheapest first.

    A set costs what its modalities cost one by one: encoders run in parallel, so its latency hides the cheaper ones.
    """
    best: list[str] = []
    for name in sorted(worth, key=lambda name: (_cost_ms(sets, name), -worth[name])):
        if not best or worth[name] > worth[best[-1]]:
            best.append(name)
    return best


def expected(sets: Sets) -> dict[str, float]:
    """The accuracy that is expected of each set."""
    return {name: info.accuracy for name, info in sets.items()}


def guaranteed(sets: Sets) -> dict[str, float]:
    """The accuracy that is guaranteed of each set; empty without labelled calibration rows."""
    return {name: info.guaranteed_accuracy for name, info in sets.items() if info.guaranteed_accuracy is not None}


def choose_settings(sets: Sets, how: Setting) -> list[Setting]:
    """No floor, some losses against everything, and some floors, all sent in the same way.

    Where calibration rows are, the last floor is one that cannot be guaranteed, only expected.
    """
    losses = [replace(how, max_loss=loss) for loss in LOSSES]
    return [how, *losses, *(replace(how, floor=floor) for floor in choose_floors(sets))]


def choose_floors(sets: Sets) -> list[float]:
    """Up to three accuracy floors that can be guaranteed by different modality sets, then one that cannot.

    The former are what the frontier's sets below the best guarantee, evenly picked and rounded down. Without
    calibration rows they are what is expected, and there is no floor that cannot be guaranteed.
    """
    worth = guaranteed(sets) or expected(sets)
    steps = frontier(sets, worth)[:-1]
    count = min(len(steps), _FLOORS)
    picked = [steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)]
    floors = sorted({math.floor(worth[name] * 100) / 100 for name in picked})
    return floors + _not_guaranteed(max(worth.values()), max(expected(sets).values()))


def _not_guaranteed(best: float, most: float) -> list[float]:
    """A floor, of few digits, above the best that can be guaranteed and not above what is expected; if there is one."""
    return [floor for digits in (2, 3) if best < (floor := round((best + most) / 2, digits)) < most][:1]


def without_slowest(sets: Sets) -> str | None:
    """Every modality but the one that takes longest alone; None if there is one only."""
    names = parse_set(full_set(sets))
    slowest = max(names, key=lambda name: sets[name].latency_ms)
    return format_set(names - {slowest}) or None


def tight_deadline_ms(fast_ms: float, full_ms: float) -> float:
    """A deadline that the faster set can keep and the full set cannot: as many times the one as the other is times it.

    Args:
        fast_ms: measured time of a job without the slowest modality.
        full_ms: measured time of the same job with every modality.
    """
    return math.sqrt(fast_ms * full_ms)


def _cost_ms(sets: Sets, name: str) -> float:
    return sum(sets[modality].latency_ms for modality in parse_set(name))
