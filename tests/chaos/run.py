"""The whole run: load, kills and a full shared memory at the same time; and what was promised about it."""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import uvloop

from bench.closed_loop import closed_loop
from bench.items import items_of
from bench.simulation import world_and_demands
from bench.workload import Demands, from_trace, read_trace
from mosel.config import FREE_PORTS, Settings, load_settings
from mosel.errors import ServiceUnavailable
from mosel.launcher import Launcher
from mosel.profiles.files import needed_profile
from tests.chaos.held import Held
from tests.chaos.kills import Killer, Recovery
from tests.chaos.load import Ended, Load, mixed
from tests.chaos.memory import SharedMemory
from tests.chaos.truth import Truth

MODEL = "digits"
_READY_TIMEOUT_S = 300.0
# Before anything is compared with it, a service has worked for so long.
_WARM_UP_S = 5.0
# How long it is measured what the services can answer.
_CAPACITY_S = 2.0
# About what a job of the load has, and enough of them to keep the services busy.
_JOB_ITEMS, _IN_FLIGHT = 3, 8
# That requests bring some of; more than the largest job has.
_ITEMS = 256
_GATEWAY_ARENA_MIB, _ENCODER_ARENA_MIB = 32, 16
_MODALITIES = ("audio", "image", "pen")
# Requests of each second, unless a file says others; scaled to the rate.
_TRACE = (4.0, 6.0, 5.0, 9.0, 3.0, 7.0, 14.0, 5.0, 2.0, 6.0)
# What is promised: how long after its deadline a call ends at most, and how soon a service is of use again.
LATE_S, AGAIN_S = 0.1, 15.0


@dataclass(frozen=True)
class Options:
    """What to do.

    Attributes:
        seconds: how long services are killed.
        kills: how many there are at least, however long that takes.
        load: in multiples of what the services can answer with every modality.
        trace: CSV file second,requests; None: a bursty one.
        replicas: of each encoder.
        placement: of the services; in one process, all are killed together.
        seed: of all chance.
    """

    seconds: float = 300.0
    kills: int = 0
    load: float = 0.5
    trace: Path | None = None
    replicas: int = 1
    placement: str = "services"
    seed: int = 0

    @property
    def memory_mib(self) -> int:
        """Room for every arena, and for another one of the largest."""
        return 2 * _GATEWAY_ARENA_MIB + len(_MODALITIES) * self.replicas * _ENCODER_ARENA_MIB

    def times(self, rate: float, seconds: float) -> Iterator[float]:
        """When requests are sent."""
        counts = _TRACE if self.trace is None else read_trace(self.trace)
        return from_trace(counts, rate, seconds, self.seed)


@dataclass(frozen=True)
class Report:
    """What happened.

    Attributes:
        rate: requests per second that were meant to be sent.
        ended: each request.
        recoveries: each kill.
        restarts: by service.
        overshoots: of requests that ended late, seconds beyond the deadline and how much of it this process was busy.
        worst_lag_s: the longest time for which this process was busy.
        before, after: what was held; None if the gateway did not answer in the end.
        memory_own: whether memory could be filled.
    """

    rate: float
    ended: list[Ended]
    recoveries: list[Recovery]
    restarts: dict[str, int]
    overshoots: list[tuple[float, float]]
    worst_lag_s: float
    before: Held
    after: Held | None
    memory_own: bool

    def wrong(self) -> list[str]:
        """Broken promises that no slow machine excuses."""
        broken = [reason for ended in self.ended for reason in ended.broken]
        broken += [f"{r.service} did not come back" for r in self.recoveries if math.isinf(r.took_s)]
        return broken + (list(self.after.more_than(self.before)) if self.after else ["the gateway does not answer"])

    def late(self) -> list[str]:
        """Promises about time that were broken, but for what this process itself was late."""
        calls = [late - busy for late, busy in self.overshoots if late - busy > LATE_S]
        broken = [f"{len(calls)} calls ended up to {max(calls) * 1000:.0f} ms after their deadline"] if calls else []
        slow = [r for r in self.recoveries if AGAIN_S < r.took_s < math.inf]
        return broken + [f"{r.service} was of use again after {r.took_s:.1f} s" for r in slow]

    def down_during(self, ended: Ended) -> str:
        """The service that was down while a request was under way; empty if none was."""
        for recovery in self.recoveries:
            if recovery.killed_s <= ended.ended_s and ended.sent_s <= recovery.over_s:
                return recovery.service
        return ""


