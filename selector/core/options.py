"""Which strategies a job may use, in the order in which they are preferred; never one below its accuracy floor."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from mosel.errors import FloorUnreachable, ServiceUnavailable
from mosel.modality import ModalitySet, format_set, subsets
from selector.core.frontier import Frontiers, Strategy
from selector.core.jobs import Effort, Job, Option
from selector.core.profile import ModelProfile

# Sums of floats: a floor equal to a profile's accuracy is met by it.
_TOLERANCE = 1e-9
# A policy weighs so many strategies per job; a frontier has more, hardly different ones.
_MOST_OPTIONS = 8
# Of what little thrift is worth beside accuracy: it only breaks ties and orders.
_THRIFT = 1e-3


def strategy_of(profile: ModelProfile, counts: Mapping[ModalitySet, int]) -> Strategy:
    """The strategy that runs so many items of each set."""
    # Not the mean of equal numbers, which is a little less than each.
    values = {profile.accuracy[s] for s in counts}
    mean = sum(profile.accuracy[s] * count for s, count in counts.items()) / sum(counts.values())
    accuracy = values.pop() if len(values) == 1 else mean
    ordered = tuple(sorted(counts.items(), key=lambda entry: format_set(entry[0])))
    return Strategy(ordered, accuracy, profile.mixed_cost_ms(counts))


def floor_of(profile: ModelProfile, job: Job) -> float:
    """The accuracy that the job's items must have on average."""
    if job.min_accuracy is not None:
        return job.min_accuracy
    full = profile.accuracy[job.modalities]
    return full if profile.default_min_accuracy is None else min(full, profile.default_min_accuracy)


def allowed_options(
    profile: ModelProfile,
    frontiers: Frontiers,
    job: Job,
    items: int,
    floor: float,
    is_up: Callable[[ModalitySet], bool],
    full_only: bool,
) -> list[Option]:
    """The strategies for items of a job that meet a floor and could run now, the preferred one first.

    Args:
        profile: the model's.
        frontiers: the model's.
        job: the job.
        items: how many of its items are to be planned.
        floor: the accuracy that they need on average.
        is_up: whether all encoders of a set are there.
        full_only: every modality that was sent is run, whatever the floor.

    Raises:
        FloorUnreachable: no strategy over what was sent meets the floor; names the best set, and what is missing.
        ServiceUnavailable: one would, but an encoder that it needs is away; names the best that is left.
    """
    candidates = [job.modalities] if job.exact or full_only else subsets(job.modalities)
    accurate = [s for s in candidates if profile.accuracy[s] >= floor - _TOLERANCE]
    if not accurate:
        raise FloorUnreachable(
            f"min_accuracy {floor:.4g} cannot be met with {format_set(job.modalities)}; {best_of(profile, candidates)}"
            f"{_what_is_missing(profile, job.modalities, floor)}"
        )
    running = runnable(profile, candidates, job.modalities, is_up)
    strategies = frontiers.of(running, items).thin(_MOST_OPTIONS, floor - _TOLERANCE) if running else []
    if not strategies:
        raise ServiceUnavailable(
            f"service {_why_not(accurate[-1], is_up)}, so no modality set that meets accuracy {floor:.4g} can be run; "
            f"{best_of(profile, running)}"
        )
    effort = job.effort or (Effort.BEST if job.min_accuracy is None else Effort.CHEAPEST)
    if effort is Effort.CHEAPEST:
        return [Option(s, -_THRIFT * i) for i, s in enumerate(strategies)]
    options = [Option(s, s.accuracy) for s in reversed(strategies)]
    if job.min_accuracy is None and job.modalities in running:
        accurate = [s for s in running if profile.accuracy[s] >= floor - _TOLERANCE]
        return _first(strategy_of(profile, {_worth_running(profile, job.modalities, accurate, items): items}), options)
    return options


def runnable(
    profile: ModelProfile, candidates: Iterable[ModalitySet], sent: ModalitySet, is_up: Callable[[ModalitySet], bool]
) -> list[ModalitySet]:
    """Those of some sets, all of modalities that were sent, that could run now; `is_up` as in `allowed_options`."""
    there = frozenset(modality for modality in sent if is_up(frozenset({modality})))
    return [s for s in candidates if s <= there and profile.can_run(s)]


def best_of(profile: ModelProfile, candidates: Iterable[ModalitySet]) -> str:
    """What a refusal says of the alternatives."""
    best = profile.best(candidates)
    if best is None:
        return "nothing else could be had"
    return f"the best that could be had is {profile.accuracy[best]:.4g} with {format_set(best)}"


def _what_is_missing(profile: ModelProfile, sent: ModalitySet, floor: float) -> str:
    """The fewest modalities that would have to be sent, too, for a floor to be met; empty if nothing helps."""
    missing = [s for s, accuracy in profile.accuracy.items() if accuracy >= floor - _TOLERANCE and not s <= sent]
    if not missing:
        return ""
    nearest = min(missing, key=lambda s: (len(s - sent), -profile.accuracy[s], format_set(s)))
    more = ", ".join(sorted(nearest - sent))
    return f"; with {more} as well, {format_set(nearest)} has {profile.accuracy[nearest]:.4g}"


def _worth_running(profile: ModelProfile, sent: ModalitySet, sets: Collection[ModalitySet], items: int) -> ModalitySet:
    """What was sent; or, if something in it does not help, the cheapest set that is as good as any that is no dearer.

    As good are accuracies that the samples of the profile cannot tell apart. The caller wants what it sent, so that is
    judged in favour of what was sent: by the least difference that so many samples can show.

    Args:
        profile: the model's.
        sent: the modality set.
        sets: those that may be run, with `sent`.
        items: of the job.
    """
    least_difference = profile.least_difference
    near = [s for s in sets if profile.accuracy[s] >= profile.accuracy[sent] - least_difference]
    if near == [sent]:
        return sent
    costs = {s: profile.cost_ms(s, items) for s in near}
    no_dearer = [s for s in near if costs[s] <= costs[sent]]
    most = max(profile.accuracy[s] for s in no_dearer)
    as_good = [s for s in no_dearer if profile.accuracy[s] >= most - least_difference]
    return min(as_good, key=lambda s: (costs[s], -profile.accuracy[s], -len(s)))


def _first(preferred: Strategy, options: Sequence[Option]) -> list[Option]:
    """Prefers a strategy, even where a cheaper one is as accurate; those that are no cheaper are not wanted."""
    others = [option for option in options if option.strategy.cost_ms < preferred.cost_ms]
    most = max((option.value for option in others), default=0.0)
    return [Option(preferred, max(preferred.accuracy, most + _THRIFT)), *others]


def _why_not(modality_set: ModalitySet, is_up: Callable[[ModalitySet], bool]) -> str:
    """Which services a modality set waits for."""
    if not is_up(frozenset()):
        return "fusion is away"
    away = ", ".join(f"encoder/{m}" for m in sorted(modality_set) if not is_up(frozenset({m})))
    return f"{away} is away" if away else f"selector still loads and measures {format_set(modality_set)}"
