"""A real arena and a real reader in any order of events: no read of a slot that was reused, or after its lease."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mosel.errors import Overloaded, ReadNotProven
from mosel.transport import Reader, SharedMemoryArena, slice_rows
from mosel.transport.control import PROOF_MARGIN_NS
from mosel.transport.exchange import release_slots, set_slot
from mosel.transport.layout import SLOT_SIZES
from mosel.transport.object_arena import ObjectArena
from mosel.transport.slots import Slot, SlotState
from mosel.v1 import tensor_pb2
from tests.mosel.transport.support import SETTING, AnyArena

# So few that slots are soon reused.
SLOTS = 2
MARGIN_S = PROOF_MARGIN_NS / 1e9


def content(epoch: int, slot: int, generation: int, nbytes: int) -> bytes:
    """What a slot holds, a function of its ref alone."""
    return np.random.default_rng([epoch, slot, generation]).bytes(nbytes)


class _AbortedError(Exception):
    pass


@dataclass
class Filling:
    """A slot between acquire and publish."""

    slot: Slot
    generation: int
    nbytes: int
    expires_at: float
    filling: contextlib.AbstractContextManager[Slot]


@dataclass
class Published:
    """A ref, and what is known about its slot."""

    ref: tensor_pb2.TensorRef
    expires_at: float
    reused: bool = False
    released: bool = False
    opened: bool = True


class ArenaMachine(RuleBasedStateMachine):
    """One producer that may restart, and one consumer that may read any ref it ever got, at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.stack = contextlib.ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="mosel-test-", dir="/dev/shm")))
        self.stack.enter_context(mock.patch("mosel.transport.arena.time", self))
        self.stack.enter_context(mock.patch("mosel.transport.control.monotonic_ns", self.monotonic_ns))
        self.reader = self.stack.enter_context(Reader(self.folder))
        self.published: list[Published] = []
        self.start()

    def monotonic(self) -> float:
        """The producer's clock."""
        return self.now

    def monotonic_ns(self) -> int:
        """The consumer's."""
        return int(self.now * 1e9)

    def start(self) -> None:
        self.arena = self.make()
        self.reader.open(self.arena.announcement().arena)
        self.filling: list[Filling] = []
        self.generations: dict[int, int] = {}

    def make(self) -> AnyArena:
        return SharedMemoryArena(self.folder, SLOTS * SLOT_SIZES[0], SETTING)

    def fill(self, one: Filling, nbytes: int) -> None:
        """Puts so many bytes of what a slot is to hold there."""
        assert isinstance(self.arena, SharedMemoryArena)
        with self.arena.writable(one.slot, one.nbytes) as target:
            target[:nbytes] = content(self.arena.epoch, one.slot.index, one.generation, one.nbytes)[:nbytes]

    @rule(nbytes=st.sampled_from([1000, SLOT_SIZES[0]]), lease_s=st.sampled_from([0.01, 0.5, 60.0]))
    def acquire(self, nbytes: int, lease_s: float) -> None:
        manager = self.arena.filling(nbytes, self.now + lease_s, 0.0)
        try:
            slot = manager.__enter__()
        except Overloaded:
            return
        assert slot.generation > self.generations.get(slot.index, 0)
        assert slot.index not in [other.slot.index for other in self.filling]
        for other in self.mine(slot.index):
            assert other.released or other.expires_at <= self.now, "a lease was broken"
            other.reused = True
        self.generations[slot.index] = slot.generation
        self.filling.append(Filling(slot, slot.generation, nbytes, self.now + lease_s, manager))

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def write_half(self, data: st.DataObject) -> None:
        """A fill that is not done: whoever reads the slot now sees neither the old tensor nor the new one."""
        one = data.draw(st.sampled_from(self.filling))
        self.fill(one, one.nbytes // 2)

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        one = self.filling.pop(data.draw(st.integers(0, len(self.filling) - 1)))
        self.fill(one, one.nbytes)
        one.filling.__exit__(None, None, None)
        ref = tensor_pb2.TensorRef(dtype=tensor_pb2.UINT8, shape=[one.nbytes], nbytes=one.nbytes)
        set_slot(ref, self.arena, one.slot, one.expires_at)
        self.published.append(Published(ref, one.expires_at))

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        one = self.filling.pop(data.draw(st.integers(0, len(self.filling) - 1)))
        with contextlib.suppress(_AbortedError):
            one.filling.__exit__(_AbortedError, _AbortedError(), None)

    @precondition(lambda self: self.published)
    @rule(data=st.data(), times=st.integers(1, 2))
    def release(self, data: st.DataObject, times: int) -> None:
        """Any ref at all: late, for the second time, or of an epoch that is over."""
        one = data.draw(st.sampled_from(self.published))
        before = self.arena.statistics()
        release_slots(self.arena, [one.ref.slot] * times)
        mine = one.ref.slot.epoch == self.arena.epoch
        ends = mine and not (one.released or one.reused or one.expires_at <= self.now)
        assert self.arena.statistics().free == before.free + ends
        one.released = one.released or ends

    @rule(seconds=st.sampled_from([0.001, 0.1, 1.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    # Not too often, or little happens between two restarts.
    @precondition(lambda self: len(list(self.mine())) > 5)
    @rule(closes=st.booleans())
    def restart(self, closes: bool) -> None:
        """The consumer may hear of it late: until then it reads what it mapped."""
        if closes or self.arena.rung == tensor_pb2.IN_PROCESS:
            self.reader.close(self.arena.arena_id, self.arena.epoch)
            for one in self.published:
                one.opened = one.opened and one.ref.slot.epoch != self.arena.epoch
        self.end()
        self.start()

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.published))
        ref, slot = one.ref, one.ref.slot
        in_time = self.now < one.expires_at - MARGIN_S
        # Objects are dropped when they are released, what was copied stays until the slot is used again.
        gone = one.reused or (one.released and self.arena.rung == tensor_pb2.IN_PROCESS)
        try:
            batch = self.reader.gather([slice_rows(ref, 0, ref.nbytes)], "UINT8", ())
        except ReadNotProven:
            # 2 ns: the lease is rounded to whole nanoseconds.
            assert gone or not one.opened or self.now >= one.expires_at - MARGIN_S - 2e-9
        else:
            assert in_time
            assert not gone
            assert one.opened
            assert batch.tobytes() == content(slot.epoch, slot.slot, slot.generation, ref.nbytes)

    @invariant()
    def slots_are_conserved(self) -> None:
        counts = self.arena.statistics()
        assert counts.free + counts.filling + counts.published == self.arena.layout.slot_count
        assert counts.filling == len(self.filling)
        held = [one for one in self.mine() if not (one.released or one.reused) and one.expires_at > self.now]
        assert counts.published == len(held)

    def mine(self, slot: int | None = None) -> Iterator[Published]:
        for one in self.published:
            if one.ref.slot.epoch == self.arena.epoch and slot in (None, one.ref.slot.slot):
                yield one

    def end(self) -> None:
        for one in self.filling:
            with contextlib.suppress(_AbortedError):
                one.filling.__exit__(_AbortedError, _AbortedError(), None)
        self.now += 100
        statistics = self.arena.statistics()
        assert statistics.free == self.arena.layout.slot_count
        self.arena.close()
        assert list(self.folder.iterdir()) == []

    def teardown(self) -> None:
        with self.stack:
            self.end()


class ObjectArenaMachine(ArenaMachine):
    """The same in one process: what an object arena holds is dropped with its slot, and when the producer ends."""

    def make(self) -> AnyArena:
        return ObjectArena(SLOTS * SLOT_SIZES[0], SETTING)

    def fill(self, one: Filling, nbytes: int) -> None:
        data = content(self.arena.epoch, one.slot.index, one.generation, one.nbytes)
        one.slot.content = np.frombuffer(data[:nbytes] + bytes(one.nbytes - nbytes), np.uint8)

    @invariant()
    def free_slots_hold_nothing(self) -> None:
        free = [slot for slot in self.arena._table.slots if slot.state is SlotState.FREE]
        assert all(slot.content is None for slot in free)


TestArenaStates = ArenaMachine.TestCase
TestObjectArenaStates = ObjectArenaMachine.TestCase
TestArenaStates.settings = TestObjectArenaStates.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None
)
