"""Open-loop load on a running gateway: each job is sent at its time, whatever became of those before it."""

import asyncio
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import uvloop

from bench.items import Items
from bench.outcomes import Ending, Outcome
from bench.workload import Arrival
from mosel import AsyncClient, Tls
from mosel.errors import DeadlineExceeded, MoselError, Overloaded, Unreachable
from mosel.launcher import Launcher
from mosel.packages.model_package import ModelPackage

# How long the client itself waits, which is beyond every deadline.
_TIMEOUT_S = 60.0
_PATIENCE_S = 3600.0


@dataclass(frozen=True)
class Gateway:
    """A running gateway, and how it is called: attributes as of `mosel.AsyncClient`."""

    address: str
    token: str | None = None
    tls: Tls | None = None


@dataclass(frozen=True)
class Jobs:
    """What is sent at each arrival.

    Attributes:
        model: its name.
        labels: that it gives, in the order of its outputs; empty if it names none.
        items: what jobs bring along.
        effort: what happens to time that a floor leaves unused, see `mosel.Demand`.
        late_ok: no job is refused, dropped or given up for its deadline.
    """

    model: str
    labels: Sequence[str]
    items: Items
    effort: Literal["cheapest", "best"] | None = None
    late_ok: bool = False


def serve(
    launcher: Launcher, package: ModelPackage, arrivals: Iterable[Arrival], items: Items, *, late_ok: bool = False
) -> list[Outcome]:
    """Sends jobs with `effort = best` to running services; otherwise as `send`."""
    return send(Gateway(launcher.address), Jobs(package.name, package.output.labels, items, "best", late_ok), arrivals)


def send(gateway: Gateway, jobs: Jobs, arrivals: Iterable[Arrival]) -> list[Outcome]:
    """Sends jobs, and waits until all are over.

    Args:
        gateway: where to.
        jobs: what to send.
        arrivals: by rising time.

    Raises:
        MoselError: the gateway cannot be reached, or does not serve the model.
    """
    return uvloop.run(_send(gateway, jobs, arrivals))


async def _send(gateway: Gateway, jobs: Jobs, arrivals: Iterable[Arrival]) -> list[Outcome]:
    loop, outcomes = asyncio.get_running_loop(), dict[int, Outcome]()
    async with AsyncClient(gateway.address, token=gateway.token, tls=gateway.tls, retries=None) as client:
        await client.plan(jobs.model, 1)  # connects before the clock starts
        start = loop.time()

        async def send_one(number: int, arrival: Arrival) -> None:
            outcomes[number] = await _outcome(client, jobs, number, arrival, start)

        async with asyncio.TaskGroup() as group:
            for number, arrival in enumerate(arrivals):
                await asyncio.sleep(max(start + arrival.at_s - loop.time(), 0))
                group.create_task(send_one(number, arrival))
    return [outcomes[number] for number in sorted(outcomes)]


async def _outcome(client: AsyncClient, jobs: Jobs, number: int, arrival: Arrival, start: float) -> Outcome:
    """Sends one job; its time counts from when it was due, not from when this client came to send it."""
    loop, rows = asyncio.get_running_loop(), jobs.items.rows(arrival.size, number)
    lag_s = loop.time() - start - arrival.at_s
    try:
        prediction = await client.predict(
            jobs.model,
            jobs.items.payloads_of(rows),
            min_accuracy=arrival.min_accuracy,
            max_accuracy_loss=arrival.max_accuracy_loss,
            latency_slo_ms=arrival.deadline_ms if math.isfinite(arrival.deadline_ms) else None,
            effort=jobs.effort,
            late_ok=jobs.late_ok,
            timeout_s=_PATIENCE_S if jobs.late_ok else _TIMEOUT_S,
        )
    except MoselError as error:
        # Kept with what it came from, it would keep the whole call in memory.
        error.__traceback__ = error.__context__ = None
        return Outcome(arrival, _ending(error), loop.time() - start, error=error, lag_s=lag_s)
    at_s = loop.time() - start
    counts = tuple(Counter(prediction.modality_sets).items())
    scored = jobs.items.scored(rows, prediction.labels, jobs.labels)
    return Outcome(arrival, Ending.ANSWERED, at_s, counts, prediction.expected_accuracy, scored, lag_s=lag_s)


def _ending(error: MoselError) -> Ending:
    if isinstance(error, (Overloaded, Unreachable)):
        return Ending.REFUSED
    return Ending.EXPIRED if isinstance(error, DeadlineExceeded) else Ending.FAILED
