"""Starts the selector: `python -m selector`."""

import argparse
import asyncio
import sys
from functools import partial

from mosel.config import Settings
from mosel.model_package import ModelPackage, find_packages
from mosel.service import Service, run_service
from mosel.tracing import open_tracing
from mosel.v1 import selector_pb2_grpc
from selector.director import Director
from selector.observer import Observer
from selector.peers import Peers
from selector.profile import ModelProfile
from selector.scheduler import Scheduler
from selector.servicer import SelectorServicer


def main() -> int:
    """Serves until a signal; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m selector", description=__doc__)
    parser.add_argument("--listen", default="", help="address to listen on (default: the setting selector.address)")
    arguments = parser.parse_args()
    return run_service("selector", partial(serve, arguments.listen))


async def serve(listen: str, settings: Settings, stop: asyncio.Event) -> None:
    """Listens, follows encoders and fusion, and finishes what was admitted once `stop` is set.

    Raises:
        ConfigError: a setting is wrong.
        PackageError: a model package is wrong.
    """
    packages = find_packages(settings.models_dir, settings.models)
    profiles = {name: _profile(package) for name, package in packages.items()}
    limits = settings.selector
    scheduler = Scheduler(profiles, limits.policy, limits.max_queued_items, settings.workers, limits.reply_ms)
    versions = {name: package.version for name, package in packages.items()}
    address = listen or settings.selector_address
    with open_tracing(settings, "selector") as tracing:
        observer = Observer(versions, tracing)
        director = Director(scheduler, profiles, observer)
        async with Peers(settings, packages, profiles, director.lane_changed) as peers:
            director.use(peers)
            servicer = SelectorServicer(director, peers, address, observer.metrics)
            register = partial(selector_pb2_grpc.add_SelectorServicer_to_server, servicer)
            names = ["mosel.v1.Selector"]
            async with Service(settings, address, "selector.address", register, names=names) as service:
                service.set_ready(True)
                await stop.wait()
                service.set_ready(False)
                await director.drain(settings.stop_grace_ms / 1000)


def _profile(package: ModelPackage) -> ModelProfile:
    accuracy = package.accuracy
    return ModelProfile(accuracy.sets, accuracy.samples, package.default_min_accuracy)


if __name__ == "__main__":
    sys.exit(main())
