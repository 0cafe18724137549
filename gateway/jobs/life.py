"""One life of a job, whatever protocol it came by: admit, check, store, submit, answer. Knows no protocol."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

from gateway.jobs.answers import Answer, answer_from
from gateway.jobs.checks import CheckedJob, Payloads
from gateway.jobs.concurrency import ConcurrencyLimit
from gateway.jobs.description import describe
from gateway.jobs.floors import Floors
from gateway.jobs.job import Job
from gateway.jobs.refusals import Refusals
from gateway.jobs.registry import JobRegistry
from gateway.jobs.request_observer import RequestObserver
from gateway.jobs.store import OFF_LOOP_ELEMENTS, PayloadStore
from gateway.jobs.upload import ArrivingBytes, JobUpload, Read, read_items
from gateway.selector_link import Answers, SelectorLink
from gateway.served_packages import ServedPackages
from mosel.config import GatewaySettings
from mosel.deadline import Deadline
from mosel.errors import MoselError, Overloaded

# Methods, of every protocol, whose callers wait for the whole of a job.
_BRING_JOBS = frozenset({"Predict", "ModelInfer"})

Check = Callable[[], tuple[CheckedJob, Payloads]]


@dataclass(frozen=True)
class Jobs:
    """Begins the lives of jobs; what they share.

    Attributes:
        settings: limits.
        observer: follows requests.
        registry: the jobs under way.
        served: the packages that jobs are checked against.
        floors: what the operator says of accuracy.
        limit: on jobs whose callers wait.
        refusals: what the selector refused a moment ago.
        arriving: what jobs take whose items are still arriving.
        store: where payloads are.
        link: the stream to the selector.
        counters: requests, answers and items since the start.
    """

    settings: GatewaySettings
    observer: RequestObserver
    registry: JobRegistry
    served: ServedPackages
    floors: Floors
    limit: ConcurrencyLimit
    refusals: Refusals
    arriving: ArrivingBytes
    store: PayloadStore
    link: SelectorLink
    counters: Counter[str] = field(default_factory=Counter)

    def begin(self, model: str) -> "JobLife":
        """The life of one job, a context manager of the task that serves it; how the block ends is how the job ends.

        What is refused before it is a job counts and is logged, too. Cancelling cancels the job.

        Args:
            model: as the caller names it; empty if that is not known yet.

        Raises:
            MoselError: what the job was ended with from outside: it was cancelled, or its deadline passed.
        """
        self.counters["requests"] += 1
        return JobLife(self, Job(self.registry.new_id(), model))

    def check_unread(self, method: str, left_s: float) -> None:
        """Raises Overloaded or ServiceUnavailable if a call of a method brings a job that cannot be admitted now.

        Args:
            method: without its service.
            left_s: seconds until the deadline of the call.
        """
        if method in _BRING_JOBS:
            self.check_room()
            self.limit.check_time(left_s, time.monotonic())

    def refused_unread(self, error: MoselError) -> None:
        """A request was refused of which nothing was read; it counts and is logged as every other."""
        self.counters["requests"] += 1
        self.observer.refused_unread(error)

    def sound(self, job: Job, checked: CheckedJob) -> None:
        """A job is checked; whose floor counts is decided here, whatever protocol it came by."""
        job.sound_as(self.floors.resolve(checked, job.owner), self.settings.default_deadline_ms / 1000)

    def check_room(self) -> None:
        """Raises Overloaded or ServiceUnavailable if no job whose caller waits can be admitted now."""
        self.registry.check_room()
        self.limit.check_room()
        self.link.check_connected()


class JobLife:
    """The steps of one job, in their order; a context manager that ends what a step has begun.

    Attributes:
        job: the record that all steps fill.
    """

    def __init__(self, jobs: Jobs, job: Job) -> None:
        self.job, self._jobs = job, jobs
        self._has_place = False

    def __enter__(self) -> Self:
        self._jobs.observer.began(self.job)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._has_place:
            self._jobs.served.checked(self.job)
            try:
                self._jobs.registry.leave(self.job, error)
            except MoselError as reason:
                self._jobs.observer.over(self.job, reason)
                raise
        self._jobs.observer.over(self.job, error)

    def admit(self, call: Deadline) -> None:
        """Takes the job's place, before anything else is done for it; from now on it can be found and cancelled.

        Args:
            call: when the caller's own call ends.

        Raises:
            Overloaded, ServiceUnavailable: no job can be taken now.
        """
        self._jobs.link.check_connected()
        self._jobs.registry.admit(self.job, call)
        self._has_place = True
        self._jobs.served.begin_checking(self.job)

    async def check(self, check: Check, elements: int) -> Payloads:
        """Checks what the caller sent, in a thread if there is much of it.

        Args:
            check: checks it.
            elements: of all payloads together, as the caller says.

        Raises:
            MoselError: whatever `check` raises.
            Overloaded: the selector would refuse it.
        """
        checked, payloads = await asyncio.to_thread(check) if elements > OFF_LOOP_ELEMENTS else check()
        self.sound(checked)
        self.job.status.items_received = checked.size
        return payloads

    def sound(self, checked: CheckedJob) -> None:
        """The job is checked; its items may be elsewhere.

        Raises:
            DeadlineExceeded: it is over already.
            Overloaded: the selector would refuse it.
        """
        self._jobs.sound(self.job, checked)
        self.job.ends.check("the request was checked")
        self._jobs.refusals.check(self.job.sound, self.job.deadline)
        self.job.description = describe(self.job)

    async def receive(self, read: Read) -> None:
        """Stores the items of a job as they arrive, for results as they finish.

        Args:
            read: the caller's next message.

        Raises:
            MoselError: there is no room, a message is wrong, or as `store`.
        """
        job = self.job
        with self._jobs.arriving.reserve(job.sound):
            upload = JobUpload(job.sound, self._jobs.settings.max_items_per_job)
            async for job.status.items_received in read_items(read, upload):
                pass
            job.description.stream = True
            await self.store(upload.payloads)

    async def store(self, payloads: Payloads) -> None:
        """Puts the payloads where encoders read them; errors as of `PayloadStore.store`."""
        await self._jobs.store.store(self.job, payloads)
        self._jobs.counters["payload_bytes"] += sum(payloads[name].nbytes for name in self.job.sound.modalities)

    @contextlib.contextmanager
    def submit(self) -> Iterator[Answers]:
        """Sends the job; what the selector says of it can be had inside the block; as of `SelectorLink.submit`."""
        description = self.job.description
        description.traceparent = self.job.span.traceparent
        with self._jobs.link.submit(description) as answers:
            self._jobs.served.checked(self.job)
            self.job.under_way()
            try:
                yield answers
            except Overloaded as error:
                # For want of time, and others that ask for no less need not ask.
                self._jobs.refusals.note(self.job.sound, self.job.deadline, error)
                raise

    def answered(self, sets: Mapping[str, int], answers: Answers) -> None:
        """All of it is answered.

        Args:
            sets: items by modality set.
            answers: what the selector said, read to its end.
        """
        self.job.answered(sets, answers.result)
        self._jobs.counters["answered"] += 1
        self._jobs.counters["items"] += self.job.size

    async def predict(self, check: Check, elements: int) -> Answer:
        """All that is left once the job is admitted, for a caller that waits for the whole of it.

        Raises:
            MoselError: as of the steps.
            Overloaded: enough jobs are under way.
        """
        job, limit = self.job, self._jobs.limit
        with limit.holding():
            try:
                answer = await self._answered_whole(check, elements)
            except Overloaded:
                limit.refused(job.came, time.monotonic())
                raise
            except asyncio.CancelledError:
                if job.deadline.remaining <= 0:
                    limit.ended(job.came, time.monotonic(), job.deadline.at - job.came)
                raise
            limit.answered(job.came, time.monotonic(), job.deadline.at - job.came)
        return answer

    async def _answered_whole(self, check: Check, elements: int) -> Answer:
        await self.store(await self.check(check, elements))
        with self.submit() as answers:
            groups = [group async for finished in answers for group in finished]
        answer = answer_from(self.job.sound, groups, answers.result, self.job.deadline.remaining * 1000)
        self.answered(answer.sets, answers)
        return answer
