"""What jobs may run: floors and strategies, worked out once for jobs that are alike.

They depend on what a job asks for, on which services are there, and on what is known of its model. While none of that
changes, the next job that asks for the same gets the same.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeVar

from mosel.errors import InputsNeeded, ServiceUnavailable
from mosel.modality import ModalitySet, format_set
from selector.core.floors import Floor, Outcomes, floor_of
from selector.core.frontier import Frontiers, Strategy
from selector.core.jobs import Job, Option
from selector.core.options import Rounding, allowed_options, rounding_of, runnable
from selector.core.policies import Queued
from selector.core.profile import ModelProfile
from selector.core.resources import Resources
from selector.core.stages import Remaining, Stages

# Terms that are kept for each model, and offers.
_KEPT = 512

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Offer:
    """The strategies for some items of a job.

    Attributes:
        options: the preferred one first; at least one.
        lefts: what is left to do with each.
        values: what each is worth per item.
        cheapest: index of the cheapest.
        without: modalities that the items would run, were their encoders there.
    """

    options: Sequence[Option]
    lefts: Sequence[Remaining]
    values: Sequence[float]
    cheapest: int
    without: ModalitySet = frozenset()

    def queued(self, job: Job) -> Queued:
        """A job that has not started, as a policy sees it."""
        return Queued(self.lefts, self.values, self.cheapest, job.size, job.deadline, late_ok=job.late_ok)


@dataclass(frozen=True, eq=False)
class Terms:
    """What a new job gets.

    Attributes:
        floor: what its items must have.
        offer: the strategies that it may use.
        rounding: how jobs like it use all of a guaranteed loss, or None.
        rounded: the floors of those that run the cheaper strategy for it, and of the others.
        outcomes: what became of such jobs; a mix of sets that one had is what the next is likely to have.
    """

    floor: Floor
    offer: Offer
    rounding: Rounding | None
    rounded: tuple[Floor, Floor]
    outcomes: Outcomes = field(default_factory=dict)


class Offers:
    """Of all models.

    Args:
        profiles: by model; their latencies may arrive later, and models may come and go.
        resources: where work runs.
        stages: the steps of every model.
        full_only: jobs run everything that was sent, or the reference set.
        refuse: floors that nothing guarantees are refused; else the reference set is run for them.
    """

    def __init__(
        self,
        profiles: Mapping[str, ModelProfile],
        resources: Resources,
        stages: Stages,
        *,
        full_only: bool,
        refuse: bool,
    ) -> None:
        self._profiles, self._resources, self._stages = profiles, resources, stages
        self._full_only, self._refuse = full_only, refuse
        self._frontiers = {model: Frontiers(profile) for model, profile in profiles.items()}
        self._terms, self._offers = _Kept[Terms](), _Kept[Offer]()

    def add(self, model: str) -> None:
        """Jobs may name one more model."""
        self._frontiers[model] = Frontiers(self._profiles[model])

    def forget(self, model: str) -> None:
        """No job will name a model any more, or its latencies have changed."""
        del self._frontiers[model]
        self._terms.forget(model)
        self._offers.forget(model)

    def terms(self, job: Job) -> Terms:
        """What a new job gets.

        Raises:
            FloorUnreachable, ServiceUnavailable.
            InputsNeeded: what was sent does not do, and all that its caller has would.
        """
        sent = job.modalities, job.available
        key = *sent, job.min_accuracy, job.max_accuracy_loss, job.exact, job.effort, job.size
        try:
            return self._terms.of(job.model, self._state(job.model), key, lambda: self._new_terms(job))
        except ServiceUnavailable:
            if not job.is_part:
                raise
            wanted = self.wanted(job)
            raise InputsNeeded(
                f"what is asked for cannot be met now with {format_set(job.modalities)} alone; "
                f"send {', '.join(sorted(wanted))}",
                wanted,
            ) from None

    def wanted(self, job: Job) -> ModalitySet:
        """The modalities that jobs like one use where time is no matter, had their callers sent all that they have.

        Raises:
            FloorUnreachable, ServiceUnavailable.
        """
        terms = self.terms(job.sent_whole)
        preferred = terms.offer.options[0].strategy.modalities
        return preferred if terms.rounding is None else preferred | terms.rounding.cheaper.modalities

    def offer(self, job: Job, floor: Floor, items: int, least: float) -> Offer:
        """The strategies for items of a job that need a mean score, with the services that are there.

        Raises:
            FloorUnreachable, ServiceUnavailable.
        """
        key = floor, job.exact, job.effort, items, least
        state = self._state(job.model)
        return self._offers.of(job.model, state, key, lambda: self._new_offer(job, floor, items, least))

    def of(self, job: Job, options: Sequence[Option], without: ModalitySet = frozenset()) -> Offer:
        """Options of a job, and what is left to do with each."""
        lefts = [self._stages.remaining(job.model, option.strategy) for option in options]
        cheapest = min(range(len(options)), key=lambda i: options[i].strategy.cost_ms)
        return Offer(options, lefts, [option.value for option in options], cheapest, without)

    def frontier(self, job: Job, most: int) -> list[Strategy]:
        """At most so many strategies for a job's size over what it sent, cheapest first."""
        profile = self._profiles[job.model]
        sets = runnable(profile, profile.accuracy, job.modalities, self._is_up(profile))
        return self._frontiers[job.model].of(sets, job.size).thin(most) if sets else []

    def statistics(self) -> Counter[str]:
        """Of the frontiers of all models."""
        counts: Counter[str] = Counter()
        for frontiers in self._frontiers.values():
            counts.update(frontiers.statistics())
        return counts

    def _new_terms(self, job: Job) -> Terms:
        profile = self._profiles[job.model]
        floor = floor_of(profile, job, refuse=self._refuse)
        offer = self.offer(job, floor, job.size, floor.least)
        rounding = None
        if not self._full_only:
            rounding = rounding_of(profile, self._frontiers[job.model], job, floor, self._is_up(profile))
        if rounding is None:
            return Terms(floor, offer, None, (floor, floor))
        leasts = rounding.cheaper.accuracy, rounding.otherwise
        below, above = (replace(floor, least=least, over_all=floor.least) for least in leasts)
        return Terms(floor, offer, rounding, (below, above))

    def _new_offer(self, job: Job, floor: Floor, items: int, least: float) -> Offer:
        options = self._options(job, floor, items, least)
        lacking, is_served = self._profiles[job.model].lacking, self._resources.is_served
        away = frozenset(m for m in job.everything if not is_served(m, lacking, staying=True))
        preferred = self._options(job.sent_whole, floor, items, least, whole=True)[0].strategy if away else None
        return self.of(job, options, away & preferred.modalities if preferred else frozenset())

    def _options(self, job: Job, floor: Floor, items: int, least: float, *, whole: bool = False) -> list[Option]:
        """The strategies for items of a job with the services that are there, or as if all were (`whole`)."""
        profile, frontiers = self._profiles[job.model], self._frontiers[job.model]
        is_up = (lambda _: True) if whole else self._is_up(profile)
        return allowed_options(profile, frontiers, job, floor, items, least, is_up, self._full_only)

    def _is_up(self, profile: ModelProfile) -> Callable[[ModalitySet], bool]:
        return partial(self._resources.is_up, lacking=profile.lacking)

    def _state(self, model: str) -> Hashable:
        return self._resources.version, self._profiles[model].state


class _Kept(Generic[T]):
    """What was worked out for each model in its present state, by what it was asked with; the newest so many."""

    def __init__(self) -> None:
        self._of_models: dict[str, tuple[Hashable, dict[Hashable, T]]] = {}

    def of(self, model: str, state: Hashable, key: Hashable, make: Callable[[], T]) -> T:
        """What was made of a key in this state of the model; whatever was made in another one goes."""
        before, kept = self._of_models.get(model, (None, {}))
        if before != state:
            kept = {}
            self._of_models[model] = state, kept
        found = kept.get(key)
        if found is None:
            found = kept[key] = make()
            if len(kept) > _KEPT:
                del kept[next(iter(kept))]
        return found

    def forget(self, model: str) -> None:
        """Nothing of a model counts any more."""
        self._of_models.pop(model, None)
