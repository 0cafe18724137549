"""The runs as a picture: misses, throughput and completion times by load."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.policies.runs import Row
from bench.policies.tables import points

_COLOURS = {"all": "#888888", "aggressive": "#cc4455", "greedy": "#e09f3e", "mosel": "#2f6690"}
_PANELS: dict[str, Callable[[Row], float]] = {
    "jobs missed": lambda row: row.summary.job_miss_ratio,
    "items answered in time per second": lambda row: row.summary.items_per_s,
    "mean completion time (ms)": lambda row: row.summary.mean_ms,
}


def write_plot(file: Path, rows: Sequence[Row], title: str) -> None:
    """Writes a PNG: a line of panels per slack; a curve per policy, darker for wider floors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    slacks = sorted({row.setting.slack for row in rows})
    figure = Figure(figsize=(14, 4.2 * len(slacks)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.subplots(len(slacks), len(_PANELS), squeeze=False)
    for line, slack in zip(grid, slacks, strict=True):
        curves = _curves([row for row in rows if row.setting.slack == slack])
        for axes, (name, value) in zip(line, _PANELS.items(), strict=True):
            for (policy, t), curve in curves.items():
                label = policy if t is None else f"{policy}, t = {points(t)}"
                loads, shade = [row.setting.load for row in curve], 1.0 if t is None else 0.3 + 5 * t
                colour = _COLOURS.get(policy)
                axes.plot(loads, [value(row) for row in curve], "o-", label=label, color=colour, alpha=min(shade, 1.0))
            axes.set(xlabel="load (multiples of the capacity of all)", ylabel=name, title=f"slack {slack:g}")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        line[0].axhline(0.05, color="black", linewidth=0.8, linestyle=":")
        line[0].legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def _curves(rows: Sequence[Row]) -> dict[tuple[str, float | None], list[Row]]:
    curves: dict[tuple[str, float | None], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.setting.load):
        curves[row.setting.policy, row.setting.t].append(row)
    return curves
