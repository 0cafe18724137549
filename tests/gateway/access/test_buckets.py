"""A token bucket never gives more than its rate and capacity allow, and what it says of the wait is true."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.access.buckets import TokenBucket

rates = st.floats(0.01, 1e6)
capacities = st.floats(1, 1e6)
steps = st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1)), max_size=40)


@given(rates, capacities, steps, st.floats(0, 1e7))
def test_in_no_stretch_of_time_does_it_give_more_than_capacity_and_rate(
    rate: float, capacity: float, steps: list[tuple[float, float]], start: float
) -> None:
    bucket, now, taken = TokenBucket(rate, capacity, start), start, []
    for pause, share in steps:
        now += pause
        amount = share * capacity
        if not bucket.wait_s(amount, now):
            bucket.take(amount, now)
            taken.append((now, amount))
    for first in range(len(taken)):
        given_out = 0.0
        for at, amount in taken[first:]:
            given_out += amount
            assert given_out <= (capacity + rate * (at - taken[first][0])) * (1 + 1e-6) + 1e-6


@given(rates, capacities, steps, st.floats(0, 1))
def test_after_the_wait_it_gives_and_before_it_does_not(
    rate: float, capacity: float, steps: list[tuple[float, float]], share: float
) -> None:
    bucket, now = TokenBucket(rate, capacity, 0.0), 0.0
    for pause, part in steps:
        now += pause
        # Whatever is there: debts, too.
        bucket.take(part * capacity, now)
    least = share * capacity
    wait = bucket.wait_s(least, now)
    assert bucket.wait_s(least, now + wait) == 0
    if wait * rate > 1e-3 * (capacity + rate):
        assert bucket.wait_s(least, now + wait * 0.99) > 0


@given(rates, capacities, st.floats(0, 100))
def test_it_never_holds_more_than_its_capacity(rate: float, capacity: float, pause: float) -> None:
    bucket = TokenBucket(rate, capacity, 0.0)
    bucket.take(capacity, pause)
    assert bucket.wait_s(capacity / 2, pause) > 0


def test_a_debt_is_paid_before_anything_is_given() -> None:
    bucket = TokenBucket(10, 10, 0.0)
    bucket.take(60, 0.0)
    assert bucket.wait_s(0, 0.0) == 5
    assert bucket.wait_s(0, 4.9) > 0
    assert bucket.wait_s(0, 5.0) == 0
    assert bucket.wait_s(10, 5.0) == 1


def test_other_limits_hold_at_once_and_what_was_used_stays_used() -> None:
    bucket = TokenBucket(1, 10, 0.0)
    bucket.take(10, 0.0)
    bucket.limit(2, 4, 0.0)
    assert bucket.wait_s(1, 0.0) == 0.5
    assert bucket.wait_s(4, 100.0) == 0
    assert bucket.wait_s(5, 100.0) > 0
