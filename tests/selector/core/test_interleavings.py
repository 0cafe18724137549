"""The scheduler's promises in any order of events: floors above all."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mosel.errors import (
    DeadlineExceeded,
    DeadlineUnreachable,
    FloorUnreachable,
    InputsNeeded,
    MoselError,
    Overloaded,
)
from mosel.modality import FUSION, modality_of, parse_set, subsets
from selector.core.jobs import Call, Effort, EncodeCall, Ended, FuseCall, Job, Wait
from selector.core.policies import POLICIES
from selector.core.scheduler import Scheduler
from tests.selector.account import (
    FRONTIERS,
    LANES,
    MAX_QUEUED,
    MODALITIES,
    PROFILES,
    REPLICA,
    TOKENS,
    Account,
    floor_of,
    name_of,
    undercut,
)
from tests.selector.support import THREE, held

models = st.sampled_from(sorted(PROFILES))
picks = st.just(set(MODALITIES)) | st.sets(st.sampled_from(MODALITIES), min_size=1)
demands = st.fixed_dictionaries(
    {
        "size": st.sampled_from([1, 1, 1, 2, 3, 6, 15]),
        "min_accuracy": st.none() | st.sampled_from([*THREE.values()]) | st.floats(0, 1),
        "max_accuracy_loss": st.none() | st.sampled_from([0.0, 0.01, 0.05, 0.2]) | st.floats(0, 1),
        "exact": st.booleans(),
        "effort": st.sampled_from([None, *Effort]),
        "late_ok": st.booleans(),
        # Those that are sent of what there is, if any is; else all.
        "part": st.just(set[str]()) | st.sets(st.sampled_from(MODALITIES)),
    }
)
budgets_ms = st.sampled_from([5.0, 30.0, 100.0, 1000.0, 10_000.0])


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of events; the services' view is kept beside the scheduler's and compared with it."""

    policy = "mosel"

    @initialize(
        away=st.sets(st.sampled_from(LANES), max_size=2),
        fusion_on=st.sampled_from(["cpu", "gpu"]),
        replica_on=st.sampled_from(["cpu", "gpu"]),
        joined=st.sets(st.sampled_from(MODALITIES)),
    )
    def start(self, away: set[str], fusion_on: str, replica_on: str, joined: set[str]) -> None:
        self.now, self.joined = 0.0, joined
        self.resources = dict.fromkeys(MODALITIES, "cpu") | {REPLICA: replica_on, FUSION: fusion_on}
        self.up = set(LANES) - away
        self.scheduler = self.new_scheduler()
        self.scheduler._planner._offers._frontiers = dict(FRONTIERS)
        for name in LANES:
            assert self.lane(name) == []
        self.accounts: dict[bytes, Account] = {}
        self.under_way: list[Call] = []
        self.dropped = 0

    def lane(self, name: str) -> list[bytes]:
        return self.scheduler.lane(
            name, name in self.up, self.resources[name], self.joined if name == FUSION else set()
        )

    def new_scheduler(self) -> Scheduler:
        return Scheduler(PROFILES, self.policy, MAX_QUEUED, TOKENS)

    def alive(self) -> list[Account]:
        return [account for account in self.accounts.values() if not account.how_ended]

    def new_job(self, model: str, pick: set[str], budget_ms: float, demand: dict[str, object]) -> Job:
        has = frozenset((pick - {"image"}) or {"pen"} if name_of(model) == "two" else pick)
        sent, demand = has.intersection(demand["part"]), {k: v for k, v in demand.items() if k != "part"}  # type: ignore[arg-type]
        if name_of(model) == "sure":
            floor, lost = demand["min_accuracy"], demand["max_accuracy_loss"]
            demand = demand | {"min_accuracy": floor if lost is None else None, "exact": not (floor or lost)}
        else:
            demand = demand | {"max_accuracy_loss": None}
        deadline = self.now + budget_ms / 1000
        expires = deadline + 0.2 if demand["late_ok"] else None
        job_id = len(self.accounts).to_bytes(16, "big")
        parts = {"modalities": sent, "available": has} if sent else {"modalities": has}
        return Job(job_id, model, deadline=deadline, expires=expires, **parts, **demand)  # type: ignore[arg-type]

    @rule(model=models, pick=picks, budget_ms=budgets_ms, demand=demands, times=st.integers(1, 3))
    def submit(self, model: str, pick: set[str], budget_ms: float, demand: dict[str, object], times: int) -> None:
        for _ in range(times):
            self.submit_one(self.new_job(model, pick, budget_ms, demand))

    def submit_one(self, job: Job) -> None:
        queued = sum(account.job.size for account in self.alive())
        try:
            work = self.scheduler.submit(job, self.now)
        except MoselError as error:
            self.check_refusal(job, error)
            return
        assert queued + job.size <= MAX_QUEUED
        assert work.strategy.size == job.size
        assert not undercut(job, work.counts, work.floor.least)
        self.accounts[job.id] = Account(job, work)

    def check_refusal(self, job: Job, error: MoselError) -> None:
        candidates = [job.everything] if job.exact or self.policy == "all" else subsets(job.everything)
        if name_of(job.model) == "sure" and self.policy == "all":
            candidates = subsets(job.everything)
        best = max(PROFILES[name_of(job.model)].accuracy[s] for s in candidates)
        unreachable = job.max_accuracy_loss is None and best < floor_of(job) - 1e-9
        assert isinstance(error, FloorUnreachable) == unreachable
        assert not isinstance(error, DeadlineUnreachable) or not job.late_ok
        assert not isinstance(error, Overloaded) or error.retry_after_ms >= 1
        if isinstance(error, InputsNeeded):
            assert job.everything.issuperset(error.modalities)
            assert not job.modalities.issuperset(error.modalities)

    @rule(model=models, pick=picks, budget_ms=budgets_ms, demand=demands)
    def ask_for_a_plan(self, model: str, pick: set[str], budget_ms: float, demand: dict[str, object]) -> None:
        def state() -> object:
            return held(self.scheduler), [account.work.strategy for account in self.alive()]

        before = state()
        job = self.new_job(model, pick, budget_ms, demand)
        plan = self.scheduler.plan(job, self.now)
        assert (plan.chosen is None) == bool(plan.refusal)
        assert plan.chosen is None or not undercut(job, dict(plan.chosen.counts))
        assert state() == before

    @rule()
    def advance(self) -> None:
        """Does what the service does: asks for the next thing until there is none."""
        while not isinstance(action := self.scheduler.next(self.now), Wait):
            if isinstance(action, Ended):
                self.check_ended(action)
            else:
                self.check_call(action)
                self.under_way.append(action)
        assert action.until == min((account.job.ends for account in self.alive()), default=None)

    def check_ended(self, ended: Ended) -> None:
        account = self.accounts[ended.job_id]
        assert isinstance(ended.error, DeadlineExceeded)
        if account.job.ends > self.now:
            self.dropped += 1
            assert not account.job.late_ok
            assert not account.sent, "what has been started is not dropped"
        account.end("expired or dropped")

    def check_call(self, call: Call) -> None:
        used = Counter(self.resources[other.lane] for other in self.under_way)
        assert call.lane in self.up
        assert used[self.resources[call.lane]] < TOKENS
        accounts = [self.accounts[rows.job_id] for rows in call.rows]
        deadlines = [account.job.deadline for account in accounts]
        assert deadlines == sorted(deadlines)
        assert len(accounts) == 1 or not any(account.retries_alone for account in accounts)
        for account, rows in zip(accounts, call.rows, strict=True):
            assert not account.how_ended, "work for a job that has ended"
            assert account.job.model == call.model
            assert list(rows.items) == sorted(set(rows.items)) != []
            if isinstance(call, EncodeCall):
                account.encode_sent(call.modality, rows.items)
            elif call.from_payloads:
                # Audio has two encoders, of which fusion has at most one.
                assert call.modality_set <= self.joined - {"audio"}
                account.path_sent(call.modality_set, rows.items)
            else:
                account.fuse_sent(call.modality_set, rows.items)
        self.check_size(call)
        self.check_order(accounts[0], {n for n in self.up if used[self.resources[n]] < TOKENS})

    def check_size(self, call: Call) -> None:
        profile = PROFILES[name_of(call.model)]
        if isinstance(call, EncodeCall):
            curve = profile.encoders[call.modality]
        else:
            curve = (profile.paths if call.from_payloads else profile.fusion)[call.modality_set]
        assert sum(len(rows.items) for rows in call.rows) <= curve.best_batch

    def check_order(self, head: Account, open_lanes: set[str]) -> None:
        replicated = {"audio"} if {"audio", REPLICA} <= self.up else set()
        open_lanes = {modality_of(lane) for lane in open_lanes}
        for account in self.alive():
            if account.job.deadline < head.job.deadline:
                # Where there are two, a job may wait for the better one.
                planned, is_path = account.work.planned, account.work.profile.is_path
                waits_for = set(account.work.unsent).union(*(s for s in planned if not is_path(s))) - replicated
                waits_for |= {FUSION} if account.work.unfused or any(map(is_path, planned)) else set()
                assert waits_for.isdisjoint(open_lanes), "a later job was served first"

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), well=st.sampled_from([True, True, False]))
    def call_returns(self, data: st.DataObject, well: bool) -> None:
        call = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        if well:
            self.returned_well(call)
            return
        parts = [(self.accounts[rows.job_id], rows.items) for rows in call.rows]
        parts = [(account, account.wanted(call, items)) for account, items in parts if not account.how_ended]
        lost = self.scheduler.failed(call, self.now)
        assert set(lost) <= {account.job.id for account, _ in parts}
        for account, items in parts:
            account.retries_alone |= bool(items)
            if account.job.id in lost:
                account.end("failed")
            else:
                assert account.failed_once.isdisjoint(items), "an item is tried again once"
                account.begin_again(items, self.under_way)
            account.failed_once.update(items)

    def returned_well(self, call: Call) -> None:
        for rows in call.rows:
            account = self.accounts[rows.job_id]
            if isinstance(call, FuseCall):
                account.fused(call.modality_set, rows.items)
            else:
                for item in account.wanted(call, rows.items):
                    account.encoded[item].add(call.modality)
        for job_id in self.scheduler.completed(call, self.now):
            self.accounts[job_id].answered()

    @rule(name=st.sampled_from(LANES))
    def lane_changes(self, name: str) -> None:
        self.up ^= {name}
        gone = modality_of(name)
        # Another encoder of the modality takes what one has not begun.
        if gone != FUSION and not any(modality_of(lane) == gone for lane in self.up):
            for account in self.alive():
                account.begin_again([*account.work.unsent.get(gone, ())], self.under_way)
        for job_id in self.lane(name):
            assert not any(modality_of(lane) == modality_of(name) for lane in self.up)
            self.accounts[job_id].end("failed")

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        account = data.draw(st.sampled_from(self.alive()))
        assert self.scheduler.cancelled(account.job.id)
        assert not self.scheduler.cancelled(account.job.id)
        account.end("cancelled")

    @rule(ms=st.sampled_from([0.5, 5.0, 20.0, 100.0]))
    def time_passes(self, ms: float) -> None:
        self.now += ms / 1000

    @invariant()
    def both_sides_know_the_same(self) -> None:
        statistics, alive = self.scheduler.statistics(), self.alive()
        assert statistics["jobs"] == len(alive)
        assert statistics["queued_items"] == sum(account.job.size for account in alive) <= MAX_QUEUED
        assert statistics.get("jobs_dropped", 0) == self.dropped
        for name in LANES:
            assert statistics[f"calls_in_flight.{name}"] == sum(call.lane == name for call in self.under_way)
        for account in alive:
            assert self.scheduler.work_of(account.job.id) is account.work
            assert account.work.strategy.size == account.job.size
            assert not undercut(account.job, account.work.counts, account.work.floor.least)

    def teardown(self) -> None:
        """With all services up and calls going well, every job that is left is answered, and nothing else is left."""
        if not hasattr(self, "scheduler"):
            return
        for name in set(LANES) - self.up:
            self.lane_changes(name)
        self.advance()
        while self.under_way:
            self.returned_well(self.under_way.pop(0))
            self.advance()
        assert self.alive() == []
        assert held(self.scheduler) == {}
        assert self.scheduler.next(self.now) == Wait(None)


@pytest.mark.parametrize("examples", [40, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_no_floor_is_undercut_and_nothing_is_done_twice_or_forgotten(policy: str, examples: int) -> None:
    machine = type("Machine", (SchedulerMachine,), {"policy": policy})
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=40, deadline=None))


def test_the_profiles_have_sets_that_more_modalities_make_worse() -> None:
    accuracy = PROFILES["two"].accuracy
    assert accuracy[parse_set("audio+pen")] < accuracy[parse_set("pen")]
