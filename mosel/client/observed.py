"""What is told of a model while it is observed: dataclasses, and how they are made of messages."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mosel.v1 import gateway_pb2


@dataclass(frozen=True, eq=False)
class ObservedItems:
    """Items of one job, as every modality set answers them.

    Attributes:
        job: counts the jobs that were observed.
        size: items of the job, those that are not observed included.
        answers: int32 [items, sets], the index of the largest output.
        confidences: float32 [items, sets], that output.
    """

    job: int
    size: int
    answers: NDArray[np.int32]
    confidences: NDArray[np.float32]


@dataclass(frozen=True)
class ObserveEvent:
    """What was observed since the event before, and counts since the start.

    Attributes:
        revision: of the files that the model was loaded from.
        modality_sets: the columns of what was observed, such as `audio+image`.
        observed: since the event before.
        seconds: since the start.
        jobs, items: answered since then.
        others: those of the items that cannot be observed: their jobs fixed their modalities, sent less than the model
            has, or had no time for everything.
        compute_ms: what the networks computed for callers.
        observing_ms: what they computed besides, for what was observed.
    """

    revision: str
    modality_sets: tuple[str, ...]
    observed: tuple[ObservedItems, ...]
    seconds: float
    jobs: int
    items: int
    others: int
    compute_ms: float
    observing_ms: float


def observed_from(message: gateway_pb2.ObserveEvent) -> ObserveEvent:
    """What a message of Observe says."""
    sets = len(message.modality_sets)
    return ObserveEvent(
        revision=message.revision,
        modality_sets=tuple(message.modality_sets),
        observed=tuple(
            ObservedItems(
                job=items.job,
                size=items.size,
                answers=np.array(items.answers, np.int32).reshape(-1, sets),
                confidences=np.array(items.confidences, np.float32).reshape(-1, sets),
            )
            for items in message.observed
        ),
        seconds=message.seconds,
        jobs=message.jobs,
        items=message.items,
        others=message.others,
        compute_ms=message.compute_ms,
        observing_ms=message.observing_ms,
    )
