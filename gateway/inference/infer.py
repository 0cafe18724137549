"""Inference by the Open Inference Protocol, whether it came over gRPC or over HTTP."""

from functools import partial

from gateway.data_plane import DataPlane
from gateway.inference.requests import call_deadline, check, elements_of
from gateway.inference.responses import respond
from gateway.inference.words import InferRequest, InferResponse
from mosel.deadline import Deadline


async def infer(plane: DataPlane, request: InferRequest, call: Deadline) -> InferResponse:
    """Answers one request; cancelling cancels its job.

    Args:
        plane: the data plane.
        request: what the caller sent.
        call: when the caller's own call ends.

    Raises:
        MoselError: as `gateway.inference.requests.check` and `DataPlane.predict`.
    """
    checked = partial(check, request, plane.packages, plane.settings)
    answer = await plane.predict(request.model, checked, elements_of(request), call_deadline(request, call))
    return respond(request, answer)
