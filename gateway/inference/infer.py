"""Inference by the Open Inference Protocol, whether it came over gRPC or over HTTP."""

from functools import partial

from gateway.data_plane import DataPlane
from gateway.inference.requests import call_deadline, check, elements_of
from gateway.inference.responses import respond
from gateway.inference.words import InferRequest, InferResponse
from gateway.jobs.life import JobLife


async def infer(data_plane: DataPlane, life: JobLife, request: InferRequest) -> InferResponse:
    """Answers one request.

    Args:
        data_plane: the data plane.
        life: of its job, which is admitted.
        request: what the caller sent.

    Raises:
        MoselError: as `gateway.inference.requests.check` and `JobLife.predict`.
    """
    life.job.end_by(call_deadline(request, life.job.ends, life.job.admitted))
    checked = partial(check, request, data_plane.packages, data_plane.settings)
    return respond(request, await life.predict(checked, elements_of(request)))
