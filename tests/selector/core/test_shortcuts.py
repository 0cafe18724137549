"""What is kept and seen at a glance decides nothing: the same comes out where everything is worked out each time."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from mosel.errors import MoselError, ServiceUnavailable
from mosel.modality import FUSION, parse_set
from selector.core.forecast import Forecast
from selector.core.jobs import Ended
from selector.core.offers import Offer, Terms, _Kept
from selector.core.policies import POLICIES
from selector.core.profile import LatencyCurve
from selector.core.scheduler import Scheduler
from selector.core.stages import Correction, Remaining, Stage
from selector.core.work import Work
from tests.selector.account import FRONTIERS, MAX_QUEUED, PROFILES, REPLICA, TOKENS
from tests.selector.core.test_interleavings import SchedulerMachine
from tests.selector.support import BOTH, job, scheduler_with
from tests.selector.support import PROFILES as PROFILES_OF_TWO

# Where more items may take less time.
times_ms = st.lists(st.floats(0.01, 20), min_size=1, max_size=4)
corrections = st.tuples(st.floats(0.2, 5), st.floats(-5, 20))
LANES = ("image", "image/2", "pen", FUSION)


@st.composite
def stages(draw: st.DrawFn, lane: str) -> Stage:
    sizes = (draw(st.sampled_from([1, 2])), 3, 6, 8)
    curve = LatencyCurve(tuple(zip(sizes, draw(times_ms), strict=False)))
    smallest, largest = sorted((curve.points[0][1], curve.points[-1][1]))
    found = Stage(lane, curve, Correction(smallest, largest))
    for one in (found, found.on("image/2")) if lane == "image" else (found,):
        factor, overhead_ms = draw(corrections)
        for items in (*sizes, *sizes):
            if items <= curve.max_batch:
                profiled_ms = one.profiled_ms(items)
                one.correction.learn(profiled_ms, max(overhead_ms + factor * profiled_ms, 0.0), 0.0)
    return found


@st.composite
def queues(draw: st.DrawFn) -> list[Remaining]:
    encoders = draw(stages("image")), draw(stages("pen"))
    fusions = draw(stages(FUSION)), draw(stages(FUSION))
    rows = st.integers(1, 20)
    lefts = []
    for _ in range(draw(st.integers(1, 6))):
        encode = tuple((s, draw(rows)) for s in draw(st.lists(st.sampled_from(encoders), max_size=3)))
        fuse = tuple((s, draw(rows)) for s in draw(st.lists(st.sampled_from(fusions), max_size=3)))
        left = Remaining(encode, fuse, draw(st.sampled_from([0.0, 0.004, 0.1])))
        lefts += [left] * draw(st.integers(1, 4))
    return draw(st.permutations(lefts))


@given(
    queue=queues(),
    resources=st.fixed_dictionaries({lane: st.sampled_from(["cpu", "gpu"]) for lane in LANES}),
    free_at=st.lists(st.sampled_from([0.0, 0.003, 0.05]), min_size=4, max_size=4),
    taken=st.floats(0, 0.8),
)
@settings(max_examples=400, deadline=None)
def test_no_job_is_answered_later_than_is_seen_at_a_glance(
    queue: list[Remaining], resources: dict[str, str], free_at: list[float], taken: float
) -> None:
    tokens = {"cpu": free_at[:2], "gpu": free_at[2:]}
    spread = {"image": ("image", "image/2")} if resources["image"] != resources["image/2"] else {}
    forecast = Forecast(0.0, tokens, resources, 0.001, {"cpu": taken, "gpu": taken / 2}, spread)
    for plan in (forecast, forecast.cautious()):
        assert max(plan.finish(queue)) <= plan.latest(queue)


def test_the_time_that_is_seen_at_a_glance_is_not_far_off() -> None:
    curve = LatencyCurve(((1, 10.0), (4, 16.0)))
    image, fusion = (Stage(lane, curve, Correction(10, 16)) for lane in ("image", FUSION))
    forecast = Forecast(0.0, {"cpu": [0.0]}, dict.fromkeys(LANES, "cpu"))
    alone = Remaining(((image, 1),), ((fusion, 1),))
    assert forecast.finish([alone])[0] == pytest.approx(0.020)
    assert forecast.latest([alone]) == pytest.approx(0.040, abs=1e-5)
    assert forecast.latest([alone] * 8) == pytest.approx(2 * 0.016 + 8 * 0.016 + 0.032, abs=1e-5)


class Twins:
    """Two schedulers that are told the same, one of which takes no shortcut; whatever they say is compared."""

    def __init__(self, *args: Any) -> None:
        self.quick, self.plain = Scheduler(*args), Scheduler(*args)

    @property
    def _planner(self) -> Any:
        return self.quick._planner

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def both(*args: Any) -> Any:
            forget(self.plain)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Forecast, "latest", lambda *_: math.inf)
                plain = outcome(getattr(self.plain, name), *args)
            quick = outcome(getattr(self.quick, name), *args)
            assert seen(plain) == seen(quick)
            assert list(map(seen, self.plain._queue)) == list(map(seen, self.quick._queue))
            if isinstance(quick, MoselError):
                raise quick
            return quick

        return both


def outcome(verb: Callable[..., Any], *args: Any) -> Any:
    try:
        return verb(*args)
    except MoselError as error:
        return error


def seen(what: Any) -> object:
    """What tells two schedulers apart."""
    if isinstance(what, MoselError):
        return type(what), str(what)
    if isinstance(what, Ended):
        return what.job_id, seen(what.error)
    if isinstance(what, Work):
        known = what.predicted, what.preferred, what.least, what.without, what.floor.least, what.floor.over_all
        return what.job, what.chosen, what.counts, what.planned, what.unsent, what.unfused, known
    return what


def forget(scheduler: Scheduler) -> None:
    """Makes it work out everything again."""
    offers, resources = scheduler._planner._offers, scheduler._resources
    offers._terms, offers._offers, resources._open = _Kept[Terms](), _Kept[Offer](), None
    for work in scheduler._queue:
        work.is_settled = False
    for stage in scheduler._planner.stages._stages.values():
        for one in (stage, *stage.replicas.values()):
            one.correction._fit = None


class TwinMachine(SchedulerMachine):
    def new_scheduler(self) -> Any:
        twins = Twins(PROFILES, self.policy, MAX_QUEUED, TOKENS)
        twins.plain._planner._offers._frontiers = dict(FRONTIERS)
        return twins

    @rule(name=st.sampled_from([*PROFILES]), unavailable=st.booleans(), observed=st.booleans())
    def profile_changes(self, name: str, unavailable: bool, observed: bool) -> None:
        profile = PROFILES[name]
        profile.unavailable = frozenset({parse_set("audio+pen")} if unavailable else ())
        profile.observed = observed

    @rule(name=st.sampled_from(["audio", REPLICA]))
    def leaves(self, name: str) -> None:
        self.scheduler.leaving(name)

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            for profile in PROFILES.values():
                profile.unavailable, profile.observed = frozenset(), False

    # What it promises is tested elsewhere, of profiles that do not change.
    def check_refusal(self, *_: object) -> None: ...

    def check_order(self, *_: object) -> None: ...


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_shortcuts_decide_nothing(policy: str) -> None:
    machine = type("Machine", (TwinMachine,), {"policy": policy})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None))


def test_a_lane_that_lacks_the_model_counts_at_once() -> None:
    scheduler, profile = scheduler_with(), PROFILES_OF_TWO["one"]
    assert scheduler.lane("image/2", True) == []
    assert scheduler.submit(job("a", sent="image+pen"), 0.0).strategy.counts == ((BOTH, 1),)
    profile.lacking.update({"image", "image/2"})
    try:
        with pytest.raises(ServiceUnavailable):
            scheduler.submit(job("b", sent="image+pen"), 0.0)
    finally:
        profile.lacking.clear()
    assert scheduler.submit(job("c", sent="image+pen"), 0.0).strategy.counts == ((BOTH, 1),)
