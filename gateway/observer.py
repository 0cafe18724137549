"""What is seen of requests from outside, whatever protocol they came by: counts, times, spans and a line in the log."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from gateway.inferences import Inferences
from gateway.jobs.checks import CheckedJob, Times
from mosel.errors import Cancelled, DeadlineExceeded, JobCancelled, MoselError
from mosel.observability.logs import about_jobs
from mosel.observability.metrics import MIXED, Metrics, reason_of, refusals
from mosel.observability.tracing import OFF, Attributes, Span, Tracing
from mosel.packages.model_package import ModelPackage
from mosel.runtime.incoming import incoming
from mosel.status import status_of
from mosel.v1 import selector_pb2

# A caller that goes away so shortly before its deadline has missed it.
_AT_DEADLINE_S = 0.02
# As much of a text from outside is repeated.
_SHOWN_MODEL, _SHOWN_REASON = 100, 400

log = logging.getLogger("gateway.requests")


@dataclass(eq=False)
class Request:
    """One request, as far as it got.

    Attributes:
        model: its name, as the caller says.
        method: what was called.
        job_id: 16 bytes.
        span: of the whole request.
        started: seconds of `time.perf_counter()`.
        job, times: what was asked for, once that is known to be sound.
        at_selector: whether the selector has it, and says itself when it refuses it.
        sent_at: since when, as `started`.
        sets: items by modality set, once it is answered.
        result: what the selector said of it at the end.
        slack_ms: milliseconds left then.
    """

    model: str
    method: str
    job_id: bytes
    span: Span
    started: float
    job: CheckedJob | None = None
    times: Times | None = None
    at_selector: bool = False
    sent_at: float = 0.0
    sets: Mapping[str, int] = field(default_factory=dict)
    result: selector_pb2.JobResult = field(default_factory=selector_pb2.JobResult)
    slack_ms: float = 0.0

    def checked(self, job: CheckedJob, times: Times) -> None:
        """It is sound."""
        self.model, self.job, self.times = job.package.name, job, times

    def sent(self, description: selector_pb2.JobDescription) -> None:
        """The selector gets it, and goes on with its trace."""
        self.at_selector, self.sent_at = True, time.perf_counter()
        description.traceparent = self.span.traceparent

    def answered(self, sets: Mapping[str, int], result: selector_pb2.JobResult, slack_ms: float) -> None:
        """All of it is answered."""
        self.sets, self.result, self.slack_ms = dict(sets), result, slack_ms

    @property
    def size(self) -> int:
        """Items; 0 if that is not known."""
        return 0 if self.job is None else self.job.size

    @property
    def modality_set(self) -> str:
        """The set that its items used."""
        return next(iter(self.sets)) if len(self.sets) == 1 else MIXED


class Observer:
    """Follows the requests of one gateway.

    Args:
        metrics: of this process.
        packages: the models by name.
        access_log: whether each request gets a line in the log.
        tracing: records requests.

    Attributes:
        refused: refused requests, by model ("" if that is not known) and reason.
        served: what became of the requests to each model.
    """

    def __init__(
        self, metrics: Metrics, packages: Mapping[str, ModelPackage], access_log: bool, tracing: Tracing = OFF
    ) -> None:
        self._packages, self._access_log, self._tracing = packages, access_log, tracing
        self.refused = refusals(metrics)
        self.served: dict[str, Inferences] = defaultdict(Inferences)
        text = "From a request until its answer, as the gateway sees it; of answered requests."
        by = ("model", "modality_set")
        self._duration_s = metrics.histogram("mosel_request_duration_seconds", text, by)
        text = "Requests that are over, by how they ended."
        self._requests = metrics.counts("mosel_requests_total", text, "model", "status")
        text = "Jobs that were not answered by their deadline: late, or never."
        self._missed = metrics.counts("mosel_missed_total", text, "model", "how")
        for name in packages:
            self._missed[name, "late"] = self._missed[name, "expired"] = 0

    @contextlib.contextmanager
    def following(self, model: str) -> Iterator[Request]:
        """Follows a request through the body, which says how far it got; how the body ends is how the request ends.

        Args:
            model: its name, as the caller says.
        """
        call, job_id = incoming(), secrets.token_bytes(16)
        about_jobs(job_id)
        parent = call.traceparent if self._tracing.on else ""
        span = self._tracing.begin("request", parent, "server", job_id)
        request = Request(model, call.method, job_id, span, time.perf_counter())
        try:
            yield request
        except BaseException as error:
            self._over(request, _as_callers_see_it(error, request))
            raise
        self._over(request, None)

    def _over(self, request: Request, error: BaseException | None) -> None:
        seconds = time.perf_counter() - request.started
        model = request.model if request.model in self._packages else ""
        status = "OK" if error is None else status_of(error).name
        self._requests[model, status] += 1
        if error is None:
            self._succeeded(request, model, seconds)
        else:
            self._failed(request, model, seconds, error)
        if self._tracing.on:
            request.span.end(_attributes(request, model, status), error)
        if self._access_log:
            log.info("request", extra=_line(request, status, seconds, error))

    def _succeeded(self, request: Request, model: str, seconds: float) -> None:
        self._duration_s.observe(seconds, model, request.modality_set)
        if request.slack_ms < 0:
            self._missed[model, "late"] += 1
        times_ns = (seconds * 1e9, (request.sent_at - request.started) * 1e9)
        steps_ns = (request.result.queue_us * 1e3, request.result.compute_us * 1e3)
        self.served[model].answered(sum(request.sets.values()), *map(round, times_ns + steps_ns))

    def _failed(self, request: Request, model: str, seconds: float, error: BaseException) -> None:
        if model:
            self.served[model].failed(round(seconds * 1e9))
        if isinstance(error, DeadlineExceeded) and request.job is not None:
            self._missed[model, "expired"] += 1
        elif not request.at_selector and not isinstance(error, (Cancelled, JobCancelled)):
            self.refused[model, reason_of(error)] += 1


def _as_callers_see_it(error: BaseException, request: Request) -> BaseException:
    """A cancelled task is a caller that went away, or a deadline that passed."""
    if not isinstance(error, asyncio.CancelledError):
        return error
    if request.times is not None and request.times.deadline.remaining < _AT_DEADLINE_S:
        return DeadlineExceeded("the caller's own deadline passed")
    return Cancelled("the caller went away")


def _attributes(request: Request, model: str, status: str) -> Attributes:
    set_used = {"modality_set": request.modality_set} if request.sets else {}
    job_id = request.job_id.hex()
    return {"job_id": job_id, "model": model, "batch_size": request.size, "status": status, **set_used}


def _line(request: Request, status: str, seconds: float, error: BaseException | None) -> dict[str, object]:
    """What the log says of a request."""
    line: dict[str, object] = {
        "method": request.method,
        "model": request.model[:_SHOWN_MODEL],
        "size": request.size,
        "status": status,
        "ms": round(seconds * 1000, 3),
        "job_id": request.job_id.hex(),
    }
    if error is None:
        line["modality_sets"] = request.sets
        line["queue_ms"], line["compute_ms"] = request.result.queue_us / 1000, request.result.compute_us / 1000
        line["slack_ms"] = round(request.slack_ms, 3)
    else:
        line["reason"] = str(error)[:_SHOWN_REASON] if isinstance(error, MoselError) else type(error).__name__
    return line
