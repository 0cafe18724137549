"""From what the selector says of a job to what its caller gets. Knows no gRPC and no sockets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gateway.jobs.checks import CheckedJob
from gateway.jobs.job import Job
from mosel.errors import InternalError
from mosel.tensors import dtype_value, from_proto
from mosel.v1 import gateway_pb2, selector_pb2, tensor_pb2

Groups = Sequence[selector_pb2.ItemGroup]
# What an accuracy stands on, in words.
GUARANTEES = {number: name.lower() for name, number in gateway_pb2.Guarantee.items()}


@dataclass(frozen=True)
class Answer:
    """What a caller that waits for the whole job gets, whatever protocol it speaks.

    Attributes:
        job: what was asked for.
        job_id: 16 bytes.
        output: [size, *shape] of the model's output, BF16 as uint16.
        modality_sets: the set that each item used, written sorted and joined.
        sets: how many items used which.
        expected_accuracy: over the items, 0..1.
        queue_ms: milliseconds from admission until the first encoder call.
        compute_ms: milliseconds from then on.
        deadline_slack_ms: milliseconds that were left; negative if it is late.
        unavailable_modalities: those that would have been run, had their encoders been there; sorted.
        assurance: what the accuracy stands on; None: the selector does not say.
        upload: what the next job like it should bring; None: its caller did not say what it has.
    """

    job: CheckedJob
    job_id: bytes
    output: NDArray[np.generic]
    modality_sets: list[str]
    sets: Mapping[str, int]
    expected_accuracy: float
    queue_ms: float
    compute_ms: float
    deadline_slack_ms: float
    unavailable_modalities: Sequence[str]
    assurance: gateway_pb2.Assurance | None = None
    upload: gateway_pb2.UploadAdvice | None = None


def answer_from(job: CheckedJob, groups: Groups, result: selector_pb2.JobResult, slack_ms: float) -> Answer:
    """The answer to a caller that waits for the whole job.

    Args:
        job: the job.
        groups: everything that the selector sent of it.
        result: what it said last.
        slack_ms: milliseconds left until the deadline; negative if it is over.

    Raises:
        InternalError: the groups do not cover the items.
    """
    sets = sets_of(job, groups)
    outputs = [from_proto(group.output, "output") for group in groups]
    joined, by_item = outputs[0], [groups[0].modality_set] * job.size
    if len(groups) > 1:
        joined = np.empty((job.size, *outputs[0].shape[1:]), outputs[0].dtype)
        for group, output in zip(groups, outputs, strict=True):
            joined[list(group.items)] = output
            for item in group.items:
                by_item[item] = group.modality_set
    return Answer(
        job=job,
        job_id=result.job_id,
        output=joined,
        modality_sets=by_item,
        sets=sets,
        expected_accuracy=result.expected_accuracy,
        queue_ms=result.queue_us / 1000,
        compute_ms=result.compute_us / 1000,
        deadline_slack_ms=slack_ms,
        unavailable_modalities=tuple(result.unavailable_modalities),
        assurance=assurance_of(result),
        upload=result.upload if result.HasField("upload") else None,
    )


def predict_reply(answer: Answer) -> gateway_pb2.PredictReply:
    """An answer as `mosel.v1` says it."""
    output, dtype = answer.output, dtype_value(answer.job.package.output.dtype)
    return gateway_pb2.PredictReply(
        job_id=answer.job_id.hex(),
        output=tensor_pb2.Tensor(dtype=dtype, shape=output.shape, data=output.tobytes()),
        labels=labels_of(answer.job, output),
        modality_sets=answer.modality_sets,
        expected_accuracy=answer.expected_accuracy,
        queue_ms=answer.queue_ms,
        compute_ms=answer.compute_ms,
        deadline_slack_ms=answer.deadline_slack_ms,
        unavailable_modalities=answer.unavailable_modalities,
        assurance=answer.assurance,
        upload=answer.upload,
    )


def accepted_event(job_id: bytes) -> gateway_pb2.JobEvent:
    """What a caller that sends its items later gets first."""
    return gateway_pb2.JobEvent(accepted=gateway_pb2.JobAccepted(job_id=job_id.hex()))


def results_event(job: CheckedJob, group: selector_pb2.ItemGroup, items_done: int) -> gateway_pb2.JobEvent:
    """Items that are done, for a caller that wants them as they come."""
    results = gateway_pb2.ItemResults(
        modality_set=group.modality_set,
        items=group.items,
        output=group.output,
        labels=labels_of(job, from_proto(group.output, "output")),
        items_done=items_done,
    )
    return gateway_pb2.JobEvent(results=results)


def summary_event(job: Job) -> gateway_pb2.JobEvent:
    """The end of a job whose results were sent as they came."""
    result = job.result
    summary = gateway_pb2.JobSummary(
        expected_accuracy=result.expected_accuracy,
        queue_ms=result.queue_us / 1000,
        compute_ms=result.compute_us / 1000,
        deadline_slack_ms=job.slack_ms,
        strategy=job.sets,
        unavailable_modalities=result.unavailable_modalities,
        assurance=assurance_of(result),
    )
    return gateway_pb2.JobEvent(summary=summary)


def assurance_of(result: selector_pb2.JobResult) -> gateway_pb2.Assurance | None:
    """What the accuracy of an answer stands on; None: the selector does not say."""
    return result.assurance if result.HasField("assurance") else None


def words_of(assurance: gateway_pb2.Assurance | None) -> dict[str, str | float]:
    """The same by the names of its fields, without what has nothing to say."""
    if assurance is None:
        return {}
    said: dict[str, str | float] = {"guarantee": GUARANTEES[assurance.guarantee]}
    bounds: tuple[Literal["guaranteed_accuracy", "guaranteed_loss"], ...] = "guaranteed_accuracy", "guaranteed_loss"
    for bound in bounds:
        if assurance.HasField(bound):
            said |= {bound: getattr(assurance, bound), "confidence": assurance.confidence}
    said["saved"] = assurance.saved
    if assurance.floor_source:
        said["floor_source"] = gateway_pb2.FloorSource.Name(assurance.floor_source).lower()
    return said | ({"note": assurance.note} if assurance.note else {})


def sets_of(job: CheckedJob, groups: Groups) -> dict[str, int]:
    """How many items of a job used which modality set.

    Raises:
        InternalError: the groups do not cover the items.
    """
    sets: dict[str, int] = {}
    for group in groups:
        sets[group.modality_set] = sets.get(group.modality_set, 0) + len(group.items)
    if (items := sum(sets.values())) != job.size:
        raise InternalError(f"service selector answered {items} items; expected the {job.size} of the job")
    return sets


def labels_of(job: CheckedJob, output: NDArray[np.generic]) -> list[str]:
    """The label of each item's largest output; empty if the model names none."""
    labels = job.package.output.labels
    return [labels[i] for i in output.argmax(axis=-1)] if labels else []
