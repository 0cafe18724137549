"""Open-loop load, half of it single calls and half streamed jobs, whose every answer is checked."""

import asyncio
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bench.workload import Arrival, Demands
from mosel.client import AsyncClient
from mosel.client.answers import ItemResults, JobSummary
from mosel.errors import DeadlineExceeded, Overloaded, ServiceUnavailable, Unreachable
from tests.chaos.truth import Truth

# Deadlines from tight to loose, in full latencies of one item; and how far below full accuracy floors may be.
SLACKS, T = (20.0, 100.0, 400.0), 0.12
_WITHOUT_FLOOR = 0.25
# How much longer the client itself would wait: that the services end calls in time is what is tested.
_PATIENCE_S = 10.0
_TICK_S = 0.005
_ROUNDING = 1e-5
# What may happen to a request that is right.
_EXPECTED = (Overloaded, DeadlineExceeded, ServiceUnavailable, Unreachable)


@dataclass(frozen=True)
class Ended:
    """What became of one request; times are of the monotonic clock.

    Attributes:
        arrival: what was asked for.
        streamed: whether it was a streamed job.
        sent_s, ended_s: when it was sent, and when its caller knew the end.
        error: its kind; empty if it was answered.
        message: what it says.
        broken: what is wrong with the end, in words.
        full: whether it was answered from every modality.
    """

    arrival: Arrival
    streamed: bool
    sent_s: float
    ended_s: float
    error: str
    message: str
    broken: tuple[str, ...]
    full: bool

    @property
    def due_s(self) -> float:
        """Its deadline."""
        return self.sent_s + self.arrival.deadline_ms / 1000


