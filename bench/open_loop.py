"""Open-loop load from a process of its own: calls are sent at their times, whatever became of others.

Requests are serialised beforehand and answers are not parsed, so that the generator holds as high a rate as it can.
"""

import asyncio
import itertools
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import grpc
import numpy as np
import uvloop
from numpy.typing import NDArray

from bench.workload import poisson

_PREDICT = "/mosel.v1.Gateway/Predict"
# Connections, as several callers have.
_CHANNELS = 4
# A generator that is so far behind does not hold the rate.
MOST_LAG_MS = 10.0
_REFUSED = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
# Before the first call, for the process to be ready.
_HEAD_START_S = 0.2


@dataclass(frozen=True)
class Window:
    """What became of the calls of one window.

    Attributes:
        rate: calls per second that were meant to be sent.
        seconds: its length.
        slo_s: the deadline of each call.
        lag_s: how long after its time each was sent.
        took_s: from its time until its end.
        codes: the gRPC status of each.
    """

    rate: float
    seconds: float
    slo_s: float
    lag_s: NDArray[np.float64]
    took_s: NDArray[np.float64]
    codes: NDArray[np.int32]

    @property
    def goodput(self) -> float:
        """Calls per second that were answered in time."""
        return float(np.count_nonzero((self.codes == 0) & (self.took_s <= self.slo_s)) / self.seconds)

    @property
    def refused(self) -> float:
        """Calls per second that were refused."""
        return float(np.count_nonzero(self.codes == _REFUSED) / self.seconds)

    @property
    def is_held(self) -> bool:
        """Whether the generator held the rate."""
        return self.lag_ms <= MOST_LAG_MS

    @property
    def lag_ms(self) -> float:
        """Milliseconds after their time that 99 % of the calls were sent within."""
        return _p99_ms(self.lag_s)

    @property
    def answered_p99_ms(self) -> float:
        """Milliseconds within which 99 % of the answers came; NaN without any."""
        return _p99_ms(self.took_s[self.codes == 0])

    @property
    def refused_p99_ms(self) -> float:
        """Milliseconds within which 99 % of the refusals came; NaN without any."""
        return _p99_ms(self.took_s[self.codes == _REFUSED])


class OpenLoop:
    """The generator; a context manager."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)

    def run(self, address: str, requests: Sequence[bytes], rate: float, seconds: float, slo_s: float) -> Window:
        """Sends calls for so long, at Poisson times, and waits until all are over.

        Args:
            address: of a server of `mosel.v1.Gateway`.
            requests: serialised, sent in turn.
            rate: calls per second.
            seconds: length of the window.
            slo_s: the deadline of each call.
        """
        self._connection.send((address, list(requests), rate, seconds, slo_s))
        return Window(rate, seconds, slo_s, *self._connection.recv())

    def __enter__(self) -> "OpenLoop":
        self._process.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.join()


def _serve(connection: Connection) -> None:
    for seed in itertools.count():
        address, requests, rate, seconds, slo_s = connection.recv()
        connection.send(uvloop.run(_window(address, requests, [*poisson(rate, seconds, seed)], slo_s)))


async def _window(
    address: str, requests: Sequence[bytes], times: Sequence[float], slo_s: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int32]]:
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options) for _ in range(_CHANNELS)]
    for channel in channels:
        await channel.channel_ready()
    methods: list[Any] = [channel.unary_unary(_PREDICT) for channel in channels]
    lag, took, codes = np.zeros(len(times)), np.zeros(len(times)), np.zeros(len(times), np.int32)
    began = time.perf_counter() + _HEAD_START_S

    async def call(number: int) -> None:
        sent = time.perf_counter() - began
        lag[number] = sent - times[number]
        try:
            # What it is late already is the generator's fault.
            await methods[number % _CHANNELS](requests[number % len(requests)], timeout=slo_s)
        except grpc.aio.AioRpcError as error:
            codes[number] = error.code().value[0]
        took[number] = time.perf_counter() - began - times[number]

    calls = list[asyncio.Task[None]]()
    for number, at in enumerate(times):
        if (wait := began + at - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        calls.append(asyncio.create_task(call(number)))
    await asyncio.gather(*calls)
    for channel in channels:
        await channel.close()
    return lag, took, codes


def _p99_ms(seconds: NDArray[np.float64]) -> float:
    return float(np.percentile(seconds, 99) * 1000) if len(seconds) else float("nan")
