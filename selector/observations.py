"""The models that administrators observe: which answered jobs become samples, and what is told of them.

Samples hold the slots of their embeddings by themselves: their jobs are over as soon as they are answered. At most one
call is under way for all samples together. None begins while a job waits for what it takes, unless samples have had
less than their least share of the compute: where callers never leave any, nothing would be observed otherwise.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator

from mosel.errors import InvalidRequest, MoselError, ServiceUnavailable, Unreachable
from mosel.modality import format_set
from mosel.packages.model_package import name_of
from mosel.runtime.background import Background
from mosel.v1 import fusion_pb2, gateway_pb2
from selector.core.jobs import FuseCall
from selector.core.ledger import Ledger
from selector.core.observation import Observation, Piece, Sample
from selector.core.scheduler import Scheduler
from selector.events import Event, SampleFused, TimePassed
from selector.in_flight import JobInFlight, SampleInFlight, SlotKey, fuse_request
from selector.services.compute_services import ComputeServices

# How often whoever observes a model is told what there is; and how many answers may wait for that.
_TELL_S, _MOST_UNTOLD = 0.25, 100_000
# Of what the networks compute for jobs.
_LEAST_SHARE = 0.05

log = logging.getLogger(__name__)


class ObservedModel:
    """A model while somebody observes it.

    Args:
        model: `name@revision`.
        observation: of it.

    Attributes:
        model, observation: as given.
        in_flight: the slots of each sample that is not complete.
        counts: `jobs`, `items` and `others` as of ObserveEvent, items `observed` and told, microseconds computed.
    """

    def __init__(self, model: str, observation: Observation) -> None:
        self.model, self.observation = model, observation
        self.in_flight: dict[Sample, SampleInFlight] = {}
        self.counts: Counter[str] = Counter()
        self._began = time.monotonic()
        self._complete: list[Sample] = []
        self._ended = asyncio.Event()
        self._error: MoselError | None = None

    def end(self, error: MoselError) -> None:
        """It cannot go on."""
        self._error = error
        self._ended.set()

    def complete(self, sample: Sample) -> None:
        """All answers of a sample are there."""
        self._complete.append(sample)

    @property
    def is_behind(self) -> bool:
        """Whether its samples have had less than their least share."""
        return self.counts["observing_us"] < _LEAST_SHARE * self.counts["compute_us"]

    @property
    def is_read(self) -> bool:
        """Whether whoever observes it reads what it is told."""
        return sum(sample.answers.size for sample in self._complete) < _MOST_UNTOLD

    async def wait(self) -> None:
        """Waits until it is time to tell more.

        Raises:
            MoselError: it cannot go on.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TELL_S):
                await self._ended.wait()
        if self._error is not None:
            raise self._error

    def event(self) -> gateway_pb2.ObserveEvent:
        """What was observed since it was asked last."""
        complete, self._complete = self._complete, []
        event = gateway_pb2.ObserveEvent(
            revision=self.model.partition("@")[2],
            modality_sets=map(format_set, self.observation.sets),
            seconds=time.monotonic() - self._began,
            jobs=self.counts["jobs"],
            items=self.counts["items"],
            others=self.counts["others"],
            compute_ms=self.counts["compute_us"] / 1000,
            observing_ms=self.counts["observing_us"] / 1000,
        )
        for sample in complete:
            self.counts["observed"] += len(sample.items)
            answers, confidences = sample.answers.ravel().tolist(), sample.confidences.ravel().tolist()
            event.observed.add(job=sample.number, size=sample.size, answers=answers, confidences=confidences)
        return event


