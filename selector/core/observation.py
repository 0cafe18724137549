"""What is observed of a model while it serves: some items of answered jobs, fused at every modality set.

Nobody waits for any of it, so it is bounded and may be given up at any time. Which items are observed, a keyed hash of
the job's id says, never what is in them.
"""

import hashlib
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mosel.modality import ModalitySet, format_set
from selector.core.jobs import Rows
from selector.core.profile import ModelProfile

# Jobs whose embeddings are kept at the same time, and for how long after their answer.
_MOST_JOBS, _KEPT_S = 4, 2.0


@dataclass(frozen=True)
class Piece:
    """Items of a sample to be fused in one call: those of its `items` from `start` on, as the rows say."""

    modality_set: ModalitySet
    start: int
    rows: Rows


@dataclass(eq=False)
class Sample:
    """Items of an answered job.

    Attributes:
        number: counts samples.
        size: items of the job.
        items: their indices in the job, rising.
        ends: seconds on the driver's clock at which it is given up.
        answers: int32 [items, sets], the index of the largest output.
        confidences: float32 [items, sets], that output.
        waiting: what is to be fused.
        missing: answers that are not there yet.
    """

    number: int
    size: int
    items: tuple[int, ...]
    ends: float
    answers: NDArray[np.int32]
    confidences: NDArray[np.float32]
    waiting: deque[Piece] = field(default_factory=deque)
    missing: int = 0


class Observation:
    """One model that is observed.

    Args:
        profile: of the model, with every latency known.
        share: of the items, 0..1.
        key: of the hash; another one draws other items.

    Attributes:
        sets: every modality set, in the order of columns.
        samples: those that are neither complete nor given up, the oldest first.
    """

    def __init__(self, profile: ModelProfile, share: float, key: bytes) -> None:
        self._profile, self._share, self._key = profile, share, key
        self.sets: Sequence[ModalitySet] = sorted(profile.accuracy, key=format_set)
        self.samples: list[Sample] = []
        self._number = 0

    def drawn(self, job_id: bytes, size: int) -> tuple[int, ...]:
        """The items of a job that are to be observed; each has the same chance, whatever the size of its job."""
        digest = hashlib.blake2b(job_id, key=self._key, digest_size=16).digest()
        count = int(self._share * size + int.from_bytes(digest[:8], "big") / 2**64)
        generator = random.Random(digest)  # noqa: S311 (fair, not secret: the key is)
        return tuple(sorted(generator.sample(range(size), min(count, size))))

    def add(self, job_id: bytes, size: int, now: float) -> Sample | None:
        """Begins with items of a job that was just answered; None if none is drawn, or enough others are kept."""
        items = self.drawn(job_id, size)
        if not items or len(self.samples) >= _MOST_JOBS:
            return None
        self._number += 1
        shape = len(items), len(self.sets)
        answers, confidences = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        sample = Sample(self._number, size, items, now + _KEPT_S, answers, confidences, missing=answers.size)
        name = f"observed {self._number}".encode()
        for modality_set in self.sets:
            most = self._profile.fusion[modality_set].best_batch
            for start in range(0, len(items), most):
                sample.waiting.append(Piece(modality_set, start, Rows(name, items[start : start + most])))
        self.samples.append(sample)
        return sample

    def next(self) -> tuple[Sample, Piece] | None:
        """The next piece that waits, and its sample; whoever fuses it takes it away."""
        return next(((sample, sample.waiting[0]) for sample in self.samples if sample.waiting), None)

    def expire(self, now: float) -> None:
        """Gives up those that have been kept too long."""
        self.samples = [sample for sample in self.samples if now < sample.ends]

    def drop(self, sample: Sample) -> None:
        """Gives up a sample."""
        self.samples.remove(sample)

    def fused(self, sample: Sample, piece: Piece, labels: Iterable[int], confidences: Iterable[float]) -> bool:
        """Takes the answers to a piece of one of the samples; whether the sample is complete by that."""
        rows, column = slice(piece.start, piece.start + len(piece.rows.items)), self.sets.index(piece.modality_set)
        sample.answers[rows, column] = list(labels)
        sample.confidences[rows, column] = list(confidences)
        sample.missing -= len(piece.rows.items)
        if not sample.missing:
            self.samples.remove(sample)
        return not sample.missing
