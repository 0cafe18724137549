"""How busy the machine is."""

import asyncio
from pathlib import Path

_WINDOW_S = 0.2
_STAT = Path("/proc/stat")


async def busy_share(seconds: float = _WINDOW_S) -> float:
    """The share of all processors, 0..1, that was in use during a moment; 0 where the system does not say.

    Asked while this system has nothing to do, it is what others use.
    """
    busy, total = await asyncio.to_thread(_used)
    await asyncio.sleep(seconds)
    busy_then, total_then = await asyncio.to_thread(_used)
    return (busy_then - busy) / (total_then - total) if total_then > total else 0.0


def _used() -> tuple[int, int]:
    """Ticks in use, and all, since the start of the machine: the first line of /proc/stat, see proc_stat(5)."""
    try:
        user, nice, system, idle, waiting, irq, soft_irq, stolen = map(int, _STAT.read_text().split()[1:9])
    except (OSError, ValueError):
        return 0, 0
    busy = user + nice + system + irq + soft_irq + stolen
    return busy, busy + idle + waiting
