"""Who still reads which slot. The selector is the only owner of leases: it decides when a slot is released.

A slot is held by the jobs that need it. A job lets go of its slots when it is closed *and* the last call that reads
for it has returned. A slot that nobody holds is released to its producer, once.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Slot = TypeVar("Slot", bound=Hashable)


@dataclass
class _Held(Generic[Slot]):
    slots: list[Slot] = field(default_factory=list)
    calls: int = 0
    closed: bool = False


class Ledger(Generic[Slot]):
    """Holds and releases. `Slot` is any hashable name of a slot that also tells its producer."""

    def __init__(self) -> None:
        self._jobs: dict[bytes, _Held[Slot]] = {}
        self._holders: dict[Slot, int] = {}
        self._released: list[Slot] = []

    def open(self, job_id: bytes, slots: Iterable[Slot]) -> None:
        """A job begins; it holds its payload slots."""
        self._jobs[job_id] = _Held()
        for slot in slots:
            self.hold(job_id, slot)

    def hold(self, job_id: bytes, slot: Slot) -> None:
        """A job needs a slot, such as one with its embeddings; call before the call that made it counts as returned."""
        self._jobs[job_id].slots.append(slot)
        self._holders[slot] = self._holders.get(slot, 0) + 1

    def call_started(self, job_id: bytes) -> None:
        """A call that reads for the job is under way."""
        self._jobs[job_id].calls += 1

    def call_returned(self, job_id: bytes) -> None:
        """It no longer reads."""
        self._jobs[job_id].calls -= 1
        self._let_go_if_over(job_id)

    def close(self, job_id: bytes) -> None:
        """The job is answered, failed or cancelled."""
        if job_id in self._jobs:
            self._jobs[job_id].closed = True
            self._let_go_if_over(job_id)

    def take_released(self) -> list[Slot]:
        """The slots that became free since the last call; each appears once."""
        released, self._released = self._released, []
        return released

    def statistics(self) -> dict[str, int]:
        """Jobs and slots that are held."""
        return {"jobs_held": len(self._jobs), "slots_held": len(self._holders)}

    def _let_go_if_over(self, job_id: bytes) -> None:
        held = self._jobs[job_id]
        if not held.closed or held.calls:
            return
        del self._jobs[job_id]
        for slot in held.slots:
            self._holders[slot] -= 1
            if not self._holders[slot]:
                del self._holders[slot]
                self._released.append(slot)
