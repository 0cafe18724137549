"""Who shares what: the identity of a process's host and namespaces, and the shared clock."""

import os
import time
from functools import cache
from pathlib import Path

from mosel.v1 import arena_pb2


@cache
def host_identity() -> arena_pb2.HostIdentity:
    """This process's identity, as the kernel states it."""
    return arena_pb2.HostIdentity(
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
        time_namespace=_namespace("time"),
        pid_namespace=_namespace("pid"),
        ipc_namespace=_namespace("ipc"),
        pid=os.getpid(),
    )


@cache
def clock_id() -> str:
    """Names the clock of `monotonic_ns`: two processes that say the same can compare times."""
    here = host_identity()
    return f"{here.boot_id}/{here.time_namespace}"


def no_shared_clock(producer: arena_pb2.HostIdentity) -> str:
    """Why leases of this producer cannot be checked here, empty if they can: it takes one kernel and one clock."""
    here = host_identity()
    if producer.boot_id != here.boot_id:
        return "the producer runs on another host"
    if producer.time_namespace != here.time_namespace:
        return "the producer is in another time namespace, so its clock cannot be compared"
    return ""


def monotonic_ns() -> int:
    """Nanoseconds on the clock that all processes of one host and time namespace share (CLOCK_MONOTONIC)."""
    return time.monotonic_ns()


def _namespace(kind: str) -> int:
    try:
        return Path(f"/proc/self/ns/{kind}").stat().st_ino
    except OSError:
        # Older kernels have no time namespaces: all processes share the clock.
        return 0
