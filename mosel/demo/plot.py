"""The demo's results as a picture: accuracy against time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mosel.client import ModelInfo, SetInfo
from mosel.demo.plan import expected, frontier
from mosel.demo.tables import floor
from mosel.profiles.labelled_run import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SET, _SETTING = "#2f6690", "#d1495b"
_LINE_POINTS = 10.0


def write_plot(file: Path, model: ModelInfo, rows: Sequence[Row]) -> None:
    """Writes a PNG: a dot per modality set, their frontier, and what was measured at each setting.

    Args:
        file: where to; missing folders are made.
        model: for the sets' expected accuracies and predicted milliseconds.
        rows: one per setting; those without an answer are left out.
    """
    # The figure without pyplot: no window system is looked for, no global state is left.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="milliseconds (log scale)", ylabel="accuracy", title=f"{model.name}: accuracy against time")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _draw_sets(axes, model.sets)
    _draw_settings(axes, model.sets, [row for row in rows if row.items])
    axes.margins(x=0.2, y=0.06)
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.36), fontsize=8, framealpha=1, edgecolor="white")
    figure.draw_without_rendering()  # label positions depend on the layout
    _label(axes, [(name, s.latency_ms, s.accuracy) for name, s in model.sets.items()], "black", right=False)
    _label(axes, [(floor(row), row.p50_ms, row.accuracy) for row in rows if row.items], _SETTING, right=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _draw_sets(axes: "Axes", sets: Mapping[str, SetInfo]) -> None:
    best = [sets[name] for name in frontier(sets, expected(sets))]
    axes.plot([s.latency_ms for s in best], [s.accuracy for s in best], color=_SET, alpha=0.4, label="frontier")
    label = "modality set: expected accuracy,\npredicted time of one item on an idle system"
    x, y = [s.latency_ms for s in sets.values()], [s.accuracy for s in sets.values()]
    axes.scatter(x, y, color=_SET, s=36, zorder=2, label=label)


def _draw_settings(axes: "Axes", sets: Mapping[str, SetInfo], rows: Sequence[Row]) -> None:
    label = "setting: accuracy on test items,\nmedian time of a job at the client"
    if rows:
        how = rows[0].setting
        label += f"\n({how.job_items} items per job, {how.in_flight} jobs in flight)"
    x, y = [row.p50_ms for row in rows], [row.accuracy for row in rows]
    axes.scatter(x, y, color=_SETTING, marker="*", s=130, zorder=3, label=label)
    for row in rows:
        used = sets[next(iter(row.shares))]
        axes.plot([used.latency_ms, row.p50_ms], [used.accuracy, row.accuracy], color=_SETTING, ls=":", lw=1, zorder=1)


def _label(axes: "Axes", points: Sequence[tuple[str, float, float]], color: str, right: bool) -> None:
    """Names points on their left or right, a line lower where a name would cover the one above."""
    points_per_pixel = 72 / axes.figure.dpi
    above: list[tuple[float, float]] = []
    for name, *place in sorted(points, key=lambda point: -point[2]):
        x, y = axes.transData.transform(place) * points_per_pixel
        close = [other for at, other in above if abs(at - x) < 6 * _LINE_POINTS]
        lowered = min([y, *(other - _LINE_POINTS for other in close)])
        above.append((x, lowered))
        offset, align = (9.0, "left") if right else (-7.0, "right")
        axes.annotate(
            name,
            (place[0], place[1]),
            (offset, lowered - y),
            textcoords="offset points",
            fontsize=8,
            ha=align,
            color=color,
        )
