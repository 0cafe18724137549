"""Opens the arenas that a producer needs."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from mosel.config import TransportSettings
from mosel.transport.control import remove_orphans
from mosel.transport.exchange import Publisher
from mosel.transport.layout import MIB
from mosel.transport.object_arena import ObjectArena
from mosel.transport.shared_memory import SharedMemoryArena


@dataclass(frozen=True)
class ArenaKinds:
    """Which arenas a producer needs: that depends on where its consumers are.

    Attributes:
        in_process: some are in its own process.
        shared: some are in others, so that it takes memory that is shared, of the host and of its GPU.

    Raises:
        ValueError: none are anywhere.
    """

    in_process: bool
    shared: bool

    def __post_init__(self) -> None:
        if not (self.in_process or self.shared):
            raise ValueError("in_process and shared are both false; expected a producer with consumers")


# As for services that are processes of their own.
SHARED = ArenaKinds(in_process=False, shared=True)


@contextlib.contextmanager
def open_arenas(settings: TransportSettings, mib: int, setting: str, kinds: ArenaKinds = SHARED) -> Iterator[Publisher]:
    """New arenas with their publisher; where they need shared memory, after orphans of dead processes were removed.

    Args:
        settings: the transport's.
        mib: the budget of each in MiB.
        setting: the setting that states the budget, for messages.
        kinds: which are needed.

    Raises:
        ConfigError: shared memory is too small for it.
    """
    nbytes = mib * MIB
    with contextlib.ExitStack() as opened:
        shared = objects = None
        if kinds.shared:
            remove_orphans(settings.shm_dir)
            shared = opened.enter_context(SharedMemoryArena(settings.shm_dir, nbytes, setting))
        if kinds.in_process:
            objects = opened.enter_context(ObjectArena(nbytes, setting))
        yield Publisher(shared, settings, objects)
