import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.clairvoyant import Cheapest, bound, capacity_ratio, clairvoyant, least_work_s, shares_done
from bench.example import example
from bench.outcomes import summarise
from bench.simulation import World, new_scheduler, simulate
from bench.workload import Arrival, poisson
from selector.core.profile import LatencyCurve, ModelProfile

WORLD, DEMANDS = example()
EDGELESS = World(WORLD.profile)


def fits(jobs: Sequence[tuple[float, float, float]]) -> bool:
    """Whether jobs (released, due, work) can all be done: no span has more work than time."""
    return all(
        sum(w for r, d, w in jobs if r >= start and d <= end) <= end - start + 1e-9
        for (start, _, _), (_, end, _) in itertools.product(jobs, jobs)
        if start < end
    )


jobs_of = st.lists(
    st.tuples(st.integers(0, 10), st.integers(1, 8), st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=7
)


@settings(deadline=None)
@given(jobs_of)
def test_no_choice_of_whole_jobs_is_worth_more_than_the_bound(drawn: list[tuple[int, int, int, int]]) -> None:
    drawn.sort()
    arrivals = [Arrival(at, size, span * 1000, 0.0) for at, span, _, size in drawn]
    work = np.array([float(work) for _, _, work, _ in drawn])
    jobs = [(float(at), float(at + span), float(w)) for at, span, w, _ in drawn]
    choices = [c for n in range(len(jobs) + 1) for c in itertools.combinations(range(len(jobs)), n)]
    feasible = [c for c in choices if fits([jobs[i] for i in c])]
    best_jobs = max(len(c) for c in feasible)
    best_items = max(sum(drawn[i][3] for i in c) for c in feasible)
    assert shares_done(EDGELESS, arrivals, work, False).sum() >= best_jobs - 1e-6
    sizes = np.array([arrival.size for arrival in arrivals])
    assert (shares_done(EDGELESS, arrivals, work, True) * sizes).sum() >= best_items - 1e-6


@settings(deadline=None)
@given(jobs_of)
def test_what_is_done_fits(drawn: list[tuple[int, int, int, int]]) -> None:
    drawn.sort()
    arrivals = [Arrival(at, size, span * 1000, 0.0) for at, span, _, size in drawn]
    work = np.array([float(work) for _, _, work, _ in drawn])
    done = shares_done(EDGELESS, arrivals, work, False) * work
    assert (done >= -1e-9).all()
    assert (done <= work + 1e-9).all()
    assert fits([(at, at + span, float(d)) for (at, span, _, _), d in zip(drawn, done, strict=True)])


def test_the_least_valuable_work_is_cut() -> None:
    arrivals = [Arrival(0, 1, 4_000, 0), Arrival(0, 1, 4_000, 0), Arrival(0, 9, 5_000, 0)]
    work = np.array([1.0, 4.0, 3.0])
    assert shares_done(EDGELESS, arrivals, work, False).tolist() == pytest.approx([1.0, 0.25, 1.0])
    assert shares_done(EDGELESS, arrivals, work, True).tolist() == pytest.approx([1.0, 0.25, 1.0])


def test_work_waits_for_its_release_and_the_edge() -> None:
    arrivals, work = [Arrival(0, 1, 3_000, 0), Arrival(2, 1, 1_000, 0)], np.array([2.0, 1.0])
    assert shares_done(EDGELESS, arrivals, work, False).tolist() == [1.0, 1.0]
    slow_edge = World(WORLD.profile, edge_ms=500)
    assert shares_done(slow_edge, arrivals, work, False).tolist() == [1.0, 0.5]


@pytest.mark.parametrize("load", [30, 80, 150])
@pytest.mark.parametrize("policy", ["all", "mosel"])
def test_no_policy_misses_less_than_the_bound(policy: str, load: float) -> None:
    arrivals = list(DEMANDS.arrivals(poisson(load, 4, 0), 0))
    jobs, items = bound(WORLD, arrivals)
    real = summarise(simulate(arrivals, new_scheduler(WORLD, policy), WORLD), 4)
    assert real.job_miss_ratio >= jobs
    assert real.item_miss_ratio >= items


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_knowing_all_arrivals_helps_and_does_not_beat_the_bound() -> None:
    arrivals = list(DEMANDS.arrivals(poisson(150, 8, 0), 0))
    blind = summarise(simulate(arrivals, new_scheduler(WORLD, "mosel"), WORLD), 8)
    knowing = clairvoyant(WORLD, arrivals, 8)
    assert bound(WORLD, arrivals)[0] <= knowing.job_miss_ratio < blind.job_miss_ratio
    assert knowing.jobs == blind.jobs
    assert knowing.below_floor == 0


def test_the_cheapest_strategy_meets_the_floor_at_the_least_cost() -> None:
    strategies = {floor: Cheapest(WORLD.profile)(Arrival(0, 2, 0, floor)) for floor in (0.5, 0.86, 0.9, 0.98)}
    assert all(strategy.accuracy >= floor - 1e-9 for floor, strategy in strategies.items())
    costs = [strategy.cost_ms for strategy in strategies.values()]
    assert costs == sorted(costs)


def test_capacity_ratio_is_one_where_everything_is_needed() -> None:
    all_of_it = [Arrival(0, size, 0, 0.98) for size in (1, 4, 9)]
    assert capacity_ratio(WORLD.profile, all_of_it) == pytest.approx(1)
    assert capacity_ratio(WORLD.profile, [Arrival(0, 4, 0, 0.6)]) > 2


def test_the_least_work_is_that_of_the_best_batches() -> None:
    audio = frozenset({"audio"})
    curve, free = LatencyCurve(((1, 10.0), (4, 20.0))), LatencyCurve(((1, 0.0),))
    world = World(ModelProfile({audio: 0.9}, 1, None, {"audio": curve}, {audio: free}), 2, drift={"audio": 1.5})
    # 20 ms for four items, half of it per token, for three items, slowed down.
    assert least_work_s(world, [Arrival(0, 3, 0, 0.5)]) == pytest.approx([0.005 * 3 / 2 * 1.5])
