"""What the items of a job must have on average, and what an answer's accuracy stands on."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mosel.errors import FloorUnreachable
from mosel.modality import ModalitySet, format_set, subsets
from selector.core.certificate import Ladder
from selector.core.frontier import Scores
from selector.core.jobs import Assurance, Guarantee, Job
from selector.core.profile import ModelProfile

# Sums of floats: a floor equal to a profile's accuracy is met by it.
TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Floor:
    """What the items of a job must have on average.

    Attributes:
        scores: what an item of each set that may be run counts for, 0..1.
        least: the mean score that all items need.
        reference: the set that is run where nothing else will do.
        ladder: of what was sent: turns mean scores into guarantees; None without calibration rows.
        of_loss: scores and guarantees are of agreement with the reference, not of accuracy.
        asked: what was asked for, in words.
        over_all: what the items of all jobs with this floor score on average, where some have a little less than it
            needs and others a little more; else None.
        missed: nothing guarantees it; so the reference set is run, and this says what can be guaranteed.
    """

    scores: Scores
    least: float
    reference: ModalitySet
    ladder: Ladder | None
    asked: str
    of_loss: bool = False
    missed: str = ""
    over_all: float | None = None

    def assurance(self, counts: Mapping[ModalitySet, int]) -> Assurance:
        """What can be said of items that run these sets."""
        ladder, bound = self.ladder, bound_of(self.ladder, counts)
        if ladder is None or bound is None:
            return Assurance(Guarantee.ESTIMATE)
        if self.over_all is not None:
            bound = ladder.guaranteed(self.over_all)
        guarantee = Guarantee.NONE if self.missed else Guarantee.CALIBRATED
        note = self.missed or ("approximate: calibrated on few groups" if ladder.approximate else "")
        if self.of_loss:
            return Assurance(guarantee, loss=1 - bound, confidence=ladder.confidence, note=note)
        return Assurance(guarantee, accuracy=bound, confidence=ladder.confidence, note=note)


@dataclass(frozen=True)
class Outcome:
    """What becomes of items that run so many of each set.

    Attributes:
        score: the mean over the items, 0..1, of what they count for towards the floor.
        expected_accuracy: the mean over the items, 0..1, by what was measured.
        assurance: what can be said of the accuracy of the answer.
        saved: the share of the compute of everything that its caller has which is not spent, 0..1.
    """

    score: float
    expected_accuracy: float
    assurance: Assurance
    saved: float


# By floor and items of each set.
Outcomes = dict[tuple[Floor, frozenset[tuple[ModalitySet, int]]], Outcome]


def outcome_of(
    floor: Floor, profile: ModelProfile, everything: ModalitySet, counts: Mapping[ModalitySet, int]
) -> Outcome:
    """What becomes of a job that runs so many items of each set, where its caller has some modalities."""
    return Outcome(
        score=mean_score(floor.scores, counts),
        expected_accuracy=mean_score(profile.accuracy, counts),
        assurance=floor.assurance(counts),
        saved=profile.saved(counts, everything),
    )


def bound_of(ladder: Ladder | None, counts: Mapping[ModalitySet, int]) -> float | None:
    """What items that run these sets are guaranteed on average, 0..1; None where the ladder says nothing of them."""
    if ladder is None or not counts.keys() <= ladder.scores.keys():
        return None
    return ladder.guaranteed(mean_score(ladder.scores, counts))


def mean_score(scores: Scores, counts: Mapping[ModalitySet, int]) -> float:
    """The mean over so many items of each set."""
    # Not the mean of equal numbers, which is a little less than each.
    values = {scores[s] for s in counts}
    mean = sum(scores[s] * count for s, count in counts.items()) / sum(counts.values())
    return values.pop() if len(values) == 1 else mean


def floor_of(profile: ModelProfile, job: Job, *, refuse: bool = False) -> Floor:
    """What the items of a job must have.

    Args:
        profile: the model's.
        job: the job.
        refuse: a floor that nothing guarantees is refused; else the reference set is run for it.

    Raises:
        FloorUnreachable: what the caller has is not accurate enough, or that is not guaranteed and `refuse` says so.
    """
    if job.max_accuracy_loss is not None:
        return _floor_of_loss(profile, job.everything, job.max_accuracy_loss)
    if job.min_accuracy is not None:
        return _floor_of_accuracy(profile, job, job.min_accuracy, refuse=refuse)
    return _no_floor(profile, job.everything)


def best_of(profile: ModelProfile, candidates: Collection[ModalitySet]) -> str:
    """What a refusal says of the alternatives."""
    best = profile.best(candidates)
    if best is None:
        return "nothing else could be had"
    return f"the best that could be had is {profile.accuracy[best]:.4g} with {format_set(best)}"


def _floor_of_loss(profile: ModelProfile, sent: ModalitySet, most: float) -> Floor:
    asked, ladder = f"max_accuracy_loss {most:.4g}", profile.loss_ladder(sent)
    least = None if ladder is None else ladder.least(1 - most)
    if ladder is None or least is None:
        reference = _most_accurate(profile, sent)
        return Floor(profile.accuracy, profile.accuracy[reference] - most, reference, None, asked)
    return Floor(ladder.scores, least, ladder.reference, ladder, asked, of_loss=True)


def _floor_of_accuracy(profile: ModelProfile, job: Job, wanted: float, *, refuse: bool) -> Floor:
    sent, asked = job.everything, f"min_accuracy {wanted:.4g}"
    reference = _most_accurate(profile, sent)
    if profile.accuracy[reference] < wanted - TOLERANCE:
        raise FloorUnreachable(
            f"{asked} cannot be met with {format_set(sent)}; {best_of(profile, subsets(sent))}"
            f"{_what_is_missing(profile, sent, wanted)}"
        )
    ladder = profile.accuracy_ladder(sent)
    if ladder is None:
        return Floor(profile.accuracy, wanted, reference, None, asked)
    least = ladder.least(wanted)
    if least is not None:
        return Floor(ladder.scores, least, ladder.reference, ladder, asked)
    best = f"the best floor that can be with {format_set(sent)} is {_rounded_down(ladder.best)}"
    missed = f"{asked} cannot be guaranteed; {best}"
    if refuse:
        raise FloorUnreachable(missed)
    return Floor(ladder.scores, max(ladder.scores.values()), ladder.reference, ladder, asked, missed=missed)


def _no_floor(profile: ModelProfile, sent: ModalitySet) -> Floor:
    """Everything that was sent is wanted; under pressure, what the model's default allows."""
    full, default = profile.accuracy[sent], profile.default_min_accuracy
    least = full if default is None else min(full, default)
    of_accuracy = profile.accuracy_ladder(sent)
    ladder = profile.loss_ladder(sent) if of_accuracy is None else of_accuracy
    of_loss = of_accuracy is None and ladder is not None
    return Floor(profile.accuracy, least, sent, ladder, f"accuracy {least:.4g}", of_loss=of_loss)


def _most_accurate(profile: ModelProfile, sent: ModalitySet) -> ModalitySet:
    return max(reversed(subsets(sent)), key=lambda s: profile.accuracy[s])


def _what_is_missing(profile: ModelProfile, sent: ModalitySet, floor: float) -> str:
    """The fewest modalities that would have to be sent, too, for a floor to be met; empty if nothing helps."""
    missing = [s for s, accuracy in profile.accuracy.items() if accuracy >= floor - TOLERANCE and not s <= sent]
    if not missing:
        return ""
    nearest = min(missing, key=lambda s: (len(s - sent), -profile.accuracy[s], format_set(s)))
    more = ", ".join(sorted(nearest - sent))
    return f"; with {more} as well, {format_set(nearest)} has {profile.accuracy[nearest]:.4g}"


def _rounded_down(bound: float) -> str:
    """A bound, rounded so that it still holds."""
    return f"{int(bound * 10_000) / 10_000:.4f}"
