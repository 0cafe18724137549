"""What a full profile adds to a quick one: measurements of a model through its running services."""

import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mosel.client import Client
from mosel.data.samples import Samples
from mosel.errors import DeadlineExceeded, Overloaded, Unreachable
from mosel.modality import PATH, parse_set
from mosel.profiles.files import CallCost, JobPoint, MeasuredAccuracy, Profile, wilson
from mosel.profiles.labelled_run import Setting, measure, percentile

JOB_SIZES = (1, 2, 4, 8, 16, 32)
# Jobs of one set and size: as many as asked for, but after the time is over no more than the least.
_JOBS, _LEAST_JOBS, _JOBS_S = 30, 5, 2.0
_LABELLED = Setting(None, job_items=32, in_flight=4)
# The load: so many clients, each with a job under way all the time. What was learned is read in the second half.
_CLIENTS = 8
_READ_EVERY_S = 0.25
_LOAD_SIZES = (1, 2, 4, 8)

Payloads = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class EdgeCosts:
    """Milliseconds that client and gateway add to a job of one item, and for each further item."""

    ms: float
    item_ms: float


# Called with what was just measured.
Advance = Callable[[str], None]


def measured_accuracy(
    client: Client, model: str, sets: Iterable[str], samples: Samples, advance: Advance
) -> dict[str, MeasuredAccuracy]:
    """The accuracy of every modality set on labelled samples, through the services.

    Raises:
        MoselError: the services failed.
    """
    accuracy = {}
    for name in sets:
        modalities = tuple(sorted(parse_set(name)))
        chosen = Samples({m: samples.payloads[m] for m in modalities}, samples.labels)
        setting = Setting(None, _LABELLED.job_items, _LABELLED.in_flight, modalities=modalities)
        accuracy[name] = wilson(measure(client, model, chosen, setting).accuracy, len(samples))
        advance(f"accuracy of {name}")
    return accuracy


def end_to_end(
    client: Client, quick: Profile, payloads: Payloads, sizes: Sequence[int], advance: Advance
) -> tuple[dict[str, tuple[JobPoint, ...]], dict[str, CallCost], EdgeCosts]:
    """Times jobs of every modality set on an idle system, one at a time.

    Args:
        client: of the services.
        quick: what the selector expects of calls.
        payloads: rows by modality; at least as many as the largest job has.
        sizes: items per job.
        advance: told what was measured.

    Returns:
        Times by modality set, what calls cost as the selector learned it, and what client and gateway add to a job.

    Raises:
        MoselError: the services failed.
    """
    points: dict[str, tuple[JobPoint, ...]] = {}
    edges: dict[tuple[str, int], float] = {}
    readings: list[dict[str, int]] = []
    for name in quick.accuracy:
        of_set = []
        for size in sizes:
            times, edges[name, size] = _job_times(client, quick.model, _rows(payloads, parse_set(name), size))
            readings.append(_selector_counters(client))
            of_set.append(JobPoint(size=size, p50_ms=statistics.median(times), p95_ms=percentile(times, 95)))
            advance(f"jobs of {size} with {name}")
        points[name] = tuple(of_set)
    learned = {lane: _learned(quick.model, lane, readings) for lane in quick.calls}
    calls = {lane: _after(learned[lane], quick.calls[lane]) for lane in quick.calls}
    full = max(quick.accuracy, key=len)
    return points, calls, _edge({size: edges[full, size] for size in sizes})


