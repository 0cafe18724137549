"""Closed-loop load on running services, and the processor time that each process spends on it."""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import uvloop
from numpy.typing import NDArray

from mosel import AsyncClient
from mosel.launcher import Launcher

Payloads = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Load:
    """What one window of load showed.

    Attributes:
        items_per_s: items answered per second.
        latency_ms: median milliseconds of one job, seen by the client.
        cpu_ms: processor milliseconds per job, by service and for the client.
    """

    items_per_s: float
    latency_ms: float
    cpu_ms: dict[str, float]


def closed_loop(
    launcher: Launcher,
    model: str,
    payloads: Payloads,
    jobs_in_flight: int,
    seconds: float,
    min_accuracy: float | None = None,
) -> Load:
    """Keeps so many jobs in flight for so long.

    Args:
        launcher: the running services.
        model: the model's name.
        payloads: arrays [items, ...] by modality, sent again and again.
        jobs_in_flight: each is sent when the one before it is answered.
        seconds: length of the window.
        min_accuracy: the floor of each job, 0..1, or None.
    """
    before = _cpu_seconds(launcher)
    started = time.perf_counter()
    times = uvloop.run(_drive(launcher.address, model, payloads, jobs_in_flight, seconds, min_accuracy))
    elapsed = time.perf_counter() - started
    after = _cpu_seconds(launcher)
    items = len(next(iter(payloads.values()))) * len(times)
    cpu = {name: (after[name] - before[name]) * 1000 / len(times) for name in before}
    return Load(items / elapsed, statistics.median(times) * 1000, cpu)


async def keep_busy(predict: Callable[[], Awaitable[object]], jobs_in_flight: int, seconds: float) -> list[float]:
    """Keeps so many jobs in flight for so long; returns the seconds that each took."""
    times: list[float] = []
    until = time.perf_counter() + seconds

    async def caller() -> None:
        while (started := time.perf_counter()) < until:
            await predict()
            times.append(time.perf_counter() - started)

    await asyncio.gather(*(caller() for _ in range(jobs_in_flight)))
    return times


async def _drive(
    address: str, model: str, payloads: Payloads, jobs_in_flight: int, seconds: float, min_accuracy: float | None
) -> list[float]:
    async with AsyncClient(address, retries=None) as client:
        predict = partial(client.predict, model, payloads, min_accuracy=min_accuracy)
        return await keep_busy(predict, jobs_in_flight, seconds)


def _cpu_seconds(launcher: Launcher) -> dict[str, float]:
    processes = {name: psutil.Process(child.process.pid) for name, child in launcher.children.items()}
    processes["client"] = psutil.Process()
    return {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
