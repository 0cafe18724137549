"""What is seen of requests from outside, whatever protocol they came by: counts, times, spans and a line in the log."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Mapping

from gateway.inferences import Inferences
from gateway.jobs.answers import GUARANTEES, assurance_of, words_of
from gateway.jobs.job import Job
from mosel.errors import Cancelled, DeadlineExceeded, JobCancelled, MoselError
from mosel.observability.logs import about_jobs
from mosel.observability.metrics import Labels, Metrics, reason_of, refusals
from mosel.observability.tracing import OFF, Attributes, Tracing
from mosel.packages.model_package import ModelPackage
from mosel.runtime.incoming import incoming
from mosel.status import status_of

# A caller that goes away so shortly before its deadline has missed it.
_AT_DEADLINE_S = 0.02
# As much of a text from outside is repeated.
_SHOWN_MODEL, _SHOWN_REASON = 100, 400

log = logging.getLogger("gateway.requests")


class RequestObserver:
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
        text = "Items answered, by what their accuracy stands on."
        self._answered = metrics.counts("mosel_answered_items_total", text, "model", "guarantee")
        self._saved: defaultdict[Labels, float] = defaultdict(float)
        text = "Compute saved, in items for which everything that was sent would have been run."
        metrics.counter("mosel_saved_items_total", text, ("model",), lambda: self._saved)
        for name in packages:
            self._missed[name, "late"] = self._missed[name, "expired"] = 0

    def began(self, job: Job) -> None:
        """A request has come, which the current task serves."""
        call = incoming()
        about_jobs(job.id)
        job.method = call.method
        if self._tracing.on:
            job.span = self._tracing.begin("request", call.traceparent, "server", job.id)

    def over(self, job: Job, error: BaseException | None) -> None:
        """It is over.

        Args:
            job: its record, which says how far it got.
            error: what ended it; None: it is answered.
        """
        if error is not None:
            error = _as_callers_see_it(error, job)
        seconds = time.monotonic() - job.came
        model = job.model if job.model in self._packages else ""
        status = "OK" if error is None else status_of(error).name
        self._requests[model, status] += 1
        if error is None:
            self._succeeded(job, model, seconds)
        else:
            self._failed(job, model, seconds, error)
        if self._tracing.on:
            job.span.end(_attributes(job, model, status), error)
        if self._access_log and log.isEnabledFor(logging.INFO):
            log.info("request", extra=_line(job, status, seconds, error))

    def refused_unread(self, error: MoselError) -> None:
        """A request was refused before anything of it was read; it is no job, and has no id."""
        call = incoming()
        job = Job(b"", method=call.method)
        if self._tracing.on:
            job.span = self._tracing.begin("request", call.traceparent, "server")
        self.over(job, error)

    def _succeeded(self, job: Job, model: str, seconds: float) -> None:
        self._duration_s.observe(seconds, model, job.modality_set)
        if job.slack_ms < 0:
            self._missed[model, "late"] += 1
        if (assurance := assurance_of(job.result)) is not None:
            self._answered[model, GUARANTEES[assurance.guarantee]] += job.size
            self._saved[model,] += job.size * assurance.saved
        times_ns = (seconds * 1e9, (job.sent - job.came) * 1e9)
        steps_ns = (job.result.queue_us * 1e3, job.result.compute_us * 1e3)
        self.served[model].answered(job.size, *map(round, times_ns + steps_ns))

    def _failed(self, job: Job, model: str, seconds: float, error: BaseException) -> None:
        if model:
            self.served[model].failed(round(seconds * 1e9))
        if isinstance(error, DeadlineExceeded) and job.checked is not None:
            self._missed[model, "expired"] += 1
        elif not job.sent and not isinstance(error, (Cancelled, JobCancelled)):
            self.refused[model, reason_of(error)] += 1


def _as_callers_see_it(error: BaseException, job: Job) -> BaseException:
    """A cancelled task is a caller that went away, or a deadline that passed."""
    if not isinstance(error, asyncio.CancelledError | Cancelled):
        return error
    if job.deadline.remaining < _AT_DEADLINE_S:
        return DeadlineExceeded("the caller's own deadline passed")
    return Cancelled("the caller went away")


def _attributes(job: Job, model: str, status: str) -> Attributes:
    set_used = {"modality_set": job.modality_set} if job.sets else {}
    job_id = job.id.hex()
    return {"job_id": job_id, "model": model, "batch_size": job.size, "status": status, **set_used}


def _line(job: Job, status: str, seconds: float, error: BaseException | None) -> dict[str, object]:
    """What the log says of a request."""
    line: dict[str, object] = {
        "method": job.method,
        "model": job.model[:_SHOWN_MODEL],
        "size": job.size,
        "status": status,
        "ms": round(seconds * 1000, 3),
        "job_id": job.id.hex(),
    }
    if error is None:
        line["modality_sets"] = job.sets
        line["queue_ms"], line["compute_ms"] = job.result.queue_us / 1000, job.result.compute_us / 1000
        line["slack_ms"] = round(job.slack_ms, 3)
        line |= words_of(assurance_of(job.result))
    else:
        line["reason"] = str(error)[:_SHOWN_REASON] if isinstance(error, MoselError) else type(error).__name__
    return line
