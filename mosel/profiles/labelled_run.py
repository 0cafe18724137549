"""Sends labelled items to running services and summarises the answers."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from mosel.client import Assurance, Client, Prediction
from mosel.client.assurance import Guarantee
from mosel.data.samples import Samples
from mosel.errors import DeadlineExceeded, MoselError, Overloaded, Unreachable

_WEAKEST_FIRST: tuple[Guarantee, ...] = ("estimate", "none", "live", "calibrated")
# A measured accuracy is clearly below what is guaranteed if it is so many standard errors below.
_CLEAR_ERRORS = 2


@dataclass(frozen=True)
class Setting:
    """How jobs are sent.

    Attributes:
        floor: the least accuracy, 0..1, or None.
        job_items: items per job; the last job may be smaller.
        in_flight: jobs under way at once.
        deadline_ms: milliseconds that each job is given, or None.
        modalities: only these may be run; all if empty.
        max_loss: how much less accurate than everything answers may be, 0..1, or None; instead of a floor.
    """

    floor: float | None
    job_items: int
    in_flight: int
    deadline_ms: float | None = None
    modalities: tuple[str, ...] = ()
    max_loss: float | None = None


@dataclass(frozen=True)
class JobAnswer:
    """What became of one job: a prediction, or the error that it was answered with.

    Attributes:
        items: of the job.
        right: items whose largest output is that of their label.
        ms: milliseconds from the call to the answer, as the client saw it.
    """

    items: int
    right: int
    ms: float
    prediction: Prediction | None
    error: MoselError | None = None


@dataclass(frozen=True)
class Row:
    """One setting, measured.

    Attributes:
        shares: answered items by modality set, as a share 0..1, the most frequent first.
        accuracy: measured against the labels, over the answered items; NaN if there are none.
        expected: accuracy that the answers promised, over the same items.
        assurance: what the answer that guarantees least stands on, and what all saved together.
        p50_ms, p99_ms: of the answered jobs.
        in_time, refused, missed: jobs, which add up to all; refused means at once and with a reason, missed means that
            the deadline passed first, at the services or by the client's own clock.
        refusal: the first refusal's message, or "".
    """

    setting: Setting
    shares: dict[str, float]
    accuracy: float
    expected: float
    assurance: Assurance
    p50_ms: float
    p99_ms: float
    in_time: int
    refused: int
    missed: int
    items: int
    refusal: str

    @property
    def standard_error(self) -> float:
        """Of the measured accuracy, as if items were independent (binomial); NaN if there are none."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.items) if self.items else math.nan

    def misses(self, everything: float) -> bool:
        """Whether the measured accuracy is more than two standard errors below what is guaranteed.

        Args:
            everything: accuracy of everything on the same items, 0..1: what a loss is counted against.
        """
        said, most = self.assurance, self.accuracy + _CLEAR_ERRORS * self.standard_error
        if said.guaranteed_accuracy is not None:
            return most < said.guaranteed_accuracy
        return said.guaranteed_loss is not None and most < everything - said.guaranteed_loss


def measure(client: Client, model: str, samples: Samples, setting: Setting) -> Row:
    """Sends all samples once, cut into jobs, and summarises what came back.

    Raises:
        MoselError: the services failed in a way that the setting does not explain.
    """
    jobs = [
        samples.take(slice(start, start + setting.job_items)) for start in range(0, len(samples), setting.job_items)
    ]
    with ThreadPoolExecutor(setting.in_flight) as pool:
        return summarise(setting, list(pool.map(lambda job: _ask(client, model, job, setting), jobs)))


def summarise(setting: Setting, answers: Sequence[JobAnswer]) -> Row:
    """One row from the answers of a setting."""
    answered = [(answer, answer.prediction) for answer in answers if answer.prediction is not None]
    items = sum(answer.items for answer, _ in answered)
    used = Counter(name for _, prediction in answered for name in prediction.modality_sets)
    expected = sum(answer.items * prediction.expected_accuracy for answer, prediction in answered)
    times = [answer.ms for answer, _ in answered]
    limit_ms = math.inf if setting.deadline_ms is None else setting.deadline_ms
    in_time = sum(ms <= limit_ms for ms in times)
    refusals = [str(a.error) for a in answers if a.error is not None and not isinstance(a.error, DeadlineExceeded)]
    return Row(
        setting=setting,
        shares={name: count / items for name, count in used.most_common()},
        accuracy=sum(answer.right for answer, _ in answered) / items if items else float("nan"),
        expected=expected / items if items else float("nan"),
        assurance=_together([(answer.items, prediction.assurance) for answer, prediction in answered]),
        p50_ms=percentile(times, 50),
        p99_ms=percentile(times, 99),
        in_time=in_time,
        refused=len(refusals),
        missed=len(answers) - len(refusals) - in_time,
        items=items,
        refusal=refusals[0] if refusals else "",
    )


def percentile(times_ms: Sequence[float], q: float) -> float:
    """The smallest measured time that at least q % of them do not exceed; NaN for none."""
    return float(np.percentile(times_ms, q, method="inverted_cdf")) if times_ms else float("nan")


def _together(said: Sequence[tuple[int, Assurance]]) -> Assurance:
    """The weakest of what is said of so many items each, with the mean of what they saved."""
    if not said:
        return Assurance()
    weakest = min((assurance for _, assurance in said), key=_strength)
    saved = sum(items * assurance.saved for items, assurance in said) / sum(items for items, _ in said)
    return replace(weakest, saved=saved)


def _strength(said: Assurance) -> tuple[int, float, float]:
    return _WEAKEST_FIRST.index(said.guarantee), said.guaranteed_accuracy or 0.0, -(said.guaranteed_loss or 0.0)


def _ask(client: Client, model: str, job: Samples, setting: Setting) -> JobAnswer:
    start = time.perf_counter()
    try:
        prediction = client.predict(
            model,
            job.payloads,
            min_accuracy=setting.floor,
            max_accuracy_loss=setting.max_loss,
            latency_slo_ms=setting.deadline_ms,
            modalities=setting.modalities,
        )
    except (Unreachable, DeadlineExceeded, Overloaded) as error:
        return JobAnswer(len(job), 0, (time.perf_counter() - start) * 1000, None, error)
    elapsed_ms = (time.perf_counter() - start) * 1000
    right = int((prediction.output.reshape(len(job), -1).argmax(axis=1) == job.labels).sum())
    return JobAnswer(len(job), right, elapsed_ms, prediction)
