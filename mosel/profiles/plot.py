"""A profile as a picture: accuracy against time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mosel.profiles.files import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SET, _MIX = "#2f6690", "#d1495b"


def write_plot(
    file: Path, profile: Profile, size: int, costs: Mapping[str, float], frontier: Sequence[tuple[float, float]]
) -> None:
    """Writes a PNG: a dot per modality set with its 95 % interval, and the frontier of all strategies.

    Args:
        file: where to; missing folders are made.
        profile: the model's.
        size: items of the jobs that are shown.
        costs: milliseconds of compute time of such a job, by modality set.
        frontier: (milliseconds, accuracy) of each strategy for that size, cheapest first.
    """
    # The figure without pyplot: no window system is looked for, no global state is left.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    items = "1 item" if size == 1 else f"{size} items"
    title = f"{profile.model}: accuracy against time, jobs of {items}"
    axes.set(xlabel="compute time of all services together, milliseconds", ylabel="accuracy", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    label = "frontier: strategies that mix modality sets"
    axes.plot(*zip(*frontier, strict=True), color=_MIX, marker=".", lw=1, alpha=0.7, label=label)
    _draw_sets(axes, profile, costs)
    axes.set_xlim(left=0)
    axes.margins(x=0.12, y=0.08)
    axes.legend(loc="lower right", fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _draw_sets(axes: "Axes", profile: Profile, costs: Mapping[str, float]) -> None:
    known = [profile.accuracy[name] for name in costs]
    values = [accuracy.value for accuracy in known]
    around = [[a.value - a.low for a in known], [a.high - a.value for a in known]]
    label = "one modality set for all items, and its 95 % interval"
    axes.errorbar(list(costs.values()), values, yerr=around, fmt="o", color=_SET, elinewidth=1, capsize=2, label=label)
    for (name, ms), value in zip(costs.items(), values, strict=True):
        axes.annotate(name, (ms, value), (5, 4), textcoords="offset points", fontsize=8, color=_SET)
