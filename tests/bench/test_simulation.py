from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.example import example
from bench.outcomes import Ending, Outcome, Summary, summarise
from bench.simulation import World, capacity, new_scheduler, simulate, world_and_demands
from bench.workload import Arrival, Demands, poisson
from mosel.profiles.files import CallCost, JobPoint, Point, Profile, wilson
from mosel.profiles.hardware import Hardware, Versions
from selector.core.jobs import Effort
from selector.core.profile import LatencyCurve, ModelProfile

WORLD, DEMANDS = example()
CAPACITY = 58.0  # of `all`, about
AUDIO = frozenset({"audio"})


def one_modality(call_ms: float = 10.0) -> World:
    """A model whose only encoder takes so long, and whose fusion takes nothing."""
    curve, free = LatencyCurve(((1, call_ms), (2, call_ms + 2))), LatencyCurve(((1, 0.0), (2, 0.0)))
    return World(ModelProfile({AUDIO: 0.9}, 100, None, {"audio": curve}, {AUDIO: free}), tokens=1, edge_ms=4.0)


def job(at_s: float, size: int = 1, deadline_ms: float = 1_000) -> Arrival:
    return Arrival(at_s, size, deadline_ms, 0.9)


def run(world: World, *arrivals: Arrival, late_ok: bool = False) -> list[Outcome]:
    return list(simulate(arrivals, new_scheduler(world, "mosel"), world, late_ok=late_ok))


def loaded(policy: str, load: float, world: World = WORLD, seconds: float = 10.0, seed: int = 0) -> Summary:
    arrivals = DEMANDS.arrivals(poisson(load * CAPACITY, seconds, seed), seed)
    return summarise(simulate(arrivals, new_scheduler(world, policy), world), seconds)


def test_a_job_alone_takes_its_calls_and_the_edge() -> None:
    (outcome,) = run(one_modality(), job(1.0))
    assert (outcome.ending, outcome.counts, outcome.expected_accuracy) == (Ending.ANSWERED, (("audio", 1),), 0.9)
    assert outcome.ms == pytest.approx(10 + 4)


def test_a_large_job_takes_longer_at_the_edge_but_time_never_runs_back() -> None:
    world = replace(one_modality(), edge_item_ms=1000.0)
    outcomes = {outcome.arrival.size: outcome for outcome in run(world, job(0.0, size=2), job(0.001))}
    assert outcomes[2].ms == pytest.approx(12 + 1004)
    assert outcomes[1].at_s >= outcomes[2].at_s - 0.502


def test_calls_take_longer_where_the_edge_needs_the_same_cores() -> None:
    world = one_modality(call_ms=9.0)
    arrivals = [job(i / 100, deadline_ms=10_000) for i in range(500)]
    shared, alone = (run(replace(world, edge_cpu_ms=ms), *arrivals)[-1].ms for ms in (4.0, 0.0))
    assert shared > 1.3 * alone


def test_with_one_token_the_second_job_waits_for_the_first() -> None:
    first, second = run(one_modality(), job(0.0), job(0.001))
    assert first.ms == pytest.approx(14)
    assert second.ms == pytest.approx(23)


def test_jobs_that_wait_share_a_call() -> None:
    _, second, third = run(one_modality(), job(0.0), job(0.001), job(0.002))
    assert second.at_s == third.at_s == pytest.approx(0.002 + 0.010 + 0.012 + 0.002)


def test_drift_is_of_the_services_alone() -> None:
    (outcome,) = run(replace(one_modality(), drift={"audio": 3.0}), job(0.0))
    assert outcome.ms == pytest.approx(34)


def test_a_job_that_cannot_be_in_time_is_refused_unless_late_is_fine() -> None:
    hopeless = job(0.0, deadline_ms=5)
    (refused,) = run(one_modality(), hopeless)
    (late,) = run(one_modality(), hopeless, late_ok=True)
    assert (refused.ending, late.ending) == (Ending.REFUSED, Ending.ANSWERED)
    assert not late.in_time


def test_failed_calls_lose_their_jobs() -> None:
    outcomes = run(replace(one_modality(), failures=1.0), job(0.0), job(5.0))
    assert [outcome.ending for outcome in outcomes] == [Ending.FAILED, Ending.FAILED]


def test_cancelled_jobs_end_as_such() -> None:
    outcomes = run(replace(one_modality(), cancels=1.0), *(job(at_s, deadline_ms=20) for at_s in range(50)))
    endings = Counter(outcome.ending for outcome in outcomes)
    assert set(endings) == {Ending.CANCELLED, Ending.ANSWERED}


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["all", "aggressive", "greedy", "mosel"]),
    st.floats(0.3, 3),
    st.floats(0.7, 1.5),
    st.sampled_from([0.0, 0.05]),
    st.integers(0, 1000),
)
def test_every_job_ends_once_and_the_scheduler_is_left_empty(
    policy: str, load: float, drift: float, trouble: float, seed: int
) -> None:
    lanes = dict.fromkeys(WORLD.noise, drift)
    world = replace(WORLD, drift=lanes, failures=trouble, cancels=trouble, seed=seed)
    arrivals = list(DEMANDS.arrivals(poisson(load * CAPACITY, 1.0, seed), seed))
    scheduler = new_scheduler(world, policy)
    outcomes = list(simulate(arrivals, scheduler, world))
    assert Counter(id(outcome.arrival) for outcome in outcomes) == Counter(map(id, arrivals))
    left = scheduler.statistics()
    assert (left["jobs"], left["queued_items"]) == (0, 0)
    assert summarise(outcomes, 1.0).below_floor == 0


