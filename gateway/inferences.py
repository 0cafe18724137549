"""What became of the requests to a model since the start. Knows no protocol."""

import time
from dataclasses import dataclass, field


@dataclass
class Total:
    """How often something was done, and how long all of it took, in nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Counts one more."""
        self.count += 1
        self.ns += max(ns, 0)


@dataclass
class Inferences:
    """The requests to one model.

    Attributes:
        items: of the requests that were answered.
        last_ms: when the last request that is over came, in milliseconds since 1970; 0 if none did.
        success, fail: requests from their arrival until the answer, or the error, was there.
        intake: of the answered ones, from arrival until the selector got the job.
        queue: from admission until the first encoder call.
        compute: from then until the predictions were there.
        delivery: what is left: the way to the selector and back.
    """

    items: int = 0
    last_ms: int = 0
    success: Total = field(default_factory=Total)
    fail: Total = field(default_factory=Total)
    intake: Total = field(default_factory=Total)
    queue: Total = field(default_factory=Total)
    compute: Total = field(default_factory=Total)
    delivery: Total = field(default_factory=Total)

    def answered(self, items: int, total_ns: int, intake_ns: int, queue_ns: int, compute_ns: int) -> None:
        """A request was answered in full; the attributes say what the times are."""
        self._came_before(total_ns)
        self.items += items
        self.success.add(total_ns)
        self.intake.add(intake_ns)
        self.queue.add(queue_ns)
        self.compute.add(compute_ns)
        self.delivery.add(total_ns - intake_ns - queue_ns - compute_ns)

    def failed(self, total_ns: int) -> None:
        """A request ended with an error."""
        self._came_before(total_ns)
        self.fail.add(total_ns)

    def _came_before(self, ns: int) -> None:
        self.last_ms = (time.time_ns() - ns) // 1_000_000
