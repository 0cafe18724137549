"""The scheduler core: which rows of which job go to which service, and when. No sockets, no threads, no clock.

Jobs wait in deadline order, priorities considered (`Job.order`). A *lane* is one service that computes: an encoder of a
modality, of which there may be several, or fusion. Lanes on the same resource share its tokens, and each call holds
one. The driver feeds events in and asks `next` what to do:

    submit(job, now)                       -> the job's work, or an error
    next(now)                              -> EncodeCall | FuseCall | Ended | Wait
    completed(call, now)                   -> the jobs that are answered by it
    failed(call, now)                      -> the jobs that are lost by it
    lane(name, up, resource)               -> the jobs that are lost by it
    remove_lane(name)                      no model has it any more
    leaving(name)                          no new job gets it
    cancelled(job_id)
    load(model, profile)                   jobs may name it from now on
    measured_again(model)                  its latencies have changed
    retire(model)                          no further jobs; those that are here go on
    drained()                              -> the retired models of which nothing is left
    spare_call(model, set, rows, now)      -> FuseCall for what nobody waits for, if nothing else needs the token
"""

import bisect
import heapq
from collections import Counter
from collections.abc import Mapping, Set

from mosel.errors import DeadlineExceeded, InvalidRequest, ModelNotFound, MoselError, Overloaded
from mosel.modality import FUSION, ModalitySet, format_set, modality_of
from selector.core.batching import next_batch
from selector.core.jobs import Call, EncodeCall, Ended, FuseCall, Job, Path, Plan, Rows, Wait
from selector.core.options import strategy_of
from selector.core.planner import Planner
from selector.core.policies import Choices
from selector.core.profile import ModelProfile
from selector.core.resources import CallInFlight, Resources
from selector.core.work import Work


