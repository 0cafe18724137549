"""Which queued jobs give up accuracy under each policy. One token and calls of one item: finish times are sums."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selector.core.forecast import Forecast
from selector.core.policies import POLICIES, Choices, Policy, Queued, aggressive, finish_times, greedy, mosel
from selector.core.profile import LatencyCurve
from selector.core.stages import Correction, Remaining, Stage

# One row takes a millisecond, in calls of one row.
ENCODER = Stage("image", LatencyCurve(((1, 1.0),)), Correction(1.0, 1.0))
DROPPED = -10.0

every_policy = pytest.mark.parametrize("policy", [aggressive, greedy, mosel])


def queued(
    deadline_ms: float, *options: tuple[int, float], size: int = 1, committed: bool = False, late_ok: bool = False
) -> Queued:
    """A job whose options are (milliseconds, value), the preferred one first."""
    lefts = [Remaining(((ENCODER, ms),), ()) for ms, _ in options]
    cheapest = min(range(len(options)), key=lambda i: options[i][0])
    values = [value for _, value in options]
    return Queued(lefts, values, cheapest, size, deadline_ms / 1000 + 1e-9, committed, late_ok)


def forecast() -> Forecast:
    return Forecast(0.0, {"cpu": [0.0]}, {"image": "cpu"})


def times_ms(queue: Sequence[Queued], choices: Choices) -> list[int | None]:
    return [None if at is None else round(at * 1000) for at in finish_times(queue, forecast(), choices)]


def value(queue: Sequence[Queued], choices: Sequence[int | None]) -> float:
    """The total over items of the options; no job that may be dropped may be late instead."""
    times = finish_times(queue, forecast(), choices)
    total = 0.0
    for job, choice, at in zip(queue, choices, times, strict=True):
        in_time = at is not None and at <= job.deadline
        total += job.size * (DROPPED if choice is None else job.values[choice] if in_time else -math.inf)
    return total


FULL_OR_LESS = ((10, 1.0), (4, 0.8))


@every_policy
def test_nobody_gives_up_anything_while_everyone_is_in_time(policy: Policy) -> None:
    assert policy([queued(10, *FULL_OR_LESS), queued(20, *FULL_OR_LESS)], forecast()) == [0, 0]
    assert policy([], forecast()) == []


def test_all_is_a_policy_for_jobs_with_one_option() -> None:
    queue = [queued(10, (10, 1.0)), queued(15, (10, 1.0)), queued(20, (10, 1.0))]
    choices = POLICIES["all"](queue, forecast())
    assert choices == [0, None, 0]
    assert times_ms(queue, choices) == [10, None, 20]


def test_aggressive_reassigns_everyone_up_to_the_first_miss() -> None:
    queue = [queued(ms, *FULL_OR_LESS) for ms in (12, 15, 30, 40)]
    assert times_ms(queue, [0, 0, 0, 0]) == [10, 20, 30, 40]
    assert aggressive(queue, forecast()) == [1, 1, 0, 0]
    assert times_ms(queue, [1, 1, 0, 0]) == [4, 8, 18, 28]


def test_aggressive_goes_on_to_the_next_miss() -> None:
    queue = [queued(15, *FULL_OR_LESS), queued(16, *FULL_OR_LESS), queued(17, *FULL_OR_LESS), queued(99, *FULL_OR_LESS)]
    assert aggressive(queue, forecast()) == [1, 1, 1, 0]


def test_greedy_stops_when_the_deficit_is_gone() -> None:
    # The second is 5 ms late; the first saves 6.
    assert greedy([queued(12, *FULL_OR_LESS), queued(15, *FULL_OR_LESS)], forecast()) == [1, 0]
    # It is 8 ms late: both must.
    assert greedy([queued(12, *FULL_OR_LESS), queued(12, *FULL_OR_LESS)], forecast()) == [1, 1]


def test_mosel_serves_all_deadlines_at_once_where_the_others_look_at_the_first() -> None:
    # In full they end at 10, 20 and 30 ms: the second is 1 ms late, the third 6 ms. The others solve the second's miss
    # with the first job, then need the second job for the third; the third has most to give for least.
    queue = [
        queued(10, (10, 1.0), (6, 0.9)),
        queued(19, (10, 1.0), (6, 0.9)),
        queued(24, (10, 1.0), (2, 0.95)),
    ]
    assert value(queue, aggressive(queue, forecast())) == pytest.approx(2.8)
    assert value(queue, greedy(queue, forecast())) == pytest.approx(2.8)
    choices = mosel(queue, forecast())
    assert choices in ([1, 0, 1], [0, 1, 1])
    assert value(queue, choices) == pytest.approx(2.85)


def test_mosel_takes_an_option_between_where_it_is_enough() -> None:
    queue = [queued(18, (10, 1.0), (9, 0.98), (2, 0.5)), queued(19.5, (10, 1.0), (2, 0.5))]
    assert mosel(queue, forecast()) == [1, 0]
    assert greedy(queue, forecast()) == [2, 0]
    assert aggressive(queue, forecast()) == [2, 1]


def test_mosel_weighs_jobs_by_their_items() -> None:
    small, large = queued(15, *FULL_OR_LESS), queued(15, *FULL_OR_LESS, size=9)
    assert mosel([small, large], forecast()) == [1, 0]
    assert mosel([large, small], forecast()) == [0, 1]


@every_policy
def test_a_job_is_dropped_only_when_nothing_saves_it(policy: Policy) -> None:
    saved = [queued(4, *FULL_OR_LESS), queued(8, *FULL_OR_LESS)]
    assert policy(saved, forecast()) == [1, 1]
    hopeless = [queued(4, *FULL_OR_LESS), queued(7, *FULL_OR_LESS)]
    assert policy(hopeless, forecast()).count(None) == 1


def test_mosel_drops_the_job_that_costs_the_others_least() -> None:
    # The first fits alone, or the other two without it.
    queue = [queued(9, (9, 1.0)), queued(10, (5, 1.0)), queued(11, (5, 1.0))]
    assert mosel(queue, forecast()) == [None, 0, 0]
    assert value(queue, greedy(queue, forecast())) < value(queue, mosel(queue, forecast()))


@every_policy
def test_what_has_started_or_may_be_late_is_never_dropped(policy: Policy) -> None:
    queue = [queued(5, (10, 1.0), committed=True), queued(6, (10, 1.0), (8, 0.9), late_ok=True)]
    choices = policy(queue, forecast())
    assert None not in choices
    assert policy([*queue, queued(17, *FULL_OR_LESS)], forecast())[2] is None


@every_policy
def test_a_queue_in_which_all_is_under_way_is_left_as_it_is(policy: Policy) -> None:
    over = Queued([Remaining((), (), not_before=0.5)], [0.0], 0, 3, deadline=0.1, committed=True)
    assert policy([over, over], forecast()) == [0, 0]


def test_behind_the_window_jobs_are_cheap_while_someone_would_be_late() -> None:
    queue = [queued(2000 + i, *FULL_OR_LESS) for i in range(100)]
    assert mosel(queue, forecast()) == [0] * 100
    queue[0] = queued(4, *FULL_OR_LESS)
    choices = mosel(queue, forecast())
    assert choices[:64] == [1] + [0] * 63
    assert set(choices[64:]) == {1}


option = st.tuples(st.integers(1, 40), st.integers(0, 100).map(lambda percent: percent / 100))
options = st.lists(option, min_size=1, max_size=3).map(lambda some: sorted(some, key=lambda o: -o[1]))
deadlines, sizes = st.integers(1, 120), st.integers(1, 8)
droppable = st.builds(lambda deadline, some, size: queued(deadline, *some, size=size), deadlines, options, sizes)
committed = st.builds(lambda deadline, some: queued(deadline, some[0], committed=True), deadlines, options)
late_ok = st.builds(lambda deadline, some: queued(deadline, *some, late_ok=True), deadlines, options)


def in_order(jobs: list[Queued]) -> list[Queued]:
    return sorted(jobs, key=lambda job: job.deadline)


queues = st.lists(droppable, min_size=1, max_size=5).map(in_order)
mixed_queues = st.lists(droppable | committed | late_ok, min_size=1, max_size=6).map(in_order)


def hurried(queue: Sequence[Queued], seconds: float) -> list[Queued]:
    """The same jobs, with deadlines so much earlier."""
    return [dataclasses.replace(job, deadline=job.deadline - seconds) for job in queue]


def best_value(queue: Sequence[Queued]) -> float:
    """The greatest total value, by trying everything."""
    every = itertools.product(*([None, *range(len(job.options))] for job in queue))
    return max(value(queue, choices) for choices in every)


def rounding_s(queue: Sequence[Queued]) -> float:
    """By how much the plan is more careful than the deadlines: every job's time and deadline are rounded to buckets."""
    longest = sum(max(rows for left in job.options for _, rows in left.encode) for job in queue) / 1000
    return (len(queue) + 1) * longest / 256


