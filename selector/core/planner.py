"""Plans: who is admitted, and which strategy each queued job has."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from mosel.errors import InputsNeeded, MoselError
from mosel.modality import FUSION, ModalitySet
from selector.core.admission import OfferedLoad, Promises, refusal
from selector.core.forecast import Forecast
from selector.core.frontier import Strategy
from selector.core.jobs import Assurance, Job, Option
from selector.core.offers import Offers
from selector.core.options import strategy_of
from selector.core.policies import PLANNED_JOBS, POLICIES, Choices, Queued, finish_times, placed
from selector.core.profile import ModelProfile
from selector.core.resources import Resources
from selector.core.stages import Remaining, Stages
from selector.core.work import Work

# Plans are made at most so often, and the more jobs they have the less often: a plan of one job takes about a tenth of
# that, and while the selector plans, no call is handed out. Between two, newcomers join the plan as it is.
_REPLAN_S, _REPLAN_S_PER_JOB = 0.010, 0.0015
# Of a frontier that is shown: each strategy has a forecast of its own.
_SHOWN = 64


class Planner:
    """Knows the models, and applies the policy to a queue of jobs.

    Args:
        profiles: by model; their latencies may arrive later, and models may come and go.
        policy: a key of `POLICIES`.
        resources: where work runs.
        refuse: floors that nothing guarantees are refused; else the reference set is run for them.

    Attributes:
        stages: the steps of every model.
        promises: what became of those that were admitted.
    """

    def __init__(
        self, profiles: Mapping[str, ModelProfile], policy: str, resources: Resources, *, refuse: bool = False
    ) -> None:
        self._policy, self._resources = policy, resources
        self._offered_load = OfferedLoad()
        self._next_plan_at = 0.0
        self.stages = Stages(profiles)
        self.promises = Promises(resources.reply_s)
        self._offers = Offers(profiles, resources, self.stages, full_only=policy == "all", refuse=refuse)

    def add(self, model: str) -> None:
        """Jobs may name one more model."""
        self._offers.add(model)

    def forget(self, model: str) -> None:
        """No job will name a model any more."""
        self._offers.forget(model)
        self.stages.forget(model)

    def new_work(self, job: Job, profile: ModelProfile, now: float) -> Work:
        """A job with the strategies that it may use.

        Raises:
            FloorUnreachable, ServiceUnavailable, InputsNeeded.
        """
        terms = self._offers.terms(job)
        offer = terms.offer
        return Work(
            job,
            profile,
            terms.floor,
            now,
            offer.options,
            offer.queued(job),
            without=offer.without,
            outcomes=terms.outcomes,
        )

    def round(self, work: Work) -> None:
        """Has a job with a guaranteed loss run a strategy a little too cheap, as often as that is right over all jobs.

        Which jobs do is drawn by their ids, after they were admitted as if none did: whether a job is answered must not
        depend on it.
        """
        terms = self._offers.terms(work.job)
        if terms.rounding is None:
            return
        drawn = random.Random(b"round" + work.job.id).random() < terms.rounding.share  # noqa: S311 (fair, not secret)
        below, above = terms.rounded
        work.floor = below if drawn else above
        if drawn and self._plan_rest(work):
            work.preferred = work.least = below.least

    def outlook(self, work: Work) -> tuple[Assurance, float]:
        """What answers to jobs like one that has not started stand on, and the share of compute that they save."""
        rounding, saved = self._offers.terms(work.job).rounding, work.outcome.saved
        if rounding is None:
            return work.outcome.assurance, saved
        cheaper = work.profile.saved(dict(rounding.cheaper.counts), work.job.everything)
        floor = replace(work.floor, over_all=work.floor.least)
        return floor.assurance(work.counts), saved + rounding.share * (cheaper - saved)

    def wanted(self, job: Job, used: Iterable[ModalitySet] = ()) -> ModalitySet:
        """What the next job like one should bring; empty if it could not be answered.

        Args:
            job: the job.
            used: the sets that it has run: policies choose others where time is short.
        """
        try:
            return self._offers.wanted(job).union(*used)
        except MoselError:
            return frozenset()

    def lost(self, job: Job, error: MoselError) -> MoselError:
        """What a job ends with that an error left without a plan: that more inputs would help, if so."""
        try:
            self._offers.terms(job)
        except InputsNeeded as needed:
            return needed
        except MoselError:
            pass
        return error

    def arrived(self, work: Work, now: float) -> None:
        """A job came, whether it will be admitted or not."""
        cheapest = work.queued.options[work.queued.cheapest]
        self._offered_load.add(self._resources.idle_forecast(now).demands([[cheapest]], ())[0][0].seconds, now)

    def admit(self, works: Sequence[Work], newcomer: Work, now: float) -> Choices:
        """Plans with a newcomer in the queue; those who are in it already keep their promise. Changes no strategy.

        Args:
            works: the queue in deadline order, with the newcomer.
            newcomer: one of them.
            now: seconds on the driver's clock.

        Raises:
            DeadlineUnreachable, Overloaded.
        """
        at = works.index(newcomer)
        if newcomer.job.late_ok and at >= PLANNED_JOBS and at == len(works) - 1:
            # It waits for its turn behind everyone else: nothing to check, and nothing to plan yet.
            newcomer.predicted = newcomer.job.deadline
            return [*[None] * at, newcomer.queued.cheapest]
        queue, forecast = [self._as_queued(work) for work in works], self._forecast(now)
        spare_s = self._spare_s(works, at, now)
        if spare_s:
            queue[at] = replace(queue[at], deadline=newcomer.job.deadline - spare_s)
        plan: Choices = [0] * len(works) if self.is_due(now) else [work.chosen for work in works]
        plan[at] = 0
        if _unhurried(queue, forecast, plan):
            newcomer.predicted = finish_times(queue, forecast, plan)[at] or now
            return plan
        if self._resources.is_one and (hopeless := _hopeless(queue, forecast, at)):
            raise self._refusal(newcomer, queue, forecast, hopeless, at, spare_s)
        if self.is_due(now):
            choices = self._reassigned(queue, forecast)
        else:
            choices = placed(queue, forecast, [work.chosen for work in works], at)
        times = finish_times(queue, forecast, choices)
        kept = None not in choices and not _broken(queue, forecast, choices, times, at)
        newcomer.predicted = times[at] or now
        if not kept or (newcomer.predicted > queue[at].deadline and not newcomer.job.late_ok):
            raise self._refusal(newcomer, queue, forecast, choices, at, spare_s)
        return choices

    def apply(self, works: Sequence[Work], choices: Choices) -> None:
        """Gives each job its option, as far as its items are not committed."""
        for work, choice in zip(works, choices, strict=True):
            # What has not started has what it was given last.
            changes = choice != work.chosen or work.started_at is not None
            if choice is not None and changes and work.uncommitted:
                work.choose(choice)

    def replan(self, works: Sequence[Work], now: float) -> list[Work]:
        """Reassigns strategies at the head of the queue; returns the jobs dropped as they can no longer be met."""
        works = works[:PLANNED_JOBS]
        if not any(work.uncommitted for work in works):
            return []
        queue = [self._as_queued(work) for work in works]
        choices = self._reassigned(queue, self._forecast(now))
        self.apply(works, choices)
        return [work for work, choice in zip(works, choices, strict=True) if choice is None]

    def is_due(self, now: float) -> bool:
        """Whether the last exact plan is long enough ago."""
        return now >= self._next_plan_at

    def plan_without(self, work: Work, lane: str) -> bool:
        """Plans anew what a service that went away has not begun of a job; False if the job cannot do without it.

        A call that the service has already may still come back, well or not.
        """
        if lane == FUSION and work.unfinished():
            return False
        work.begin_again(work.unsent.get(lane, ()))
        return not work.uncommitted or self._plan_rest(work)

    def plan_again(self, work: Work, now: float) -> bool:
        """Plans anew what is not committed of a job after a call for it failed; False if there is no time for that."""
        if not self._plan_rest(work):
            return False
        left_s = work.job.ends - now
        in_time = [i for i, left in enumerate(work.queued.options) if self._idle_s(left, now) <= left_s]
        if in_time:
            work.choose(in_time[0])
        return bool(in_time)

    def _plan_rest(self, work: Work) -> bool:
        """Plans what is not committed of a job with the services that are there; False if its floor needs more."""
        try:
            offer = self._offers.offer(work.job, work.floor, work.uncommitted, work.floor_of_rest)
        except MoselError:
            return False
        work.options, work.queued = offer.options, offer.queued(work.job)
        work.without |= offer.without
        work.choose(0)
        return True

    def frontier(self, job: Job, now: float) -> list[tuple[Strategy, float]]:
        """Strategies for a job's size over what it sent, cheapest first, with their milliseconds on an idle system."""
        strategies = self._offers.frontier(job, _SHOWN)
        return [(s, self._idle_s(self.stages.remaining(job.model, s), now) * 1000) for s in strategies]

    def statistics(self) -> Counter[str]:
        """Of the frontiers of all models."""
        return self._offers.statistics()

    def _reassigned(self, queue: Sequence[Queued], forecast: Forecast) -> Choices:
        choices = POLICIES[self._policy](queue, forecast)
        if any(choices):
            jobs = min(len(queue), PLANNED_JOBS)
            self._next_plan_at = forecast.now + max(_REPLAN_S, _REPLAN_S_PER_JOB * jobs)
        return choices

    def _forecast(self, now: float) -> Forecast:
        return self._resources.forecast(now, self._offered_load.shares(now))

    def _idle_s(self, left: Remaining, now: float) -> float:
        return self._resources.idle_forecast(now).finish([left])[0] - now

    def _spare_s(self, works: Sequence[Work], at: int, now: float) -> float:
        """Seconds that the newcomer at a place in the queue must have to spare."""
        job = works[at].job
        ahead_s = max(works[at - 1].predicted - now, 0.0) if at else 0.0
        return 0.0 if job.late_ok else self.promises.spare_s(job.deadline - now, ahead_s, now)

    def _refusal(
        self,
        work: Work,
        queue: Sequence[Queued],
        forecast: Forecast,
        choices: Choices,
        at: int,
        spare_s: float,
    ) -> MoselError:
        now, options = forecast.now, work.queued.options
        fastest = work.queued.cheapest
        if not self._resources.is_one:
            fastest = min(range(len(options)), key=lambda i: self._idle_s(options[i], now))
        others = [other.cheapest if choice is None else choice for other, choice in zip(queue, choices, strict=True)]
        behind = finish_times(queue, forecast, [*others[:at], fastest, *others[at + 1 :]])[at] or now
        idle_s = self._idle_s(options[fastest], now)
        return refusal(work, now, fastest, idle_s, behind + spare_s - now, partial(self._fitting, work, now))

    def _fitting(self, work: Work, now: float) -> list[ModalitySet]:
        """The modality sets with which a job would be in time on an idle system, whatever its floor."""
        profile, job = work.profile, work.job
        sets = [s for s in profile.accuracy if s <= job.modalities and profile.can_run(s)]
        lefts = {s: self.stages.remaining(job.model, strategy_of(profile, {s: job.size})) for s in sets}
        return [s for s, left in lefts.items() if self._idle_s(left, now) <= job.deadline - now]

    def _as_queued(self, work: Work) -> Queued:
        """The job as a policy sees it now."""
        if work.started_at is None or work.is_settled:
            return work.queued
        job, stage = work.job, partial(self.stages.of, work.job.model)
        committed = Remaining(
            tuple((stage(modality), len(items)) for modality, items in work.unsent.items()),
            tuple((stage(modality_set), count) for modality_set, count in work.unfinished().items()),
            max((under_way.due for under_way in self._resources.calls(work.calls)), default=0.0),
        )
        if not work.uncommitted:
            work.chosen, work.is_settled = 0, True
            work.queued = Queued((committed,), (0.0,), 0, job.size, job.deadline, True, job.late_ok)
            return work.queued
        try:
            offer = self._offers.offer(job, work.floor, work.uncommitted, work.floor_of_rest)
        except MoselError:
            # Rounding left none that meets the floor to the last digit: the plan stays as it is.
            offer = self._offers.of(job, [Option(strategy_of(work.profile, work.planned, work.floor.scores), 0.0)])
        work.replace_options(offer.options)
        lefts = [committed + left for left in offer.lefts]
        return Queued(lefts, offer.values, offer.cheapest, work.uncommitted, job.deadline, True, job.late_ok)


