"""What the services hold: it must be the same before and after."""

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from mosel.client import Client
from mosel.errors import MoselError
from mosel.launcher import Launcher
from tests.chaos.memory import SharedMemory

_SLOTS = ("slots_published", "slots_filling", "object_slots_published", "object_slots_filling", "slots_held")
_JOBS = ("jobs_held", "jobs", "jobs_in_flight", "jobs_at_selector", "queued_items")
# Slots that nobody gives back come free when their leases end; connections of callers that left close meanwhile.
_SETTLE_S = 60.0
# A service that was started again may have some connections more, and Python's and malloc's pools another size.
MORE_DESCRIPTORS = 4
MORE_MEMORY, MORE_MIB = 0.2, 16.0


@dataclass(frozen=True)
class Held:
    """What is held at one moment.

    Attributes:
        processes: below this one.
        descriptors: open files and connections, by service.
        mib: resident memory that is no file's and not shared (RssAnon), by service.
        slots: of all arenas, in use.
        jobs: in flight or queued.
        files: in shared memory.
        dead_maps: arenas that services have mapped though they are removed.
    """

    processes: int
    descriptors: dict[str, int]
    mib: dict[str, float]
    slots: int
    jobs: int
    files: int
    dead_maps: int

    @classmethod
    def now(cls, launcher: Launcher, memory: SharedMemory) -> "Held":
        """At this moment; everything must be ready."""
        pids = {name: child.process.pid for name, child in launcher.children.items()}
        with Client(launcher.address) as client:
            counters = [service.counters for service in client.status()]
        maps = [line for pid in pids.values() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        return cls(
            processes=len(psutil.Process().children(recursive=True)),
            descriptors={name: psutil.Process(pid).num_fds() for name, pid in pids.items()},
            mib={name: _anonymous_mib(pid) for name, pid in pids.items()},
            slots=sum(counter.get(name, 0) for counter in counters for name in _SLOTS),
            jobs=sum(counter.get(name, 0) for counter in counters for name in _JOBS),
            files=memory.arenas(),
            dead_maps=sum("mosel-arena-" in line and line.endswith("(deleted)") for line in maps),
        )

    @classmethod
    def settled(cls, launcher: Launcher, memory: SharedMemory, before: "Held | None" = None) -> "Held | None":
        """When nothing is in use any more, and no more is held than before, or after a generous time.

        None if the gateway does not answer.
        """
        give_up, held = time.monotonic() + _SETTLE_S, None
        while time.monotonic() < give_up:
            launcher.supervise()
            with contextlib.suppress(MoselError):
                held = cls.now(launcher, memory)
                nothing = not (held.slots or held.jobs)
                if nothing and not (before and any(held.more_than(before))):
                    break
            time.sleep(0.2)
        return held

    def more_than(self, before: "Held") -> Iterator[str]:
        """What is not back at what it was, in words."""
        for name in ("processes", "slots", "jobs", "files", "dead_maps"):
            if (now := getattr(self, name)) != (then := getattr(before, name)):
                yield f"{name.replace('_', ' ')}: {now}, before {then}"
        for service, count in self.descriptors.items():
            if count > before.descriptors[service] + MORE_DESCRIPTORS:
                yield f"file descriptors of {service}: {count}, before {before.descriptors[service]}"
        for service, mib in self.mib.items():
            if mib > before.mib[service] * (1 + MORE_MEMORY) + MORE_MIB:
                yield f"memory of {service}: {mib:.0f} MiB, before {before.mib[service]:.0f}"


def _anonymous_mib(pid: int) -> float:
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024
