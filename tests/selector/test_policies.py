"""Which modality set a job gets."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosel.errors import DeadlineUnreachable, FloorUnreachable, MoselError, Overloaded, ServiceUnavailable
from mosel.modality import ModalitySet, format_set, parse_set, subsets
from selector.policies import Demand, choose, preferred_sets
from selector.profile import LatencyCurve, ModelProfile

ALL = frozenset({"audio", "image", "pen"})
ACCURACY = {
    "pen": 0.60,
    "image": 0.65,
    "audio": 0.72,
    "image+pen": 0.88,
    "audio+pen": 0.89,
    "audio+image": 0.90,
    "audio+image+pen": 0.96,
}
ENCODER_MS = {"pen": 0.04, "image": 0.7, "audio": 2.5}


def profile_of(
    accuracy: dict[str, float], encoder_ms: dict[str, float], default_floor: float | None = None
) -> ModelProfile:
    def curve(ms: float) -> LatencyCurve:
        return LatencyCurve(((1, ms), (8, 4 * ms)))

    return ModelProfile(
        accuracy={parse_set(name): value for name, value in accuracy.items()},
        samples=1000,
        default_min_accuracy=default_floor,
        encoders={name: curve(ms) for name, ms in encoder_ms.items()},
        fusion={parse_set(name): curve(0.1) for name in accuracy},
    )


@pytest.fixture
def profile() -> ModelProfile:
    return profile_of(ACCURACY, ENCODER_MS)


def up(_: ModalitySet) -> bool:
    return True


def without(*away: str) -> Callable[[ModalitySet], bool]:
    return lambda modality_set: modality_set.isdisjoint(away)


def names(sets: list[ModalitySet]) -> list[str]:
    return [format_set(s) for s in sets]


def demand(min_accuracy: float | None = None, sent: ModalitySet = ALL, budget_ms: float = 1e6, size: int = 1) -> Demand:
    return Demand(size, sent, min_accuracy, budget_ms)


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
def test_with_a_floor_the_cheapest_set_that_meets_it_comes_first(
    profile: ModelProfile, floor: float, cheapest: str
) -> None:
    assert names(preferred_sets(profile, demand(floor), up))[0] == cheapest


def test_without_a_floor_only_as_accurate_as_what_was_sent(profile: ModelProfile) -> None:
    assert names(preferred_sets(profile, demand(), up)) == ["audio+image+pen"]
    assert names(preferred_sets(profile, demand(sent=frozenset({"pen"})), up)) == ["pen"]


def test_without_a_floor_what_was_sent_comes_first_then_by_falling_accuracy_down_to_the_default_floor() -> None:
    noisy = ACCURACY | {"audio+image": 0.97}
    assert names(preferred_sets(profile_of(noisy, ENCODER_MS, default_floor=0.7), demand(), up)) == [
        "audio+image+pen",
        "audio+image",
        "audio+pen",
        "image+pen",
        "audio",
    ]


def test_the_default_floor_never_refuses_what_was_sent() -> None:
    strict = profile_of(ACCURACY, ENCODER_MS, default_floor=0.9)
    assert names(preferred_sets(strict, demand(sent=frozenset({"pen"})), up)) == ["pen"]


def test_the_caller_s_floor_wins_over_the_default_floor() -> None:
    strict = profile_of(ACCURACY, ENCODER_MS, default_floor=0.9)
    assert names(preferred_sets(strict, demand(0.0), up))[0] == "pen"


def test_sets_whose_encoders_are_away_are_passed_over(profile: ModelProfile) -> None:
    assert names(preferred_sets(profile, demand(0.65), without("image")))[0] == "audio"


def test_sets_that_are_not_measured_are_passed_over(profile: ModelProfile) -> None:
    del profile.encoders["pen"]
    assert names(preferred_sets(profile, demand(0.0), up))[0] == "image"


def test_a_floor_that_is_out_of_reach_is_refused_with_the_best_that_could_be_had(profile: ModelProfile) -> None:
    with pytest.raises(FloorUnreachable, match=r"0\.97 .*the best that could be had is 0\.96 with audio\+image\+pen"):
        preferred_sets(profile, demand(0.97), up)
    with pytest.raises(FloorUnreachable, match=r"the best that could be had is 0\.88 with image\+pen"):
        preferred_sets(profile, demand(0.9, sent=frozenset({"image", "pen"})), up)


def test_an_encoder_that_is_away_is_named_with_the_best_that_is_left(profile: ModelProfile) -> None:
    with pytest.raises(ServiceUnavailable, match=r"the best that could be had is 0\.88 with image\+pen"):
        preferred_sets(profile, demand(0.89), without("audio"))
    with pytest.raises(ServiceUnavailable, match="nothing else could be had"):
        preferred_sets(profile, demand(0.5), without("audio", "image", "pen"))


def idle(profile: ModelProfile, size: int = 1) -> Callable[[ModalitySet], float]:
    return lambda modality_set: profile.idle_latency_ms(modality_set, size)


def test_exactly_the_named_modalities_are_run_or_nothing(profile: ModelProfile) -> None:
    job = Demand(1, frozenset({"audio", "pen"}), None, 1000, exact=True)
    assert preferred_sets(profile, job, up) == [job.modalities]
    with pytest.raises(ServiceUnavailable, match="encoder/pen"):
        preferred_sets(profile, job, without("pen"))


def test_a_deadline_makes_a_later_preference_the_choice(profile: ModelProfile) -> None:
    job = demand(0.0, budget_ms=1.0)
    sets = [parse_set(name) for name in ("audio+image+pen", "audio", "image", "pen")]
    assert choose(profile, job, sets, idle(profile), idle(profile)) == frozenset({"image"})


def test_a_deadline_that_no_set_fits_is_refused_with_the_best_that_would(profile: ModelProfile) -> None:
    job = demand(0.7, budget_ms=0.5)
    sets = preferred_sets(profile, job, up)
    with pytest.raises(DeadlineUnreachable, match=r"image\+pen takes 0\.8 ms on an idle system; .* 0\.6 with pen"):
        choose(profile, job, sets, idle(profile), idle(profile))
    with pytest.raises(DeadlineUnreachable, match="nothing else could be had"):
        choose(profile, demand(0.7, budget_ms=0.01), sets, idle(profile), idle(profile))


def test_a_queue_in_front_is_overload_and_says_when_to_try_again(profile: ModelProfile) -> None:
    job = demand(0.7, budget_ms=10)
    sets = preferred_sets(profile, job, up)
    with pytest.raises(Overloaded, match=r"image\+pen takes 0\.8 ms on an idle system") as refused:
        choose(profile, job, sets, idle(profile), lambda s: profile.idle_latency_ms(s, 1) + 50)
    assert refused.value.retry_after_ms == 41


fractions = st.floats(0, 1)
SETS = [format_set(s) for s in subsets(ALL)]


@settings(deadline=None, max_examples=300)
@given(
    accuracy=st.fixed_dictionaries(dict.fromkeys(SETS, fractions)),
    encoder_ms=st.fixed_dictionaries({name: st.floats(0.01, 100) for name in sorted(ALL)}),
    default_floor=st.none() | fractions,
    floor=st.none() | fractions,
    exact=st.booleans(),
    sent=st.sampled_from(subsets(ALL)),
    away=st.sets(st.sampled_from(sorted(ALL)), max_size=2),
    budget_ms=st.floats(0.01, 1000),
    size=st.integers(1, 40),
    queue=st.fixed_dictionaries({name: st.floats(0, 100) for name in sorted(ALL)}),
)
def test_what_is_chosen_meets_floor_and_deadline_and_nothing_preferred_would(
    accuracy: dict[str, float],
    encoder_ms: dict[str, float],
    default_floor: float | None,
    floor: float | None,
    exact: bool,
    sent: ModalitySet,
    away: set[str],
    budget_ms: float,
    size: int,
    queue: dict[str, float],
) -> None:
    profile = profile_of(accuracy, encoder_ms, default_floor)
    job = Demand(size, sent, floor, budget_ms, exact)

    def predicted(modality_set: ModalitySet) -> float:
        return profile.idle_latency_ms(modality_set, size) + max(queue[m] for m in modality_set)

    full = accuracy[format_set(sent)]
    effective = floor if floor is not None else full if default_floor is None else min(full, default_floor)
    accurate = [s for s in ([sent] if exact else subsets(sent)) if profile.accuracy[s] >= effective]
    running = [s for s in accurate if s.isdisjoint(away)]
    allowed = [s for s in running if predicted(s) <= budget_ms]
    try:
        chosen = choose(profile, job, preferred_sets(profile, job, without(*away)), idle(profile, size), predicted)
    except MoselError as error:
        assert not allowed
        fits_idle = any(profile.idle_latency_ms(s, size) <= budget_ms for s in running)
        behind = Overloaded if fits_idle else DeadlineUnreachable
        assert type(error) is (  # noqa: PT017
            FloorUnreachable if not accurate else ServiceUnavailable if not running else behind
        )
        return
    assert chosen in allowed
    if floor is not None:
        assert profile.cost_ms(chosen, size) == min(profile.cost_ms(s, size) for s in allowed)
    elif sent in allowed:
        assert chosen == sent
    else:
        assert profile.accuracy[chosen] == max(profile.accuracy[s] for s in allowed)
