"""Kills services one after another, and notes when each is of use again."""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from mosel.client import Client
from mosel.errors import MoselError
from mosel.launcher import Child, Launcher
from tests.chaos.memory import SharedMemory
from tests.chaos.truth import Truth

PHASES = ("started", "listening", "ready", "attached", "answered")
# Between one recovery and the next kill.
_PAUSE_S = (1.0, 3.0)
# How long memory is full before a kill; after it, until the service has failed to start.
_FULL_S = 2.0
_GIVE_UP_S = 120.0
_POLL_S = 0.05
_PROBE_TIMEOUT_S = 5.0


@dataclass
class Recovery:
    """One kill, and the way back.

    Attributes:
        service: which was killed.
        memory_full: whether there was no shared memory left then.
        killed_s: when, on the monotonic clock.
        room_s: how many seconds later there was room for it; 0 if there always was.
        seconds: from the kill until the process was started again, listened, had its networks, was attached to the
            others, and until a probe got a right answer from every modality.
    """

    service: str
    memory_full: bool
    killed_s: float
    room_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def took_s(self) -> float:
        """From when it could come back until it was of use; infinite if it never was."""
        return self.seconds.get("answered", float("inf")) - self.room_s

    @property
    def over_s(self) -> float:
        """When it was, on the monotonic clock."""
        return self.killed_s + self.seconds.get("answered", float("inf"))


class Killer:
    """Kills every service in turn, in random order, and supervises meanwhile.

    Args:
        launcher: its services are killed and started again.
        memory: theirs; filled for one kill in each round.
        truth: what a probe is to be answered.
        seed: of all chance.

    Attributes:
        recoveries: each kill.
    """

    def __init__(self, launcher: Launcher, memory: SharedMemory, truth: Truth, seed: int) -> None:
        self._launcher, self._memory, self._truth = launcher, memory, truth
        self._rng = np.random.default_rng((seed, 4))
        self._started_s: dict[str, float] = {}
        self.recoveries: list[Recovery] = []

    def run(self, seconds: float, least: int) -> None:
        """Kills for so long, and so many times at least; all is ready at the end unless something never came back."""
        until = time.monotonic() + seconds
        for service, memory_full in self._rounds():
            self._supervise(self._rng.uniform(*_PAUSE_S))
            if time.monotonic() >= until and len(self.recoveries) >= least:
                return
            self._kill(service, memory_full)

    def _look(self) -> list[str]:
        """Has the launcher look at the services; what it tells."""
        before = dict(self._launcher.restarts)
        news = self._launcher.supervise()
        for name, count in self._launcher.restarts.items():
            if count > before.get(name, 0):
                self._started_s[name] = time.monotonic()
        time.sleep(_POLL_S)
        return news

    def _supervise(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._look()

    def _rounds(self) -> Iterator[tuple[str, bool]]:
        # With arenas of their own, to begin with: these need room to come back.
        needy = [name for name in self._launcher.children if name.startswith("encoder/") or name == "gateway"]
        while True:
            services = list(self._rng.permutation(list(self._launcher.children)))
            starved = self._rng.choice(needy) if self._memory.own and needy else ""
            yield from ((str(service), service == starved) for service in services)

    def _kill(self, service: str, memory_full: bool) -> None:
        with self._memory.full() if memory_full else contextlib.nullcontext():
            if memory_full:
                self._supervise(_FULL_S)
            recovery = Recovery(service, memory_full, time.monotonic())
            self.recoveries.append(recovery)
            self._launcher.children[service].process.kill()
            self._launcher.children[service].process.wait()
            if memory_full:
                self._starve(service)
        if memory_full:
            recovery.room_s = time.monotonic() - recovery.killed_s
        self._follow(recovery)

    def _starve(self, service: str) -> None:
        """Leaves no room until a service has failed to start for the lack of it."""
        give_up = time.monotonic() + _GIVE_UP_S
        while time.monotonic() < give_up:
            self._memory.fill()
            if any(line.startswith(f"{service} ended with exit code 1: ") for line in self._look()):
                return

    def _follow(self, recovery: Recovery) -> None:
        """Notes the phases until a probe is answered."""
        name, began, seconds = recovery.service, recovery.killed_s, recovery.seconds
        while "answered" not in seconds and time.monotonic() < began + _GIVE_UP_S:
            news = self._look()
            if "ready" not in seconds and self._is_ready(name):
                seconds["ready"] = time.monotonic() - began
            if any(line.startswith("everything is ready again") for line in news):
                seconds.setdefault("ready", time.monotonic() - began)
                seconds["attached"] = time.monotonic() - began
            if "attached" in seconds and self._is_answered():
                seconds["answered"] = time.monotonic() - began
        if name in self._started_s:
            seconds["started"] = self._started_s[name] - began
        killed_at = time.time() - time.monotonic() + began
        if (at := _listening_at(self._launcher.children[name])) is not None:
            seconds["listening"] = at - killed_at

    def _is_ready(self, name: str) -> bool:
        """Whether the process that was started says that it is."""
        child = self._launcher.children[name]
        if child.process.poll() is not None:
            return False
        with Client(self._launcher.local_address, retries=None) as client, contextlib.suppress(MoselError):
            return any(service.ready and service.pid == child.process.pid for service in client.status())
        return False

    def _is_answered(self) -> bool:
        """Whether a caller gets a right answer from every modality."""
        name, everything = self._truth.package.name, self._truth.package.modalities
        with Client(self._launcher.address, retries=None) as client, contextlib.suppress(MoselError):
            rows = self._truth.rows(0, 1)
            answer = client.predict(name, rows, modalities=everything, timeout_s=_PROBE_TIMEOUT_S)
            return self._truth.is_label(0, answer.modality_sets[0], answer.labels[0])
        return False


def _listening_at(child: Child) -> float | None:
    """When a process said that it listens; seconds since 1970."""
    for line in child.log.read_bytes()[child.log_start :].decode(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            entry = json.loads(line)
            if entry.get("message") == "listening":
                moment, _, ms = entry["time"].partition(",")
                return time.mktime(time.strptime(moment, "%Y-%m-%d %H:%M:%S")) + int(ms) / 1000
    return None
