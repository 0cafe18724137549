"""Who shares a host and its clock."""

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from mosel.transport.host import host_identity, monotonic_ns, no_shared_clock
from mosel.v1 import arena_pb2


def describe(pipe: Connection) -> None:
    pipe.send_bytes(host_identity().SerializeToString())
    pipe.send_bytes(str(monotonic_ns()).encode())


def test_the_identity_is_what_the_kernel_states() -> None:
    identity = host_identity()
    assert identity.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert identity.pid == os.getpid()
    assert identity.pid_namespace == Path("/proc/self/ns/pid").stat().st_ino
    assert identity.ipc_namespace == Path("/proc/self/ns/ipc").stat().st_ino


def test_another_process_of_this_host_shares_the_clock() -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    before = monotonic_ns()
    process = context.Process(target=describe, args=(there,))
    process.start()
    other = arena_pb2.HostIdentity.FromString(here.recv_bytes())
    assert before < int(here.recv_bytes()) < monotonic_ns()
    process.join(30)
    here.close()
    there.close()
    assert other.pid != os.getpid()
    assert no_shared_clock(other) == ""


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [("boot_id", "another", "another host"), ("boot_id", "", "another host"), ("time_namespace", 1, "time namespace")],
)
def test_leases_of_another_host_or_clock_cannot_be_checked(field: str, value: object, reason: str) -> None:
    other = arena_pb2.HostIdentity()
    other.CopyFrom(host_identity())
    setattr(other, field, value)
    assert reason in no_shared_clock(other)


def test_the_clock_is_the_one_that_leases_are_made_with() -> None:
    assert abs(monotonic_ns() / 1e9 - time.monotonic()) < 1
