"""What a process counts and times, in the form that Prometheus reads.

Each process has one `Metrics`, whose name is the label `service` of everything in it. Counts are kept where things are
counted; metrics read them when somebody asks. `docs/observability.md` lists them all.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mosel.errors import MoselError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Bounds of buckets, for times in seconds and for items.
SECONDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 2.0, 5.0, 10.0, 30.0),
)
ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
RATIOS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0)

# The value of the label `modality_set` where items of one job, or of one call, use several.
MIXED = "mixed"

# Values by the values of their labels.
Labels = tuple[str, ...]
Values = Mapping[Labels, float]
Read = Callable[[], Values]

# Arenas by the prefix that their counters have in a `statistics()`.
_ARENAS = {"shared_memory": "", "device": "device_", "object": "object_"}

# When a histogram began is of no use here, and would add a line to each.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Distribution:
    """A histogram of one process."""

    def __init__(self, histogram: Histogram, service: str) -> None:
        self._histogram, self._service = histogram, service
        # To find one takes longer than to add to it.
        self._of_labels: dict[Labels, Histogram] = {}

    def observe(self, value: float, *labels: str) -> None:
        """Adds a value under the values of the labels, in their order. Thread-safe."""
        found = self._of_labels.get(labels)
        if found is None:
            found = self._of_labels[labels] = self._histogram.labels(self._service, *labels)
        found.observe(value)


class Metrics:
    """The metrics of one process.

    Args:
        service: its name, `encoder/image`.
    """

    def __init__(self, service: str) -> None:
        self.service = service
        self._histograms = CollectorRegistry()
        self._readers: list[Callable[[], Metric]] = []

    def histogram(
        self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float] = SECONDS
    ) -> Distribution:
        """A new histogram; labels must have few values."""
        made = Histogram(name, text, ("service", *labels), registry=self._histograms, buckets=buckets)
        return Distribution(made, self.service)

    def gauge(self, name: str, text: str, labels: Sequence[str], read: Read) -> None:
        """A gauge that is read, on the event loop, when somebody asks."""
        self._add(name, text, labels, read, GaugeMetricFamily)

    def counter(self, name: str, text: str, labels: Sequence[str], read: Read) -> None:
        """The same for what only grows; `name` ends in `_total`."""
        self._add(name, text, labels, read, CounterMetricFamily)

    def counts(self, name: str, text: str, *labels: str) -> Counter[Labels]:
        """A counter that keeps its counts itself: add to what is returned."""
        counted: Counter[Labels] = Counter()
        self.counter(name, text, labels, lambda: counted)
        return counted

    def triton(self, name: str, text: str, kind: str, read: Read) -> None:
        """A counter or gauge as Triton has it: by model and version alone, and no suffix after the name."""

        def family() -> Metric:
            metric = Metric(name, text, kind)
            for (model, version), value in dict(read()).items():
                metric.add_sample(name, {"model": model, "version": version}, value)
            return metric

        self._readers.append(family)

    async def page(self) -> bytes:
        """Everything as text. It is read here, where it belongs to; to write it takes milliseconds, in a thread."""
        families = [reader() for reader in self._readers]
        return await asyncio.to_thread(self._written, families)

    def _add(
        self,
        name: str,
        text: str,
        labels: Sequence[str],
        read: Read,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    ) -> None:
        def family() -> Metric:
            metric = kind(name, text, labels=("service", *labels))
            # A copy: other threads may add to it.
            for values, value in dict(read()).items():
                metric.add_metric((self.service, *values), value)
            return metric

        self._readers.append(family)

    def _written(self, families: Sequence[Metric]) -> bytes:
        process = list(ProcessCollector("mosel", registry=None).collect())
        for family in process:
            family.samples = [s._replace(labels={"service": self.service}) for s in family.samples]
        text = generate_latest(_Families([*self._histograms.collect(), *process, *families]))
        return re.sub(rb"(?m)^(# (?:HELP|TYPE) nv_\w+)_total ", rb"\1 ", text)


class _Families(Collector):
    """What `generate_latest` takes."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def merged(pages: Iterable[bytes]) -> bytes:
    """One page of several: each metric once, with the samples of everybody."""
    families: dict[bytes, list[bytes]] = {}
    for page in pages:
        for family in re.split(rb"(?m)^(?=# HELP )", page):
            if family:
                help_line, type_line, samples = family.split(b"\n", 2)
                name = help_line.split(b" ")[2]
                families.setdefault(name, [help_line + b"\n" + type_line + b"\n"]).append(samples)
    return b"".join(part for parts in families.values() for part in parts)


def up(answered: Mapping[str, bool]) -> bytes:
    """A page that says which services answered when they were asked for theirs."""
    family = GaugeMetricFamily(
        "mosel_up", "Whether a service answered when it was asked for metrics.", labels=["service"]
    )
    for service, here in answered.items():
        family.add_metric((service,), here)
    return generate_latest(_Families([family]))


def reason_of(error: BaseException) -> str:
    """An error as the value of a label: `floor_unreachable`, the name of its class in `mosel/errors.py`."""
    name = type(error).__name__ if isinstance(error, MoselError) else "InternalError"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def refusals(metrics: Metrics) -> Counter[Labels]:
    """Counts refused requests by model ("" if that is not known) and reason; each is counted where it is refused."""
    text = "Requests refused, by the service that refused them and why."
    return metrics.counts("mosel_refused_total", text, "model", "reason")


def single(statistics: Mapping[str, int], name: str) -> Values:
    """A statistic that has no labels."""
    return {(): statistics[name]}


def parts(statistics: Mapping[str, int], prefix: str) -> Values:
    """The statistics `prefix.*`, by what stands for the star."""
    return {(name.removeprefix(f"{prefix}."),): n for name, n in statistics.items() if name.startswith(f"{prefix}.")}


def show_arenas(metrics: Metrics, read: Callable[[], Mapping[str, int]]) -> None:
    """Shows the slots of a producer's arenas, and the tensors that it published.

    Args:
        metrics: where.
        read: statistics that have those of its `Publisher`.
    """

    def slots(*names: str) -> Values:
        statistics = read()
        keys = {(arena, name): f"{prefix}slots_{name}" for arena, prefix in _ARENAS.items() for name in names}
        return {labels: statistics[key] for labels, key in keys.items() if key in statistics}

    def events() -> Values:
        totals = slots("acquired_total", "released_total", "expired_total", "refused_total")
        return {(arena, event.removesuffix("_total")): count for (arena, event), count in totals.items()}

    metrics.gauge(
        "mosel_arena_slots", "Slots by what they are used for now.", ("arena", "state"),
        lambda: slots("free", "filling", "published"),
    )  # fmt: skip
    metrics.counter("mosel_arena_slot_events_total", "What happened to slots.", ("arena", "event"), events)
    metrics.counter(
        "mosel_tensors_total", "Tensors published, by the rung that they travel on.", ("rung",),
        lambda: parts(read(), "tensors"),
    )  # fmt: skip
    metrics.counter(
        "mosel_tensor_bytes_total", "Their bytes.", ("rung",), lambda: parts(read(), "tensor_bytes")
    )  # fmt: skip


def show_fetched(metrics: Metrics, read: Callable[[], Mapping[str, int]]) -> None:
    """Shows what a consumer fetched from producers whose arenas it cannot map; `read`: statistics of its `Reader`."""
    text = "Bytes of tensors fetched from their producers, on other hosts."
    metrics.counter("mosel_fetched_bytes_total", text, (), lambda: single(read(), "bytes_fetched"))
