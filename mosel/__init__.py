"""MOSEL: serve multi-modal models, choosing request by request which modalities to run.

`Client` and `AsyncClient` talk to a gateway; `mosel.errors` has what they raise.
"""

from mosel.answers import ItemResults, JobAccepted, JobSummary
from mosel.client import AsyncClient, Client, Prediction
from mosel.retry import Retry
from mosel.tls import Tls

__all__ = ["AsyncClient", "Client", "ItemResults", "JobAccepted", "JobSummary", "Prediction", "Retry", "Tls"]
