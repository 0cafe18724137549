"""What rows guarantee of losing at most so much accuracy; and what more rows like them would."""

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mosel.packages.calibration import Calibration
    from selector.core.certificate import Ladder

LOSSES = (0.01, 0.02, 0.03, 0.06)
CONFIDENCE = 0.95


def loss_ladder(rows: "Calibration") -> "Ladder | None":
    """The levels of loss against the reference set of all modalities; None where too few rows certify."""
    from selector.conversions import certificates

    known = certificates(rows, CONFIDENCE)
    return None if known is None else known.of_loss(max(rows.sets, key=len))


def least_score(ladder: "Ladder", loss: float) -> float:
    """The mean score that guarantees a loss; that of the reference set where no other does."""
    least = ladder.least(1 - loss)
    return ladder.scores[ladder.reference] if least is None else least


def tiled(rows: "Calibration", times: int) -> "Calibration":
    """So many times the rows, each time of other groups."""
    import numpy as np

    groups = rows.groups
    apart = np.repeat(np.arange(times, dtype=np.int32), len(groups))[:, None] * (groups.max(initial=0) + 1)
    return replace(
        rows,
        answers=np.tile(rows.answers, (times, 1)),
        confidence=np.tile(rows.confidence, (times, 1)),
        labels=np.tile(rows.labels, times),
        groups=(np.tile(groups, (times, 1)) + apart).astype(np.int32),
        certify=np.tile(rows.certify, times),
    )
