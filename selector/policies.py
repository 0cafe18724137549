"""Which modality sets a job may use, in the order in which they are preferred.

With a floor: the sets that meet it, cheapest first. Without one: what was sent first, then by falling accuracy, down to
the model's default floor.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mosel.errors import DeadlineUnreachable, FloorUnreachable, Overloaded, ServiceUnavailable
from mosel.modality import ModalitySet, format_set, subsets
from selector.profile import ModelProfile


@dataclass(frozen=True)
class Demand:
    """What a job asks for.

    Attributes:
        size: items.
        modalities: those that were sent and may be run.
        min_accuracy: the accuracy floor, 0..1, or None.
        budget_ms: milliseconds until the deadline.
        exact: run all of `modalities` or refuse.
    """

    size: int
    modalities: ModalitySet
    min_accuracy: float | None
    budget_ms: float
    exact: bool = False


def preferred_sets(profile: ModelProfile, demand: Demand, is_up: Callable[[ModalitySet], bool]) -> list[ModalitySet]:
    """The modality sets that meet the floor and could run now, best choice first.

    Args:
        profile: the model's.
        demand: the job's.
        is_up: whether all encoders of a set are there.

    Raises:
        FloorUnreachable: no subset of what was sent meets the floor; names the most accurate.
        ServiceUnavailable: some would, but an encoder that they need is away; names the best that is left.
    """
    candidates = [demand.modalities] if demand.exact else subsets(demand.modalities)
    floor = _floor(profile, demand)
    accurate = [s for s in candidates if profile.accuracy[s] >= floor]
    if not accurate:
        raise FloorUnreachable(
            f"min_accuracy {floor:.4g} cannot be met with {format_set(demand.modalities)}; "
            f"{_best_of(profile, candidates)}"
        )
    running = [s for s in accurate if is_up(s) and profile.is_measured(s)]
    if not running:
        left = [s for s in candidates if is_up(s) and profile.is_measured(s)]
        raise ServiceUnavailable(
            f"service {_why_not(accurate[-1], is_up)}, so no modality set that meets accuracy {floor:.4g} can be run; "
            f"{_best_of(profile, left)}"
        )
    if demand.min_accuracy is not None:
        return sorted(running, key=lambda s: profile.cost_ms(s, demand.size))
    return sorted(running, key=lambda s: (s != demand.modalities, -profile.accuracy[s]))


def choose(
    profile: ModelProfile,
    demand: Demand,
    sets: Sequence[ModalitySet],
    idle_ms: Callable[[ModalitySet], float],
    predicted_ms: Callable[[ModalitySet], float],
) -> ModalitySet:
    """The first of the preferred sets whose predicted time fits the deadline.

    Args:
        profile: the model's.
        demand: the job's.
        sets: what `preferred_sets` returned.
        idle_ms: predicted milliseconds until the job is answered with a set, if nothing were in front of it.
        predicted_ms: the same behind what is in front of it now.

    Raises:
        DeadlineUnreachable: none fits even on an idle system; names the best that would.
        Overloaded: one would fit on an idle system; says when to try again.
    """
    for modality_set in sets:
        if predicted_ms(modality_set) <= demand.budget_ms:
            return modality_set
    fastest = min(sets, key=idle_ms)
    takes = f"{format_set(fastest)} takes {idle_ms(fastest):.1f} ms on an idle system"
    if idle_ms(fastest) <= demand.budget_ms:
        retry_after_ms = max(1, round(predicted_ms(fastest) - demand.budget_ms))
        raise Overloaded(
            f"the deadline of {demand.budget_ms:.1f} ms cannot be met behind what is queued; {takes}", retry_after_ms
        )
    measured = [s for s in subsets(demand.modalities) if profile.is_measured(s)]
    fitting = [s for s in measured if idle_ms(s) <= demand.budget_ms]
    raise DeadlineUnreachable(
        f"the deadline of {demand.budget_ms:.1f} ms cannot be met for {demand.size} items: of the sets that are "
        f"accurate enough, {takes}; {_best_of(profile, fitting)}"
    )


def _floor(profile: ModelProfile, demand: Demand) -> float:
    if demand.min_accuracy is not None:
        return demand.min_accuracy
    full = profile.accuracy[demand.modalities]
    return full if profile.default_min_accuracy is None else min(full, profile.default_min_accuracy)


def _why_not(modality_set: ModalitySet, is_up: Callable[[ModalitySet], bool]) -> str:
    """Which services a modality set waits for."""
    if not is_up(frozenset()):
        return "fusion is away"
    away = ", ".join(f"encoder/{m}" for m in sorted(modality_set) if not is_up(frozenset({m})))
    return f"{away} is away" if away else f"selector still measures {format_set(modality_set)}"


def _best_of(profile: ModelProfile, candidates: Iterable[ModalitySet]) -> str:
    best = profile.best(candidates)
    if best is None:
        return "nothing else could be had"
    return f"the best that could be had is {profile.accuracy[best]:.4g} with {format_set(best)}"
