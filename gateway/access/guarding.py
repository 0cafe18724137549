"""The guard that a tokens file asks for, in step with the file."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import NoReturn

from gateway.access.guard import Guard
from gateway.access.tenants import read_tenants
from mosel.errors import ConfigError
from mosel.runtime.background import Background

_LOOK_EVERY_S = 1.0

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def guarding(
    path: Path | None, counters: Counter[str], look_every_s: float = _LOOK_EVERY_S
) -> AsyncIterator[Guard | None]:
    """A guard that knows the tenants of a tokens file, as it is inside the block; while it is wrong, those of before.

    Args:
        path: the file; None: everybody may call, and there is no guard.
        counters: gets the counts of what is refused.
        look_every_s: how often to see whether the file has changed.

    Raises:
        ConfigError: the file is wrong at the start.
    """
    if path is None:
        yield None
        return
    # Before it is read: what is written meanwhile is seen the next time. So it is below.
    state = await asyncio.to_thread(_state, path)
    guard = Guard(await asyncio.to_thread(read_tenants, path), counters)
    background = Background()
    background.forever(partial(_follow, path, state, guard, look_every_s), "tokens file")
    try:
        yield guard
    finally:
        await background.close()


async def _follow(path: Path, state: object, guard: Guard, look_every_s: float) -> NoReturn:
    while True:
        await asyncio.sleep(look_every_s)
        seen, state = state, await asyncio.to_thread(_state, path)
        if state == seen:
            continue
        try:
            tenants = await asyncio.to_thread(read_tenants, path)
        except ConfigError as error:
            reason = str(error)
            log.error("tokens file not usable, so the tenants stay as they are", extra={"reason": reason})  # noqa: TRY400
        else:
            guard.replace(tenants)
            log.info("tenants", extra={"tenants": sorted(tenants)})


def _state(path: Path) -> object:
    """What changes when the file does."""
    try:
        file = path.stat()
    except OSError as error:
        return error.errno
    return file.st_mtime_ns, file.st_ino, file.st_size, file.st_mode
