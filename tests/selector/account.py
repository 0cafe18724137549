"""Models for jobs of any kind, and one job as the services see it: what it may count on, and what became of it."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from bench.coverage import Population
from mosel.modality import FUSION, ModalitySet, parse_set
from selector.core.certificate import Certificates
from selector.core.frontier import Frontiers
from selector.core.jobs import Call, Job
from selector.core.work import Work
from tests.selector.support import THREE, profile_of

MODALITIES = ("audio", "image", "pen")
REPLICA = "audio/2"
LANES = (*MODALITIES, REPLICA, FUSION)
TWO = {"audio": 0.5, "pen": 0.7, "audio+pen": 0.65}
DEFAULT_FLOOR = 0.62
PROFILES = {
    "three": profile_of(THREE, {"audio": 8.0, "image": 3.0, "pen": ((1, 1.0), (8, 2.0))}, 0.5, DEFAULT_FLOOR),
    "two": profile_of(TWO, {"audio": 4.0, "pen": 1.0}),
    # Its floors are guaranteed, as far as they can be.
    "sure": profile_of(THREE, {"audio": 8.0, "image": 3.0, "pen": ((1, 1.0), (8, 2.0))}, 0.5, DEFAULT_FLOOR),
}
POPULATION = Population({parse_set(name): accuracy for name, accuracy in THREE.items()})
CERTIFICATES = Certificates(POPULATION.calibration(np.random.default_rng(0)), 0.95)
PROFILES["sure"].certificates = CERTIFICATES
# Computing them takes longer than a whole run, and they are the same in all.
FRONTIERS = {name: Frontiers(profile) for name, profile in PROFILES.items()}
MAX_QUEUED, TOKENS = 60, 2


def name_of(model: str) -> str:
    """The name of one of the revisions of a model, which all have the same profile."""
    return model.partition("@")[0]


def needed(job: Job) -> tuple[Mapping[ModalitySet, float], float]:
    """What an item of each set counts for, and what the items of a job need on average."""
    accuracy = PROFILES[name_of(job.model)].accuracy
    if name_of(job.model) != "sure" or not job.has_floor:
        return accuracy, floor_of(job)
    of_loss = job.max_accuracy_loss is not None
    ladder = CERTIFICATES.of_loss(job.everything) if of_loss else CERTIFICATES.of_accuracy(job.everything)
    assert ladder is not None
    asked = job.min_accuracy if job.max_accuracy_loss is None else 1 - job.max_accuracy_loss
    least = ladder.least(asked or 0.0)
    return ladder.scores, ladder.scores[ladder.reference] if least is None else least


def undercut(job: Job, counts: Mapping[ModalitySet, int], drawn: float = math.inf) -> bool:
    """Whether items that run these sets are below the floor, or below the lower one that was drawn for the job."""
    scores, least = needed(job)
    if job.max_accuracy_loss is not None:
        least = min(least, drawn)
    return sum(scores[s] * count for s, count in counts.items()) / job.size < least - 1e-9


def floor_of(job: Job) -> float:
    """The accuracy that the caller may count on."""
    accuracy = PROFILES[name_of(job.model)].accuracy
    if job.min_accuracy is not None:
        return job.min_accuracy
    sent = accuracy[job.everything]
    return sent if name_of(job.model) == "two" else min(sent, DEFAULT_FLOOR)


class Account:
    """One job as the services see it: what was sent of it, what came back, and how it ended."""

    def __init__(self, job: Job, work: Work) -> None:
        self.job, self.work = job, work
        self.how_ended = ""
        self.retries_alone = False
        self.failed_once: set[int] = set()
        # Calls and items whose results no longer count: the item began again meanwhile.
        self.void: set[tuple[int, int]] = set()
        self.begun_again = 0
        self.sent: Counter[tuple[str, int]] = Counter()
        self.encoded: dict[int, set[str]] = {item: set() for item in range(job.size)}
        self.in_fusion: set[int] = set()
        self.answered_with: dict[int, ModalitySet] = {}

    def end(self, how: str) -> None:
        assert not self.how_ended, f"ended as {self.how_ended}, then as {how}"
        self.how_ended = how

    def encode_sent(self, modality: str, items: tuple[int, ...]) -> None:
        assert modality in self.job.modalities
        self.sent.update((modality, item) for item in items)
        assert max(self.sent.values()) == 1, "a row was sent twice"

    def path_sent(self, modality_set: ModalitySet, items: tuple[int, ...]) -> None:
        for modality in modality_set:
            self.encode_sent(modality, items)
        for item in items:
            assert not self.encoded[item], "what was encoded already is encoded again"
            self.encoded[item] = set(modality_set)
        self.fuse_sent(modality_set, items)

    def fuse_sent(self, modality_set: ModalitySet, items: tuple[int, ...]) -> None:
        for item in items:
            assert self.encoded[item] == modality_set, "fused is exactly what was encoded"
            assert item not in self.in_fusion | self.answered_with.keys(), "an item was fused twice"
        self.in_fusion.update(items)

    def fused(self, modality_set: ModalitySet, items: tuple[int, ...]) -> None:
        self.in_fusion.difference_update(items)
        self.answered_with.update(dict.fromkeys(items, modality_set))

    def begin_again(self, items: Iterable[int], under_way: Iterable[Call]) -> None:
        self.begun_again += 1
        for item in items:
            self.encoded[item] = set()
            self.in_fusion.discard(item)
            for modality in MODALITIES:
                del self.sent[modality, item]
        self.void.update((call.id, item) for call in under_way for item in items)

    def wanted(self, call: Call, items: Iterable[int]) -> tuple[int, ...]:
        return tuple(item for item in items if (call.id, item) not in self.void)

    def answered(self) -> None:
        self.end("answered")
        assert self.answered_with.keys() == set(range(self.job.size)), "each item is answered once"
        counts = Counter(self.answered_with.values())
        assert not undercut(self.job, counts, self.work.floor.least), "the floor was undercut"
        assert not self.job.exact or set(self.answered_with.values()) == {self.job.everything}
        in_vain = set(+self.sent) - {(m, item) for item, s in self.answered_with.items() for m in s}
        assert not in_vain
