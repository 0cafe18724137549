import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.accuracy import standard_error
from bench.outcomes import Ending, Outcome, summarise
from bench.workload import Arrival


def outcome(ending: Ending, size: int = 1, ms: float = 50, accuracy: float = 0.9, floor: float = 0.8) -> Outcome:
    counts = (("audio", size),) if ending is Ending.ANSWERED else ()
    return Outcome(Arrival(1.0, size, 100.0, floor), ending, 1.0 + ms / 1000, counts, accuracy)


def test_everything_that_is_not_answered_in_time_is_missed() -> None:
    outcomes = [
        outcome(Ending.ANSWERED, 4),
        outcome(Ending.ANSWERED, 3, ms=101),
        outcome(Ending.REFUSED, 2),
        outcome(Ending.EXPIRED),
        outcome(Ending.FAILED),
    ]
    summary = summarise(outcomes, 2.0)
    assert (summary.jobs, summary.items) == (5, 11)
    assert (summary.jobs_per_s, summary.items_per_s) == (0.5, 2.0)
    assert summary.job_miss_ratio == pytest.approx(4 / 5)
    assert summary.item_miss_ratio == pytest.approx(7 / 11)
    assert summary.endings == {"answered": 2, "late": 1, "refused": 1, "expired": 1, "failed": 1}


def test_cancelled_jobs_count_nowhere() -> None:
    summary = summarise([outcome(Ending.ANSWERED), outcome(Ending.CANCELLED)], 1.0)
    assert (summary.jobs, summary.job_miss_ratio) == (1, 0)


def test_completion_times_include_late_answers_and_nothing_else() -> None:
    times = [outcome(Ending.ANSWERED, ms=ms) for ms in (20, 40, 300)]
    assert summarise([*times, outcome(Ending.REFUSED, ms=1)], 1.0).mean_ms == pytest.approx(120)


def test_accuracy_and_shares_are_over_answered_items() -> None:
    arrival = Arrival(0.0, 3, 100.0, 0.8)
    mixed = Outcome(arrival, Ending.ANSWERED, 0.05, (("audio", 2), ("audio+image", 1)), 0.85)
    summary = summarise([mixed, outcome(Ending.ANSWERED, 1, accuracy=0.95)], 1.0)
    assert summary.expected_accuracy == pytest.approx((3 * 0.85 + 0.95) / 4)
    assert summary.shares == {"audio": 0.75, "audio+image": 0.25}


def test_jobs_below_their_floor_are_counted() -> None:
    answers = [outcome(Ending.ANSWERED, accuracy=accuracy, floor=0.8) for accuracy in (0.79, 0.8 - 1e-9, 0.8, 0.9)]
    assert summarise(answers, 1.0).below_floor == 1


def test_a_run_without_answers_has_no_times_and_no_accuracy() -> None:
    summary = summarise([outcome(Ending.REFUSED)], 1.0)
    assert all(map(math.isnan, (summary.mean_ms, summary.p99_ms, summary.expected_accuracy, summary.measured_accuracy)))
    assert math.isnan(summarise([], 1.0).job_miss_ratio)


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=300))
def test_p99_is_known_to_one_percent(times: list[float]) -> None:
    summary = summarise([outcome(Ending.ANSWERED, ms=ms) for ms in times], 1.0)
    exact = float(np.percentile(times, 99, method="inverted_cdf"))
    assert exact * 0.999 <= summary.p99_ms <= exact * 1.011


def test_measured_accuracy_is_over_labelled_items() -> None:
    arrival = Arrival(0.0, 2, 100.0, 0.5)
    scored = [(((1,), True), ((2,), False)), (((1,), True), ((3,), True))]
    answers = [Outcome(arrival, Ending.ANSWERED, 0.01, (("audio", 2),), 0.9, s) for s in scored]
    summary = summarise(answers, 1.0)
    assert summary.measured_accuracy == 0.75
    assert summary.standard_error > 0


def test_independent_items_have_the_binomial_standard_error() -> None:
    right = np.random.default_rng(0).random(2_000) < 0.8
    share = right.mean()
    error = standard_error([((i,), bool(r)) for i, r in enumerate(right)])
    assert error == pytest.approx(math.sqrt(share * (1 - share) / 2_000), rel=0.1)


def test_items_of_one_recording_tell_no_more_than_one() -> None:
    right = np.random.default_rng(0).random(200) < 0.8
    alone = [((i,), bool(r)) for i, r in enumerate(right)]
    assert standard_error(alone * 10) == pytest.approx(standard_error(alone), rel=0.1)
