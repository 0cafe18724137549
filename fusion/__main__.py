"""Starts the fusion service: `python -m fusion`."""

import argparse
import asyncio
import logging
from functools import partial
from typing import NoReturn

from fusion.predictor import Predictor
from fusion.servicer import FusionServicer
from mosel.compute import networks
from mosel.compute.forms import Forms
from mosel.compute.joined import JoinedEncoders
from mosel.compute.workers import Workers
from mosel.config import Settings
from mosel.packages.model_package import find_packages
from mosel.runtime.channels import open_blocking_channel
from mosel.runtime.service import Service, run_service
from mosel.runtime.tracing import open_tracing
from mosel.transport import Reader
from mosel.transport.cupy_ipc import device_ipc_for
from mosel.transport.torch_exchange import TensorReader
from mosel.v1 import fusion_pb2_grpc

log = logging.getLogger(__name__)


def main() -> NoReturn:
    """Serves until a signal, and ends the process."""
    parser = argparse.ArgumentParser(prog="python -m fusion", description=__doc__)
    parser.add_argument("--listen", default="", help="address to listen on (default: the setting fusion.address)")
    arguments = parser.parse_args()
    run_service("fusion", partial(serve, arguments.listen))


async def serve(listen: str, settings: Settings, stop: asyncio.Event, joined: JoinedEncoders | None = None) -> None:
    """Loads the networks, listens, and is ready until `stop` is set.

    Args:
        listen: the address, empty for that of the settings.
        settings: the effective settings.
        stop: ends it.
        joined: the encoders that share its process.

    Raises:
        ConfigError: a setting is wrong.
        PackageError: a model package is wrong.
    """
    packages = find_packages(settings.models_dir, settings.models)
    address = listen or settings.fusion_address
    device = networks.choose_device(settings.device)
    ipc, no_ipc = device_ipc_for(device)
    log.info("device", extra={"device": str(device), "no_cuda_ipc": no_ipc})
    shm_dir = settings.transport.shm_dir
    with (
        open_tracing(settings, "fusion") as tracing,
        Reader(shm_dir, partial(open_blocking_channel, settings)) as host_reader,
        TensorReader(host_reader, shm_dir, device, ipc, no_ipc) as reader,
        Workers(settings.workers, settings.fusion.torch_threads) as workers,
    ):
        predictor = Predictor(device, reader, Forms(settings, device), joined)
        servicer = FusionServicer(predictor, workers, reader, address, settings.models_dir, tracing)
        register = partial(fusion_pb2_grpc.add_FusionServicer_to_server, servicer)
        async with Service(settings, address, "fusion.address", register, names=["mosel.v1.Fusion"]) as service:
            for package in packages.values():
                await workers.run_aside(partial(predictor.networks.load, package))
            service.set_ready(True)
            await stop.wait()
            await service.finish()


if __name__ == "__main__":
    main()
