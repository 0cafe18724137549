"""Results that are sent as they finish keep the floor at every moment."""

from hypothesis import given
from hypothesis import strategies as st

from selector.core.emission import Emission

Done = tuple[float, int]

results = st.lists(st.tuples(st.integers(0, 100).map(lambda percent: percent / 100), st.integers(1, 8)), min_size=1)


def mean(groups: list[Done]) -> float:
    return sum(accuracy * items for accuracy, items in groups) / sum(items for _, items in groups)


@given(done=results, floor=st.floats(0, 1))
def test_what_was_sent_meets_the_floor_at_any_moment(done: list[Done], floor: float) -> None:
    emission = Emission[Done](floor)
    sent: list[Done] = []
    for accuracy, items in done:
        for group in emission.add(accuracy, items, (accuracy, items)):
            sent.append(group)
            assert mean(sent) >= floor - 1e-9
    assert sorted(sent + emission.rest()) == sorted(done)
    assert emission.rest() == []


@given(done=results, slack=st.floats(0, 0.5))
def test_nothing_is_held_back_once_the_whole_meets_the_floor(done: list[Done], slack: float) -> None:
    emission = Emission[Done](mean(done) - slack)
    sent = [group for accuracy, items in done for group in emission.add(accuracy, items, (accuracy, items))]
    assert sorted(sent) == sorted(done)


@given(done=results)
def test_nothing_is_held_back_longer_than_needed(done: list[Done]) -> None:
    floor, finished = 0.5, list[Done]()
    emission = Emission[Done](floor)
    sent: list[Done] = []
    for accuracy, items in done:
        finished.append((accuracy, items))
        sent += emission.add(accuracy, items, (accuracy, items))
        if mean(finished) >= floor:
            assert sorted(sent) == sorted(finished)
        assert all(group in sent for group in finished if group[0] >= floor)


def test_cheap_results_wait_for_accurate_ones() -> None:
    emission = Emission[str](0.7)
    assert emission.add(0.6, 2, "cheap") == []
    assert emission.add(0.65, 1, "less cheap") == []
    assert emission.add(0.9, 1, "accurate") == ["accurate", "less cheap"]
    assert emission.add(0.75, 1, "good") == ["good", "cheap"]
