"""Models that are loaded, replaced and retired between any other events: jobs keep theirs, and what goes is gone."""

import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from mosel.errors import ModelNotFound, ServiceUnavailable
from selector.core.jobs import Job, Wait
from selector.core.profile import ModelProfile
from tests.selector.account import PROFILES, name_of
from tests.selector.core.test_interleavings import SchedulerMachine, budgets_ms, demands, models, picks
from tests.selector.support import BOTH, PEN, Driver, encode_call, fuse_call, job, profile_of, scheduler_with
from tests.selector.support import PROFILES as SMALL


class ModelsMachine(SchedulerMachine):
    """Any order of events, models among them; several revisions of a model have the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.serving: dict[str, ModelProfile] = dict(PROFILES)
        self.retired: dict[str, ModelProfile] = {}
        self.gone: list[str] = []
        self.revisions = 0

    def new_job(self, model: str, pick: set[str], budget_ms: float, demand: dict[str, object]) -> Job:
        """Names the newest revision that is served; in turns an older one, if there is none the name alone."""
        revisions = sorted(m for m in self.serving if name_of(m) == model)
        chosen = revisions[-1 - len(self.accounts) % 2 * (len(revisions) - 1)] if revisions else model
        return super().new_job(chosen, pick, budget_ms, demand)

    def submit_one(self, job: Job) -> None:
        if job.model in self.serving:
            super().submit_one(job)
            return
        with pytest.raises(ModelNotFound):
            self.scheduler.submit(job, self.now)

    @rule(model=models, pick=picks, budget_ms=budgets_ms, demand=demands)
    def ask_for_a_plan(self, model: str, pick: set[str], budget_ms: float, demand: dict[str, object]) -> None:
        if any(name_of(served) == model for served in self.serving):
            super().ask_for_a_plan(model, pick, budget_ms, demand)

    @rule(name=models)
    def a_model_is_loaded(self, name: str) -> None:
        self.revisions += 1
        model, profile = f"{name}@{self.revisions:03}", dataclasses.replace(PROFILES[name])
        self.scheduler.load(model, profile)
        self.serving[model] = profile

    @precondition(lambda self: self.serving)
    @rule(data=st.data())
    def one_is_retired(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(sorted(self.serving)))
        self.scheduler.retire(model)
        self.retired[model] = self.serving.pop(model)
        assert not self.scheduler.serves(model)

    @precondition(lambda self: self.retired)
    @rule(data=st.data())
    def one_that_was_retired_is_loaded_again(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(sorted(self.retired)))
        self.serving[model] = self.retired.pop(model)
        self.scheduler.load(model, self.serving[model])

    @precondition(lambda self: self.retired)
    @rule()
    def nobody_waits_for_those_that_were_retired(self) -> None:
        for account in self.alive():
            if account.job.model in self.retired:
                assert self.scheduler.cancelled(account.job.id)
                account.end("cancelled")
        self.what_is_drained_is_forgotten()

    @rule()
    def advance(self) -> None:
        """As ever, and lets go of what is drained."""
        super().advance()
        self.what_is_drained_is_forgotten()

    def what_is_drained_is_forgotten(self) -> None:
        drained = set(self.scheduler.drained())
        in_use = {account.job.model for account in self.alive()} | {call.model for call in self.under_way}
        assert drained == self.retired.keys() - in_use
        for model in drained:
            del self.retired[model]
            self.gone.append(model)
            # Retired again, it is not known.
            self.scheduler.retire(model)
        assert self.scheduler.drained() == []
        planner = self.scheduler._planner
        known = {model for model, _ in (*planner.stages._stages, *planner.stages._corrections)}
        assert (known | planner._offers._frontiers.keys()).isdisjoint(self.gone)
        assert planner._offers._frontiers.keys() == self.serving.keys() | self.retired.keys()

    def teardown(self) -> None:
        """As ever; and then every model that was retired can go."""
        super().teardown()
        if hasattr(self, "scheduler"):
            self.what_is_drained_is_forgotten()
            assert self.retired == {}


@pytest.mark.parametrize("examples", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_jobs_keep_their_models_and_nothing_is_left_of_those_that_go(examples: int) -> None:
    run_settings = settings(max_examples=examples, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(ModelsMachine, settings=run_settings)


def test_a_job_ends_with_the_model_that_it_began_with() -> None:
    scheduler = scheduler_with()
    scheduler.submit(job("old", sent="image+pen"), 0.0)
    scheduler.load("one@2", dataclasses.replace(SMALL["one"]))
    scheduler.submit(job("new", sent="image+pen", model="one@2"), 0.0)
    scheduler.retire("one")
    with pytest.raises(ModelNotFound, match=r"^model 'one' is not served; known: one@2, two$"):
        scheduler.submit(job("late"), 0.0)
    driver = Driver(scheduler, SMALL | {"one@2": SMALL["one"]})
    driver.run()
    assert driver.answered.keys() == {b"old", b"new"}
    for call in driver.calls:
        assert {rows.job_id for rows in call.rows} == {b"new" if call.model == "one@2" else b"old"}
    assert scheduler.drained() == ["one"]


def test_a_model_goes_when_its_last_call_is_back_even_if_nobody_waits_for_it() -> None:
    scheduler = scheduler_with()
    scheduler.submit(job("a"), 0.0)
    call = encode_call(scheduler)
    scheduler.retire("one")
    assert scheduler.drained() == []
    assert scheduler.cancelled(b"a")
    assert scheduler.drained() == []
    assert scheduler.completed(call, 0.002) == []
    assert scheduler.drained() == ["one"]
    assert scheduler.drained() == []


def test_a_model_may_bring_a_modality_that_no_other_has() -> None:
    scheduler = scheduler_with()
    profile = profile_of({"taste": 0.8}, {"taste": ((1, 1.0), (4, 1.0))})
    scheduler.load("meal", profile)
    assert not scheduler.is_up(frozenset({"taste"}))
    assert scheduler.lane("taste", True) == []
    scheduler.submit(job("a", sent="taste", model="meal"), 0.0)
    assert scheduler.completed(encode_call(scheduler), 0.001) == []
    assert scheduler.completed(fuse_call(scheduler, 0.001), 0.002) == [b"a"]
    assert scheduler.next(0.002) == Wait(None)


def test_sets_that_a_service_has_no_networks_for_are_not_run() -> None:
    scheduler = scheduler_with()
    profile = dataclasses.replace(SMALL["one"], unavailable=frozenset({BOTH}))
    scheduler.load("part", profile)
    work = scheduler.submit(job("a", sent="image+pen", model="part", floor=0.6), 0.0)
    assert work.strategy.counts == ((PEN, 1),)
    with pytest.raises(ServiceUnavailable, match="selector still loads and measures"):
        scheduler.submit(job("b", sent="image+pen", model="part", floor=0.85), 0.0)
