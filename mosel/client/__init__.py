"""The Python client: numpy arrays or tensors in, dataclasses out. Needs grpcio, protobuf and numpy only."""

from mosel.client.answers import (
    EdgeInfo,
    ItemResults,
    JobAccepted,
    JobEvent,
    JobInfo,
    JobSummary,
    ModalityInfo,
    ModelInfo,
    PlanInfo,
    Prediction,
    ServiceInfo,
    SetInfo,
    StrategyInfo,
)
from mosel.client.arrays import SupportsDlpack
from mosel.client.assurance import Assurance, Weakness
from mosel.client.async_client import AsyncClient
from mosel.client.client import Client
from mosel.client.demands import Demand, Payloads
from mosel.client.observed import ObservedItems, ObserveEvent
from mosel.client.retry import Retry
from mosel.tls import Tls

__all__ = [
    "Assurance",
    "AsyncClient",
    "Client",
    "Demand",
    "EdgeInfo",
    "ItemResults",
    "JobAccepted",
    "JobEvent",
    "JobInfo",
    "JobSummary",
    "ModalityInfo",
    "ModelInfo",
    "ObserveEvent",
    "ObservedItems",
    "Payloads",
    "PlanInfo",
    "Prediction",
    "Retry",
    "ServiceInfo",
    "SetInfo",
    "StrategyInfo",
    "SupportsDlpack",
    "Tls",
    "Weakness",
]