def _unhurried(queue: Sequence[Queued], forecast: Forecast, plan: Sequence[int | None]) -> bool:
    """Whether there is so much time that under every policy all jobs keep what a plan gives them."""
    lefts = [job.options[choice] for job, choice in zip(queue, plan, strict=True) if choice is not None]
    # What tells whether a newcomer is hopeless.
    lefts += [job.options[job.cheapest] for job, choice in zip(queue, plan, strict=True) if choice != job.cheapest]
    return forecast.cautious().latest(lefts) <= min(job.deadline for job in queue)


def _hopeless(queue: Sequence[Queued], forecast: Forecast, at: int) -> Choices:
    """Everyone's cheapest options if the newcomer at a place is late even so, which no plan can help; else nothing.

    Plans take time, and under overload most are refused. On one resource the cheapest options are the fastest.
    """
    choices: Choices = [job.cheapest for job in queue]
    answered = finish_times(queue[: at + 1], forecast, choices[: at + 1])[at] or 0.0
    return choices if answered > queue[at].deadline and not queue[at].late_ok else []


def _broken(
    queue: Sequence[Queued], forecast: Forecast, choices: Choices, times: Sequence[float | None], at: int
) -> bool:
    """Whether the newcomer at a place makes a job late that would be in time without it."""
    behind = range(at + 1, len(queue))
    late = [i for i in behind if not queue[i].late_ok and (times[i] or 0.0) > queue[i].deadline]
    if not late:
        return False
    without = finish_times(queue, forecast, [*choices[:at], None, *choices[at + 1 :]])
    return any((without[i] or 0.0) <= queue[i].deadline for i in late)
