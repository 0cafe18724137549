"""A run in tables."""

from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table

from tests.chaos.held import MORE_DESCRIPTORS, MORE_MEMORY, MORE_MIB, Held
from tests.chaos.kills import PHASES
from tests.chaos.run import AGAIN_S, LATE_S, Report

_MOST_MESSAGES = 6


def tables(report: Report) -> Group:
    """Everything that there is to see."""
    return Group(_figures(report), _endings(report), _messages(report), _recoveries(report))


def _figures(report: Report) -> Table:
    shown = Table(title="chaos", box=box.SIMPLE_HEAD, show_header=False)
    answered = [ended for ended in report.ended if not ended.error]
    overshoots = [late for late, _ in report.overshoots]
    net = [late - busy for late, busy in report.overshoots]
    kills = Counter(recovery.service for recovery in report.recoveries)
    rows = {
        "requests": f"{len(report.ended)}, half of them streamed, {report.rate:.1f}/s; {len(answered)} answered, "
        f"{sum(ended.full for ended in answered)} of them from every modality",
        "items": f"{sum(ended.arrival.size for ended in answered)} answered",
        "wrong, missing or twice, untyped": str(sum(bool(ended.broken) for ended in report.ended)),
        "after their deadline": f"{len(overshoots)}, the worst {_ms(overshoots)}; without what this process was late: "
        f"{_ms(net)}, {sum(late > LATE_S for late in net)} beyond {LATE_S * 1000:.0f} ms",
        "this process was late": f"at worst {report.worst_lag_s * 1000:.0f} ms",
        "kills": ", ".join(f"{count} {name}" for name, count in sorted(kills.items())),
        "restarts": ", ".join(f"{count} {name}" for name, count in sorted(report.restarts.items())),
        "memory was full": f"for {sum(r.memory_full for r in report.recoveries)} kills"
        if report.memory_own
        else "never: only root can mount a tmpfs",
    }
    if report.after:
        rows |= _held(report.before, report.after)
    for name, figures in rows.items():
        shown.add_row(name, figures)
    return shown


def _held(before: Held, after: Held) -> dict[str, str]:
    return {
        "processes": f"{before.processes} before, {after.processes} after",
        "slots, jobs": f"{before.slots}, {before.jobs} before, {after.slots}, {after.jobs} after",
        "files in shared memory": f"{before.files} before, {after.files} after; "
        f"{after.dead_maps} removed ones still mapped",
        f"file descriptors (+{MORE_DESCRIPTORS})": _by_service(before.descriptors, after.descriptors),
        f"anonymous memory, MiB (+{MORE_MEMORY:.0%} and {MORE_MIB:.0f})": _by_service(before.mib, after.mib),
    }


def _endings(report: Report) -> Table:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for ended in report.ended:
        counts[report.down_during(ended) or "nothing"][ended.error or "answered"] += 1
    kinds = sorted({kind for counter in counts.values() for kind in counter})
    shown = Table(title="how requests ended, by what was down meanwhile", box=box.SIMPLE_HEAD)
    shown.add_column("down")
    for kind in kinds:
        shown.add_column(kind, justify="right")
    for name, counter in sorted(counts.items()):
        shown.add_row(name, *(str(counter[kind]) for kind in kinds))
    return shown


def _messages(report: Report) -> Table:
    shown = Table(title="what callers were told while nothing was down", box=box.SIMPLE_HEAD, show_header=False)
    told = Counter(
        f"{ended.error}: {ended.message}" for ended in report.ended if ended.error and not report.down_during(ended)
    )
    for message, count in told.most_common(_MOST_MESSAGES):
        shown.add_row(str(count), message)
    return shown


def _recoveries(report: Report) -> Table:
    title = f"seconds from each kill on; of use again within {AGAIN_S:.0f} s, from when there was room"
    shown = Table(title=title, box=box.SIMPLE_HEAD)
    shown.add_column("killed")
    for column in ("room", *PHASES):
        shown.add_column(column, justify="right")
    for recovery in report.recoveries:
        times = [f"{recovery.seconds[phase]:.2f}" if phase in recovery.seconds else "-" for phase in PHASES]
        room = f"{recovery.room_s:.2f}" if recovery.memory_full else ""
        shown.add_row(recovery.service, room, *times)
    return shown


def _by_service(before: dict[str, float] | dict[str, int], after: dict[str, float] | dict[str, int]) -> str:
    changes = (f"{name} {before[name]:.0f} → {after[name]:.0f}" for name in sorted(after))
    return f"{sum(before.values()):.0f} → {sum(after.values()):.0f}: {', '.join(changes)}"


def _ms(seconds: Iterable[float]) -> str:
    return f"{np.max(np.fromiter(seconds, float), initial=0.0) * 1000:.0f} ms"
