"""Measures models again, when the machine is quiet, that were measured while others used it."""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NoReturn

import grpc

from mosel.modality import FUSION
from mosel.profiles.files import BUSY_SHARE
from mosel.runtime.background import Background
from selector.core.profile import ModelProfile
from selector.core.scheduler import Scheduler
from selector.services.compute_services import ComputeServices
from selector.services.latency_measurement import Latencies
from selector.services.loaded_model import LoadedModel
from selector.services.model_loader import ModelLoader

log = logging.getLogger(__name__)


class _Disturbed(Exception):
    """A job came, or a model is loaded."""


class QuietMeasurement:
    """One loop for all models; a context manager.

    It is in nobody's way: no batch size is measured while a job is here or a model is loaded, and what one of these
    disturbed is measured once more.

    Args:
        models: those that are loaded.
        latencies: measures them.
        services: those that compute.
        scheduler: knows whether jobs are here, and is told of new latencies.
        pause: waits until it is time to look, for the first time or whether what disturbed is over.
    """

    def __init__(
        self,
        models: ModelLoader,
        latencies: Latencies,
        services: ComputeServices,
        scheduler: Scheduler,
        pause: Callable[[], Awaitable[object]],
    ) -> None:
        self._models, self._latencies, self._services = models, latencies, services
        self._scheduler, self._pause = scheduler, pause
        self._work = Background()

    async def __aenter__(self) -> "QuietMeasurement":
        self._work.forever(self._look_now_and_then, "measure again")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._work.close()

    async def _look_now_and_then(self) -> NoReturn:
        while True:
            await self._pause()
            for model in self._models.measured_while_busy():
                try:
                    await self._measure(model)
                except grpc.RpcError as error:
                    log.info("not measured again", extra={"model": model.package.id, "reason": error.code().name})

    async def _measure(self, model: LoadedModel) -> None:
        """Measures a model as if it had just come, and has it use that; or leaves it as it is, if it is not quiet."""
        if self._is_disturbed() or not await self._latencies.is_quiet():
            return
        known = model.profile
        again = LoadedModel(model.package, ModelProfile(known.accuracy, known.samples), model.lanes, looked=True)
        self._latencies.forget_ways()
        for modality in (*sorted(model.package.modalities), FUSION):
            if not await self._measured(model, again, modality):
                return
        await self._undisturbed()
        if model in self._models.measured_while_busy():
            model.measured = again.measured
            known.encoders.update(again.profile.encoders)
            known.fusion.update(again.profile.fusion)
            self._scheduler.measured_again(model.package.id)
            self._models.tell_gateways()

    async def _measured(self, model: LoadedModel, again: LoadedModel, modality: str) -> bool:
        """Measures a modality, or fusion, as often as it is disturbed; False if that is to be left for later."""
        while True:
            await self._undisturbed()
            lane = self._lane_of(model, modality)
            if lane is None or model not in self._models.measured_while_busy():
                return False
            check = partial(self._check, self._scheduler.calls_if_idle())
            try:
                if modality == FUSION:
                    await self._latencies.of_fusion(
                        self._services.fusion, [again], self._services.resources, check=check
                    )
                else:
                    await self._latencies.of_encoder(
                        modality, self._services.encoder(lane), [again], self._services.resources, check=check
                    )
            except _Disturbed:
                # Where jobs come often, most of them must not meet it.
                await self._pause()
                continue
            return again.others_share <= BUSY_SHARE

    def _lane_of(self, model: LoadedModel, modality: str) -> str | None:
        """A service of a modality that is there and has the model."""
        there = {service.lane for service in self._services if service.up.is_set()}
        return next((lane for lane in model.replicas(modality) if lane in there - model.lacking.keys()), None)

    def _is_disturbed(self) -> bool:
        return self._models.is_loading or self._scheduler.calls_if_idle() is None

    async def _undisturbed(self) -> None:
        while self._is_disturbed():
            await self._pause()

    def _check(self, calls: int | None) -> None:
        """Ends a measurement beside which something else is computed, or was, since so many calls were handed out."""
        if self._is_disturbed() or self._scheduler.calls_if_idle() != calls:
            raise _Disturbed