def chaos(options: Options, profiles_dir: Path | None = None) -> Report:
    """Runs it.

    Args:
        options: what to do.
        profiles_dir: where profiles are kept; None: where the settings say.

    Raises:
        MoselError: the services do not start.
    """
    with SharedMemory(options.memory_mib) as memory, Launcher(_settings(options, memory, profiles_dir)) as launcher:
        launcher.wait_ready(_READY_TIMEOUT_S)
        package = launcher.packages[MODEL]
        items = items_of(package, at_least=_ITEMS)
        truth = Truth(package, items.payloads_of(slice(_ITEMS)))
        _, demands = world_and_demands(needed_profile(package, launcher.settings, None))
        rate = options.load * _capacity(launcher, truth)
        _Sending(launcher, truth, demands, options, rate, _WARM_UP_S).finish()
        before = Held.settled(launcher, memory)
        if before is None:
            raise ServiceUnavailable("the gateway does not answer after the first requests")
        killer = Killer(launcher, memory, truth, options.seed)
        # It is over when the last kill is.
        sending = _Sending(launcher, truth, demands, options, rate, 10 * options.seconds)
        try:
            killer.run(options.seconds, options.kills)
        finally:
            load = sending.stop()
        after = Held.settled(launcher, memory, before)
        return Report(
            rate,
            load.ended,
            killer.recoveries,
            dict(launcher.restarts),
            list(load.overshoots()),
            load.worst_lag_s,
            before,
            after,
            memory.own,
        )


def _capacity(launcher: Launcher, truth: Truth) -> float:
    """Jobs per second that the services answer from every modality; measured, for they share cores with the load."""
    payloads = truth.rows(0, _JOB_ITEMS)
    return closed_loop(launcher, MODEL, payloads, _IN_FLIGHT, _CAPACITY_S).items_per_s / _JOB_ITEMS


class _Sending:
    """Load from a thread of its own: the services end with the thread that started them, so that one supervises."""

    def __init__(
        self, launcher: Launcher, truth: Truth, demands: Demands, options: Options, rate: float, seconds: float
    ) -> None:
        arrivals = mixed(demands, options.times(rate, seconds), options.seed)
        self._load = Load(launcher.address, truth, arrivals, options.seed)
        self._thread = threading.Thread(target=uvloop.run, args=(self._load.run(),), name="load")
        self._thread.start()

    def finish(self) -> Load:
        """Waits until everything has been sent and has ended."""
        self._thread.join()
        return self._load

    def stop(self) -> Load:
        """Sends no more, and waits until everything has ended."""
        self._load.stop = True
        return self.finish()


def _settings(options: Options, memory: SharedMemory, profiles_dir: Path | None) -> Settings:
    transport = {
        "shm_dir": memory.folder,
        "gateway_arena_mib": _GATEWAY_ARENA_MIB,
        "encoder_arena_mib": _ENCODER_ARENA_MIB,
        "inline_max_kib": 0,
        "lease_grace_ms": 1000,
    }
    flags = {
        "models": (MODEL,),
        "device": "cpu",
        "placement": options.placement,
        "gateway": FREE_PORTS,
        "transport": transport,
        "encoders": {"replicas": dict.fromkeys(_MODALITIES, options.replicas)},
    }
    return load_settings(**flags if profiles_dir is None else flags | {"profiles_dir": profiles_dir})
