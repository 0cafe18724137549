"""What a client gets: dataclasses, and how they are made of replies."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mosel.client.assurance import Assurance, Weakness, assurance_from, weakness_from
from mosel.tensors import dtype_name, from_proto
from mosel.v1 import gateway_pb2, service_pb2, tensor_pb2

# Of a server that says nothing of it.
_UNKNOWN = Assurance()


@dataclass(frozen=True)
class Prediction:
    """The answer to one job.

    Attributes:
        job_id: 32 hexadecimal digits; also in the services' logs.
        output: the model's output, [items, ...].
        labels: the label of each item's largest output; empty if the model names none.
        modality_sets: the modality set that each item used, such as `audio+image`.
        expected_accuracy: over the job's items, 0..1, from the model's measured profile.
        queue_ms: milliseconds before the first encoder call.
        compute_ms: milliseconds from then on.
        deadline_slack_ms: milliseconds that were left; below 0 the answer is late.
        unavailable_modalities: those that would have been run, had their encoders not been away; mostly none.
        assurance: what the accuracy stands on, and what was saved.
    """

    job_id: str
    output: NDArray[np.generic]
    labels: tuple[str, ...]
    modality_sets: tuple[str, ...]
    expected_accuracy: float
    queue_ms: float
    compute_ms: float
    deadline_slack_ms: float
    unavailable_modalities: tuple[str, ...] = ()
    assurance: Assurance = _UNKNOWN

    @property
    def deadline_met(self) -> bool:
        """Whether the answer was there in time."""
        return self.deadline_slack_ms >= 0


@dataclass(frozen=True)
class JobAccepted:
    """The first event of a job: its id, 32 hexadecimal digits."""

    job_id: str


@dataclass(frozen=True)
class ItemResults:
    """Items of a job that are done; each item is in one of these.

    Attributes:
        modality_set: what these items used.
        items: their indices in the job, rising.
        output: the model's output, [items, ...].
        labels: the label of each item's largest output; empty if the model names none.
        items_done: items of the job that are done, these included.
    """

    modality_set: str
    items: tuple[int, ...]
    output: NDArray[np.generic]
    labels: tuple[str, ...]
    items_done: int


@dataclass(frozen=True)
class JobSummary:
    """The last event of a job; fields as of `Prediction`.

    Attributes:
        strategy: items by modality set.
    """

    expected_accuracy: float
    queue_ms: float
    compute_ms: float
    deadline_slack_ms: float
    strategy: dict[str, int]
    unavailable_modalities: tuple[str, ...] = ()
    assurance: Assurance = _UNKNOWN

    @property
    def deadline_met(self) -> bool:
        """Whether the answer was there in time."""
        return self.deadline_slack_ms >= 0


JobEvent = JobAccepted | ItemResults | JobSummary


@dataclass(frozen=True)
class StrategyInfo:
    """How many items of a job run which modality set.

    Attributes:
        items: by modality set.
        accuracy: expected, 0..1.
        cost_ms: compute time of all services together, in milliseconds.
        latency_ms: predicted milliseconds until the answer.
    """

    items: dict[str, int]
    accuracy: float
    cost_ms: float
    latency_ms: float


@dataclass(frozen=True)
class PlanInfo:
    """What a job would get if it were sent now.

    Attributes:
        frontier: strategies that no other beats in both accuracy and compute time, cheapest first.
        chosen: the one that the job would get; None if it would be refused.
        refusal: why it would be refused; empty if it would not.
        assurance: what an answer by `chosen` would stand on; None if it would be refused.
        upload: the modalities that jobs like it use now, see `plan_first` of `Client.predict`.
    """

    frontier: tuple[StrategyInfo, ...]
    chosen: StrategyInfo | None
    refusal: str
    assurance: Assurance | None = None
    upload: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobInfo:
    """Where a job is.

    Attributes:
        job_id: 32 hexadecimal digits.
        model: the model's name.
        state: `receiving`, `under_way`, `answered`, `failed` or `cancelled`.
        size: items.
        items_received: items that have arrived.
        items_done: items whose results are there.
        error: why it failed; empty if it did not.
    """

    job_id: str
    model: str
    state: str
    size: int
    items_received: int
    items_done: int
    error: str


@dataclass(frozen=True)
class ModalityInfo:
    """Data type name and shape of one item."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SetInfo:
    """What is known of one modality set.

    Attributes:
        accuracy: measured, 0..1; what is expected.
        latency_ms: predicted milliseconds for one item.
        available: whether it can be run now.
        guaranteed_accuracy: if every item ran it, they would be right at least so often, 0..1; None: nobody knows.
        guaranteed_loss: and wrong at most so much more often than if everything were run, 0..1; None: nobody knows.
        worst_label, worst_group: what it does worst on; None: there are no labelled calibration rows, or too few.
    """

    accuracy: float
    latency_ms: float
    available: bool
    guaranteed_accuracy: float | None = None
    guaranteed_loss: float | None = None
    worst_label: Weakness | None = None
    worst_group: Weakness | None = None


@dataclass(frozen=True)
class ModelInfo:
    """One served model.

    `revision` is a digest of the files that it was loaded from; `reason` says which service lacks it, and why;
    `latencies` what its latencies are from.
    """

    name: str
    version: str
    description: str
    ready: bool
    modalities: dict[str, ModalityInfo]
    sets: dict[str, SetInfo]
    labels: tuple[str, ...]
    revision: str = ""
    reason: str = ""
    latencies: str = ""


