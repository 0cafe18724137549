"""What giving up at most so much accuracy would save, by calibration rows; and how many rows it takes to know."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mosel.cli.losses import LOSSES, least_score, loss_ladder, tiled

if TYPE_CHECKING:
    from mosel.packages.calibration import Calibration
    from selector.core.certificate import Ladder
    from selector.core.profile import ModelProfile

# Rows that are like those that are there, up to so many times as many, are tried.
_MOST_TIMES = 64
_JOB_ITEMS = 64


@dataclass(frozen=True)
class Saving:
    """What a loss allows.

    Attributes:
        loss: the most accuracy that is lost against running everything, 0..1.
        used: what the mix of sets that is guaranteed not to lose more loses on design rows, as a share of `loss`; 1
            where that may be any mix.
        saved: the share of the compute of everything that it saves, 0..1; None if costs are not known.
        most_saved: the same with an unlimited number of rows.
        rows_for_half: about how many rows it takes, if others are like these, to use half of the loss; None if more
            than can be tried.
    """

    loss: float
    used: float
    saved: float | None
    most_saved: float | None
    rows_for_half: int | None


def savings(calibration: "Calibration", profile: "ModelProfile | None") -> list[Saving]:
    """What each of `LOSSES` allows; empty where no row certifies.

    Args:
        calibration: rows, labelled or not.
        profile: the model's, with what its calls cost.
    """
    ladder = loss_ladder(calibration)
    if ladder is None:
        return []
    found, times = dict[float, int](), 1
    while len(found) < len(LOSSES) and times <= _MOST_TIMES:
        larger = ladder if times == 1 else loss_ladder(tiled(calibration, times))
        found |= {e: times for e in LOSSES if larger and e not in found and _used(larger, e) >= 0.5}
        times *= 2
    return [
        Saving(
            loss=loss,
            used=_used(ladder, loss),
            saved=_saved(profile, ladder, least_score(ladder, loss)),
            most_saved=_saved(profile, ladder, 1 - loss),
            rows_for_half=len(calibration.labels) * found[loss] if loss in found else None,
        )
        for loss in LOSSES
    ]


def _used(ladder: "Ladder", loss: float) -> float:
    """As a share of the loss, or all of it if every set may be run."""
    least = least_score(ladder, loss)
    return 1.0 if least <= min(ladder.scores.values()) + 1e-9 else min((1 - least) / loss, 1.0)


def _saved(profile: "ModelProfile | None", ladder: "Ladder", least: float) -> float | None:
    """What the cheapest mix of a job that scores so much saves."""
    from selector.core.frontier import frontier

    if profile is None:
        return None
    cheapest = frontier(profile, ladder.scores, _JOB_ITEMS, ladder.scores).thin(1, least - 1e-9)
    return profile.saved(dict(cheapest[0].counts), max(ladder.scores, key=len)) if cheapest else 0.0
