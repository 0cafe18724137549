"""Sends labelled items to running services and summarises the answers."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mosel.client import Client, Prediction
from mosel.data.samples import Samples
from mosel.errors import DeadlineExceeded, MoselError, Overloaded, Unreachable


@dataclass(frozen=True)
class Setting:
    """How jobs are sent.

    Attributes:
        floor: the least expected accuracy, 0..1, or None.
        job_items: items per job; the last job may be smaller.
        in_flight: jobs under way at once.
        deadline_ms: milliseconds that each job is given, or None.
        modalities: only these may be run; all if empty.
    """

    floor: float | None
    job_items: int
    in_flight: int
    deadline_ms: float | None = None
    modalities: tuple[str, ...] = ()


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
        p50_ms, p99_ms: of the answered jobs.
        in_time, refused, missed: jobs, which add up to all; refused means at once and with a reason, missed means that
            the deadline passed first, at the services or by the client's own clock.
        bytes_read: of payloads, by all encoders.
        bytes_of_all: what all modalities of the answered items have.
        refusal: the first refusal's message, or "".
    """

    setting: Setting
    shares: dict[str, float]
    accuracy: float
    expected: float
    p50_ms: float
    p99_ms: float
    in_time: int
    refused: int
    missed: int
    items: int
    bytes_read: int
    bytes_of_all: int
    refusal: str

    @property
    def saved(self) -> float:
        """The share of the answered items' payload bytes that no encoder read; NaN if nothing was answered."""
        return 1 - self.bytes_read / self.bytes_of_all if self.bytes_of_all else float("nan")


def measure(client: Client, model: str, samples: Samples, setting: Setting) -> Row:
    """Sends all samples once, cut into jobs, and summarises what came back.

    Raises:
        MoselError: the services failed in a way that the setting does not explain.
    """
    jobs = [
        samples.take(slice(start, start + setting.job_items)) for start in range(0, len(samples), setting.job_items)
    ]
    before = payload_bytes_read(client)
    with ThreadPoolExecutor(setting.in_flight) as pool:
        answers = list(pool.map(lambda job: _ask(client, model, job, setting), jobs))
    bytes_per_item = sum(payload[:1].nbytes for payload in samples.payloads.values())
    return summarise(setting, answers, payload_bytes_read(client) - before, bytes_per_item)


def payload_bytes_read(client: Client) -> int:
    """Bytes of payload that all encoders have read since they started."""
    return sum(service.counters.get("payload_bytes_read", 0) for service in client.status())


def summarise(setting: Setting, answers: Sequence[JobAnswer], bytes_read: int, bytes_per_item: int) -> Row:
    """One row from the answers of a setting; `bytes_per_item` is what all modalities of an item have."""
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
        p50_ms=percentile(times, 50),
        p99_ms=percentile(times, 99),
        in_time=in_time,
        refused=len(refusals),
        missed=len(answers) - len(refusals) - in_time,
        items=items,
        bytes_read=bytes_read,
        bytes_of_all=items * bytes_per_item,
        refusal=refusals[0] if refusals else "",
    )


def percentile(times_ms: Sequence[float], q: float) -> float:
    """The smallest measured time that at least q % of them do not exceed; NaN for none."""
    return float(np.percentile(times_ms, q, method="inverted_cdf")) if times_ms else float("nan")


def _ask(client: Client, model: str, job: Samples, setting: Setting) -> JobAnswer:
    start = time.perf_counter()
    try:
        prediction = client.predict(
            model,
            job.payloads,
            min_accuracy=setting.floor,
            latency_slo_ms=setting.deadline_ms,
            modalities=setting.modalities,
        )
    except (Unreachable, DeadlineExceeded, Overloaded) as error:
        return JobAnswer(len(job), 0, (time.perf_counter() - start) * 1000, None, error)
    elapsed_ms = (time.perf_counter() - start) * 1000
    right = int((prediction.output.reshape(len(job), -1).argmax(axis=1) == job.labels).sum())
    return JobAnswer(len(job), right, elapsed_ms, prediction)