@dataclass(frozen=True)
class EdgeInfo:
    """How tensors get from a producer to a consumer (`inline`, `posix_shm`, `cuda_ipc`), and why not better."""

    producer: str
    consumer: str
    rung: str
    reason: str


@dataclass(frozen=True)
class ServiceInfo:
    """State and counters of one service.

    `edges` are those that the selector knows of; `models` those whose networks are loaded there, as `name@revision`;
    `forms` says which form each of these networks is in, such as `torchscript`.
    """

    name: str
    address: str
    ready: bool
    detail: str
    pid: int
    counters: dict[str, int]
    edges: tuple[EdgeInfo, ...] = ()
    models: tuple[str, ...] = ()
    forms: Mapping[str, str] = field(default_factory=dict)


def prediction_from(reply: gateway_pb2.PredictReply) -> Prediction:
    """The answer behind a reply."""
    return Prediction(
        job_id=reply.job_id,
        output=from_proto(reply.output, "output"),
        labels=tuple(reply.labels),
        modality_sets=tuple(reply.modality_sets),
        expected_accuracy=reply.expected_accuracy,
        queue_ms=reply.queue_ms,
        compute_ms=reply.compute_ms,
        deadline_slack_ms=reply.deadline_slack_ms,
        unavailable_modalities=tuple(reply.unavailable_modalities),
        assurance=assurance_from(reply.assurance),
    )


def event_from(event: gateway_pb2.JobEvent) -> JobEvent:
    """The event behind a message."""
    if event.HasField("accepted"):
        return JobAccepted(event.accepted.job_id)
    if event.HasField("results"):
        results = event.results
        return ItemResults(
            modality_set=results.modality_set,
            items=tuple(results.items),
            output=from_proto(results.output, "output"),
            labels=tuple(results.labels),
            items_done=results.items_done,
        )
    summary = event.summary
    return JobSummary(
        expected_accuracy=summary.expected_accuracy,
        queue_ms=summary.queue_ms,
        compute_ms=summary.compute_ms,
        deadline_slack_ms=summary.deadline_slack_ms,
        strategy=dict(summary.strategy),
        unavailable_modalities=tuple(summary.unavailable_modalities),
        assurance=assurance_from(summary.assurance),
    )


def plan_from(reply: gateway_pb2.PlanReply) -> PlanInfo:
    """The plan behind a reply."""
    chosen = _strategy(reply.chosen) if reply.HasField("chosen") else None
    assurance = assurance_from(reply.assurance) if reply.HasField("assurance") else None
    frontier, upload = tuple(map(_strategy, reply.frontier)), tuple(reply.upload.modalities)
    return PlanInfo(frontier, chosen, reply.refusal, assurance, upload)


def job_from(status: gateway_pb2.JobStatus) -> JobInfo:
    """The job behind a reply."""
    return JobInfo(
        job_id=status.job_id,
        model=status.model,
        state=gateway_pb2.JobState.Name(status.state).lower(),
        size=status.size,
        items_received=status.items_received,
        items_done=status.items_done,
        error=status.error,
    )


def models_from(reply: gateway_pb2.ListModelsReply) -> list[ModelInfo]:
    """The models behind a reply."""
    return list(map(model_from, reply.models))


def model_from(model: gateway_pb2.Model) -> ModelInfo:
    """The model behind a message."""
    return ModelInfo(
        name=model.name,
        version=model.version,
        description=model.description,
        ready=model.ready,
        modalities={m.name: ModalityInfo(dtype_name(m.dtype), tuple(m.shape)) for m in model.modalities},
        sets={known.modality_set: _set(known) for known in model.sets},
        labels=tuple(model.labels),
        revision=model.revision,
        reason=model.reason,
        latencies=model.latencies,
    )


def services_from(reply: service_pb2.StatusReply) -> list[ServiceInfo]:
    """The services behind a reply."""
    return [
        ServiceInfo(
            name=s.name,
            address=s.address,
            ready=s.ready,
            detail=s.detail,
            pid=s.pid,
            counters=dict(s.counters),
            edges=tuple(map(_edge, s.edges)),
            models=tuple(s.models),
            forms=dict(s.forms),
        )
        for s in reply.services
    ]


def _set(known: gateway_pb2.SetProfile) -> SetInfo:
    return SetInfo(
        accuracy=known.accuracy,
        latency_ms=known.latency_ms,
        available=known.available,
        guaranteed_accuracy=known.guaranteed_accuracy if known.HasField("guaranteed_accuracy") else None,
        guaranteed_loss=known.guaranteed_loss if known.HasField("guaranteed_loss") else None,
        worst_label=weakness_from(known.worst_label) if known.HasField("worst_label") else None,
        worst_group=weakness_from(known.worst_group) if known.HasField("worst_group") else None,
    )


def _edge(edge: service_pb2.EdgeStatus) -> EdgeInfo:
    return EdgeInfo(edge.producer, edge.consumer, tensor_pb2.Rung.Name(edge.rung).lower(), edge.reason)


def _strategy(strategy: gateway_pb2.Strategy) -> StrategyInfo:
    return StrategyInfo(dict(strategy.items), strategy.accuracy, strategy.cost_ms, strategy.latency_ms)
