"""Where the slots of an arena are."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosel.transport.layout import ENTRY_BYTES, HEADER_BYTES, KIB, MIB, SLOT_SIZES, Layout

# 700 entries take more than one page.
layouts = st.tuples(*[st.integers(0, 5) | st.just(700) for _ in SLOT_SIZES]).map(Layout)


@settings(deadline=None, max_examples=30)
@given(layout=layouts)
def test_slots_are_aligned_and_fill_the_arena_without_overlap(layout: Layout) -> None:
    end = layout.data_start
    for index in range(layout.slot_count):
        assert layout.slot_offset(index) == end
        assert layout.slot_offset(index) % 256 == 0
        end += layout.slot_size(index)
    assert end == layout.total_bytes


@settings(deadline=None, max_examples=30)
@given(layout=layouts)
def test_every_slot_has_an_entry_before_the_data(layout: Layout) -> None:
    assert HEADER_BYTES % ENTRY_BYTES == 0
    assert HEADER_BYTES + ENTRY_BYTES * layout.slot_count <= layout.data_start
    sizes = [layout.slot_size(index) for index in range(layout.slot_count)]
    assert sizes == [size for size, count in zip(SLOT_SIZES, layout.counts, strict=True) for _ in range(count)]


@pytest.mark.parametrize("index", [-1, 3, 1000])
def test_a_slot_that_is_not_there_is_an_error(index: int) -> None:
    layout = Layout((2, 1, 0, 0, 0, 0))
    with pytest.raises(IndexError, match="of 3"):
        layout.slot_offset(index)


@given(mib=st.integers(1, 2048))
def test_a_budget_is_spent_on_every_class_that_fits_a_quarter_of_it(mib: int) -> None:
    budget = mib * MIB
    layout = Layout.for_budget(budget)
    assert [count > 0 for count in layout.counts] == [size * 4 <= budget for size in SLOT_SIZES]
    data = layout.total_bytes - layout.data_start
    classes = sum(count > 0 for count in layout.counts)
    largest = max(size for size, count in zip(SLOT_SIZES, layout.counts, strict=True) if count)
    assert budget - classes * largest <= data <= budget


def test_the_smallest_budget_has_one_slot() -> None:
    assert Layout.for_budget(1).counts == (1, 0, 0, 0, 0, 0)


def test_a_known_budget() -> None:
    # 1 MiB: classes of 64 and 256 KiB; 352 KiB more for each: 5 and 1 slots.
    layout = Layout.for_budget(1 * MIB)
    assert layout.counts == (6, 2, 0, 0, 0, 0)
    assert layout.total_bytes == 4096 + (6 * 64 + 2 * 256) * KIB