@settings(deadline=None, max_examples=100)
@given(queue=queues)
def test_mosel_is_as_good_as_trying_everything_up_to_rounding(queue: list[Queued]) -> None:
    choices = mosel(queue, forecast())
    got = value(queue, choices)
    assert got <= best_value(queue) + 1e-9
    assert got >= best_value(hurried(queue, rounding_s(queue))) - 1e-9


@settings(deadline=None, max_examples=200)
@given(queue=queues)
def test_mosel_is_as_good_as_the_others_up_to_rounding(queue: list[Queued]) -> None:
    got, others = value(queue, mosel(queue, forecast())), hurried(queue, rounding_s(queue))
    for policy in (aggressive, greedy):
        assert got >= value(others, policy(others, forecast())) - 1e-9


@settings(deadline=None, max_examples=300)
@given(queue=mixed_queues, policy=st.sampled_from([aggressive, greedy, mosel]))
def test_who_can_be_met_is_in_time_and_nobody_is_dropped_in_vain(queue: list[Queued], policy: Policy) -> None:
    choices = policy(queue, forecast())
    for job, choice, at in zip(queue, choices, finish_times(queue, forecast(), choices), strict=True):
        assert choice is None or 0 <= choice < len(job.options)
        assert choice is not None or not (job.committed or job.late_ok)
        assert at is None or at <= job.deadline or job.committed or job.late_ok
    cheapest = finish_times(queue, forecast(), [job.cheapest for job in queue])
    if all(at is not None and at <= job.deadline for job, at in zip(queue, cheapest, strict=True)):
        assert None not in choices


