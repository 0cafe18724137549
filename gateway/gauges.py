"""What the gateway holds now, as metrics."""

from collections.abc import Callable, Mapping

from gateway.inferences import Inferences
from mosel.observability.metrics import Metrics, Values, parts, show_arenas, single
from mosel.packages.model_package import ModelPackage

Statistics = Callable[[], Mapping[str, int]]


def show_jobs(metrics: Metrics, statistics: Statistics) -> None:
    """Shows where the jobs are that are not over, and what waits."""
    text = "Jobs that are not over."
    metrics.gauge("mosel_jobs_in_flight", text, (), lambda: single(statistics(), "jobs_in_flight"))
    text = "Those of them that the selector has."
    metrics.gauge("mosel_jobs_at_selector", text, (), lambda: single(statistics(), "jobs_at_selector"))
    text = "Reserved for items that are still arriving."
    metrics.gauge("mosel_arriving_bytes", text, (), lambda: single(statistics(), "arriving_bytes"))

    text = "Jobs that wait for a slot in the full arena."
    metrics.gauge("mosel_jobs_waiting_for_slots", text, (), lambda: single(statistics(), "jobs_waiting_for_slots"))
    text = "Messages that wait to be sent to the selector, by lane."
    metrics.gauge("mosel_outbox_messages", text, ("lane",), lambda: parts(statistics(), "outbox"))
    text = "What the selector said of jobs and their callers have not taken yet."
    metrics.gauge("mosel_answers_waiting", text, (), lambda: single(statistics(), "answers_waiting"))


def show_models(metrics: Metrics, statistics: Statistics, readiness: Callable[[], Mapping[str, bool]]) -> None:
    """Shows which models are ready, and the arena of their payloads."""
    text = "Whether jobs for a model would be run."
    metrics.gauge("mosel_model_ready", text, ("model",), lambda: {(m,): ready for m, ready in readiness().items()})
    show_arenas(metrics, statistics)


def show_as_triton(metrics: Metrics, packages: Mapping[str, ModelPackage], served: Mapping[str, Inferences]) -> None:
    """Shows what each model has served, under the names that Triton has for it."""

    def show(name: str, text: str, value: Callable[[Inferences], float]) -> None:
        def by_version() -> Values:
            return {(model, p.version): value(served[model]) for model, p in packages.items()}

        metrics.triton(f"nv_inference_{name}", text, "counter", by_version)

    show("request_success", "Requests answered.", lambda s: s.success.count)
    show("request_failure", "Requests that ended with an error.", lambda s: s.fail.count)
    show("count", "Items answered.", lambda s: s.items)
    show("request_duration_us", "From requests until their answers, summed up.", lambda s: s.success.ns / 1000)
    show("queue_duration_us", "From admission until the first call, summed up.", lambda s: s.queue.ns / 1000)
    show("compute_infer_duration_us", "From the first call until the answer, summed up.", lambda s: s.compute.ns / 1000)
