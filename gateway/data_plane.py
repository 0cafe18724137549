"""The data plane: the one way in for every protocol: jobs, models, and how all is. Knows no protocol."""

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from gateway.access.guard import Guard
from gateway.gauges import show_as_triton, show_jobs, show_models
from gateway.inferences import Inferences
from gateway.jobs.concurrency import ConcurrencyLimit
from gateway.jobs.floors import Floors
from gateway.jobs.life import Jobs
from gateway.jobs.refusals import Refusals
from gateway.jobs.registry import JobRegistry
from gateway.jobs.request_observer import RequestObserver
from gateway.jobs.store import PayloadStore
from gateway.jobs.upload import ArrivingBytes
from gateway.selector_link import SelectorLink
from gateway.served_packages import ServedPackages
from gateway.weaknesses import Weaknesses
from mosel.config import Settings
from mosel.errors import ModelNotFound, ServiceUnavailable
from mosel.observability.metrics import Metrics
from mosel.observability.tracing import OFF, Tracing
from mosel.packages.model_package import ModelPackage
from mosel.v1 import gateway_pb2, selector_pb2, service_pb2

# Sends an event to whoever observes.
Write = Callable[[gateway_pb2.ObserveEvent], Awaitable[None]]


class DataPlane:
    """What the servicers of all protocols share.

    Args:
        settings: limits.
        packages: the models that are known from the start, by name.
        largest_payload: bytes that one payload may have.
        store: where payloads are kept.
        link: the stream to the selector.
        tracing: records requests.

    Attributes:
        settings, link: as given.
        served: keeps the packages in step with the selector.
        packages: the models by name, those that were unloaded included; always the same mapping.
        arriving: what jobs take whose items are still arriving.
        counters: requests, answers and items since the start.
        guard: who may call; None: everybody.
        metrics: of this process.
        observer: follows requests.
        registry: the jobs under way.
        weaknesses: what models do worst on.
        jobs: begins the life of each.
        stopping: set when this gateway is about to end, for calls that would go on for ever.
    """

    def __init__(
        self,
        settings: Settings,
        packages: Mapping[str, ModelPackage],
        largest_payload: int,
        store: PayloadStore,
        link: SelectorLink,
        tracing: Tracing = OFF,
    ) -> None:
        self.settings, self.link, limits = settings, link, settings.gateway
        self.served = ServedPackages(settings.models_dir, packages, link)
        self.packages: Mapping[str, ModelPackage] = self.served.packages
        limit = settings.transport.gateway_arena_mib * 1024 * 1024
        self.arriving = ArrivingBytes(largest_payload, limit, "transport.gateway_arena_mib")
        self.counters: Counter[str] = Counter()
        self.guard: Guard | None = None
        self.stopping = asyncio.Event()
        self._store, self._refusals = store, Refusals()
        self._limit = ConcurrencyLimit(limits.max_jobs_in_flight)
        self.weaknesses = Weaknesses()
        self.metrics = Metrics("gateway")
        self.observer = RequestObserver(self.metrics, self.packages, limits.access_log, tracing)
        self.registry = JobRegistry(limits.max_jobs_in_flight)
        self.jobs = Jobs(
            limits,
            self.observer,
            self.registry,
            self.served,
            Floors(limits.max_accuracy_loss, self._loss_of_tenant),
            self._limit,
            self._refusals,
            self.arriving,
            store,
            link,
            self.counters,
        )
        show_jobs(self.metrics, self.statistics)
        show_as_triton(self.metrics, self.packages, self.observer.served)
        show_models(self.metrics, self.statistics, lambda: {name: self.is_ready(name) for name in self.packages})

    def inferences_of(self, model: str) -> Inferences:
        """What became of the requests to a model; names of no model leave nothing behind."""
        return self.observer.served[model] if model in self.packages else Inferences()

    async def load(self, model: str) -> None:
        """Loads a model from the models folder, or loads it anew; later requests are checked against what was loaded.

        Jobs under way end with what they began with. What was begun goes on if the caller goes away.

        Raises:
            ModelNotFound: there is no such package.
            PackageError: it is wrong; the model stays as it was.
            ServiceUnavailable: a service that it needs is away.
        """
        await self.link.load(model)
        await self.served.take_over(model)

    async def unload(self, model: str) -> None:
        """Admits no more jobs of a model, and returns when those under way are over and its networks are freed.

        Raises:
            ModelNotFound: it is not loaded.
            ServiceUnavailable: the selector is away.
        """
        await self.link.unload(model)

    async def observe(
        self, model: str, share: float, write: Callable[[gateway_pb2.ObserveEvent], Awaitable[None]]
    ) -> None:
        """Has a model observed until it is cancelled; writes what there is to tell.

        Args:
            model: its name.
            share: of the items, above 0 to 1; 0: all.
            write: takes each event.

        Raises:
            ModelNotFound: there is no such model.
            ServiceUnavailable: the selector is away, or this gateway is about to end.
            MoselError: whatever the selector answered.
        """
        if model not in self.packages:
            known = ", ".join(sorted(self.packages)) or "none"
            raise ModelNotFound(f"model '{model}' is not served; known: {known}")
        request = gateway_pb2.ObserveRequest(model=self.packages[model].id, share=share)
        stopping = asyncio.create_task(self.stopping.wait())
        async with contextlib.aclosing(self.link.observe(request)) as events:
            said = asyncio.ensure_future(anext(events, None))
            try:
                while True:
                    # Nothing else is given up: gRPC sends no status while a message is on its way.
                    await asyncio.wait((said, stopping), return_when=asyncio.FIRST_COMPLETED)
                    if not said.done():
                        raise ServiceUnavailable("service gateway is stopping")
                    if (event := said.result()) is None:
                        return
                    await write(event)
                    said = asyncio.ensure_future(anext(events, None))
            finally:
                said.cancel()
                stopping.cancel()
                await asyncio.wait((said, stopping))

    def state_of(self, model: str) -> selector_pb2.ModelState:
        """What the selector last said of a model; nothing is ready while it is away."""
        reason = "not loaded" if self.link.connected else "service selector is not reachable"
        return self.link.models.get(model, selector_pb2.ModelState(model=model, reason=reason))

    def is_ready(self, model: str) -> bool:
        """Whether jobs for a model would be run."""
        return self.state_of(model).ready and self.served.is_loaded(model) and not self.link.refused

    def statistics(self) -> dict[str, int]:
        """Counts since the start, and what is held now."""
        counts = dict(self.counters) | self._store.statistics() | self.registry.statistics()
        counts |= self.arriving.statistics() | self.link.statistics()
        counts |= self._limit.statistics() | self._refusals.statistics()
        return counts | (self.guard.statistics() if self.guard is not None else {})

    async def statuses(self) -> list[service_pb2.ServiceStatus]:
        """The state of every service; of a selector that does not answer, why."""
        detail = self.link.refused
        if not self.link.models:
            detail = "no model is loaded" if self.link.connected else "selector is not reachable"
        own = service_pb2.ServiceStatus(
            name="gateway",
            address=self.settings.gateway_address,
            ready=any(map(self.is_ready, self.packages)),
            detail=detail,
            pid=os.getpid(),
            counters=self.statistics(),
        )
        return [own, *await self.link.statuses()]

    def _loss_of_tenant(self, name: str) -> float | None:
        return None if self.guard is None else self.guard.max_accuracy_loss(name)
