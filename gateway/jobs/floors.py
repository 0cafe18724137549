"""Whose floor a job is held to: what its caller says wins over what the operator says. Knows no gRPC."""

from collections.abc import Callable
from dataclasses import replace

from gateway.jobs.checks import CheckedJob
from mosel.v1 import gateway_pb2


class Floors:
    """The floors that the operator states, for callers who state none.

    Args:
        for_all: setting `gateway.max_accuracy_loss`, 0..1; None: there is none.
        of_tenant: the same for a tenant, as its entry in the tokens file says now.
    """

    def __init__(self, for_all: float | None, of_tenant: Callable[[str], float | None]) -> None:
        self._for_all, self._of_tenant = for_all, of_tenant

    def resolve(self, job: CheckedJob, tenant: str | None) -> CheckedJob:
        """The job with the floor that counts, and whose it is.

        A caller who states no floor but fixes the modalities has said what it wants, too.

        Args:
            job: as its caller asked for it.
            tenant: who sent it; None: nobody has to say who it is.
        """
        if job.min_accuracy is not None or job.max_accuracy_loss is not None:
            return replace(job, floor_source=gateway_pb2.CALLER)
        if job.exact:
            return job
        stated = (
            (None if tenant is None else self._of_tenant(tenant), gateway_pb2.TENANT),
            (self._for_all, gateway_pb2.SETTINGS),
            (job.package.max_accuracy_loss, gateway_pb2.MODEL),
        )
        for loss, source in stated:
            if loss is not None:
                return replace(job, max_accuracy_loss=loss, floor_source=source)
        return job
