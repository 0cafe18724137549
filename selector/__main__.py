"""Starts the selector: `python -m selector`."""

import argparse
import asyncio
from functools import partial
from typing import NoReturn

from mosel.config import Settings
from mosel.deadline import Deadline
from mosel.packages.model_package import find_packages
from mosel.runtime.messages import ENVELOPE_BYTES, limit_bytes
from mosel.runtime.service import Service, run_service
from mosel.runtime.tracing import open_tracing
from mosel.v1 import selector_pb2_grpc
from selector.core.scheduler import Scheduler
from selector.dispatcher import Dispatcher
from selector.gateway_session import Gateways
from selector.job_observer import JobObserver
from selector.servicer import SelectorServicer
from selector.services.compute_services import ComputeServices
from selector.services.health_watch import HealthWatch
from selector.services.latency_measurement import Latencies
from selector.services.model_loader import ModelLoader
from selector.services.quiet_measurement import QuietMeasurement
from selector.services.tensor_paths import TensorPaths

# Messages that may wait for a gateway, for each item that may be queued: parts, an answer, and what was refused.
_MESSAGES_PER_ITEM = 4
# How often it is looked whether what was measured on a busy machine can be measured again.
_LOOK_EVERY_S = 30.0


def main() -> NoReturn:
    """Serves until a signal, and ends the process."""
    parser = argparse.ArgumentParser(prog="python -m selector", description=__doc__)
    parser.add_argument("--listen", default="", help="address to listen on (default: the setting selector.address)")
    arguments = parser.parse_args()
    run_service("selector", partial(serve, arguments.listen))


async def serve(listen: str, settings: Settings, stop: asyncio.Event) -> None:
    """Listens, follows encoders and fusion, and finishes what was admitted once `stop` is set.

    Raises:
        ConfigError: a setting is wrong.
        PackageError: a model package is wrong.
    """
    packages = find_packages(settings.models_dir, settings.models)
    limits, address = settings.selector, listen or settings.selector_address
    scheduler = Scheduler(
        {},
        limits.policy,
        limits.max_queued_items,
        settings.workers,
        limits.reply_ms,
        refuse_unguaranteed=limits.when_not_guaranteed == "refuse",
    )
    gateways = Gateways(_MESSAGES_PER_ITEM * limits.max_queued_items)
    modalities = {modality for package in packages.values() for modality in package.modalities}
    most = limit_bytes(settings.transport.max_message_mib) - ENVELOPE_BYTES
    with open_tracing(settings, "selector") as tracing:
        async with (
            ComputeServices(settings, modalities) as services,
            TensorPaths(settings, services, gateways) as paths,
        ):
            latencies = Latencies(settings)
            models = ModelLoader(settings, packages.values(), scheduler, services, gateways, latencies)
            observer = JobObserver(models.versions, tracing)
            dispatcher = Dispatcher(scheduler, services, paths, models, gateways, most, observer)
            servicer = SelectorServicer(dispatcher, models, services, paths, gateways, address, observer.metrics)
            register = partial(selector_pb2_grpc.add_SelectorServicer_to_server, servicer)
            async with (
                HealthWatch(services, paths, models.prepare, dispatcher.handle),
                QuietMeasurement(models, latencies, services, scheduler, partial(asyncio.sleep, _LOOK_EVERY_S)),
                Service(settings, address, "selector.address", register, names=["mosel.v1.Selector"]) as service,
            ):
                service.set_ready(True)
                await stop.wait()
                grace = Deadline.after(settings.stop_grace_ms / 1000)
                service.set_ready(False)
                await dispatcher.drain(grace)
                await service.stop(grace)


if __name__ == "__main__":
    main()
