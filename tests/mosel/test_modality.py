"""Modality sets."""

from hypothesis import given
from hypothesis import strategies as st

from mosel.modality import format_set, parse_set, subsets

names = st.frozensets(st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True), min_size=1, max_size=5)


@given(modalities=names)
def test_a_set_is_read_as_it_was_written(modalities: frozenset[str]) -> None:
    assert parse_set(format_set(modalities)) == modalities


def test_a_set_is_written_in_one_way_only() -> None:
    assert format_set(["pen", "audio", "image"]) == format_set({"image", "pen", "audio"}) == "audio+image+pen"


@given(modalities=names)
def test_subsets_are_all_that_are_not_empty_each_once_small_ones_first(modalities: frozenset[str]) -> None:
    found = subsets(modalities)
    assert len(found) == len(set(found)) == 2 ** len(modalities) - 1
    assert all(s and s <= modalities for s in found)
    assert [len(s) for s in found] == sorted(len(s) for s in found)
    assert found[-1] == modalities


def test_the_order_does_not_depend_on_the_order_of_the_names() -> None:
    assert subsets(["b", "a"]) == subsets(["a", "b"]) == [frozenset("a"), frozenset("b"), frozenset("ab")]
