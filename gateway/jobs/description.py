"""From checked job to the description that the selector gets. Knows no gRPC."""

from gateway.jobs.job import Job
from mosel.transport.host import clock_id
from mosel.v1 import selector_pb2

_NANOSECONDS = 1_000_000_000


def describe(job: Job) -> selector_pb2.JobDescription:
    """All of a job but its payloads; what is left of its time is said when it is sent."""
    checked = job.sound
    return selector_pb2.JobDescription(
        job_id=job.id,
        model=checked.package.id,
        size=checked.size,
        modalities=checked.modalities,
        available=checked.available,
        min_accuracy=checked.min_accuracy,
        max_accuracy_loss=checked.max_accuracy_loss,
        floor_source=checked.floor_source,
        exact=checked.exact,
        effort=checked.effort,
        late_ok=checked.late_ok,
        priority=checked.priority,
        expiry_us=round((job.ends.at - job.deadline.at) * 1e6),
        deadline_ns=round(job.deadline.at * _NANOSECONDS),
        clock=clock_id(),
    )
