"""What is seen of jobs and calls from outside: counts, times, spans and log lines. Nothing is decided by it."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from mosel.errors import JobCancelled, MoselError
from mosel.modality import format_set
from mosel.observability.logs import job_field
from mosel.observability.metrics import MIXED, RATIOS, Metrics, reason_of, refusals
from mosel.observability.tracing import OFF, Attributes, Tracing
from mosel.packages.model_package import name_of
from mosel.v1 import encoder_pb2, fusion_pb2, selector_pb2
from selector.core.jobs import Call, EncodeCall, FuseCall
from selector.core.stages import service_name
from selector.in_flight import CallInFlight, CallT, JobInFlight

_CANCELLED = reason_of(JobCancelled())
AnyCall = CallInFlight[EncodeCall] | CallInFlight[FuseCall]
# Why jobs are degraded.
_LOAD, _OUTAGE = "load", "outage"

log = logging.getLogger(__name__)


class JobObserver:
    """Follows the jobs of one selector.

    Args:
        versions: says those of the models by name, which come and go.
        tracing: records the steps of jobs.

    Attributes:
        metrics: of this process.
        versions: as given.
        fused: fusion calls that went well, by model.
    """

    def __init__(self, versions: Callable[[], Mapping[str, str]], tracing: Tracing = OFF) -> None:
        self.metrics, self.versions, self._tracing = Metrics("selector"), versions, tracing
        self.fused: Counter[str] = Counter()
        self._admitted = self.metrics.counts("mosel_admitted_total", "Jobs admitted.", "model")
        self._refused = refusals(self.metrics)
        self._answered = self.metrics.counts("mosel_answered_total", "Jobs answered.", "model")
        self._unanswered = self.metrics.counts(
            "mosel_unanswered_total", "Jobs admitted that ended without an answer, by why.", "model", "reason"
        )
        text = "Jobs answered with less accuracy than their preferred strategy has, or without a service that was away."
        self._degraded = self.metrics.counts("mosel_degraded_total", text, "model", "cause")
        self._upgraded = self.metrics.counts(
            "mosel_upgraded_total", "Jobs answered with more accuracy than a plan gave them while they waited.", "model"
        )
        self._items = self.metrics.counts(
            "mosel_items_total", "Items predicted, by the modality set that they used.", "model", "modality_set"
        )
        self._failed_calls = self.metrics.counts(
            "mosel_failed_calls_total", "Calls that failed, by the service called and why.", "model", "callee", "reason"
        )
        self._make_histograms()
        for model in versions():
            for counts in (self._admitted, self._answered, self._upgraded):
                counts[model,] = 0
            self._degraded[model, _LOAD] = self._degraded[model, _OUTAGE] = 0

    def statistics(self) -> dict[str, int]:
        """Counts since the start."""
        cancelled = sum(count for (_, reason), count in self._unanswered.items() if reason == _CANCELLED)
        counts = {
            "jobs_admitted": self._admitted.total(),
            "jobs_refused": self._refused.total(),
            "jobs_answered": self._answered.total(),
            "jobs_cancelled": cancelled,
            "jobs_failed": self._unanswered.total() - cancelled,
            "jobs_degraded": self._degraded.total(),
            "jobs_upgraded": self._upgraded.total(),
        }
        for (_, modality_set), items in self._items.items():
            name = f"items.{modality_set}"
            counts[name] = counts.get(name, 0) + items
        return counts

    # Jobs

    def refused(self, job: selector_pb2.JobDescription, error: MoselError, arrived: float) -> None:
        """A job was not taken."""
        model = name_of(job.model)
        model = model if model in self.versions() else ""
        self._refused[model, reason_of(error)] += 1
        self._record("plan", job.traceparent, arrived, time.monotonic(), error)
        log.debug("refused", extra=job_field([job.job_id]) | {"reason": str(error)})

    def admitted(self, job: JobInFlight) -> None:
        """A job was taken."""
        work = job.work
        self._admitted[name_of(work.job.model),] += 1
        self._record("plan", job.traceparent, work.submitted_at, time.monotonic())

    def predicted(self, call: FuseCall, items: int) -> None:
        """Items of a job are done."""
        self._items[name_of(call.model), format_set(call.modality_set)] += items

    def answered(self, job: JobInFlight, now: float) -> None:
        """All items of a job are done."""
        work = job.work
        model, counts = name_of(work.job.model), work.counts
        label = format_set(next(iter(counts))) if len(counts) == 1 else MIXED
        started = now if work.started_at is None else work.started_at
        self._answered[model,] += 1
        if work.without:
            self._degraded[model, _OUTAGE] += 1
        elif work.degraded:
            self._degraded[model, _LOAD] += 1
        self._upgraded[model,] += work.upgraded
        self._queued_s.observe(started - work.submitted_at, model, label)
        self._processing_s.observe(now - started, model, label)
        if work.predicted > work.submitted_at:
            self._predicted.observe((now - work.submitted_at) / (work.predicted - work.submitted_at), model)
        self._record("queue", job.traceparent, work.submitted_at, started)

    def failed(self, job: JobInFlight, error: MoselError) -> None:
        """A job that was taken ends without an answer."""
        work = job.work
        now, started = time.monotonic(), work.started_at
        self._unanswered[name_of(work.job.model), reason_of(error)] += 1
        self._record("queue", job.traceparent, work.submitted_at, started or now, None if started else error)
        log.debug("failed", extra=job_field([work.job.id]) | {"reason": str(error)})

    # Calls

    def began(
        self, call: CallT, jobs: Sequence[JobInFlight], request: encoder_pb2.EncodeRequest | fusion_pb2.FuseRequest
    ) -> CallInFlight[CallT]:
        """A call is about to be made; its request learns for whom."""
        request.job_ids.extend(job.id for job in jobs)
        spans = [self._tracing.begin(_name_of(call), job.traceparent, "client") for job in jobs if job.traceparent]
        request.traceparents.extend(span.traceparent for span in spans if span.traceparent)
        return CallInFlight(call, jobs, time.monotonic(), spans)

    def returned(self, in_flight: AnyCall, compute_us: int) -> None:
        """It came back, well."""
        call, seconds = in_flight.call, time.monotonic() - in_flight.started
        transfer_s = max(seconds - compute_us / 1e6, 0.0)
        if isinstance(call, EncodeCall):
            self._encode_transfer_s.observe(transfer_s, name_of(call.model), call.modality)
        else:
            self._fuse_transfer_s.observe(transfer_s, name_of(call.model), format_set(call.modality_set))
            self.fused[name_of(call.model)] += 1
        for span in in_flight.spans:
            span.end({**_attributes(call), "transfer_ms": transfer_s * 1000})

    def lost(self, in_flight: AnyCall, error: MoselError) -> None:
        """It failed."""
        call = in_flight.call
        self._failed_calls[name_of(call.model), service_name(call.lane), reason_of(error)] += 1
        for span in in_flight.spans:
            span.end(_attributes(call), error)

    def _make_histograms(self) -> None:
        by_set, by_modality = ("model", "modality_set"), ("model", "modality")
        self._queued_s = self.metrics.histogram(
            "mosel_queue_duration_seconds", "From admission until the first call for a job, of answered jobs.", by_set
        )
        self._processing_s = self.metrics.histogram(
            "mosel_processing_duration_seconds", "From the first call for a job until its answer.", by_set
        )
        self._encode_transfer_s = self.metrics.histogram(
            "mosel_encode_transfer_duration_seconds", "An encoder call without its network.", by_modality
        )
        self._fuse_transfer_s = self.metrics.histogram(
            "mosel_fuse_transfer_duration_seconds", "A fusion call without its network.", by_set
        )
        self._predicted = self.metrics.histogram(
            "mosel_prediction_ratio", "The time until an answer per second predicted at admission.", ("model",), RATIOS
        )

    def _record(
        self, step: str, traceparent: str, started: float, ended: float, error: MoselError | None = None
    ) -> None:
        """A step that is over, if its job is traced."""
        if traceparent:
            self._tracing.begin(step, traceparent, started=started).end(error=error, ended=ended)


def _name_of(call: Call) -> str:
    return f"encode {call.modality}" if isinstance(call, EncodeCall) else "fuse"


def _attributes(call: Call) -> Attributes:
    label = "modality" if isinstance(call, EncodeCall) else "modality_set"
    value = call.modality if isinstance(call, EncodeCall) else format_set(call.modality_set)
    return {"model": name_of(call.model), label: value, "batch_size": sum(len(rows.items) for rows in call.rows)}
