"""What the accuracy of an answer stands on, and where a model is weak."""

import math
from dataclasses import dataclass
from typing import Literal, cast

from mosel.v1 import gateway_pb2

Guarantee = Literal["calibrated", "live", "none", "estimate"]
FloorSource = Literal["caller", "tenant", "settings", "model"]
# Digits behind the point that bounds are given with.
_DIGITS = 3


@dataclass(frozen=True)
class Assurance:
    """What can be said of the accuracy of an answer, and what it saved; `str()` says the first in a sentence.

    Attributes:
        guarantee: `calibrated`: tested on calibration rows; `live`: bounded by what was seen while serving; `none`: the
            floor cannot be guaranteed, and everything was run; `estimate`: expected only.
        guaranteed_accuracy: items that are served so are right at least so often, 0..1.
        guaranteed_loss: they are wrong at most so much more often than if everything that was sent were run, 0..1.
        confidence: with which that is guaranteed, 0..1; 0 where nothing is.
        saved: share of the compute time of everything that was sent, 0..1; 0 while nothing is measured.
        floor_source: whose floor counted; None: there was none.
        note: what else there is to say, such as the best floor that can be guaranteed; mostly empty.
    """

    guarantee: Guarantee = "estimate"
    guaranteed_accuracy: float | None = None
    guaranteed_loss: float | None = None
    confidence: float = 0.0
    saved: float = 0.0
    floor_source: FloorSource | None = None
    note: str = ""

    def __str__(self) -> str:
        guaranteed = "the floor is not guaranteed, only" if self.guarantee == "none" else "guaranteed"
        if self.guaranteed_accuracy is not None:
            return f"{guaranteed} at least {rounded_down(self.guaranteed_accuracy)} ({100 * self.confidence:g} %)"
        if self.guaranteed_loss is not None:
            loss = rounded_up(self.guaranteed_loss)
            return f"{guaranteed} at most {loss} worse than everything ({100 * self.confidence:g} %)"
        return "expected, not guaranteed"


@dataclass(frozen=True)
class Weakness:
    """A part of the calibration rows, such as `person 7` or `label 3`, how many rows it has, and the accuracy there."""

    name: str
    accuracy: float
    samples: int


def rounded_down(bound: float) -> str:
    """A lower bound as text, which is never more than it."""
    # A little more, for bounds that are such numbers themselves.
    return f"{math.floor(bound * 10**_DIGITS + 1e-6) / 10**_DIGITS:.{_DIGITS}f}"


def rounded_up(bound: float) -> str:
    """An upper bound as text, which is never less than it."""
    return f"{math.ceil(bound * 10**_DIGITS - 1e-6) / 10**_DIGITS:.{_DIGITS}f}"


def assurance_from(message: gateway_pb2.Assurance) -> Assurance:
    """The assurance behind a message; one that says nothing guarantees nothing."""
    source = gateway_pb2.FloorSource.Name(message.floor_source).lower() if message.floor_source else None
    guarantee = gateway_pb2.Guarantee.Name(message.guarantee or gateway_pb2.ESTIMATE).lower()
    return Assurance(
        # Both are the names of the protocol.
        guarantee=cast(Guarantee, guarantee),
        guaranteed_accuracy=message.guaranteed_accuracy if message.HasField("guaranteed_accuracy") else None,
        guaranteed_loss=message.guaranteed_loss if message.HasField("guaranteed_loss") else None,
        confidence=message.confidence,
        saved=message.saved,
        floor_source=cast(FloorSource | None, source),
        note=message.note,
    )


def weakness_from(message: gateway_pb2.Weakness) -> Weakness:
    """The weakness behind a message."""
    return Weakness(message.name, message.accuracy, message.samples)
