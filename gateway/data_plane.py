"""The data plane: the one way in for every protocol. Checked jobs go in, answers come out. Knows no protocol."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping

from gateway.access.guard import Guard
from gateway.gauges import show_as_triton, show_jobs, show_models
from gateway.inferences import Inferences
from gateway.jobs.answers import Answer, answer_from
from gateway.jobs.checks import CheckedJob, Times
from gateway.jobs.intake import Check, Intake
from gateway.jobs.refusals import Refusals
from gateway.jobs.registry import JobRegistry
from gateway.jobs.upload import ArrivingBytes
from gateway.models import Models
from gateway.observer import Observer
from gateway.selector_link import Answers, SelectorLink
from mosel.config import Settings
from mosel.deadline import Deadline
from mosel.errors import MoselError, Overloaded
from mosel.observability.metrics import Metrics
from mosel.observability.tracing import OFF, Tracing
from mosel.packages.model_package import ModelPackage
from mosel.transport import Publisher, SharedMemoryArena
from mosel.v1 import selector_pb2, service_pb2


class DataPlane:
    """What the servicers of all protocols share.

    Args:
        settings: limits.
        packages: the models that are known from the start, by name.
        arena: where payloads are kept.
        publisher: puts them there.
        link: the stream to the selector.
        tracing: records requests.

    Attributes:
        settings, link: as given.
        models: keeps the packages in step with the selector.
        packages: the models by name, those that were unloaded included; always the same mapping.
        intake: puts payloads into the arena.
        refusals: what the selector refused a moment ago.
        registry: the jobs under way.
        arriving: what jobs take whose items are still arriving.
        counters: requests, answers and items since the start.
        guard: who may call; None: everybody.
        metrics: of this process.
        observer: follows requests.
    """

    def __init__(
        self,
        settings: Settings,
        packages: Mapping[str, ModelPackage],
        arena: SharedMemoryArena,
        publisher: Publisher,
        link: SelectorLink,
        tracing: Tracing = OFF,
    ) -> None:
        self.settings, self.link = settings, link
        self.models = Models(settings.models_dir, packages, link)
        self.packages: Mapping[str, ModelPackage] = self.models.packages
        self.refusals = Refusals()
        self.intake = Intake(settings, publisher, self.refusals.check)
        self.registry = JobRegistry(settings.gateway.max_jobs_in_flight)
        limit = settings.transport.gateway_arena_mib * 1024 * 1024
        self.arriving = ArrivingBytes(arena.largest_slot, limit, "transport.gateway_arena_mib")
        self.counters: Counter[str] = Counter()
        self.guard: Guard | None = None
        self._publisher = publisher
        self.metrics = Metrics("gateway")
        self.observer = Observer(self.metrics, self.packages, settings.gateway.access_log, tracing)
        show_jobs(self.metrics, self.registry, link, self.arriving)
        show_as_triton(self.metrics, self.packages, self.observer.served)
        show_models(self.metrics, publisher, lambda: {name: self.is_ready(name) for name in self.packages})

    def admit(self) -> None:
        """Counts a request.

        Raises:
            Overloaded, ServiceUnavailable: no job can be taken now.
        """
        self.counters["requests"] += 1
        self._check_room()

    def check_early(self, model: str) -> None:
        """Counts and refuses a request that has not been read yet if no job can be taken now; errors as of `admit`."""
        try:
            self._check_room()
        except MoselError:
            with self.observer.following(model):
                self.admit()

    async def predict(self, model: str, check: Check, elements: int, call: Deadline) -> Answer:
        """Predicts the items of one job; cancelling cancels the job.

        Args:
            model: as the caller names it.
            check: checks what the caller sent; may run in a thread.
            elements: of all payloads together, as the caller says.
            call: when the caller's own call ends.

        Raises:
            MoselError: whatever `check` raises, and whatever the job ends with.
        """
        with self.observer.following(model) as request, self.models.checking() as sent:
            self.admit()
            prepared = await self.intake.request(request.job_id, check, elements, call)
            job, times = prepared.job, prepared.times
            request.checked(job, times)
            request.sent(prepared.description)
            with (
                self.registry.open(request.job_id, job.package.name, job.size, times.ends) as entry,
                self.submit(job, times, prepared.description) as answers,
            ):
                sent()
                entry.under_way()
                groups = [group async for finished in answers for group in finished]
                answer = answer_from(job, groups, answers.result, times.deadline.remaining * 1000)
                entry.status.items_done = job.size
            request.answered(Counter(answer.modality_sets), answers.result, answer.deadline_slack_ms)
        self.counters.update(answered=1, items=job.size)
        return answer

    def _check_room(self) -> None:
        self.registry.check_room()
        self.link.check_connected()

    def inferences_of(self, model: str) -> Inferences:
        """What became of the requests to a model; names of no model leave nothing behind."""
        return self.observer.served[model] if model in self.packages else Inferences()

    @contextlib.contextmanager
    def submit(self, job: CheckedJob, times: Times, description: selector_pb2.JobDescription) -> Iterator[Answers]:
        """As `SelectorLink.submit`; remembers for others that the selector refused a job for want of time."""
        try:
            with self.link.submit(description) as answers:
                yield answers
        except Overloaded as error:
            self.refusals.note(job, times, error)
            raise

    async def load(self, model: str) -> None:
        """Loads a model from the models folder, or loads it anew; later requests are checked against what was loaded.

        Jobs under way end with what they began with. What was begun goes on if the caller goes away.

        Raises:
            ModelNotFound: there is no such package.
            PackageError: it is wrong; the model stays as it was.
            ServiceUnavailable: a service that it needs is away.
        """
        await self.link.load(model)
        await self.models.take_over(model)

    async def unload(self, model: str) -> None:
        """Admits no more jobs of a model, and returns when those under way are over and its networks are freed.

        Raises:
            ModelNotFound: it is not loaded.
            ServiceUnavailable: the selector is away.
        """
        await self.link.unload(model)

    def state_of(self, model: str) -> selector_pb2.ModelState:
        """What the selector last said of a model; nothing is ready while it is away."""
        reason = "not loaded" if self.link.connected else "service selector is not reachable"
        return self.link.models.get(model, selector_pb2.ModelState(model=model, reason=reason))

    def is_ready(self, model: str) -> bool:
        """Whether jobs for a model would be run."""
        return self.state_of(model).ready and self.models.is_loaded(model) and not self.link.refused

    def statistics(self) -> dict[str, int]:
        """Counts since the start, and what is held now."""
        counts = dict(self.counters) | self._publisher.statistics() | self.registry.statistics()
        counts |= self.arriving.statistics() | self.link.statistics() | self.refusals.statistics()
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
