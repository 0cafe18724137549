"""Which strategies a job may use, and in which order it likes them."""

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosel.errors import FloorUnreachable, ServiceUnavailable
from mosel.modality import ModalitySet, format_set, parse_set
from selector.core.floors import floor_of
from selector.core.frontier import Frontiers
from selector.core.jobs import Effort, Job, Option
from selector.core.options import allowed_options, strategy_of
from selector.core.profile import ModelProfile
from tests.selector.support import THREE as ACCURACY
from tests.selector.support import profile_of

ENCODER_MS = {"pen": 0.04, "image": 0.7, "audio": 2.5}
ALL = "audio+image+pen"


@pytest.fixture
def profile() -> ModelProfile:
    return profile_of(ACCURACY, ENCODER_MS, 0.1)


def up(_: ModalitySet) -> bool:
    return True


def without(*away: str) -> Callable[[ModalitySet], bool]:
    return lambda modality_set: modality_set.isdisjoint(away)


def job(
    floor: float | None = None, sent: str = ALL, size: int = 1, effort: Effort | None = None, exact: bool = False
) -> Job:
    return Job(b"job", "model", size, parse_set(sent), floor, 1.0, exact, effort)


def allowed(
    profile: ModelProfile, job: Job, is_up: Callable[[ModalitySet], bool] = up, full_only: bool = False
) -> list[Option]:
    floor = floor_of(profile, job)
    return allowed_options(profile, Frontiers(profile), job, floor, job.size, floor.least, is_up, full_only)


def names(options: list[Option]) -> list[str]:
    """The sets of strategies for one item."""
    return [format_set(option.strategy.counts[0][0]) for option in options]


@pytest.mark.parametrize(
    ("floor", "cheapest"),
    [
        (0.0, "pen"),
        (0.60, "pen"),
        (0.61, "image"),
        (0.66, "image+pen"),
        (0.885, "audio+pen"),
        (0.95, "audio+image+pen"),
    ],
)
def test_with_a_floor_the_cheapest_strategy_that_meets_it_comes_first(
    profile: ModelProfile, floor: float, cheapest: str
) -> None:
    options = allowed(profile, job(floor))
    assert names(options)[0] == cheapest
    costs = [option.strategy.cost_ms for option in options]
    assert costs == sorted(costs)
    assert names(options)[-1] == ALL


def test_with_effort_best_the_most_accurate_comes_first(profile: ModelProfile) -> None:
    options = allowed(profile, job(0.66, effort=Effort.BEST))
    assert names(options) == [ALL, "audio+image", "audio+pen", "image+pen"]
    assert [option.value for option in options] == [0.96, 0.90, 0.89, 0.88]


def test_a_job_of_several_items_may_mix_sets(profile: ModelProfile) -> None:
    cheapest = allowed(profile, job(0.74, size=2))[0].strategy
    assert cheapest.counts == ((parse_set("image+pen"), 1), (parse_set("pen"), 1))
    assert cheapest.accuracy == pytest.approx((0.88 + 0.60) / 2)


def test_without_a_floor_only_as_accurate_as_what_was_sent(profile: ModelProfile) -> None:
    assert names(allowed(profile, job())) == [ALL]
    assert names(allowed(profile, job(sent="pen"))) == ["pen"]


def test_without_a_floor_what_was_sent_comes_first_then_by_falling_accuracy_down_to_the_default_floor() -> None:
    known = profile_of(ACCURACY, ENCODER_MS, 0.1, default_floor=0.7)
    options = allowed(known, job())
    assert names(options)[0] == ALL
    assert names(options)[1:] == ["audio+image", "audio+pen", "image+pen"], "audio alone costs more than image+pen"
    values = [option.value for option in options]
    assert values == sorted(set(values), reverse=True)
    assert names(allowed(known, job(effort=Effort.CHEAPEST)))[0] == "image+pen"


@pytest.mark.parametrize("floor", [None, 0.7])
@pytest.mark.parametrize("effort", [None, Effort.BEST])
@pytest.mark.parametrize("size", [1, 3, 20])
def test_without_a_floor_a_modality_that_does_not_help_is_left_out(
    floor: float | None, effort: Effort | None, size: int
) -> None:
    poor = profile_of(ACCURACY | {"audio+image": 0.97}, ENCODER_MS, 0.1, default_floor=floor)
    assert names(allowed(poor, job(effort=effort, size=size)))[0] == "audio+image"
    exact = allowed(poor, job(effort=effort, size=size, exact=True))
    assert [format_set(option.strategy.counts[0][0]) for option in exact] == [ALL]
    assert names(allowed(poor, job(size=size), full_only=True)) == [ALL]