@given(queue=queues)
def test_aggressive_changes_a_prefix_and_nothing_behind(queue: list[Queued]) -> None:
    choices = aggressive(queue, forecast())
    changed = [i for i, choice in enumerate(choices) if choice not in (0, None)]
    for i in range(max(changed, default=-1)):
        assert choices[i] in (queue[i].cheapest, None)


def test_a_resource_with_more_tokens_serves_more_at_once() -> None:
    two = Forecast(0.0, {"cpu": [0.0, 0.0]}, {"image": "cpu"})
    queue = [queued(10, *FULL_OR_LESS), queued(10, *FULL_OR_LESS)]
    assert mosel(queue, two) == [0, 0]
    assert mosel(queue, forecast()) != [0, 0]


def test_the_reserve_keeps_time_for_jobs_to_come_but_drops_nobody_for_it() -> None:
    half = Forecast(0.0, {"cpu": [0.0]}, {"image": "cpu"}, reserve={"cpu": 0.5})
    assert mosel([queued(15, *FULL_OR_LESS)], forecast()) == [0]
    assert mosel([queued(15, *FULL_OR_LESS)], half) == [1], "10 ms take 20 while half of the time goes to others"
    assert mosel([queued(5, *FULL_OR_LESS)], half) == [1]
    assert greedy([queued(15, *FULL_OR_LESS)], half) == [0]
    assert math.isclose(half.finish([queued(15, *FULL_OR_LESS).options[0]])[0], 0.010)
