"""The data plane: the one way in for every protocol. Checked jobs go in, answers come out. Knows no protocol."""

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from gateway.answers import Answer, answer_from
from gateway.inferences import Inferences
from gateway.intake import Check, Intake
from gateway.jobs import CheckedJob, Times
from gateway.refusals import Refusals
from gateway.registry import JobRegistry
from gateway.selector_link import Answers, SelectorLink
from gateway.upload import ArrivingBytes
from mosel.config import Settings
from mosel.deadline import Deadline
from mosel.errors import MoselError, Overloaded
from mosel.model_package import ModelPackage
from mosel.transport import Publisher, SharedMemoryArena
from mosel.v1 import selector_pb2, service_pb2


class DataPlane:
    """What the servicers of all protocols share.

    Args:
        settings: limits.
        packages: the models by name.
        arena: where payloads are kept.
        publisher: puts them there.
        link: the stream to the selector.

    Attributes:
        settings, packages, link: as given.
        intake: puts payloads into the arena.
        refusals: what the selector refused a moment ago.
        registry: the jobs under way.
        arriving: what jobs take whose items are still arriving.
        counters: requests, answers and items since the start.
    """

    def __init__(
        self,
        settings: Settings,
        packages: Mapping[str, ModelPackage],
        arena: SharedMemoryArena,
        publisher: Publisher,
        link: SelectorLink,
    ) -> None:
        self.settings, self.packages, self.link = settings, packages, link
        self.refusals = Refusals()
        self.intake = Intake(settings, publisher, self.refusals.check)
        self.registry = JobRegistry(settings.gateway.max_jobs_in_flight)
        limit = settings.transport.gateway_arena_mib * 1024 * 1024
        self.arriving = ArrivingBytes(arena.largest_slot, limit, "transport.gateway_arena_mib")
        self.counters: Counter[str] = Counter()
        self._arena = arena
        self._inferences: defaultdict[str, Inferences] = defaultdict(Inferences)

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
            with self.inferences_of(model).request():
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
        with self.inferences_of(model).request() as request:
            self.admit()
            prepared = await self.intake.request(check, elements, call)
            job, times = prepared.job, prepared.times
            with (
                self.registry.open(prepared.description.job_id, job.package.name, job.size, times.ends) as entry,
                self.submit(job, times, prepared.description) as answers,
            ):
                entry.under_way()
                request.sent()
                groups = [group async for finished in answers for group in finished]
                answer = answer_from(job, groups, answers.result, times.deadline.remaining * 1000)
                entry.status.items_done = job.size
            request.answer(job.size, answer.queue_ms, answer.compute_ms)
        self.counters.update(answered=1, items=job.size)
        return answer

    def _check_room(self) -> None:
        self.registry.check_room()
        self.link.check_connected()

    def inferences_of(self, model: str) -> Inferences:
        """What became of the requests to a model; names of no model leave nothing behind."""
        return self._inferences[model] if model in self.packages else Inferences()

    @contextlib.contextmanager
    def submit(self, job: CheckedJob, times: Times, description: selector_pb2.JobDescription) -> Iterator[Answers]:
        """As `SelectorLink.submit`; remembers for others that the selector refused a job for want of time."""
        try:
            with self.link.submit(description) as answers:
                yield answers
        except Overloaded as error:
            self.refusals.note(job, times, error)
            raise

    def state_of(self, model: str) -> selector_pb2.ModelState:
        """What the selector last said of a model; nothing is ready while it is away."""
        return self.link.models.get(model, selector_pb2.ModelState())

    def is_ready(self, model: str) -> bool:
        """Whether jobs for a model would be run."""
        return self.state_of(model).ready and not self.link.refused

    def statistics(self) -> dict[str, int]:
        """Counts since the start, and what is held now."""
        counts = dict(self.counters) | self._arena.statistics().as_counters() | self.registry.statistics()
        return counts | self.arriving.statistics() | self.link.statistics() | self.refusals.statistics()

    async def statuses(self) -> list[service_pb2.ServiceStatus]:
        """The state of every service; of a selector that does not answer, why."""
        own = service_pb2.ServiceStatus(
            name="gateway",
            address=self.settings.gateway_address,
            ready=any(map(self.is_ready, self.packages)),
            detail=self.link.refused or ("" if self.link.models else "selector is not reachable"),
            pid=os.getpid(),
            counters=self.statistics(),
        )
        return [own, *await self.link.statuses()]