@pytest.mark.parametrize(
    ("samples", "gain", "first"),
    [
        (1000, 0.0035, "audio+image"),
        (1000, 0.004, ALL),
        (100, 0.035, "audio+image"),
        (100, 0.04, ALL),
        (0, 0.0001, ALL),
        (0, 0.0, "audio+image"),
        (0, -0.1, "audio+image"),
    ],
)
def test_without_a_floor_a_gain_that_the_samples_cannot_show_is_not_paid_for(
    samples: int, gain: float, first: str
) -> None:
    known = profile_of(ACCURACY | {"audio+image": 0.96 - gain}, ENCODER_MS, 0.1, default_floor=0.5)
    known.samples = samples
    assert names(allowed(known, job()))[0] == first


def test_without_a_floor_of_sets_that_cannot_be_told_apart_the_cheapest_is_run() -> None:
    accuracy = ACCURACY | {"audio+image": 0.962, "audio+pen": 0.960, "image+pen": 0.957}
    known = profile_of(accuracy, ENCODER_MS, 0.1, default_floor=0.5)
    assert names(allowed(known, job()))[0] == "audio+pen", "image+pen is cheaper, but 0.005 less accurate than the best"


def test_without_a_default_floor_nothing_is_less_accurate_than_what_was_sent() -> None:
    known = profile_of(ACCURACY | {"audio+image": 0.9599}, ENCODER_MS, 0.1)
    assert names(allowed(known, job())) == [ALL]


def test_a_named_floor_with_effort_best_runs_the_most_accurate_strategy_however_little_it_gains() -> None:
    known = profile_of(ACCURACY | {"audio+image": 0.9599}, ENCODER_MS, 0.1, default_floor=0.5)
    assert names(allowed(known, job(0.5, effort=Effort.BEST)))[0] == ALL


def test_the_default_floor_never_refuses_what_was_sent() -> None:
    strict = profile_of(ACCURACY, ENCODER_MS, 0.1, default_floor=0.9)
    assert names(allowed(strict, job(sent="pen"))) == ["pen"]


def test_the_caller_s_floor_wins_over_the_default_floor() -> None:
    strict = profile_of(ACCURACY, ENCODER_MS, 0.1, default_floor=0.9)
    assert names(allowed(strict, job(0.0)))[0] == "pen"


def test_exactly_the_named_modalities_are_run_or_nothing(profile: ModelProfile) -> None:
    exact = job(0.5, sent="audio+pen", exact=True, size=3)
    assert [option.strategy.counts for option in allowed(profile, exact)] == [((exact.modalities, 3),)]
    with pytest.raises(ServiceUnavailable, match="encoder/pen"):
        allowed(profile, exact, without("pen"))


def test_the_modality_blind_policy_runs_all_that_was_sent(profile: ModelProfile) -> None:
    assert names(allowed(profile, job(0.0), full_only=True)) == [ALL]


def test_sets_that_cannot_run_are_passed_over(profile: ModelProfile) -> None:
    assert names(allowed(profile, job(0.65), without("image")))[0] == "audio"
    del profile.encoders["pen"]
    assert names(allowed(profile, job(0.0)))[0] == "image"


def test_a_floor_that_is_out_of_reach_is_refused_with_the_best_that_could_be_had(profile: ModelProfile) -> None:
    with pytest.raises(FloorUnreachable, match=r"0\.97 .*the best that could be had is 0\.96 with audio\+image\+pen"):
        allowed(profile, job(0.97))
    with pytest.raises(FloorUnreachable, match=r"the best that could be had is 0\.96 with audio\+image\+pen$"):
        allowed(profile, job(0.97))


@pytest.mark.parametrize(
    ("sent", "floor", "missing"),
    [
        ("image+pen", 0.9, "the best that could be had is 0.88 with image+pen; with audio as well, ALL has 0.96"),
        ("pen", 0.7, "the best that could be had is 0.6 with pen; with audio as well, audio+pen has 0.89"),
        ("pen", 0.9, "the best that could be had is 0.6 with pen; with audio, image as well, ALL has 0.96"),
    ],
)
def test_what_is_missing_for_a_floor_is_named(profile: ModelProfile, sent: str, floor: float, missing: str) -> None:
    for exact in (False, True):
        with pytest.raises(FloorUnreachable) as refused:
            allowed(profile, job(floor, sent=sent, exact=exact))
        assert str(refused.value) == f"min_accuracy {floor} cannot be met with {sent}; {missing.replace('ALL', ALL)}"