class Scheduler:
    """All models of one selector.

    Args:
        profiles: by model; their latencies may arrive later.
        policy: a key of `POLICIES`.
        max_queued_items: bound on the items of all jobs on their way.
        tokens: calls under way at the same time on each resource.
        reply_ms: what an answer takes from here to the caller.
        refuse_unguaranteed: floors that nothing guarantees are refused; else the reference set is run for them.
    """

    def __init__(
        self,
        profiles: Mapping[str, ModelProfile],
        policy: str = "mosel",
        max_queued_items: int = 4096,
        tokens: int = 2,
        reply_ms: float = 0.0,
        *,
        refuse_unguaranteed: bool = False,
    ) -> None:
        self._profiles, self._max_queued_items = dict(profiles), max_queued_items
        self._retired: set[str] = set()
        modalities = {m for profile in profiles.values() for m in profile.modalities}
        self._resources = Resources((*sorted(modalities), FUSION), tokens, reply_ms)
        self._planner = Planner(self._profiles, policy, self._resources, refuse=refuse_unguaranteed)
        self._works: dict[bytes, Work] = {}
        self._queue, self._ended = list[Work](), list[Ended]()
        self._expiry: list[tuple[float, bytes]] = []
        self._queued_items = 0
        self._last_call = 0
        self._stale = False
        self._joined: frozenset[str] = frozenset()
        self.counters: Counter[str] = Counter()

    def submit(self, job: Job, now: float) -> Work:
        """Admits a job and plans its strategy.

        Raises:
            ModelNotFound, InvalidRequest, FloorUnreachable, DeadlineUnreachable, InputsNeeded, Overloaded,
            ServiceUnavailable.
        """
        self._check(job)
        work = self._planner.new_work(job, self._profiles[job.model], now)
        self._planner.arrived(work, now)
        exact = self._planner.is_due(now)
        self._planner.apply(self._queue, self._enqueued(work, now))
        self._planner.round(work)
        # An exact plan of everyone was just made with it.
        self._stale = not exact
        self._works[job.id] = work
        self._queued_items += job.size
        heapq.heappush(self._expiry, (job.ends, job.id))
        return work

    def next(self, now: float) -> Call | Ended | Wait:
        """The next thing to do; call it until it answers Wait."""
        while self._expiry and (self._expiry[0][1] not in self._works or self._expiry[0][0] <= now):
            work = self._works.get(heapq.heappop(self._expiry)[1])
            if work is not None and work.job.ends <= now:
                self._end(work, DeadlineExceeded("the deadline passed before the answer was there"), now)
        if self._stale and self._planner.is_due(now):
            self._stale = False
            for work in self._planner.replan(self._queue, now):
                self.counters["jobs_dropped"] += 1
                self._end(work, DeadlineExceeded("dropped: the deadline can no longer be met with any strategy"), now)
        if self._ended:
            return self._ended.pop()
        return self._dispatch(now) or Wait(self._expiry[0][0] if self._expiry else None)

    def completed(self, call: Call, now: float) -> list[bytes]:
        """A call came back well; returns the jobs that are answered by it."""
        under_way = self._over(call)
        stage = self._planner.stages.of(call.model, call.step).on(call.lane)
        stage.correction.learn(stage.profiled_ms(under_way.items), (now - under_way.started) * 1000, now)
        answered = []
        for rows, work in self._works_in(call):
            wanted = work.returned(call.id)
            if isinstance(call, EncodeCall):
                work.encoded(wanted)
                continue
            work.left -= len(wanted)
            if not work.left:
                self._planner.promises.answered(work.job, now)
                self.cancelled(rows.job_id)
                answered.append(rows.job_id)
        return answered

    def failed(self, call: Call, now: float) -> list[bytes]:
        """A call failed; returns the jobs that are lost by it.

        The items of the others begin again, once, each job by itself: with the same modality set or, where a service
        went away, with another that meets the floor.
        """
        # What it took says nothing about calls that go well.
        self._over(call)
        lost = []
        for rows, work in self._works_in(call):
            if not (wanted := work.returned(call.id)):
                continue
            work.alone = True
            first = work.may_try_again(wanted)
            work.begin_again(wanted)
            if first and self._planner.plan_again(work, now):
                self.counters["items_tried_again"] += len(wanted)
            else:
                self.cancelled(rows.job_id)
                lost.append(rows.job_id)
        return lost

    def lane(self, name: str, up: bool, resource: str = "cpu", joined: Set[str] = frozenset()) -> list[bytes]:
        """A service came or went; returns the jobs that are lost by it. Those that can do without it go on.

        Args:
            name: a modality, for its first encoder; `photo/2` for one more of `photo`; or fusion.
            up: whether it is there.
            resource: what it computes on.
            joined: of fusion: the modalities whose encoders it calls itself.
        """
        self._resources.set_lane(name, up, resource)
        if name == FUSION:
            self._joined = frozenset(joined)
        for profile in self._profiles.values():
            profile.joined = self._resources.without_replicas(self._joined)
        self._stale = True
        if up:
            return []
        gone, is_served = modality_of(name), self._resources.is_served
        unserved = [work for work in self._queue if not is_served(gone, work.profile.lacking)]
        lost = [work.job.id for work in unserved if not self._planner.plan_without(work, gone)]
        return [job_id for job_id in lost if self.cancelled(job_id)]

    def remove_lane(self, name: str) -> None:
        """Forgets a service that is down and that no model has."""
        self._resources.remove_lane(name)

    def leaving(self, name: str) -> None:
        """A service is about to end: new jobs do without it, those that are here go on."""
        self._resources.set_leaving(name)

    def cancelled(self, job_id: bytes) -> bool:
        """Forgets a job: nothing more is done for it. False if it is not known."""
        if (work := self._works.pop(job_id, None)) is None:
            return False
        self._queue.remove(work)
        self._queued_items -= work.job.size
        self._stale = True
        if len(self._expiry) > 2 * len(self._works) + 64:
            self._expiry = [(w.job.ends, w.job.id) for w in self._works.values()]
            heapq.heapify(self._expiry)
        return True

    def unwanted(self, job_id: bytes, now: float) -> None:
        """A caller stopped waiting. If no time is left for an answer, a promise was broken, if one was given at all."""
        work, promises = self._works.get(job_id), self._planner.promises
        if work is None:
            promises.unwanted(job_id, now)
        elif work.job.deadline - self._resources.reply_s <= now:
            promises.broken(work.job, now)

    def load(self, model: str, profile: ModelProfile) -> None:
        """Jobs may name a model from now on, again if it was retired.

        Args:
            model: not the name of another that is here.
            profile: of the model; the same one as before if it is still here.
        """
        self._resources.add_lanes(sorted(profile.modalities))
        self._retired.discard(model)
        if model not in self._profiles:
            self._profiles[model] = profile
            profile.joined = self._resources.without_replicas(self._joined)
            self._planner.add(model)

    def measured_again(self, model: str) -> None:
        """The latencies of a model have changed, while none of its jobs is here: what was made of the old ones goes."""
        self._planner.forget(model)
        self._planner.add(model)

    def retire(self, model: str) -> None:
        """Admits no more jobs of a model; those that are here go on. What is not known is passed over."""
        if model in self._profiles:
            self._retired.add(model)

    def serves(self, model: str) -> bool:
        """Whether jobs may name a model."""
        return model in self._profiles and model not in self._retired

    def drained(self) -> list[str]:
        """The retired models that no job and no call is left of; each is forgotten then."""
        in_use = {work.job.model for work in self._queue} if self._retired else set()
        over = [m for m in self._retired if m not in in_use and not self._resources.is_called_for(m)]
        for model in over:
            self._retired.discard(model)
            del self._profiles[model]
            self._planner.forget(model)
        return over

    def profile_of(self, model: str) -> ModelProfile:
        """What is known of a model that is here."""
        return self._profiles[model]

    def spare_call(self, model: str, modality_set: ModalitySet, rows: Rows, now: float) -> FuseCall | None:
        """A call for items of no job that is here, when `next` has nothing to do; None unless fusion has a token."""
        if FUSION not in self._resources.open_lanes():
            return None
        self._last_call += 1
        call = FuseCall(self._last_call, model, modality_set, (rows,))
        expected_ms = self._planner.stages.of(model, modality_set).expected_ms(len(rows.items), now)
        self._resources.begin(call, len(rows.items), now, expected_ms / 1000)
        return call

    def plan(self, job: Job, now: float) -> Plan:
        """What a job would get if it came now; the job is not kept.

        Raises:
            ModelNotFound, InvalidRequest.
        """
        self._check(job)
        frontier = tuple(self._planner.frontier(job, now))
        try:
            work = self._planner.new_work(job, self._profiles[job.model], now)
            choices = self._enqueued(work, now)
        except MoselError as error:
            return Plan(frontier, None, 0.0, str(error), wanted=self._planner.wanted(job))
        at = self._queue.index(work)
        self._planner.apply(self._queue[at : at + 1], choices[at : at + 1])
        del self._queue[at]
        chosen, wanted = strategy_of(work.profile, work.counts), self.wanted(work)
        return Plan(frontier, chosen, (work.predicted - now) * 1000, "", *self._planner.outlook(work), wanted)

    def wanted(self, work: Work) -> ModalitySet:
        """What the next job like one should bring; empty if it could not be answered."""
        return self._planner.wanted(work.job, work.counts)

    def lost(self, work: Work, error: MoselError) -> MoselError:
        """What a job ends with that an error left without a plan: `error`, or InputsNeeded where that would help."""
        return self._planner.lost(work.job, error) if work.job.is_part else error

    def is_up(self, modality_set: ModalitySet, lacking: Set[str] = frozenset()) -> bool:
        """Whether fusion and an encoder of each modality of a set are there; those that lack the model do not count."""
        return self._resources.is_up(modality_set, lacking)

    def calls_if_idle(self) -> int | None:
        """Calls that were handed out since the start; None while a job is here or a call is under way."""
        return self._last_call if not self._works and self._resources.is_idle else None

    def work_of(self, job_id: bytes) -> Work | None:
        """A job on its way, None if it is not known (any more)."""
        return self._works.get(job_id)

    def corrections(self, now: float) -> dict[tuple[str, str], tuple[float, float]]:
        """What was learned of each (model, lane): a call takes (overhead in ms) + (factor) * its profile."""
        return self._planner.stages.corrections(now)

    def waiting(self) -> Counter[str]:
        """Jobs that have not started, by model."""
        return Counter(work.job.model for work in self._queue if work.started_at is None)

    def statistics(self) -> dict[str, int]:
        """Counts of what is queued and under way."""
        counts = {"jobs": len(self._works), "jobs_waiting": self.waiting().total(), "queued_items": self._queued_items}
        return counts | self._planner.statistics() | self._resources.statistics() | self.counters

    def _check(self, job: Job) -> None:
        if not self.serves(job.model):
            known = ", ".join(sorted(self._profiles.keys() - self._retired)) or "none"
            raise ModelNotFound(f"model '{job.model}' is not served; known: {known}")
        if job.everything not in self._profiles[job.model].accuracy:
            raise InvalidRequest(f"modalities are {format_set(job.everything)}; model '{job.model}' has no such set")

    def _enqueued(self, work: Work, now: float) -> Choices:
        """Puts a job into the queue, if it can be met there; returns the plan that meets everyone."""
        if self._queued_items + work.job.size > self._max_queued_items:
            raise Overloaded(f"{self._queued_items} items are queued, at most {self._max_queued_items} may be")
        bisect.insort(self._queue, work, key=lambda w: w.job.order)
        try:
            return self._planner.admit(self._queue, work, now)
        except MoselError:
            self._queue.remove(work)
            raise

    # Dispatch

    def _dispatch(self, now: float) -> Call | None:
        """The next call, if a service is open for any rows that wait."""
        batch = next_batch(self._queue, self._resources, self._planner.stages, now)
        if batch is None:
            return None
        self._last_call += 1
        call: Call
        if isinstance(batch.step, str):
            call = EncodeCall(self._last_call, batch.model, batch.step, batch.stage.lane, batch.rows)
        else:
            modality_set = batch.step.modality_set if isinstance(batch.step, Path) else batch.step
            call = FuseCall(self._last_call, batch.model, modality_set, batch.rows, isinstance(batch.step, Path))
        self._resources.begin(call, batch.items, now, batch.stage.expected_ms(batch.items, now) / 1000)
        for part in batch.rows:
            self._works[part.job_id].calls[call.id] = set(part.items)
        return call

    # How a job ends

    def _works_in(self, call: Call) -> list[tuple[Rows, Work]]:
        """The jobs in a call that are still wanted."""
        return [(rows, self._works[rows.job_id]) for rows in call.rows if rows.job_id in self._works]

    def _over(self, call: Call) -> CallInFlight:
        self._stale = True
        return self._resources.over(call)

    def _end(self, work: Work, error: MoselError, now: float) -> None:
        self._planner.promises.broken(work.job, now)
        self.cancelled(work.job.id)
        self._ended.append(Ended(work.job.id, error))
