"""Timing of networks, with as many calls at the same time as in service: calls slow each other down."""

import asyncio
import math
import statistics
import time
from collections.abc import Callable, Iterable

from mosel.compute.workers import Workers
from mosel.deadline import Deadline
from mosel.v1 import service_pb2

# Fast networks are timed more often than asked for: so long at least. Slow ones less often: so long per call at most.
_AT_LEAST_S = 0.01
_PER_CALL_S = 0.1


class Timing:
    """Times calls of one network until there are enough; several threads may add to it at the same time.

    Args:
        calls: how many are wanted.

    Attributes:
        ms: milliseconds of each call.
    """

    def __init__(self, calls: int) -> None:
        self.ms: list[float] = []
        self._calls = calls

    def run(self, call: Callable[[], object]) -> None:
        """Times a call again and again. What has never run is slow at first: run it once before."""
        begin = end = time.perf_counter()
        while end - begin < (_AT_LEAST_S if len(self.ms) >= self._calls else _PER_CALL_S * self._calls):
            started = time.perf_counter()
            call()
            end = time.perf_counter()
            self.ms.append((end - started) * 1000)

    def point(self, batch_size: int) -> service_pb2.LatencyPoint:
        """The median, and the time that 95 % of the calls do not exceed."""
        p95 = sorted(self.ms)[math.ceil(0.95 * len(self.ms)) - 1]
        return service_pb2.LatencyPoint(batch_size=batch_size, p50_ms=statistics.median(self.ms), p95_ms=p95)


async def latency_points(
    workers: Workers,
    prepare: Callable[[int], Callable[[], object]],
    batch_sizes: Iterable[int],
    repeats: int,
    concurrency: int,
    deadline: Deadline,
) -> service_pb2.ProfileReply:
    """Times a network for each batch size.

    Args:
        workers: the threads that calls run on in service.
        prepare: makes a call for a batch size, one that has run once.
        batch_sizes: rows per call.
        repeats: timed calls per batch size.
        concurrency: calls that run at the same time.
        deadline: when nobody waits for the reply any more.

    Raises:
        DeadlineExceeded: the deadline passed first.
        Overloaded: too many calls are waiting.
    """
    reply = service_pb2.ProfileReply()
    for size in batch_sizes:
        timing = Timing(repeats)

        def timed(size: int = size, timing: Timing = timing) -> None:
            timing.run(prepare(size))

        await asyncio.gather(*(workers.run(timed, deadline, "measuring") for _ in range(max(concurrency, 1))))
        reply.points.append(timing.point(size))
    return reply
