"""What became of the requests to each model since the start. Knows no protocol."""

import contextlib
import time
from collections.abc import Iterator
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


class Request:
    """One request under way; whoever serves it says when it was sent on, and what it was answered with."""

    def __init__(self) -> None:
        self.started_ns = self.sent_ns = time.monotonic_ns()
        self.answered: tuple[int, int, int] | None = None

    def sent(self) -> None:
        """Its payloads are there, and the selector gets the job."""
        self.sent_ns = time.monotonic_ns()

    def answer(self, items: int, queue_ms: float, compute_ms: float) -> None:
        """It was answered in full; times in milliseconds as the selector measured them."""
        self.answered = items, round(queue_ms * 1e6), round(compute_ms * 1e6)


@dataclass
class Inferences:
    """The requests to one model.

    Attributes:
        items: of the requests that were answered.
        last_ms: when the last request came, in milliseconds since 1970; 0 if none did.
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

    @contextlib.contextmanager
    def request(self) -> Iterator[Request]:
        """Counts the request that is served inside the block; it has failed unless it was answered."""
        request = Request()
        self.last_ms = time.time_ns() // 1_000_000
        try:
            yield request
        finally:
            self._count(request, time.monotonic_ns())

    def _count(self, request: Request, now_ns: int) -> None:
        total = now_ns - request.started_ns
        if request.answered is None:
            self.fail.add(total)
            return
        items, queue, compute = request.answered
        intake = request.sent_ns - request.started_ns
        self.items += items
        self.success.add(total)
        self.intake.add(intake)
        self.queue.add(queue)
        self.compute.add(compute)
        self.delivery.add(total - intake - queue - compute)
