"""MOSEL: serve multi-modal models, choosing request by request which modalities to run.

`Client` and `AsyncClient` talk to a gateway, the other classes are what they take and give, and `mosel.errors` has what
they raise.
"""

import importlib
from typing import TYPE_CHECKING

from mosel import errors

if TYPE_CHECKING:
    from mosel.client import (
        Assurance,
        AsyncClient,
        Client,
        Demand,
        EdgeInfo,
        ItemResults,
        JobAccepted,
        JobEvent,
        JobInfo,
        JobSummary,
        ModalityInfo,
        ModelInfo,
        ObservedItems,
        ObserveEvent,
        Payloads,
        PlanInfo,
        Prediction,
        Retry,
        ServiceInfo,
        SetInfo,
        StrategyInfo,
        SupportsDlpack,
        Tls,
        Weakness,
    )

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
    "errors",
]

__version__ = "0.1.0"

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        # What is asked for, when it is: NumPy alone would take most of the time of a health check.
        if name in __all__:
            return getattr(importlib.import_module("mosel.client"), name)
        raise AttributeError(f"module 'mosel' has no attribute {name!r}")
