"""The ledger: who reads which slot, and when it is released."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from selector.core.ledger import Ledger


def test_a_slot_is_released_when_the_job_is_closed_and_its_last_call_returned() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.open(b"job", ["payload"])
    ledger.call_started(b"job")
    ledger.call_started(b"job")
    ledger.hold(b"job", "embedding")
    ledger.call_returned(b"job")
    ledger.close(b"job")
    assert ledger.take_released() == []
    ledger.call_returned(b"job")
    assert ledger.take_released() == ["payload", "embedding"]
    assert ledger.take_released() == []
    assert ledger.statistics() == {"jobs_held": 0, "slots_held": 0}


@pytest.mark.parametrize("order", [[b"a", b"b"], [b"b", b"a"]])
def test_a_slot_shared_by_two_jobs_is_released_with_the_second(order: list[bytes]) -> None:
    ledger: Ledger[str] = Ledger()
    ledger.open(b"a", ["batch"])
    ledger.open(b"b", ["batch"])
    ledger.close(order[0])
    assert ledger.take_released() == []
    ledger.close(order[1])
    assert ledger.take_released() == ["batch"]


def test_closing_twice_or_what_is_not_known_is_harmless() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.close(b"never")
    ledger.open(b"job", ["slot", "slot"])
    ledger.call_started(b"job")
    ledger.close(b"job")
    ledger.close(b"job")
    ledger.call_returned(b"job")
    ledger.close(b"job")
    assert ledger.take_released() == ["slot"]


class LedgerMachine(RuleBasedStateMachine):
    """Jobs open and close, calls start and return, in any order; embeddings are shared by the jobs of a call."""

    jobs = Bundle("jobs")
    calls = Bundle("calls")

    def __init__(self) -> None:
        super().__init__()
        self.ledger: Ledger[int] = Ledger()
        self.next_slot = 0
        self.holds: dict[bytes, set[int]] = {}
        self.reading: Counter[bytes] = Counter()
        self.closed: set[bytes] = set()
        self.released: Counter[int] = Counter()

    def new_slot(self) -> int:
        self.next_slot += 1
        return self.next_slot

    @rule(target=jobs, slots=st.integers(0, 3))
    def open(self, slots: int) -> bytes:
        job_id = len(self.holds).to_bytes(16, "big")
        self.holds[job_id] = {self.new_slot() for _ in range(slots)}
        self.ledger.open(job_id, self.holds[job_id])
        return job_id

    @rule(target=calls, members=st.lists(jobs, min_size=1, max_size=3, unique=True))
    def start_call(self, members: list[bytes]) -> list[bytes]:
        members = [job_id for job_id in members if job_id not in self.closed]
        for job_id in members:
            self.ledger.call_started(job_id)
            self.reading[job_id] += 1
        return members

    @rule(members=consumes(calls), keeps=st.booleans())
    def return_call(self, members: list[bytes], keeps: bool) -> None:
        embedding = self.new_slot()
        for job_id in members if keeps else ():
            self.ledger.hold(job_id, embedding)
            self.holds[job_id].add(embedding)
        for job_id in members:
            self.reading[job_id] -= 1
            self.ledger.call_returned(job_id)

    @rule(job_id=jobs)
    def close(self, job_id: bytes) -> None:
        self.closed.add(job_id)
        self.ledger.close(job_id)

    @invariant()
    def each_slot_is_released_exactly_when_its_last_holder_lets_go(self) -> None:
        self.released.update(self.ledger.take_released())
        over = {job_id for job_id in self.closed if not self.reading[job_id]}
        needed = {slot for job_id, slots in self.holds.items() if job_id not in over for slot in slots}
        ever = {slot for slots in self.holds.values() for slot in slots}
        assert self.released == Counter(ever - needed)
        assert self.ledger.statistics() == {"jobs_held": len(self.holds) - len(over), "slots_held": len(needed)}


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
