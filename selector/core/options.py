"""Which strategies a job may use, in the order in which they are preferred; never one below its accuracy floor."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mosel.errors import FloorUnreachable, ServiceUnavailable
from mosel.modality import ModalitySet, format_set, subsets
from selector.core.floors import TOLERANCE, Floor, best_of, mean_score
from selector.core.frontier import Frontiers, Scores, Strategy
from selector.core.jobs import Effort, Job, Option
from selector.core.profile import ModelProfile

# A policy weighs so many strategies per job; a frontier has more, hardly different ones.
_MOST_OPTIONS = 8
# Of what little thrift is worth beside accuracy: it only breaks ties and orders.
_THRIFT = 1e-3


def strategy_of(profile: ModelProfile, counts: Mapping[ModalitySet, int], scores: Scores | None = None) -> Strategy:
    """The strategy that runs so many items of each set; `scores` as of `frontier`."""
    ordered = tuple(sorted(counts.items(), key=lambda entry: format_set(entry[0])))
    mean = mean_score(profile.accuracy if scores is None else scores, counts)
    return Strategy(ordered, mean, profile.mixed_cost_ms(counts))


def allowed_options(
    profile: ModelProfile,
    frontiers: Frontiers,
    job: Job,
    floor: Floor,
    items: int,
    least: float,
    is_up: Callable[[ModalitySet], bool],
    full_only: bool,
) -> list[Option]:
    """The strategies for items of a job that meet its floor and could run now, the preferred one first.

    Args:
        profile: the model's.
        frontiers: the model's.
        job: the job.
        floor: the job's.
        items: how many of its items are to be planned.
        least: the score that they need on average.
        is_up: whether all encoders of a set are there.
        full_only: everything that was sent is run, or the reference set where there is one, whatever the floor.

    Raises:
        FloorUnreachable: no strategy over all that the caller has meets the floor; names the best set.
        ServiceUnavailable: one would, but an encoder or an input that it needs is away; names the best that is left.
    """
    scores = floor.scores
    candidates = _candidates(job, floor, full_only)
    accurate = [s for s in candidates if scores[s] >= least - TOLERANCE]
    if not accurate:
        raise FloorUnreachable(
            f"{floor.asked} cannot be met with {format_set(job.everything)}; {best_of(profile, candidates)}"
        )
    running = runnable(profile, candidates, job.modalities, is_up)
    strategies = frontiers.of(running, items, scores).thin(_MOST_OPTIONS, least - TOLERANCE) if running else []
    if not strategies:
        raise ServiceUnavailable(
            f"service {_why_not(accurate[-1], is_up)}, so no modality set that meets {floor.asked} can be run; "
            f"{best_of(profile, running)}"
        )
    everything = profile.observed and job.everything in running and scores[job.everything] >= least - TOLERANCE
    effort = job.effort or (Effort.CHEAPEST if job.has_floor else Effort.BEST)
    if effort is Effort.CHEAPEST and not everything:
        return [Option(s, -_THRIFT * i) for i, s in enumerate(strategies)]
    by_score = [Option(s, s.accuracy) for s in reversed(strategies)]
    if everything:
        return _first(strategy_of(profile, {job.everything: items}, scores), by_score)
    if not job.has_floor and job.everything in running:
        accurate = [s for s in running if scores[s] >= least - TOLERANCE]
        return _first(strategy_of(profile, {_worth_running(profile, job.everything, accurate, items): items}), by_score)
    return by_score


@dataclass(frozen=True)
class Rounding:
    """A strategy that is a little too cheap for a floor, and how many jobs may run it.

    Attributes:
        cheaper: the strategy.
        share: 0..1, of the jobs; the others run the cheapest that meets the floor.
        otherwise: the mean score of that.
    """

    cheaper: Strategy
    share: float
    otherwise: float


def rounding_of(
    profile: ModelProfile, frontiers: Frontiers, job: Job, floor: Floor, is_up: Callable[[ModalitySet], bool]
) -> Rounding | None:
    """How jobs together use all of a guaranteed loss; None where it is used up, or not to be used.

    A job has whole items, and one of a single item can run one set. So of jobs that are alike some run the next
    strategy on the frontier, just so many that the mean score over all of them is what the floor needs.
    """
    if not floor.of_loss or not job.has_floor or job.effort is Effort.BEST or profile.observed:
        return None
    running = runnable(profile, _candidates(job, floor, full_only=False), job.modalities, is_up)
    found = frontiers.of(running, job.size, floor.scores)
    first = int(np.searchsorted(found.accuracy, floor.least - TOLERANCE))
    if not 0 < first < len(found):
        return None
    less, otherwise = float(found.accuracy[first - 1]), float(found.accuracy[first])
    return Rounding(found[first - 1], (otherwise - floor.least) / (otherwise - less), otherwise)


def _candidates(job: Job, floor: Floor, full_only: bool) -> list[ModalitySet]:
    """The sets that a job may mix."""
    if job.exact or (full_only and floor.ladder is None):
        return [job.everything]
    return [floor.reference] if full_only else [s for s in subsets(job.everything) if s in floor.scores]


def runnable(
    profile: ModelProfile, candidates: Iterable[ModalitySet], sent: ModalitySet, is_up: Callable[[ModalitySet], bool]
) -> list[ModalitySet]:
    """Those of some sets, all of modalities that were sent, that could run now; `is_up` as in `allowed_options`."""
    there = frozenset(modality for modality in sent if is_up(frozenset({modality})))
    return [s for s in candidates if s <= there and profile.can_run(s)]


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
