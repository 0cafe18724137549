"""Open-loop load on running services: each job is sent at its time, whatever became of those before it."""

import asyncio
from collections import Counter
from collections.abc import Iterable

import uvloop

from bench.items import Items
from bench.outcomes import Ending, Outcome
from bench.workload import Arrival
from mosel import AsyncClient
from mosel.errors import DeadlineExceeded, MoselError, Overloaded, Unreachable
from mosel.launcher import Launcher
from mosel.model_package import ModelPackage

# How long the client itself waits, which is beyond every deadline.
_TIMEOUT_S = 60.0
_PATIENCE_S = 3600.0


def serve(
    launcher: Launcher, package: ModelPackage, arrivals: Iterable[Arrival], items: Items, *, late_ok: bool = False
) -> list[Outcome]:
    """Sends jobs with `effort = best` to running services, and waits until all are over.

    Args:
        launcher: the services.
        package: the model.
        arrivals: by rising time.
        items: what the jobs bring along.
        late_ok: no job is refused, dropped or given up for its deadline.
    """
    return uvloop.run(_send(launcher.address, _Sender(package, items, late_ok), arrivals))


async def _send(address: str, sender: "_Sender", arrivals: Iterable[Arrival]) -> list[Outcome]:
    loop, jobs = asyncio.get_running_loop(), []
    async with AsyncClient(address, retries=None) as client, asyncio.TaskGroup() as group:
        await client.plan(sender.model, 1)  # connects before the clock starts
        start = loop.time()
        for number, arrival in enumerate(arrivals):
            await asyncio.sleep(max(start + arrival.at_s - loop.time(), 0))
            jobs.append(group.create_task(sender.send(client, number, arrival, start)))
    return [job.result() for job in jobs]


class _Sender:
    def __init__(self, package: ModelPackage, items: Items, late_ok: bool) -> None:
        self.model, self._labels = package.name, package.output.labels
        self._items, self._late_ok = items, late_ok

    async def send(self, client: AsyncClient, number: int, arrival: Arrival, start: float) -> Outcome:
        """Sends one job; its time counts from when it was due, not from when this client came to send it."""
        loop, rows = asyncio.get_running_loop(), self._items.rows(arrival.size, number)
        try:
            prediction = await client.predict(
                self.model,
                self._items.payloads_of(rows),
                min_accuracy=arrival.min_accuracy,
                latency_slo_ms=arrival.deadline_ms,
                effort="best",
                late_ok=self._late_ok,
                timeout_s=_PATIENCE_S if self._late_ok else _TIMEOUT_S,
            )
        except MoselError as error:
            return Outcome(arrival, _ending(error), loop.time() - start)
        at_s = loop.time() - start
        counts = tuple(Counter(prediction.modality_sets).items())
        scored = self._items.scored(rows, prediction.labels, self._labels)
        return Outcome(arrival, Ending.ANSWERED, at_s, counts, prediction.expected_accuracy, scored)


def _ending(error: MoselError) -> Ending:
    if isinstance(error, (Overloaded, Unreachable)):
        return Ending.REFUSED
    return Ending.EXPIRED if isinstance(error, DeadlineExceeded) else Ending.FAILED