def test_a_service_that_is_away_is_named_with_the_best_that_is_left(profile: ModelProfile) -> None:
    with pytest.raises(ServiceUnavailable, match=r"encoder/audio is away.*the best that could be had is 0\.88 with"):
        allowed(profile, job(0.89), without("audio"))
    with pytest.raises(ServiceUnavailable, match="nothing else could be had"):
        allowed(profile, job(0.5), without("audio", "image", "pen"))
    with pytest.raises(ServiceUnavailable, match="fusion is away"):
        allowed(profile, job(0.5), lambda _: False)
    del profile.fusion[parse_set("pen")]
    with pytest.raises(ServiceUnavailable, match="selector still loads and measures pen"):
        allowed(profile, job(0.5, sent="pen"))


def test_a_policy_weighs_few_options_and_both_ends_are_among_them(profile: ModelProfile) -> None:
    frontier = [s for s in Frontiers(profile).of(list(profile.accuracy), 20) if s.accuracy >= 0.7]
    options = allowed(profile, job(0.7, size=20))
    assert len(frontier) > 8 >= len(options)
    assert [options[0].strategy, options[-1].strategy] == [frontier[0], frontier[-1]]


def test_a_floor_equal_to_what_a_strategy_has_is_met_by_it(profile: ModelProfile) -> None:
    for strategy in Frontiers(profile).of(list(profile.accuracy), 7):
        assert allowed(profile, job(strategy.accuracy, size=7))[0].strategy == strategy


fractions = st.integers(0, 1000).map(lambda thousandths: thousandths / 1000)
points = st.tuples(st.floats(0.1, 10), st.floats(1, 4)).map(lambda p: ((1, p[0]), (8, p[0] * p[1])))
SETS = [format_set(s) for s in (frozenset("a"), frozenset("b"), frozenset("ab"))]
profiles = st.builds(
    profile_of,
    st.fixed_dictionaries(dict.fromkeys(SETS, fractions)),
    st.fixed_dictionaries({"a": points, "b": points}),
    points,
    st.none() | fractions,
)
demands = st.builds(
    job,
    floor=st.none() | fractions,
    sent=st.sampled_from(SETS),
    size=st.sampled_from([1, 2, 5, 31, 32, 33, 47, 64, 100]),
    effort=st.sampled_from([None, *Effort]),
    exact=st.booleans(),
)


@settings(deadline=None, max_examples=150)
@given(profile=profiles, job=demands, away=st.sampled_from(["", "a", "b"]), full_only=st.booleans())
def test_every_option_meets_the_floor_with_all_items_and_runs_only_what_may_be_run(
    profile: ModelProfile, job: Job, away: str, full_only: bool
) -> None:
    try:
        options = allowed(profile, job, without(away), full_only)
    except FloorUnreachable:
        candidates = (
            [job.modalities] if job.exact or full_only else [s for s in profile.accuracy if s <= job.modalities]
        )
        assert job.min_accuracy is not None
        assert max(profile.accuracy[s] for s in candidates) < job.min_accuracy
        return
    except ServiceUnavailable:
        assert away in job.modalities
        return
    for option in options:
        assert option.strategy.size == job.size
        assert option.strategy.accuracy >= floor_of(profile, job).least - 1e-9
        again = strategy_of(profile, dict(option.strategy.counts))
        assert (option.strategy.accuracy, option.strategy.cost_ms) == pytest.approx((again.accuracy, again.cost_ms))
        for modality_set, _ in option.strategy.counts:
            assert away not in modality_set <= job.modalities
            assert modality_set == job.modalities or not (job.exact or full_only)
    assert 1 <= len(options) <= 9
    assert len({option.value for option in options}) == len(options)
    assert [option.value for option in options] == sorted((option.value for option in options), reverse=True)


@settings(deadline=None, max_examples=100)
@given(profile=profiles, size=st.integers(33, 200))
def test_strategies_of_large_jobs_are_a_frontier_with_the_best_set_at_its_end(profile: ModelProfile, size: int) -> None:
    strategies = list(Frontiers(profile).of(profile.accuracy, size))
    assert all(strategy.size == size for strategy in strategies)
    for cheaper, dearer in itertools.pairwise(strategies):
        assert cheaper.cost_ms <= dearer.cost_ms
        assert cheaper.accuracy < dearer.accuracy
    assert strategies[-1].accuracy == pytest.approx(max(profile.accuracy.values()))
