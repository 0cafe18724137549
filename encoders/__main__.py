"""Starts an encoder of one modality: `python -m encoders --modality image`."""

import argparse
import asyncio
import logging
from contextlib import nullcontext
from functools import partial
from typing import NoReturn

import grpc

from encoders.encoder import ModalityEncoder
from encoders.servicer import EncoderServicer
from mosel.compute import networks
from mosel.compute.forms import Forms
from mosel.compute.joined import JoinedEncoders
from mosel.compute.workers import Workers
from mosel.config import Settings
from mosel.errors import ConfigError
from mosel.modality import lane_of
from mosel.packages.model_package import find_packages
from mosel.runtime.channels import open_blocking_channel
from mosel.runtime.service import Service, run_service
from mosel.runtime.tracing import open_tracing
from mosel.transport import SHARED, ArenaKinds, Reader, open_arenas
from mosel.transport.cupy_ipc import device_ipc_for
from mosel.transport.device_arena import DeviceArena
from mosel.transport.layout import MIB
from mosel.transport.servicer import PRODUCER, ProducerServicer
from mosel.transport.torch_exchange import TensorPublisher
from mosel.v1 import arena_pb2_grpc, encoder_pb2_grpc

log = logging.getLogger(__name__)


def main() -> NoReturn:
    """Serves until a signal, and ends the process."""
    parser = argparse.ArgumentParser(prog="python -m encoders", description=__doc__)
    parser.add_argument("--modality", required=True, help="which modality's networks to run")
    parser.add_argument("--listen", default="", help="address to listen on (default: the setting encoders.addresses)")
    parser.add_argument("--replica", type=int, default=1, help="which of the modality's encoders, counted from 1")
    arguments = parser.parse_args()
    if arguments.replica < 1:
        parser.error(f"--replica is {arguments.replica}; expected a number from 1")
    name = f"encoder/{lane_of(arguments.modality, arguments.replica)}"
    run_service(name, partial(serve, name, arguments.modality, arguments.replica, arguments.listen))


async def serve(
    name: str,
    modality: str,
    replica: int,
    listen: str,
    settings: Settings,
    stop: asyncio.Event,
    arenas: ArenaKinds = SHARED,
    joined: JoinedEncoders | None = None,
) -> None:
    """Loads the networks, listens, and is ready until `stop` is set.

    Args:
        name: how people know this service.
        modality: whose networks it runs.
        replica: which of the modality's encoders it is, counted from 1.
        listen: the address, empty for that of the settings.
        settings: the effective settings.
        stop: ends it.
        arenas: what embeddings are kept in: that depends on where fusion is.
        joined: where fusion finds it, if it is in this process.

    Raises:
        ConfigError: no model has the modality, or a setting is wrong.
        PackageError: a model package is wrong.
    """
    found = find_packages(settings.models_dir, settings.models).values()
    packages = [package for package in found if modality in package.modalities]
    if not packages:
        known = sorted({m for package in found for m in package.modalities})
        raise ConfigError(f"--modality: no model has '{modality}'; expected one of {', '.join(known)}")
    address = listen or settings.encoder_address(modality, replica)
    transport = settings.transport
    device = networks.choose_device(settings.device)
    ipc, no_ipc = device_ipc_for(device)
    log.info("device", extra={"device": str(device), "no_cuda_ipc": no_ipc})
    setting = "transport.encoder_arena_mib"
    arena_bytes = transport.encoder_arena_mib * MIB
    with (
        open_tracing(settings, name) as tracing,
        open_arenas(transport, transport.encoder_arena_mib, setting, arenas) as host_publisher,
        DeviceArena(transport.shm_dir, arena_bytes, setting, ipc)
        if ipc and arenas.shared
        else nullcontext() as device_arena,
        Reader(transport.shm_dir, partial(open_blocking_channel, settings)) as reader,
        Workers(settings.workers, settings.encoders.torch_threads.get(modality, 1)) as workers,
    ):
        publisher = TensorPublisher(host_publisher, device_arena)
        encoder = ModalityEncoder(modality, device, reader, publisher, Forms(settings, device))
        servicer = EncoderServicer(encoder, workers, reader, publisher, name, address, settings, tracing)

        def register(server: grpc.aio.Server) -> None:
            encoder_pb2_grpc.add_EncoderServicer_to_server(servicer, server)
            if host_publisher.arena:
                # For consumers that cannot map it.
                arena_pb2_grpc.add_ProducerServicer_to_server(ProducerServicer(host_publisher.arena), server)

        names = ["mosel.v1.Encoder", *([PRODUCER] if host_publisher.arena else [])]
        async with Service(settings, address, "encoders.addresses", register, names=names) as service:
            for package in packages:
                await workers.run_aside(partial(encoder.networks.load, package))
            if joined:
                joined.join(modality, encoder)
            service.set_ready(True)
            await stop.wait()
            await service.finish()


if __name__ == "__main__":
    main()
