"""What could be saved as a picture: the share of compute by the accuracy that may be lost."""

from collections.abc import Sequence
from pathlib import Path

_SAVED, _MOST = "#2f6690", "#d7dee5"


def write_savings_plot(file: Path, title: str, savings: Sequence[tuple[float, float, float]]) -> None:
    """Writes a PNG with a bar for each loss.

    Args:
        file: where to; missing folders are made.
        title: above it.
        savings: (loss, share of compute that is saved, and that could be with rows without end), all 0..1.
    """
    # The figure without pyplot: no window system is looked for, no global state is left.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [f"{100 * loss:g}" for loss, _, _ in savings]
    axes.set(xlabel="points of accuracy that may be lost, at most", ylabel="compute saved, percent", title=title)
    axes.bar(names, [100 * most for _, _, most in savings], color=_MOST, label="with more items like these")
    saved = axes.bar(names, [100 * saved for _, saved, _ in savings], color=_SAVED, label="guaranteed now (95 %)")
    axes.bar_label(saved, fmt="%.0f", padding=2)
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