@dataclass
class Answer:
    """What came for one request so far, checked against what must come."""

    truth: Truth
    start: int
    arrival: Arrival
    sets: dict[int, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def add(self, items: Sequence[int], modality_sets: Sequence[str], labels: Sequence[str]) -> None:
        """Results of some items."""
        for item, modality_set, label in zip(items, modality_sets, labels, strict=True):
            if item in self.sets or not 0 <= item < self.arrival.size:
                self.broken.append(f"item {item} of {self.arrival.size} came twice or was never sent")
            elif not self.truth.is_label(self.start + item, modality_set, label):
                self.broken.append(f"label {label} with {modality_set} is not the network's")
            self.sets[item] = modality_set
        floor = self.truth.floor if self.arrival.min_accuracy is None else self.arrival.min_accuracy
        accuracy = self.truth.mean_accuracy(self.sets.values())
        if accuracy < floor - _ROUNDING:
            self.broken.append(f"accuracy {accuracy:.4f} over {len(self.sets)} items is below the floor {floor:.4f}")

    def close(self, expected_accuracy: float) -> None:
        """There is no more to come."""
        if missing := self.arrival.size - len(self.sets):
            self.broken.append(f"{missing} of {self.arrival.size} items are missing")
        elif abs(expected_accuracy - self.truth.mean_accuracy(self.sets.values())) > _ROUNDING:
            self.broken.append(f"expected accuracy {expected_accuracy} is not that of the sets that it names")


def mixed(demands: Demands, times: Iterable[float], seed: int) -> Iterator[Arrival]:
    """Jobs of all sizes with deadlines from tight to loose, with and without floors."""
    times, rng = list(times), np.random.default_rng((seed, 2))
    for alike in zip(*(demands.asking(slack, T).arrivals(times, seed) for slack in SLACKS), strict=True):
        arrival = alike[rng.integers(len(alike))]
        yield replace(arrival, min_accuracy=None) if rng.random() < _WITHOUT_FLOOR else arrival


class Load:
    """Sends requests at their times, whatever became of those before.

    Args:
        address: the gateway's.
        truth: the model, and what its answers must be.
        arrivals: by rising time.
        seed: decides which items a request brings.

    Attributes:
        ended: what became of each.
        stop: set it, and nothing is sent any more.
    """

    def __init__(self, address: str, truth: Truth, arrivals: Iterable[Arrival], seed: int) -> None:
        self._address, self._truth, self._arrivals = address, truth, arrivals
        self._rng = np.random.default_rng((seed, 3))
        self._ticks: list[tuple[float, float]] = []
        self.ended: list[Ended] = []
        self.stop = False

    async def run(self) -> None:
        """Returns when everything that was sent has ended."""
        ticking = asyncio.create_task(self._tick())
        async with AsyncClient(self._address, retries=None) as client, asyncio.TaskGroup() as group:
            began = time.monotonic()
            for number, arrival in enumerate(self._arrivals):
                await asyncio.sleep(max(began + arrival.at_s - time.monotonic(), 0))
                if self.stop:
                    break
                group.create_task(self._send(client, arrival, streamed=number % 2 == 1))
        ticking.cancel()

    def overshoots(self) -> Iterator[tuple[float, float]]:
        """Of each request that ended late: seconds beyond its deadline, and for how long this loop was busy then."""
        times = [at for at, _ in self._ticks]
        for ended in self.ended:
            if ended.ended_s > ended.due_s:
                from_, to = bisect_left(times, ended.due_s), bisect_left(times, ended.ended_s) + 1
                yield ended.ended_s - ended.due_s, sum(lag for _, lag in self._ticks[from_:to])

    @property
    def worst_lag_s(self) -> float:
        """The longest time for which this loop was busy."""
        return max((lag for _, lag in self._ticks), default=0.0)

    async def _tick(self) -> None:
        while True:
            due = time.monotonic() + _TICK_S
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            self._ticks.append((now, max(now - due - 0.001, 0.0)))

    async def _send(self, client: AsyncClient, arrival: Arrival, streamed: bool) -> None:
        start = int(self._rng.integers(self._truth.count - arrival.size + 1))
        answer = Answer(self._truth, start, arrival)
        failed: Exception | None = None
        sent_s = time.monotonic()
        try:
            await (self._stream if streamed else self._predict)(client, answer)
        except _EXPECTED as error:
            failed = error
        except Exception as error:
            failed = error
            answer.broken.append(f"an answer or a typed error is expected: {error!r}")
        full = failed is None and set(answer.sets.values()) == {max(self._truth.accuracy, key=len)}
        kind, message = (type(failed).__name__, str(failed)) if failed else ("", "")
        self.ended.append(Ended(arrival, streamed, sent_s, time.monotonic(), kind, message, tuple(answer.broken), full))

    async def _predict(self, client: AsyncClient, answer: Answer) -> None:
        arrival, name = answer.arrival, self._truth.package.name
        prediction = await client.predict(
            name,
            self._truth.rows(answer.start, arrival.size),
            min_accuracy=arrival.min_accuracy,
            latency_slo_ms=arrival.deadline_ms,
            timeout_s=arrival.deadline_ms / 1000 + _PATIENCE_S,
        )
        answer.add(range(len(prediction.labels)), prediction.modality_sets, prediction.labels)
        answer.close(prediction.expected_accuracy)

    async def _stream(self, client: AsyncClient, answer: Answer) -> None:
        arrival, summary = answer.arrival, None

        async def batches() -> AsyncIterator[dict[str, np.ndarray]]:
            half = -(-arrival.size // 2)
            for begin in range(0, arrival.size, half):
                yield self._truth.rows(answer.start + begin, min(half, arrival.size - begin))

        async for event in client.submit_job(
            self._truth.package.name,
            batches(),
            size=arrival.size,
            min_accuracy=arrival.min_accuracy,
            latency_slo_ms=arrival.deadline_ms,
            timeout_s=arrival.deadline_ms / 1000 + _PATIENCE_S,
        ):
            if isinstance(event, ItemResults):
                answer.add(event.items, [event.modality_set] * len(event.items), event.labels)
            elif isinstance(event, JobSummary):
                summary = event
        if summary is None:
            answer.broken.append("a stream ended without a summary and without an error")
        else:
            answer.close(summary.expected_accuracy)
