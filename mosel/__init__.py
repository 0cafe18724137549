"""MOSEL: serve multi-modal models, choosing request by request which modalities to run.

`Client` and `AsyncClient` talk to a gateway; `mosel.errors` has what they raise.
"""

import importlib
from typing import TYPE_CHECKING

from mosel import errors

if TYPE_CHECKING:
    from mosel.client import AsyncClient, Client, Prediction
    from mosel.client.answers import ItemResults, JobAccepted, JobSummary
    from mosel.client.retry import Retry
    from mosel.tls import Tls

__all__ = ["AsyncClient", "Client", "ItemResults", "JobAccepted", "JobSummary", "Prediction", "Retry", "Tls", "errors"]

_MODULES = {
    "mosel.client.answers": ("ItemResults", "JobAccepted", "JobSummary"),
    "mosel.client": ("AsyncClient", "Client", "Prediction"),
    "mosel.client.retry": ("Retry",),
    "mosel.tls": ("Tls",),
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        # What is asked for, when it is: NumPy alone would take most of the time of a health check.
        for module, names in _MODULES.items():
            if name in names:
                return getattr(importlib.import_module(module), name)
        raise AttributeError(f"module 'mosel' has no attribute {name!r}")
