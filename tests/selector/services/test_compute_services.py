"""What is known of the services that compute."""

from functools import partial

from mosel.config import Settings
from mosel.modality import FUSION
from mosel.runtime.in_process import local_services
from mosel.runtime.service import Context, Service
from mosel.v1 import fusion_pb2_grpc, service_pb2
from selector.services.compute_services import ComputeServices


class SaysTheSame(fusion_pb2_grpc.FusionServicer):
    """Answers with the one message that it keeps."""

    def __init__(self) -> None:
        self.status = service_pb2.ServiceStatus(name="fusion", ready=True)

    async def Status(self, request: service_pb2.StatusRequest, context: Context) -> service_pb2.ServiceStatus:  # noqa: N802
        return self.status


async def test_what_a_service_says_of_itself_stays_its_own(settings: Settings) -> None:
    """Inside a process, the selector gets the very message."""
    fusion = SaysTheSame()  # type: ignore[abstract]
    register = partial(fusion_pb2_grpc.add_FusionServicer_to_server, fusion)
    with local_services.expect([settings.fusion_address]):
        async with (
            Service(settings, settings.fusion_address, "fusion.address", register),
            ComputeServices(settings, []) as services,
        ):
            services[FUSION].refused = "it is too slow"
            (said,) = await services.statuses()
    assert (said.ready, said.detail) == (False, "it is too slow")
    assert (fusion.status.ready, fusion.status.detail) == (True, "")
