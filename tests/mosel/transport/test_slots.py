"""The life of slots."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mosel.transport.layout import KIB, SLOT_SIZES, Layout
from mosel.transport.slots import Slot, SlotState, SlotTable

SMALL, LARGE = SLOT_SIZES[0], SLOT_SIZES[1]


@pytest.fixture
def table() -> SlotTable:
    return SlotTable(Layout((2, 1, 0, 0, 0, 0)))


def acquired(table: SlotTable, nbytes: int = SMALL, now: float = 0.0) -> Slot:
    slot = table.acquire(nbytes, now)
    assert slot is not None
    return slot


def test_a_full_class_borrows_from_the_next_and_then_refuses(table: SlotTable) -> None:
    assert [acquired(table).size_class for _ in range(3)] == [0, 0, 1]
    assert table.acquire(SMALL, 0.0) is None


def test_room_is_there_when_a_slot_could_be_had(table: SlotTable) -> None:
    assert table.has_room(LARGE, 0.0)
    assert not table.has_room(LARGE + 1, 0.0)
    table.publish(acquired(table, LARGE), expires_at=5.0)
    assert not table.has_room(LARGE, 4.999)
    assert table.has_room(SMALL, 4.999)
    assert table.has_room(LARGE, 5.0)


def test_refusals_are_counted_when_the_arena_gives_up(table: SlotTable) -> None:
    table.refuse()
    assert table.statistics().refused_total == 1


def test_a_large_tensor_never_gets_a_small_slot(table: SlotTable) -> None:
    assert acquired(table, SMALL + 1).size_class == 1
    assert table.acquire(SMALL + 1, 0.0) is None
    assert table.acquire(LARGE + 1, 0.0) is None


def test_a_lease_ends_at_its_expiry_and_not_before(table: SlotTable) -> None:
    slot = acquired(table, LARGE)
    table.publish(slot, expires_at=5.0)
    assert table.acquire(LARGE, 4.999) is None
    again = acquired(table, LARGE, 5.0)
    assert (again.index, again.generation) == (slot.index, 2)
    assert table.statistics().expired_total == 1


def test_an_old_lease_does_not_end_a_new_one(table: SlotTable) -> None:
    slot = acquired(table, LARGE)
    table.publish(slot, expires_at=5.0)
    assert table.release(slot.index, 1)
    table.publish(acquired(table, LARGE), expires_at=50.0)
    assert not table.release(slot.index, 1), "the second release finds another generation"
    assert table.expire(5.0) == 0
    assert slot.state is SlotState.PUBLISHED


@pytest.mark.parametrize("held", [0, 40])
def test_leases_that_were_released_are_forgotten(held: int) -> None:
    table = SlotTable(Layout((60, 0, 0, 0, 0, 0)))
    for _ in range(held):
        table.publish(acquired(table), expires_at=1e6)
    for end in range(5_000):
        slot = acquired(table)
        table.publish(slot, expires_at=1e6 - end)
        assert table.release(slot.index, slot.generation)
    assert len(table._leases) <= 2 * held + 64
    assert table.expire(1e6) == held


def test_a_slot_that_is_being_filled_is_neither_released_nor_expired(table: SlotTable) -> None:
    slot = acquired(table)
    assert not table.release(slot.index, slot.generation)
    assert table.expire(1e9) == 0
    assert slot.state is SlotState.FILLING


@pytest.mark.parametrize("index", [-1, 3, 2**32 - 1])
def test_releasing_a_slot_that_is_not_there_is_harmless(table: SlotTable, index: int) -> None:
    assert not table.release(index, 1)


def test_a_slot_cannot_be_published_or_aborted_twice(table: SlotTable) -> None:
    slot = acquired(table)
    table.publish(slot, 1.0)
    with pytest.raises(ValueError, match="published; expected filling"):
        table.publish(slot, 1.0)
    with pytest.raises(ValueError, match="published; expected filling"):
        table.abort(slot)


class SlotMachine(RuleBasedStateMachine):
    """Acquire, publish, abort, release, expiry and restart in any order, beside a model of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.restart()

    @rule()
    def restart(self) -> None:
        """The producer comes back with a new epoch: everything starts anew."""
        self.table = SlotTable(Layout((3, 2, 1, 0, 0, 0)))
        self.filling: dict[int, Slot] = {}
        self.leases: dict[int, tuple[int, float]] = {}
        self.generations = [0] * len(self.table.slots)
        self.old: list[tuple[int, int]] = []

    @rule(nbytes=st.sampled_from([0, 1, SMALL, SMALL + 1, LARGE, LARGE + 1, 1024 * KIB]))
    def acquire(self, nbytes: int) -> None:
        self.drop_expired()
        slot = self.table.acquire(nbytes, self.now)
        free = {s.index for s in self.table.slots} - self.filling.keys() - self.leases.keys()
        if slot is None:
            assert all(SLOT_SIZES[self.table.slots[index].size_class] < nbytes for index in free)
            return
        assert slot.index in free
        fitting = [c for index in free if SLOT_SIZES[c := self.table.slots[index].size_class] >= nbytes]
        assert slot.size_class == min(fitting)
        assert slot.generation > self.generations[slot.index]
        self.generations[slot.index] = slot.generation
        self.filling[slot.index] = slot

    @precondition(lambda self: self.filling)
    @rule(data=st.data(), lease_s=st.floats(0.5, 20))
    def publish(self, data: st.DataObject, lease_s: float) -> None:
        slot = self.filling.pop(data.draw(st.sampled_from(sorted(self.filling))))
        self.table.publish(slot, self.now + lease_s)
        self.leases[slot.index] = (slot.generation, self.now + lease_s)

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.table.abort(self.filling.pop(data.draw(st.sampled_from(sorted(self.filling)))))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.leases)))
        generation, _ = self.leases.pop(index)
        assert self.table.release(index, generation)
        assert not self.table.release(index, generation)
        self.old.append((index, generation))

    @precondition(lambda self: self.old)
    @rule(data=st.data())
    def release_again(self, data: st.DataObject) -> None:
        assert not self.table.release(*data.draw(st.sampled_from(self.old)))

    @rule(seconds=st.floats(0.1, 10))
    def expire(self, seconds: float) -> None:
        self.now += seconds
        assert self.table.expire(self.now) == self.drop_expired()

    def drop_expired(self) -> int:
        over = [index for index, (_, expires_at) in self.leases.items() if expires_at <= self.now]
        self.old += [(index, self.leases.pop(index)[0]) for index in over]
        return len(over)

    @invariant()
    def generations_only_rise(self) -> None:
        assert [slot.generation for slot in self.table.slots] == self.generations

    @invariant()
    def every_slot_is_in_exactly_the_state_that_it_was_brought_into(self) -> None:
        for slot in self.table.slots:
            held = SlotState.PUBLISHED if slot.index in self.leases else SlotState.FREE
            assert slot.state is (SlotState.FILLING if slot.index in self.filling else held)
        counts = self.table.statistics()
        assert (counts.filling, counts.published) == (len(self.filling), len(self.leases))
        assert counts.free + counts.filling + counts.published == len(self.table.slots)

    def teardown(self) -> None:
        """When every lease is over, every slot can be had again, once."""
        for slot in self.filling.values():
            self.table.abort(slot)
        self.table.expire(self.now + 100)
        slots = [self.table.acquire(0, self.now + 100) for _ in self.table.slots]
        assert {slot.index for slot in slots if slot} == set(range(len(self.table.slots)))
        assert self.table.acquire(0, self.now + 100) is None


TestSlots = SlotMachine.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
