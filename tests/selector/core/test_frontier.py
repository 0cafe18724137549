"""Frontiers against all mixes there are, and against an exact reference where there are too many."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.frontier import OVERHEADS, all_mixes, excess, optima, random_profile
from mosel.modality import ModalitySet, format_set, subsets
from selector.core.frontier import Frontiers, Strategy, frontier, thin
from selector.core.profile import LatencyCurve, ModelProfile

A, B, C = frozenset("a"), frozenset("b"), frozenset("c")
AB = A | B

# Steps, dips and free calls included.
any_curves = st.dictionaries(st.integers(1, 6), st.floats(0.0, 100.0), min_size=1, max_size=4).map(
    lambda points: LatencyCurve(tuple(sorted(points.items())))
)
# Calls that never cost more merged than apart.
affine_curves = st.builds(
    lambda call, item, most: LatencyCurve(tuple({n: call + item * n for n in (1, most)}.items())),
    st.floats(0.0, 50.0),
    st.floats(0.01, 10.0),
    st.integers(1, 8),
)
accuracies = st.one_of(st.sampled_from((0.0, 0.5, 1.0)), st.floats(0.0, 1.0))


def profiles(sets: Sequence[ModalitySet], curves: st.SearchStrategy[LatencyCurve]) -> st.SearchStrategy[ModelProfile]:
    return st.builds(
        lambda accuracy, encoders, fusion: ModelProfile(accuracy, 1000, encoders=encoders, fusion=fusion),
        st.fixed_dictionaries(dict.fromkeys(sets, accuracies)),
        st.fixed_dictionaries(dict.fromkeys(sorted(frozenset().union(*sets)), curves)),
        st.fixed_dictionaries(dict.fromkeys(sets, curves)),
    )


def linear(accuracy: Mapping[ModalitySet, float], **item_ms: float) -> ModelProfile:
    """A model whose encoders take so long for each item, and whose fusion is free."""
    return ModelProfile(
        accuracy,
        samples=10,
        encoders={m: LatencyCurve(((1, ms), (64, 64 * ms))) for m, ms in item_ms.items()},
        fusion={s: LatencyCurve(((1, 0.0),)) for s in accuracy},
    )


def check_sound(found: Iterable[Strategy], profile: ModelProfile, size: int) -> None:
    """Strategies are what they say they are, and none beats another."""
    for strategy in found:
        counts = dict(strategy.counts)
        mean = sum(profile.accuracy[s] * count for s, count in counts.items()) / size
        assert strategy.size == size
        assert min(counts.values()) >= 1
        assert [s for s, _ in strategy.counts] == sorted(counts, key=format_set)
        assert strategy.accuracy == pytest.approx(mean, abs=1e-11)
        assert strategy.cost_ms == pytest.approx(profile.mixed_cost_ms(counts), abs=1e-9)
    for before, after in itertools.pairwise(found):
        assert before.cost_ms < after.cost_ms
        assert before.accuracy < after.accuracy


def cheapest_ms(found: Iterable[Strategy], accuracy: float) -> float:
    """What the cheapest strategy costs that is as accurate."""
    return min(strategy.cost_ms for strategy in found if strategy.accuracy >= accuracy - 1e-9)


@given(profile=st.integers(1, 4).flatmap(lambda n: profiles([frozenset(m) for m in "abcd"[:n]], any_curves)))
def test_sets_that_share_nothing_have_exact_frontiers_at_every_size_whatever_their_curves(
    profile: ModelProfile,
) -> None:
    sets = tuple(profile.accuracy)
    for size in range(1, 6):
        found = frontier(profile, sets, size)
        check_sound(found, profile, size)
        for accuracy, cost_ms in optima(profile, sets, size):
            assert cheapest_ms(found, accuracy) <= cost_ms + 1e-6


@given(profile=profiles(subsets("abc"), affine_curves), size=st.integers(1, 4))
def test_no_mix_costs_less_with_its_sets_run_apart(profile: ModelProfile, size: int) -> None:
    sets = tuple(profile.accuracy)
    found = frontier(profile, sets, size)
    check_sound(found, profile, size)
    for counts in all_mixes(sets, size):
        accuracy = sum(profile.accuracy[s] * count for s, count in counts.items()) / size
        apart_ms = sum(profile.cost_ms(s, count) for s, count in counts.items())
        assert cheapest_ms(found, accuracy) <= apart_ms + 1e-6


@given(profile=profiles(subsets("abc"), any_curves), size=st.integers(1, 6))
def test_strategies_are_sound_whatever_the_curves(profile: ModelProfile, size: int) -> None:
    check_sound(frontier(profile, tuple(profile.accuracy), size), profile, size)


@given(profile=profiles(subsets("abc"), any_curves), size=st.integers(1, 6))
def test_small_jobs_have_exact_frontiers_though_their_sets_share_encoders(profile: ModelProfile, size: int) -> None:
    sets = tuple(profile.accuracy)
    found = frontier(profile, sets, size)
    for accuracy, cost_ms in optima(profile, sets, size):
        assert cheapest_ms(found, accuracy) <= cost_ms + 1e-6


# To draw a profile of 31 sets takes long.
@settings(max_examples=40)
@given(profile=profiles(subsets("abcde"), any_curves))
def test_jobs_of_one_item_have_exact_frontiers_however_many_sets_there_are(profile: ModelProfile) -> None:
    sets = tuple(profile.accuracy)
    found = frontier(profile, sets, 1)
    check_sound(found, profile, 1)
    for s in sets:
        assert cheapest_ms(found, profile.accuracy[s]) <= profile.cost_ms(s, 1) + 1e-6


@pytest.mark.parametrize("overhead", OVERHEADS.values(), ids=OVERHEADS)
def test_where_not_all_mixes_are_looked_at_frontiers_are_close_to_the_optimum(overhead: tuple[float, float]) -> None:
    for seed in range(3):
        profile = random_profile(seed, 3, overhead)
        sets = tuple(profile.accuracy)
        found = frontier(profile, sets, 12)
        assert found.considered < math.comb(12 + 6, 6)
        assert max(excess(found, *optimum) for optimum in optima(profile, sets, 12)) < 0.01


@pytest.mark.parametrize(
    ("modalities", "size", "worst", "mean"), [(3, 64, 0, 0), (4, 80, 0.05, 0.01), (6, 66, 0.05, 0.01)]
)
@pytest.mark.parametrize("overhead", OVERHEADS.values(), ids=OVERHEADS)
def test_large_frontiers_are_close_to_the_exact_separable_one(
    modalities: int, size: int, worst: float, mean: float, overhead: tuple[float, float]
) -> None:
    profile = random_profile(7, modalities, overhead)
    profile.accuracy = {s: round(accuracy * 40) / 40 for s, accuracy in profile.accuracy.items()}
    found = frontier(profile, tuple(profile.accuracy), size)
    check_sound(found, profile, size)
    costs = enumerate(exact_separable(profile, 40, size))
    dearer = [max(excess(found, n / 40 / size, cost_ms), 0.0) for n, cost_ms in costs if cost_ms < np.inf]
    assert max(dearer) <= worst + 1e-9
    assert np.mean(dearer) <= mean + 1e-9


@pytest.mark.parametrize("size", [1, 2, 5, 16, 32, 64, 300, 4096])
@pytest.mark.parametrize("modalities", [2, 3, 4, 8])
def test_the_mixes_that_are_compared_are_bounded_whatever_the_model_and_the_job(modalities: int, size: int) -> None:
    profile = random_profile(1, modalities, OVERHEADS["usual"])
    found = frontier(profile, tuple(profile.accuracy), size)
    check_sound(found, profile, size)
    assert found.considered < 16_000
    assert found[len(found) - 1].accuracy == pytest.approx(max(profile.accuracy.values()))


def test_frontiers_are_kept_and_the_one_that_was_wanted_longest_ago_is_forgotten() -> None:
    frontiers = Frontiers(linear({A: 0.5, B: 0.9}, a=1.0, b=3.0))
    first = frontiers.of((A, B), 1)
    assert frontiers.of([B, A], 1) is first
    for size in range(2, 300):
        frontiers.of((A, B), size)
        assert frontiers.of((A, B), 1) is first
    statistics = frontiers.statistics()
    assert statistics["frontiers_kept"] == 128
    assert statistics["frontiers_computed"] == 299
    assert frontiers.of((A,), 7)[0].counts == ((A, 7),)
    assert frontiers.statistics() == statistics, "of one set there is one strategy, and nothing to keep"


def exact_separable(profile: ModelProfile, grid: int, size: int) -> list[float]:
    """The least separable cost of mixes whose accuracies sum to n / `grid` or more, by n."""
    least = np.full((size + 1, grid * size + 1), np.inf)
    least[0, 0] = 0.0
    for modality_set, accuracy in profile.accuracy.items():
        step, before = round(accuracy * grid), least.copy()
        for count in range(1, size + 1):
            cost_ms, rise = profile.cost_ms(modality_set, count), step * count
            with_more = before[: size + 1 - count, : grid * size + 1 - rise] + cost_ms
            least[count:, rise:] = np.minimum(least[count:, rise:], with_more)
    costs: list[float] = np.minimum.accumulate(least[size, ::-1])[::-1].tolist()
    return costs


@pytest.mark.parametrize("thinned", [False, True])
def test_the_steps_between_two_sets_are_single_items(thinned: bool) -> None:
    size = 65 if thinned else 5
    found = frontier(linear({A: 0.5, B: 0.9}, a=1.0, b=3.0), (A, B), size)
    assert found[0].counts == ((A, size),)
    assert found[-1].counts == ((B, size),)
    assert [s.cost_ms for s in found] == pytest.approx([size + 2 * n for n in range(size + 1)])
    assert [s.accuracy for s in found] == pytest.approx([0.5 + 0.4 * n / size for n in range(size + 1)])


def test_a_shared_encoder_call_is_paid_once() -> None:
    profile = linear({A: 0.5, AB: 0.9}, a=1.0, b=1.0)
    profile.encoders["a"] = LatencyCurve(((1, 10.0), (2, 10.0)))
    assert [s.cost_ms for s in frontier(profile, (A, AB), 2)] == [10.0, 11.0, 12.0]


def test_a_set_that_costs_more_and_is_less_accurate_is_not_run() -> None:
    found = frontier(linear({A: 0.5, B: 0.9, C: 0.6}, a=1.0, b=2.0, c=3.0), (A, B, C), 8)
    assert {s for strategy in found for s, _ in strategy.counts} == {A, B}


def test_of_equal_accuracies_the_cheapest_is_left() -> None:
    accuracy = {A: 0.7, B: 0.7, C: 0.7}
    (only,) = frontier(linear(accuracy, a=3.0, b=1.0, c=2.0), (A, B, C), 10)
    assert only == Strategy(((B, 10),), only.accuracy, 10.0)
    assert only.accuracy == pytest.approx(0.7)


def test_where_nothing_costs_anything_the_most_accurate_is_left() -> None:
    for size in (3, 70):
        (only,) = frontier(linear({A: 0.5, B: 0.9, AB: 0.8}, a=0.0, b=0.0), (A, B, AB), size)
        assert only.counts == ((B, size),)


def test_one_set_has_one_strategy_at_every_size() -> None:
    for size in (1, 2, 40):
        assert [strategy.counts for strategy in frontier(linear({A: 0.5}, a=2.0), (A,), size)] == [((A, size),)]


def test_sets_that_are_not_given_are_not_run() -> None:
    found = frontier(linear({A: 0.5, B: 0.9, AB: 0.95}, a=1.0, b=2.0), (A, AB), 4)
    assert {s for strategy in found for s, _ in strategy.counts} == {A, AB}


@pytest.mark.parametrize(("sets", "size"), [((), 1), ((A,), 0), ((A,), -3)])
def test_no_sets_and_no_items_are_refused(sets: tuple[ModalitySet, ...], size: int) -> None:
    profile = linear({A: 0.5}, a=1.0)
    with pytest.raises(ValueError, match="at least 1"):
        frontier(profile, sets, size)


@given(
    costs=st.lists(st.floats(0.0, 1e6), min_size=1, max_size=60, unique=True).map(sorted),
    limit=st.integers(2, 20),
)
def test_a_thinned_frontier_keeps_its_ends_and_spreads_in_cost(costs: list[float], limit: int) -> None:
    strategies = [Strategy(((A, 1),), float(i), cost) for i, cost in enumerate(costs)]
    kept = thin(strategies, limit)
    assert len(kept) <= limit
    assert (kept[0], kept[-1]) == (strategies[0], strategies[-1])
    assert [s for s in strategies if s in kept] == list(kept)
    if len(strategies) <= limit:
        assert list(kept) == strategies
    for wanted in np.linspace(costs[0], costs[-1], limit):
        nearest = min(abs(cost - wanted) for cost in costs)
        assert min(abs(s.cost_ms - wanted) for s in kept) == nearest


def test_a_frontier_cannot_be_thinned_below_its_ends() -> None:
    with pytest.raises(ValueError, match="limit is 1"):
        thin([Strategy(((A, 1),), 0.5, 1.0)], 1)
