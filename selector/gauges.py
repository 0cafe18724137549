"""What the selector holds now, as metrics."""

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mosel.observability.metrics import Values, parts, single
from mosel.packages.model_package import name_of
from selector.core.ledger import Ledger
from selector.core.scheduler import Scheduler
from selector.core.stages import service_name
from selector.gateway_session import Gateways
from selector.job_observer import JobObserver
from selector.services.attachments import Attachments
from selector.services.compute_services import ComputeServices


def show_jobs(observer: JobObserver, scheduler: Scheduler) -> None:
    """Shows what is queued and under way, and what was learned of calls."""
    metrics, statistics, versions = observer.metrics, scheduler.statistics, observer.versions

    def by_version(counts: Mapping[str, int]) -> Values:
        by_name: Counter[str] = Counter()
        for model, count in counts.items():
            by_name[name_of(model)] += count
        return {(name, version): by_name[name] for name, version in versions().items()}

    text = "Jobs admitted and not over, by whether a call was made for them."
    metrics.gauge("mosel_jobs", text, ("state",), lambda: _by_state(statistics()))
    text = "Items of jobs that are not over."
    metrics.gauge("mosel_queued_items", text, (), lambda: single(statistics(), "queued_items"))
    text = "Calls under way, by the service called."
    metrics.gauge("mosel_calls_in_flight", text, ("callee",), lambda: _calls(statistics()))
    text = "Jobs given up because no strategy could meet their deadline any more."
    metrics.counter("mosel_dropped_total", text, (), lambda: {(): statistics().get("jobs_dropped", 0)})
    text = "Items begun again after a call with them failed."
    metrics.counter("mosel_items_tried_again_total", text, (), lambda: {(): statistics().get("items_tried_again", 0)})
    by = ("model", "callee")
    text = "What a call takes besides its profile, learned while running."
    metrics.gauge("mosel_call_overhead_seconds", text, by, lambda: _corrections(scheduler, 0, 1000))
    text = "What a call takes for each second of its profile, learned while running."
    metrics.gauge("mosel_call_factor", text, by, lambda: _corrections(scheduler, 1, 1))
    text = "Batches that a model predicted."
    metrics.triton("nv_inference_exec_count", text, "counter", lambda: by_version(observer.fused))
    text = "Requests that wait."
    metrics.triton("nv_inference_pending_request_count", text, "gauge", lambda: by_version(scheduler.waiting()))


def show_tensors(observer: JobObserver, ledger: Ledger[Any], attachments: Attachments) -> None:
    """Shows who holds slots, and how tensors travel."""
    text = "Slots that jobs hold, in all arenas."
    observer.metrics.gauge("mosel_slots_held", text, (), lambda: single(ledger.statistics(), "slots_held"))
    text = "Paths from a producer of tensors to a consumer, by their rung."
    observer.metrics.gauge("mosel_transport_edges", text, ("rung",), lambda: parts(attachments.statistics(), "edges"))


def show_queues(observer: JobObserver, gateways: Gateways, services: ComputeServices) -> None:
    """Shows what waits to be sent, and which gateways do not read."""
    metrics, statistics = observer.metrics, gateways.statistics
    text = "Messages that wait to be sent to gateways."
    metrics.gauge("mosel_outbox_messages", text, (), lambda: single(statistics(), "outbox_messages"))
    text = "Slots that nobody reads any more, and whose producers were not told yet, by the kind of producer."
    metrics.gauge(
        "mosel_releases_waiting", text, ("producer",),
        lambda: {
            ("gateway",): statistics()["outbox_released_slots"],
            ("encoder",): services.statistics()["released_slots_waiting"],
        },
    )  # fmt: skip
    text = "Gateways whose sessions were ended because they did not read."
    metrics.counter("mosel_gateways_overflowed_total", text, (), lambda: single(statistics(), "gateways_overflowed"))


def _by_state(statistics: Mapping[str, int]) -> Values:
    waiting = statistics["jobs_waiting"]
    return {("waiting",): waiting, ("under_way",): statistics["jobs"] - waiting}


def _calls(statistics: Mapping[str, int]) -> Values:
    lanes = parts(statistics, "calls_in_flight")
    return {(service_name(lane),): calls for (lane,), calls in lanes.items()}


def _corrections(scheduler: Scheduler, number: int, per_second: float) -> Values:
    fits = scheduler.corrections(time.monotonic())
    return {(name_of(model), service_name(lane)): fit[number] / per_second for (model, lane), fit in fits.items()}
