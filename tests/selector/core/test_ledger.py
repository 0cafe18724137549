"""The ledger: who reads which slot, and when it is released."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from selector.core.ledger import Holder, Ledger


def test_a_slot_is_released_when_the_job_is_closed_and_its_last_call_returned() -> None:
    ledger, job = Ledger[str](), Holder[str]()
    ledger.open(job, ["payload"])
    ledger.call_started(job)
    ledger.call_started(job)
    ledger.hold(job, "embedding")
    ledger.call_returned(job)
    ledger.close(job)
    assert ledger.take_released() == []
    ledger.call_returned(job)
    assert ledger.take_released() == ["payload", "embedding"]
    assert ledger.take_released() == []
    assert ledger.statistics() == {"jobs_held": 0, "slots_held": 0}


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_slot_shared_by_two_jobs_is_released_with_the_second(order: list[int]) -> None:
    ledger, jobs = Ledger[str](), [Holder[str](), Holder[str]()]
    for job in jobs:
        ledger.open(job, ["batch"])
    ledger.close(jobs[order[0]])
    assert ledger.take_released() == []
    ledger.close(jobs[order[1]])
    assert ledger.take_released() == ["batch"]


def test_a_slot_that_a_job_holds_twice_is_released_once() -> None:
    ledger, job = Ledger[str](), Holder[str]()
    ledger.open(job, ["slot", "slot"])
    ledger.call_started(job)
    ledger.close(job)
    ledger.call_returned(job)
    assert ledger.take_released() == ["slot"]


class LedgerMachine(RuleBasedStateMachine):
    """Jobs open and close, calls start and return, in any order; embeddings are shared by the jobs of a call."""

    jobs = Bundle("jobs")
    calls = Bundle("calls")

    def __init__(self) -> None:
        super().__init__()
        self.ledger: Ledger[int] = Ledger()
        self.next_slot = 0
        self.holds: dict[Holder[int], set[int]] = {}
        self.reading: Counter[Holder[int]] = Counter()
        self.closed: set[Holder[int]] = set()
        self.released: Counter[int] = Counter()

    def new_slot(self) -> int:
        self.next_slot += 1
        return self.next_slot

    @rule(target=jobs, slots=st.integers(0, 3))
    def open(self, slots: int) -> Holder[int]:
        job = Holder[int]()
        self.holds[job] = {self.new_slot() for _ in range(slots)}
        self.ledger.open(job, self.holds[job])
        return job

    @rule(target=calls, members=st.lists(jobs, min_size=1, max_size=3, unique=True))
    def start_call(self, members: list[Holder[int]]) -> list[Holder[int]]:
        members = [job for job in members if job not in self.closed]
        for job in members:
            self.ledger.call_started(job)
            self.reading[job] += 1
        return members

    @rule(members=consumes(calls), keeps=st.booleans())
    def return_call(self, members: list[Holder[int]], keeps: bool) -> None:
        embedding = self.new_slot()
        for job in members if keeps else ():
            self.ledger.hold(job, embedding)
            self.holds[job].add(embedding)
        for job in members:
            self.reading[job] -= 1
            self.ledger.call_returned(job)

    @rule(job=consumes(jobs))
    def close(self, job: Holder[int]) -> None:
        self.closed.add(job)
        self.ledger.close(job)

    @invariant()
    def each_slot_is_released_exactly_when_its_last_holder_releases_it(self) -> None:
        self.released.update(self.ledger.take_released())
        over = {job for job in self.closed if not self.reading[job]}
        needed = {slot for job, slots in self.holds.items() if job not in over for slot in slots}
        ever = {slot for slots in self.holds.values() for slot in slots}
        assert self.released == Counter(ever - needed)
        assert self.ledger.statistics() == {"jobs_held": len(self.holds) - len(over), "slots_held": len(needed)}


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