def test_the_same_seed_gives_the_same_run() -> None:
    assert loaded("mosel", 1.0, seconds=2) == loaded("mosel", 1.0, seconds=2)
    assert loaded("mosel", 1.0, seconds=2) != loaded("mosel", 1.0, replace(WORLD, seed=1), 2)


def test_arrivals_may_be_endless() -> None:
    def forever() -> Iterator[Arrival]:
        yield from DEMANDS.arrivals(poisson(20, float("inf"), 0), 0)

    outcomes = simulate(forever(), new_scheduler(WORLD, "mosel"), WORLD)
    assert len([next(outcomes) for _ in range(50)]) == 50


def test_choosing_modalities_answers_more_in_time_under_overload() -> None:
    everything, chosen = loaded("all", 1.6), loaded("mosel", 1.6)
    assert chosen.items_per_s > 1.2 * everything.items_per_s
    assert everything.shares == {"audio+pen+video": 1.0}


def test_capacity_is_the_inverse_of_a_jobs_work_when_there_is_one_modality() -> None:
    demands = Demands(((1, 10.0),), 0.9, 0.9, slack=1.0, t=0.0)
    sizes = [arrival.size for arrival in demands.arrivals([0.0] * 300, 0)]
    rate = capacity(one_modality(), demands, "all")
    # Items in calls of two, 6 ms each.
    assert rate == pytest.approx(300 / (sum(sizes) * 0.006 + 0.004), rel=0.02)


def test_thrift_leaves_accuracy_unused() -> None:
    arrivals = [Arrival(0.0, 4, 10_000, 0.9)]
    best, cheapest = (
        next(simulate(arrivals, new_scheduler(WORLD, "mosel"), WORLD, effort=effort))
        for effort in (Effort.BEST, Effort.CHEAPEST)
    )
    assert 0.9 - 1e-9 <= cheapest.expected_accuracy < best.expected_accuracy


def test_a_profile_gives_world_and_demands() -> None:
    profile = Profile(
        model="one",
        version="1",
        content_hash="0",
        hardware=Hardware(cpu="any", cores=2, device="cpu", workers=3, torch_threads={}),
        versions=Versions(python="3", torch="2", mosel="0"),
        measured_on=date(2024, 1, 1),
        quick=False,
        concurrency=3,
        accuracy_source="made up",
        accuracy_measured=False,
        accuracy={"audio": wilson(0.9, 100)},
        encoders={"audio": (Point(batch_size=1, p50_ms=10, p95_ms=10 * 1.1**1.645),)},
        fusion={"audio": (Point(batch_size=1, p50_ms=0, p95_ms=0),)},
        end_to_end={"audio": (JobPoint(size=1, p50_ms=15, p95_ms=20),)},
        calls={"audio": CallCost(overhead_ms=1, factor=2), "fusion": CallCost(overhead_ms=1)},
        edge_ms=3,
    )
    world, demands = world_and_demands(profile)
    assert (world.tokens, world.edge_ms) == (3, 3)
    assert world.profile.encoders["audio"].call_ms(1) == 21
    assert world.noise == {"audio": pytest.approx(0.0953, rel=0.01), "fusion": 0}
    assert demands.full_latency_ms(1) == 15
    without = profile.model_copy(update={"end_to_end": {}})
    assert world_and_demands(without)[1].full_latency_ms(1) == 21 + 1 + 3
    assert not world.profile.is_path(AUDIO)
    in_one = without.model_copy(update={"hardware": profile.hardware.model_copy(update={"placement": "single"})})
    assert world_and_demands(in_one)[0].profile.is_path(AUDIO)


def test_where_the_services_share_a_process_a_job_takes_one_call() -> None:
    world = one_modality()
    known = world.profile
    path = LatencyCurve(((1, 7.0), (2, 8.0)))
    in_one = replace(known, paths={AUDIO: path}, joined=AUDIO)
    (outcome,) = run(replace(world, profile=in_one), job(1.0))
    assert outcome.ms == pytest.approx(7 + 4)


def test_a_second_encoder_on_a_resource_of_its_own_answers_as_much_again() -> None:
    # Fusion takes nothing: all that counts is the encoder.
    rates = []
    for resources in ({}, {"audio/2": "cpu"}, {"audio/2": "another"}):
        world = replace(one_modality(), resources=resources)
        arrivals = [job(0.0, deadline_ms=10_000) for _ in range(200)]
        rates.append(200 / max(outcome.at_s for outcome in run(world, *arrivals, late_ok=True)))
    assert rates[1] == pytest.approx(rates[0], rel=0.02)
    assert rates[2] == pytest.approx(2 * rates[0], rel=0.05)