class Observations:
    """Those under way.

    Args:
        scheduler: has jobs of observed models run everything, and says when there is time for a sample.
        services: those that compute.
        ledger: samples hold slots in it.
        work: where calls run.
        handle: takes events.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        services: ComputeServices,
        ledger: Ledger[SlotKey],
        work: Background,
        handle: Callable[[Event], None],
    ) -> None:
        self._scheduler, self._services, self._ledger = scheduler, services, ledger
        self._work, self._handle = work, handle
        self._models: dict[str, ObservedModel] = {}
        self._calling = False

    @contextlib.contextmanager
    def of(self, model: str, share: float) -> Iterator[ObservedModel]:
        """Observes a model inside the block.

        Args:
            model: `name@revision`; jobs may name it.
            share: of the items, 0..1; 0: all.

        Raises:
            InvalidRequest: the share is none.
            ServiceUnavailable: latencies of the model are not known yet.
            Unreachable: somebody observes it already.
        """
        if not 0 <= share <= 1:
            raise InvalidRequest(f"share is {share:g}; expected more than 0 and at most 1, or 0 for all items")
        if model in self._models:
            raise Unreachable(f"model '{name_of(model)}' is observed already; expected one who observes it at a time")
        profile = self._scheduler.profile_of(model)
        if not all(map(profile.is_measured, profile.accuracy)):
            raise ServiceUnavailable(f"service selector still loads and measures model '{name_of(model)}'")
        observation = Observation(profile, share or 1.0, secrets.token_bytes(16))
        observed = self._models[model] = ObservedModel(model, observation)
        profile.observed = True
        log.info("observing", extra={"model": model})
        try:
            yield observed
        finally:
            profile.observed = False
            del self._models[model]
            observation.samples.clear()
            self._close_gone(observed)
            # Slots may have become free.
            self._handle(TimePassed())
            log.info("observed", extra={"model": model, **observed.counts})

    def end_all(self, error: MoselError) -> None:
        """None can go on."""
        for observed in self._models.values():
            observed.end(error)

    def computed(self, model: str, microseconds: int) -> None:
        """A call for jobs of a model came back."""
        if observed := self._models.get(model):
            observed.counts["compute_us"] += microseconds

    def answered(self, job: JobInFlight) -> None:
        """All items of a job are done; some may become a sample."""
        asked = job.work.job
        if (observed := self._models.get(asked.model)) is None:
            return
        observed.counts.update(jobs=1, items=asked.size)
        # What was planned before the model was observed may have run as a path, which leaves no embeddings.
        everything = job.work.profile.modalities
        embedded = all(len(job.embeddings[modality]) == asked.size for modality in everything)
        if asked.exact or job.work.counts.keys() != {everything} or not embedded:
            observed.counts["others"] += asked.size
            return
        if observed.is_read and (sample := observed.observation.add(asked.id, asked.size, time.monotonic())):
            kept = SampleInFlight(asked.model, sample, job.embeddings)
            observed.in_flight[sample] = kept
            # Payloads are not needed any more; slots with embeddings belong to lanes.
            self._ledger.open(kept, [slot for slot in job.slots if isinstance(slot[0], str)])

    def advance(self, *, only_behind: bool = False) -> None:
        """Begins a call for a sample, if there is time.

        Args:
            only_behind: there may be something to do for jobs, which only samples that are behind may delay.
        """
        now = time.monotonic()
        for observed in self._models.values():
            observed.observation.expire(now)
            self._close_gone(observed)
            if not self._scheduler.serves(observed.model):
                name = name_of(observed.model)
                observed.end(Unreachable(f"model '{name}' was loaded anew or unloaded while it was observed"))
            elif self._calling or (only_behind and not observed.is_behind):
                continue
            elif found := observed.observation.next():
                self._begin(observed, *found, now)

    def fused(self, event: SampleFused) -> None:
        """A call for a sample is over."""
        self._calling = False
        sample, now = event.sample, time.monotonic()
        self._ledger.call_returned(sample)
        observed = self._models.get(sample.model)
        over = self._scheduler.failed if event.reply is None else self._scheduler.completed
        over(event.call, now)
        if observed is None or sample.sample not in observed.in_flight:
            return
        if event.reply is None:
            observed.observation.drop(sample.sample)
            return
        observed.counts["observing_us"] += event.reply.compute_us
        (answers,) = event.reply.answers
        if observed.observation.fused(sample.sample, event.piece, answers.labels, answers.confidences):
            observed.complete(sample.sample)

    def statistics(self) -> dict[str, int]:
        """Models that are observed, their samples that are not complete, and the items that were told."""
        models = self._models.values()
        return {
            "models_observed": len(models),
            "samples_held": sum(len(observed.in_flight) for observed in models),
            "items_observed": sum(observed.counts["observed"] for observed in models),
        }

    def _begin(self, observed: ObservedModel, sample: Sample, piece: Piece, now: float) -> None:
        call = self._scheduler.spare_call(observed.model, piece.modality_set, piece.rows, now)
        if call is not None:
            sample.waiting.popleft()
            self._calling = True
            kept = observed.in_flight[sample]
            self._ledger.call_started(kept)
            self._work.start(self._fuse(call, piece, kept, sample.ends - now))

    async def _fuse(self, call: FuseCall, piece: Piece, sample: SampleInFlight, timeout: float) -> None:
        found: fusion_pb2.FuseReply | None = None
        try:
            request = fuse_request(call, [sample])
            request.answers_only = True
            reply = await self._services.fusion.Fuse(request, timeout=timeout)
            answered = [(len(answers.labels), len(answers.confidences)) for answers in reply.answers]
            if answered != [(len(piece.rows.items),) * 2]:
                raise ValueError(f"fusion answered with {answered} answers; expected {len(piece.rows.items)}")
            found = reply
        except Exception as error:  # noqa: BLE001 (whatever it is, the call must leave its lane)
            log.info("not observed", extra={"model": call.model, "reason": repr(error)})
        self._handle(SampleFused(call, piece, sample, found))

    def _close_gone(self, observed: ObservedModel) -> None:
        """Lets go of the slots of samples that are complete or were given up."""
        for sample in observed.in_flight.keys() - set(observed.observation.samples):
            self._ledger.close(observed.in_flight.pop(sample))
