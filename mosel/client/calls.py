"""The calls that have one reply: what each sends, and what its reply and its errors mean. Sends nothing itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from mosel.client.answers import (
    JobInfo,
    ModelInfo,
    PlanInfo,
    Prediction,
    ServiceInfo,
    job_from,
    model_from,
    models_from,
    plan_from,
    prediction_from,
    services_from,
)
from mosel.client.checks import number, text
from mosel.client.demands import Payloads, predict_request, spec_of
from mosel.errors import JobNotFound, ModelNotFound, MoselError, PackageError, Unreachable
from mosel.v1 import gateway_pb2, service_pb2

Found = TypeVar("Found")
Instead = Mapping[type[MoselError], type[MoselError]]

LOAD_TIMEOUT_S = 600.0

# What a status means in calls that name a job and no model, and in those that load a model.
_ABOUT_A_JOB: Instead = {ModelNotFound: JobNotFound}
_ABOUT_A_PACKAGE: Instead = {Unreachable: PackageError}


@dataclass(frozen=True)
class UnaryCall(Generic[Found]):
    """One call.

    Attributes:
        method: of the gateway.
        request: what is sent.
        read: makes what the caller gets of the reply.
        instead: what an error means in this call.
    """

    method: str
    request: Message
    read: Callable[[Any], Found]
    instead: Instead = field(default_factory=dict)


def predict(
    model: str, payloads: Payloads, demand: Mapping[str, object], max_message_mib: int
) -> UnaryCall[Prediction]:
    """One job; errors as of `predict_request`."""
    return UnaryCall("Predict", predict_request(model, payloads, demand, max_message_mib), prediction_from)


def plan(model: str, size: int, demand: Mapping[str, object]) -> UnaryCall[PlanInfo]:
    """What a job would get; errors as of `spec_of`."""
    return UnaryCall("Plan", gateway_pb2.PlanRequest(job=spec_of(model, size, demand)), plan_from)


def job(job_id: str) -> UnaryCall[JobInfo]:
    """Where a job is; raises InvalidRequest if the id is none."""
    return UnaryCall("GetJob", gateway_pb2.GetJobRequest(job_id=_job_id(job_id)), job_from, _ABOUT_A_JOB)


def cancel(job_id: str) -> UnaryCall[JobInfo]:
    """The end of a job; raises InvalidRequest if the id is none."""
    return UnaryCall("CancelJob", gateway_pb2.CancelJobRequest(job_id=_job_id(job_id)), job_from, _ABOUT_A_JOB)


def models() -> UnaryCall[list[ModelInfo]]:
    """The served models."""
    return UnaryCall("ListModels", gateway_pb2.ListModelsRequest(), models_from)


def load_model(name: str) -> UnaryCall[ModelInfo]:
    """A model is loaded, perhaps anew; raises InvalidRequest if the name is none."""
    return UnaryCall("LoadModel", gateway_pb2.LoadModelRequest(model=_name(name)), model_from, _ABOUT_A_PACKAGE)


def unload_model(name: str) -> UnaryCall[None]:
    """A model is unloaded; raises InvalidRequest if the name is none."""
    return UnaryCall("UnloadModel", gateway_pb2.UnloadModelRequest(model=_name(name)), lambda _: None)


def observe(name: str, share: float) -> gateway_pb2.ObserveRequest:
    """A model is observed; raises InvalidRequest if the name is none, or the share."""
    found = number("share", share, "more than 0 and at most 1", lambda share: 0 < share <= 1)
    return gateway_pb2.ObserveRequest(model=_name(name), share=found)


def status() -> UnaryCall[list[ServiceInfo]]:
    """The state of every service."""
    return UnaryCall("Status", service_pb2.StatusRequest(), services_from)


def _job_id(value: object) -> str:
    return text("job_id", value, "32 hexadecimal digits")


def _name(value: object) -> str:
    return text("name", value, "the model's name")
