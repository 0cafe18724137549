"""Runs and gains as tables, and as files from which other tables can be made."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import JustifyMethod
from rich.table import Table

from bench.outcomes import Summary
from bench.policies.gains import Gain, Speedup
from bench.policies.runs import Row

_NOTHING = "-"


def runs_table(rows: Sequence[Row], title: str) -> Table:
    """One line per run."""
    table = _table(title, "policy", "slack", "t", "load", "jobs/s", *_COLUMNS)
    for row in rows:
        setting = row.setting
        what = (setting.policy, f"{setting.slack:g}", points(setting.t))
        table.add_row(*what, f"{setting.load:.2f}", f"{row.rate:.1f}", *_cells(row.summary))
    return table


def summary_table(summary: Summary, title: str) -> Table:
    """One run, by line."""
    table = Table(title=title, box=box.SIMPLE_HEAD, show_header=False)
    for name, cell in zip(_COLUMNS, _cells(summary), strict=True):
        table.add_row(name, cell)
    table.add_row("jobs", ", ".join(f"{name} {count}" for name, count in summary.endings.items()))
    return table


def gains_table(gains: Sequence[Gain]) -> Table:
    """Throughput against `all`, each at the highest load at which it keeps misses under 5 %."""
    table = _table(
        "throughput at 5 % misses, against all",
        *("policy", "slack", "t", "misses of", "load", "items/s", "load of all", "items/s of all"),
        *("gain", "simulated", "capacity ratio", "clairvoyant", "bound", "gain / clairvoyant"),
    )
    for gain in gains:
        numbers = (gain.load, gain.items_per_s, gain.load_of_all, gain.items_per_s_of_all)
        ratios = (gain.gain, gain.simulated, gain.capacity_ratio, gain.clairvoyant, gain.bound)
        table.add_row(
            gain.policy,
            f"{gain.slack:g}",
            points(gain.t),
            gain.misses_of,
            *(_number(value, ".2f") for value in numbers),
            *(_number(value, ".2f") for value in ratios),
            _number(gain.gain / gain.clairvoyant, ".0%"),
        )
    return table


def speedups_table(speedups: Sequence[Speedup], title: str) -> Table:
    """Mean completion times against `all`."""
    table = _table(title, "policy", "t", "mean ms", "p99 ms", "mean ms of all", "gain", "run s", "run s of all")
    for s in speedups:
        ms = (s.row.summary.mean_ms, s.row.summary.p99_ms, s.all.summary.mean_ms)
        lengths = (s.row.summary.seconds, s.all.summary.seconds)
        cells = [f"{value:.0f}" for value in ms] + [f"{s.gain:.2f}"] + [f"{value:.0f}" for value in lengths]
        table.add_row(s.row.setting.policy, points(s.row.setting.t), *cells)
    return table


def write_results(folder: Path, about: Mapping[str, Any], rows: Sequence[Row], gains: Sequence[Gain]) -> None:
    """Writes `runs.csv`, and `results.json` with everything."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {**about, "gains": [asdict(gain) for gain in gains], "runs": [asdict(row) for row in rows]}
    (folder / "results.json").write_text(json.dumps(_plain(results), indent=1) + "\n")
    with (folder / "runs.csv").open("w", newline="", encoding="utf-8") as stream:
        flat = [_flat(row) for row in rows]
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for line in flat for key in line)))
        writer.writeheader()
        writer.writerows(flat)


def points(t: float | None) -> str:
    """A range of floors in points of accuracy."""
    return _NOTHING if t is None else f"{t * 100:g}"


_COLUMNS = (
    *("items/s in time", "jobs missed", "items missed", "mean ms", "p99 ms"),
    *("expected accuracy", "measured", "below floor", "sets"),
)


def _cells(summary: Summary) -> tuple[str, ...]:
    measured = _number(summary.measured_accuracy, ".4f")
    if summary.standard_error > 0:
        measured += f" ± {1.96 * summary.standard_error:.4f}"
    return (
        f"{summary.items_per_s:.1f}",
        _number(summary.job_miss_ratio, ".1%"),
        _number(summary.item_miss_ratio, ".1%"),
        _number(summary.mean_ms, ".0f"),
        _number(summary.p99_ms, ".0f"),
        _number(summary.expected_accuracy, ".4f"),
        measured,
        str(summary.below_floor),
        ", ".join(f"{name} {share:.0%}" for name, share in summary.shares.items()),
    )


def _number(value: float, how: str) -> str:
    return _NOTHING if math.isnan(value) else format(value, how)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        justify: JustifyMethod = "left" if column in ("policy", "misses of", "sets") else "right"
        # Words under each other: what stands below them is narrow.
        table.add_column(column if justify == "left" else column.replace(" ", "\n"), justify=justify)
    return table


def _flat(row: Row) -> dict[str, Any]:
    summary = asdict(row.summary)
    nested = {f"share {name}": value for name, value in summary.pop("shares").items()}
    nested |= {f"jobs {name}": value for name, value in summary.pop("endings").items()}
    return {**asdict(row.setting), "rate": row.rate, "late_ok": row.late_ok, **summary, **nested}


def _plain(value: Any) -> Any:
    """As JSON has it, which knows no NaN."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
