"""Starts all services of this machine in one process: `python -m mosel.launcher.single`.

Calls between them are function calls, and tensors between them are objects. What one process shares they share: it ends
with the first of them that cannot go on, and is started again as a whole.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from functools import partial
from typing import Any, NoReturn

import encoders.__main__ as encoders
import fusion.__main__ as fusion
import gateway.__main__ as gateway
import selector.__main__ as selector
from mosel.compute.joined import JoinedEncoders
from mosel.config import Settings
from mosel.errors import MoselError
from mosel.launcher.launcher import encoders_here
from mosel.observability.logs import as_service
from mosel.packages.model_package import find_packages
from mosel.runtime.in_process import local_services
from mosel.runtime.service import run_service
from mosel.transport import ArenaKinds

# Tensors that do not leave the process take no shared memory.
_OBJECTS = ArenaKinds(in_process=True, shared=False)
# Serves with some settings until an event is set.
Serve = Callable[[Settings, asyncio.Event], Coroutine[Any, Any, None]]


def main() -> NoReturn:
    """Serves until a signal, and ends the process."""
    run_service("mosel", serve, "single")


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Runs all services until `stop` is set; then the edge ends first, so that what was admitted can finish behind it.

    Raises:
        ConfigError: a setting is wrong.
        PackageError: a model package is wrong.
    """
    packages = find_packages(settings.models_dir, settings.models).values()
    here = encoders_here(settings, packages)
    own = {settings.encoder_address(*encoder) for encoder in here.values()}
    known = {at for modality, _ in here.values() for at in settings.encoder_addresses(modality).values()}
    joined = JoinedEncoders(modality for modality, _ in here.values())
    compute: dict[str, Serve] = {"fusion": partial(fusion.serve, "", joined=joined)}
    for lane, (modality, number) in here.items():
        name = f"encoder/{lane}"
        compute[name] = partial(encoders.serve, name, modality, number, "", arenas=_OBJECTS, joined=joined)
    edge = partial(gateway.serve, "", arenas=_OBJECTS if known == own else ArenaKinds(in_process=True, shared=True))
    try:
        with local_services.expect({settings.selector_address, settings.fusion_address, *own}):
            async with (
                asyncio.TaskGroup() as group,
                _running(group, settings, compute),
                _running(group, settings, {"selector": partial(selector.serve, "")}),
                _running(group, settings, {"gateway": edge}),
            ):
                await stop.wait()
    except BaseExceptionGroup as failed:
        raise _first(failed) from None


@contextlib.asynccontextmanager
async def _running(group: asyncio.TaskGroup, settings: Settings, services: Mapping[str, Serve]) -> AsyncIterator[None]:
    """Some services run inside, and have ended afterwards."""
    stop = asyncio.Event()
    tasks = [group.create_task(_run(name, serve(settings, stop)), name=name) for name, serve in services.items()]
    yield
    stop.set()
    await asyncio.wait(tasks)


async def _run(name: str, service: Coroutine[Any, Any, None]) -> None:
    as_service(name)
    await service


def _first(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    """What the process ends with, if several services failed: what a user can mend, if there is such."""
    known, others = failed.split(MoselError)
    group: BaseException = known or others or failed
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


if __name__ == "__main__":
    main()