def calls_under_load(
    client: Client,
    quick: Profile,
    idle: Mapping[str, CallCost],
    payloads: Payloads,
    seconds: float,
    edge_cpu_s: Callable[[], float],
    advance: Advance,
) -> tuple[dict[str, CallCost], float]:
    """What calls cost while the services are saturated, as the selector learned it from its own calls.

    It is stated beside `idle`, what they cost on an idle system: `overhead + factor * idle`.

    Args:
        client: of the services, which were started with the quick profile.
        quick: what the selector expects of calls.
        idle: what they cost on an idle system.
        payloads: rows by modality.
        seconds: how long the load lasts.
        edge_cpu_s: processor time that client, gateway and selector have spent so far.
        advance: told once for each second.

    Returns:
        Calls by lane, and the milliseconds of processor time that client, gateway and selector spend on a job.

    Raises:
        MoselError: the services failed.
    """
    readings: list[dict[str, int]] = []
    stop = threading.Event()
    spent_s = edge_cpu_s()
    with ThreadPoolExecutor(_CLIENTS) as pool:
        clients = [pool.submit(_load, client, quick, payloads, random.Random(seed), stop) for seed in range(_CLIENTS)]  # noqa: S311
        try:
            started = time.monotonic()
            told = 0
            while (elapsed := time.monotonic() - started) < seconds:
                time.sleep(_READ_EVERY_S)
                if elapsed > seconds / 2:
                    readings.append(_selector_counters(client))
                if elapsed >= told + 1:
                    told += 1
                    advance("calls under load")
        finally:
            stop.set()
        jobs = sum(running.result() for running in clients)
    edge_cpu_ms = (edge_cpu_s() - spent_s) * 1000 / max(jobs, 1)
    loaded = {lane: _learned(quick.model, lane, readings) for lane in quick.calls}
    calls = {lane: _beside(idle[lane], _after(loaded[lane], quick.calls[lane])) for lane in quick.calls}
    return calls, edge_cpu_ms


def _edge(by_size: Mapping[int, float]) -> EdgeCosts:
    """From what was added to jobs of some sizes."""
    smallest, largest = min(by_size), max(by_size)
    per_item = (by_size[largest] - by_size[smallest]) / max(largest - smallest, 1)
    return EdgeCosts(max(by_size[smallest] - per_item * (smallest - 1), 0.0), max(per_item, 0.0))


def _job_times(client: Client, model: str, payloads: Payloads) -> tuple[list[float], float]:
    """Milliseconds of the same job again and again, and the median of what client and gateway added."""
    client.predict(model, payloads, modalities=payloads)
    times: list[float] = []
    edges: list[float] = []
    give_up = time.perf_counter() + _JOBS_S
    while len(times) < _LEAST_JOBS or (len(times) < _JOBS and time.perf_counter() < give_up):
        started = time.perf_counter()
        prediction = client.predict(model, payloads, modalities=payloads)
        times.append((time.perf_counter() - started) * 1000)
        edges.append(times[-1] - prediction.queue_ms - prediction.compute_ms)
    return times, statistics.median(edges)


def _load(client: Client, quick: Profile, payloads: Payloads, rng: random.Random, stop: threading.Event) -> int:
    """One caller, who sends the next job as soon as the last one is answered; returns how many were."""
    sets = sorted(quick.accuracy)
    jobs = 0
    while not stop.is_set():
        jobs += 1
        rows = _rows(payloads, parse_set(rng.choice(sets)), rng.choice(_LOAD_SIZES))
        try:
            client.predict(quick.model, rows, modalities=rows)
        except (Overloaded, Unreachable, DeadlineExceeded):
            continue
    return jobs


def _rows(payloads: Payloads, modalities: Iterable[str], size: int) -> dict[str, NDArray[np.generic]]:
    return {m: payloads[m][:size] for m in sorted(modalities)}


def _selector_counters(client: Client) -> dict[str, int]:
    return next(service.counters for service in client.status() if service.name == "selector")


def _learned(model: str, lane: str, readings: Sequence[Mapping[str, int]]) -> CallCost:
    """What the selector learned of calls to a lane: `overhead + factor * expected`.

    Where none was made, since encoders and fusion took one call together, that is what was learned of those.
    """
    for kind in (lane, PATH):
        prefix = f"correction.{model}.{kind}"
        seen = [r for r in readings if f"{prefix}.factor_permille" in r]
        if seen:
            break
    else:
        return CallCost(overhead_ms=0.0)
    factor = statistics.median(r[f"{prefix}.factor_permille"] for r in seen) / 1000
    return CallCost(overhead_ms=statistics.median(r[f"{prefix}.overhead_us"] for r in seen) / 1000, factor=factor)


def _after(learned: CallCost, expected: CallCost) -> CallCost:
    """What calls cost if the selector, which expected this, learned that."""
    overhead_ms = learned.overhead_ms + learned.factor * expected.overhead_ms
    return CallCost(overhead_ms=overhead_ms, factor=learned.factor * expected.factor)


def _beside(idle: CallCost, loaded: CallCost) -> CallCost:
    """One as overhead and factor of the other."""
    factor = loaded.factor / idle.factor
    return CallCost(overhead_ms=max(loaded.overhead_ms - factor * idle.overhead_ms, 0.0), factor=factor)
