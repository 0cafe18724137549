"""The machine and the software that a measurement is of."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

import mosel
from mosel.config import Placement, Settings
from mosel.modality import FUSION

_GPUS = Path("/proc/driver/nvidia/gpus")


class Hardware(BaseModel):
    """What latencies belong to; a profile is used where all of it is the same.

    Attributes:
        cpu: its model name.
        cores: how many of them this process may use.
        device: what the networks compute on: "cpu", or the GPU's name.
        workers: calls that a service computes at the same time.
        torch_threads: threads of each call, by lane; 1 where nothing is stated.
        placement: whether the services share a process; what a call costs beside its network depends on it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    cpu: str
    cores: float
    device: str
    workers: int
    torch_threads: dict[str, int]
    placement: Placement = "services"


class Versions(BaseModel):
    """Of the software that was measured with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    python: str
    torch: str
    mosel: str


def this_software() -> Versions:
    """The software of this process; torch is not imported."""
    torch = importlib.metadata.version("torch")
    return Versions(python=platform.python_version(), torch=torch, mosel=mosel.__version__)


def this_hardware(settings: Settings, device: str) -> Hardware:
    """The hardware of this machine, as services with these settings use it.

    Args:
        settings: the effective settings.
        device: what the networks compute on, see `device_name`.
    """
    threads = settings.encoders.torch_threads | {FUSION: settings.fusion.torch_threads}
    return Hardware(
        cpu=_cpu_name(),
        cores=_cores(),
        device=device,
        workers=settings.workers,
        torch_threads={lane: count for lane, count in threads.items() if count != 1},
        placement=settings.placement,
    )


def device_name(resources: Iterable[str]) -> str:
    """What services compute on, in words, from the `resource` of their states: "cpu", GPU names, or both."""
    return " and ".join(sorted({r if r == "cpu" else _gpu_name(r) for r in resources}))


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _cores() -> float:
    """Cores that this process may use: by its affinity, and by its control group's quota (cgroup v2, `cpu.max`)."""
    cores = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except OSError:
        return cores
    return cores if quota == "max" else min(cores, int(quota) / int(period))


def _gpu_name(uuid: str) -> str:
    """A GPU's name as the driver states it, else its UUID."""
    for file in _GPUS.glob("*/information"):
        text = file.read_text()
        name = re.search(r"^Model:\s*(.+)$", text, re.MULTILINE)
        if name and uuid in text:
            return name[1]
    return f"GPU {uuid}"
