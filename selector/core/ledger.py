"""Who still reads which slot. The selector is the only owner of leases: it decides when a slot is released.

A slot is held by the jobs that need it. A job releases its slots when it is closed *and* the last call that reads for
it has returned. A slot that nobody holds is released to its producer, once.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Slot = TypeVar("Slot", bound=Hashable)


@dataclass(eq=False)
class Holder(Generic[Slot]):
    """A job as the ledger sees it, which alone changes these.

    Attributes:
        slots: those that it holds.
        reading: calls under way that read for it.
        closed: whether it is answered, failed or cancelled.
    """

    slots: list[Slot] = field(default_factory=list, init=False)
    reading: int = field(default=0, init=False)
    closed: bool = field(default=False, init=False)


class Ledger(Generic[Slot]):
    """Holds and releases. `Slot` is any hashable name of a slot that also tells its producer."""

    def __init__(self) -> None:
        self._holders: dict[Slot, int] = {}
        self._released: list[Slot] = []
        self._jobs = 0

    def open(self, job: Holder[Slot], slots: Iterable[Slot]) -> None:
        """A job begins; it holds its payload slots."""
        self._jobs += 1
        for slot in slots:
            self.hold(job, slot)

    def hold(self, job: Holder[Slot], slot: Slot) -> None:
        """A job needs a slot, such as one with its embeddings; call before the call that made it counts as returned."""
        job.slots.append(slot)
        self._holders[slot] = self._holders.get(slot, 0) + 1

    def call_started(self, job: Holder[Slot]) -> None:
        """A call that reads for the job is under way."""
        job.reading += 1

    def call_returned(self, job: Holder[Slot]) -> None:
        """It no longer reads."""
        job.reading -= 1
        self._release_if_over(job)

    def close(self, job: Holder[Slot]) -> None:
        """The job is answered, failed or cancelled; that happens once."""
        job.closed = True
        self._release_if_over(job)

    def take_released(self) -> list[Slot]:
        """The slots that became free since the last call; each appears once."""
        released, self._released = self._released, []
        return released

    def statistics(self) -> dict[str, int]:
        """Jobs and slots that are held."""
        return {"jobs_held": self._jobs, "slots_held": len(self._holders)}

    def _release_if_over(self, job: Holder[Slot]) -> None:
        if not job.closed or job.reading:
            return
        self._jobs -= 1
        for slot in job.slots:
            self._holders[slot] -= 1
            if not self._holders[slot]:
                del self._holders[slot]
                self._released.append(slot)
