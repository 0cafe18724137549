"""What is seen of the calls of a service that computes: times, batches, spans, and whom log lines are about."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mosel.observability.logs import about_jobs
from mosel.observability.metrics import ITEMS, Metrics, single
from mosel.observability.tracing import Attributes, Tracing
from mosel.packages.model_package import name_of


class ComputeRequest(Protocol):
    """What the requests to all such services say of the jobs behind them."""

    @property
    def model(self) -> str: ...  # noqa: D102

    @property
    def job_ids(self) -> Sequence[bytes]: ...  # noqa: D102

    @property
    def traceparents(self) -> Sequence[str]: ...  # noqa: D102


@dataclass
class ComputedCall:
    """One call under way; the code that computes says what it took."""

    seconds: float = 0.0
    items: int = 0


class ComputeObserver:
    """Follows calls.

    Args:
        metrics: of the process.
        tracing: of the process.
        verb: "encode", "fuse".
        label: what calls differ by besides their model: "modality", "modality_set".
        statistics: of the workers.
    """

    def __init__(
        self, metrics: Metrics, tracing: Tracing, verb: str, label: str, statistics: Callable[[], Mapping[str, int]]
    ) -> None:
        labels = ("model", label)
        self._tracing, self._label = tracing, label
        self._seconds = metrics.histogram(
            f"mosel_{verb}_duration_seconds", "What the network takes for one call.", labels
        )
        self._items = metrics.histogram(f"mosel_{verb}_batch_items", "Items in one call.", labels, ITEMS)
        text = "Calls that wait for a worker or run."
        metrics.gauge("mosel_worker_calls", text, (), lambda: single(statistics(), "calls_waiting"))

    @contextlib.contextmanager
    def follow(self, name: str, request: ComputeRequest, value: str) -> Iterator[ComputedCall]:
        """Follows a call through the body, which tells the `ComputedCall` what it took.

        Args:
            name: of the spans.
            request: the call's.
            value: of the label.
        """
        about_jobs(*request.job_ids)
        spans = [self._tracing.begin(name, parent, "server") for parent in request.traceparents]
        model, call = name_of(request.model), ComputedCall()
        try:
            yield call
        except BaseException as error:
            for span in spans:
                span.end({"model": model, self._label: value}, error)
            raise
        for span in spans:
            taken: Attributes = {"batch_size": call.items, "compute_ms": call.seconds * 1000}
            span.end({"model": model, self._label: value, **taken})
        self._seconds.observe(call.seconds, model, value)
        self._items.observe(call.items, model, value)
