"""The settings of the demo, derived from what is measured of the model at hand: the same rules for any model."""

import math
from collections.abc import Mapping

from mosel.client import SetInfo
from mosel.modality import format_set, parse_set

PREFERRED_FLOORS = (0.60, 0.85, 0.95)
_DISTINCT_SETS = 3

Sets = Mapping[str, SetInfo]


def full_set(sets: Sets) -> str:
    """The modality set with every modality."""
    return format_set(frozenset().union(*map(parse_set, sets)))


def cheapest(sets: Sets, floor: float) -> str | None:
    """The modality set that meets a floor with the least computation, None if none does.

    A set costs what its modalities cost one by one: encoders run in parallel, so its latency hides the cheaper ones.
    """
    meeting = [name for name, info in sets.items() if info.accuracy >= floor]
    return min(meeting, key=lambda name: _cost_ms(sets, name), default=None)


def frontier(sets: Sets) -> list[str]:
    """The modality sets to which none is both cheaper and at least as accurate, cheapest first."""
    best: list[str] = []
    for name in sorted(sets, key=lambda name: (_cost_ms(sets, name), -sets[name].accuracy)):
        if not best or sets[name].accuracy > sets[best[-1]].accuracy:
            best.append(name)
    return best


def choose_floors(sets: Sets) -> tuple[float, ...]:
    """Up to three accuracy floors that make the selector choose different modality sets.

    The preferred ones where the model can meet them all and they lead, together with everything that is run without a
    floor, to three sets or more; else the accuracies of the frontier's sets below the most accurate, evenly picked.
    """
    chosen = {cheapest(sets, floor) for floor in PREFERRED_FLOORS}
    if None not in chosen and len(chosen | {full_set(sets)}) >= _DISTINCT_SETS:
        return PREFERRED_FLOORS
    steps = frontier(sets)[:-1]
    count = min(len(steps), len(PREFERRED_FLOORS))
    picked = [steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)]
    return tuple(math.floor(sets[name].accuracy * 1000) / 1000 for name in picked)


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
