"""The models that are loaded, and how they come and go while the services run.

A model is loaded as `name@revision`, and several revisions may be there at the same time. A new one is brought to every
service, measured, and given to the scheduler; then gateways are told of it. The one before it is retired when no
gateway names it any more, and its networks are freed when its last job is over. Nothing that was begun is interrupted.
"""

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import grpc

from mosel.config import Settings
from mosel.errors import ModelNotFound, MoselError, ServiceUnavailable
from mosel.modality import FUSION, modality_of
from mosel.packages.model_package import ModelPackage, find_package, name_of
from mosel.runtime.background import Background
from mosel.status import error_from_rpc
from mosel.v1 import selector_pb2
from selector.conversions import certificates, origin_of, set_profile
from selector.core.profile import ModelProfile
from selector.core.scheduler import Scheduler
from selector.core.stages import service_name
from selector.gateway_session import Gateways, GatewaySession
from selector.services.compute_services import ComputeServices
from selector.services.latency_measurement import Latencies
from selector.services.loaded_model import LoadedModel, but_for_replicas, each, lanes_of

R = TypeVar("R")

# How long a load waits for services that are just starting.
_UP_S = 2.0
# Files that are wrong are looked at again after the first pause, then each time after twice the last one.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0

log = logging.getLogger(__name__)


class ModelLoader:
    """Brings models to the services and takes them away again.

    Args:
        settings: the effective settings.
        packages: what is loaded from the start.
        scheduler: is told of each model.
        services: those that compute.
        gateways: those that are connected; they are told which models there are.
        latencies: measures them.
    """

    def __init__(
        self,
        settings: Settings,
        packages: Iterable[ModelPackage],
        scheduler: Scheduler,
        services: ComputeServices,
        gateways: Gateways,
        latencies: Latencies,
    ) -> None:
        self._settings, self._scheduler, self._services, self._gateways = settings, scheduler, services, gateways
        self._latencies = latencies
        # By id: all that services may have networks of; and by name: the id of what new jobs get.
        self._models: dict[str, LoadedModel] = {}
        self._current: dict[str, str] = {}
        # The lanes of those that are just being loaded.
        self._loading: dict[str, Sequence[str]] = {}
        self._freeing: dict[str, asyncio.Task[None]] = {}
        # By name, as long as somebody loads or unloads it.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # Those whose files are tried until they are sound.
        self._trying: set[str] = set()
        self._work = Background(_not_done)
        for package in packages:
            model = self._models[package.id] = self._model_of(package)
            self._current[package.name] = package.id
            scheduler.load(package.id, model.profile)

    @property
    def is_loading(self) -> bool:
        """Whether a model is on its way to services, or is measured there."""
        return bool(self._loading)

    def measured_while_busy(self) -> list[LoadedModel]:
        """Those that new jobs get whose latencies were measured while others used the machine."""
        models = (self._models[model] for model in self._current.values())
        return [model for model in models if model.measured is not None and model.measured.busy]

    def versions(self) -> dict[str, str]:
        """What packages call their versions, by name, of those that new jobs get."""
        return {name: self._models[model].package.version for name, model in self._current.items()}

    async def close(self) -> None:
        """Gives up what is being loaded or unloaded."""
        await self._work.close()

    async def load(self, name: str) -> selector_pb2.ModelState:
        """Loads a model from disk, or loads it anew; goes on if the caller goes away.

        Raises:
            ModelNotFound: there is no such package.
            PackageError: it is wrong; the model stays as it was.
            ServiceUnavailable: a service that it needs is away, or the selector stops.
        """
        return await self._result(self._load(name))

    async def unload(self, name: str) -> None:
        """Admits no more jobs of a model, and returns when its networks are freed; goes on if the caller goes away.

        Raises:
            ModelNotFound: it is not loaded.
            ServiceUnavailable: the selector stops.
        """
        await self._result(self._unload(name))

    # What the gateways name

    def gateway_came(self, gateway: GatewaySession) -> None:
        """A gateway is told of the current models."""
        gateway.models = set(self._current.values())
        gateway.send(models=self.states())

    def gateway_names(self, gateway: GatewaySession, models: Iterable[str]) -> None:
        """What jobs of a gateway will name from now on."""
        gateway.models = set(models)
        for model in gateway.models - self._models.keys():
            # It started after the files had changed, and has not what they were before.
            if (name := name_of(model)) in self._current:
                self._load_later(name)
        self._retire_unnamed()

    def gateway_went(self, gateway: GatewaySession) -> None:
        """No more jobs come from a gateway."""
        gateway.models = set()
        self._retire_unnamed()

    def tell_gateways(self) -> None:
        """Tells gateways which models are loaded and ready."""
        states = self.states()
        for gateway in self._gateways:
            gateway.send(models=states)

    def check_loaded(self, model: str) -> None:
        """Checks that jobs may name a model.

        Raises:
            ModelNotFound: it is not loaded.
            ServiceUnavailable: it was replaced.
        """
        name = name_of(model)
        if name not in self._current:
            raise ModelNotFound(f"model '{name}' is not loaded (any more); `mosel reload {name}` loads it")
        if not self._scheduler.serves(model):
            raise ServiceUnavailable(f"service gateway has other files of model '{name}' than the selector; try again")

    def states(self) -> selector_pb2.ModelStates:
        """What is loaded, which of it is ready, and what is known of the modality sets."""
        return selector_pb2.ModelStates(models=[self._state(model) for model in self._current.values()])

    def current_name(self, model: str) -> str | None:
        """The name of a model; None if new jobs get another revision."""
        name = name_of(model)
        return name if self._current.get(name) == model else None

    # What the services have

    async def prepare(self, lane: str, has: Sequence[str]) -> None:
        """Brings a service that has come to the models that are loaded, and makes sure that its latencies are known.

        Args:
            lane: the service.
            has: the models that it has already.

        Raises:
            grpc.RpcError, ServiceUnavailable: it went away.
        """
        for unknown in set(has) - self._models.keys():
            await self._services.unload(lane, unknown)
        models: list[LoadedModel] = []
        # Another replica may have got more meanwhile.
        while more := [model for model in self._loaded_in(lane) if model not in models]:
            for model in more:
                await self._bring(lane, model)
            await self._measure(lane, [model for model in more if lane not in model.lacking])
            models += more

    def free_drained(self) -> None:
        """Frees the retired models whose last jobs are over."""
        for model_id in self._scheduler.drained():
            self._freeing[model_id] = self._work.task(self._free(self._models[model_id]))

    def _loaded_in(self, lane: str) -> list[LoadedModel]:
        return [m for m in self._models.values() if lane in m.lanes and m.package.id not in self._freeing]

    async def _bring(self, lane: str, model: LoadedModel) -> None:
        """Has a service that has come load a model; notes why if it cannot."""
        try:
            await self._services.load(lane, model.package.id)
            model.lacks(lane, "")
            if model.package.id in self._freeing or model.freed.is_set():
                await self._services.unload(lane, model.package.id)
        except ServiceUnavailable:
            raise
        except MoselError as error:
            log.error("not loaded", extra={"peer": lane, "model": model.package.id, "reason": str(error)})  # noqa: TRY400
            model.lacks(lane, str(error))
            if self.current_name(model.package.id):
                # A service that starts can only have what is on disk now, so all are brought to that.
                self._load_later(model.package.name)

    def _load_later(self, name: str) -> None:
        """Loads a model anew though nobody waits for it, again and again while its files are wrong."""
        if name not in self._trying:
            self._trying.add(name)
            self._work.start(self._load_when_sound(name))

    async def _load_when_sound(self, name: str) -> None:
        pause_s = _FIRST_PAUSE_S
        try:
            while name in self._current:
                try:
                    await self._load(name)
                    return
                except MoselError as error:
                    log.warning("tried again later", extra={"model": name, "in_s": pause_s, "reason": str(error)})
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            self._trying.discard(name)

    async def _load(self, name: str) -> selector_pb2.ModelState:
        async with self._locks.setdefault(name, asyncio.Lock()):
            package = await asyncio.to_thread(_read, self._settings, name)
            before = self._models.get(self._current.get(name, ""))
            if before is None or before.package.id != package.id or before.lacking:
                await self._spread(package, before)
                self._current[name] = package.id
                log.info("model loaded", extra={"model": package.id})
                self.tell_gateways()
                self._retire_unnamed()
            else:
                log.info("nothing changed", extra={"model": package.id})
            return self._state(package.id)

    async def _spread(self, package: ModelPackage, before: LoadedModel | None) -> None:
        """Loads a model in all services, and gives it to the scheduler when all is known of it."""
        model_id, lanes = package.id, lanes_of(package, self._settings)
        added = [lane for lane in lanes if self._services.add(lane)]
        self._loading[model_id] = lanes
        try:
            away = await self._away(lanes)
            if model_id in self._freeing:
                await self._freeing[model_id]
            await self._spread_to(self._models.get(model_id) or self._model_of(package), before, away)
        except BaseException:
            del self._loading[model_id]
            self._remove_unused(added)
            raise
        del self._loading[model_id]

    async def _spread_to(self, model: LoadedModel, before: LoadedModel | None, away: dict[str, str]) -> None:
        model_id = model.package.id
        new = model_id not in self._models
        self._models[model_id] = model
        if not new:
            # If it was retired, it must not be freed now.
            self._scheduler.load(model_id, model.profile)
        try:
            await self._load_in_all(model, away)
            await self._find_latencies(model, before)
            self._scheduler.load(model_id, model.profile)
        except Exception:
            if new:
                self._freeing[model_id] = self._work.task(self._free(model))
                await self._freeing[model_id]
            raise

    def _remove_unused(self, lanes: Iterable[str]) -> None:
        """Follows services no more that were added for a model which could not be loaded, unless another needs them."""
        needed = {lane for model in self._models.values() for lane in model.lanes}
        needed = needed.union(*self._loading.values())
        for lane in set(lanes) - needed:
            self._services.remove(lane)

    async def _away(self, lanes: Sequence[str]) -> dict[str, str]:
        """Why replicas that a model can do without are not there, by lane.

        Raises:
            ServiceUnavailable: it cannot do without what is away.
        """
        missing = await each(lanes, lambda lane: self._services.check_up(lane, _UP_S))
        return but_for_replicas(lanes, missing)

    async def _load_in_all(self, model: LoadedModel, away: dict[str, str]) -> None:
        """Loads a model in every service that is there; in one of each kind at least, or it raises what went wrong."""
        there = [lane for lane in model.lanes if lane not in away]
        failed = await each(there, lambda lane: self._services.load(lane, model.package.id))
        lacking = away | but_for_replicas(there, failed)
        for lane in model.lanes:
            # It is brought to those that are away when they come.
            model.lacks(lane, lacking.get(lane, ""))

    async def _find_latencies(self, model: LoadedModel, before: LoadedModel | None) -> None:
        """From the kept profile, from the model before it if only weights differ, or by measuring beside the others."""
        await self._latencies.look(model, self._services.resources)
        if before is not None and model.package.has_networks_of(before.package):
            model.profile.take_latencies(before.profile)
            model.measured = model.measured or before.measured
        for lane in (lane for lane in model.lanes if lane not in model.lacking):
            try:
                await self._measure(lane, [model], idle=False)
            except grpc.RpcError as error:
                raise error_from_rpc(error, service_name(lane)) from None

    async def _measure(self, lane: str, models: Iterable[LoadedModel], *, idle: bool = True) -> None:
        services = self._services
        if lane == FUSION:
            await self._latencies.of_fusion(services.fusion, models, services.resources, idle=idle)
        else:
            stub, modality = services.encoder(lane), modality_of(lane)
            await self._latencies.of_encoder(modality, stub, models, services.resources, idle=idle)

    async def _unload(self, name: str) -> None:
        async with self._locks.setdefault(name, asyncio.Lock()):
            if self._current.pop(name, None) is None:
                loaded = ", ".join(sorted(self._current)) or "none"
                raise ModelNotFound(f"model '{name}' is not loaded; expected one of: {loaded}")
            log.info("model unloaded", extra={"model": name})
            self.tell_gateways()
            self._retire_unnamed()
            while revisions := [model for model in self._models.values() if model.package.name == name]:
                await revisions[0].freed.wait()

    def _retire_unnamed(self) -> None:
        """Retires what no job will name any more."""
        named = set().union(*(gateway.models for gateway in self._gateways))
        for model_id, model in self._models.items():
            name = model.package.name
            wanted = {self._current[name], *named} if name in self._current else ()
            if model_id not in wanted and model_id not in self._loading:
                self._scheduler.retire(model_id)
        self.free_drained()

    async def _free(self, model: LoadedModel) -> None:
        model_id = model.package.id
        try:
            await asyncio.gather(*(self._services.unload(lane, model_id) for lane in model.lanes))
            log.info("model freed", extra={"model": model_id})
        finally:
            del self._models[model_id], self._freeing[model_id]
            model.freed.set()

    def _state(self, model_id: str) -> selector_pb2.ModelState:
        model = self._models[model_id]
        profile, is_up = model.profile, self._scheduler.is_up
        available = {s: profile.can_run(s) and is_up(s, profile.lacking) for s in profile.accuracy}
        return selector_pb2.ModelState(
            model=model.package.name,
            revision=model.package.revision,
            ready=any(available.values()) and all(map(profile.is_measured, profile.accuracy)),
            sets=[set_profile(profile, s, available[s]) for s in profile.accuracy],
            reason="; ".join(f"service {service_name(lane)}: {why}" for lane, why in model.lacking.items()),
            latencies="" if model.measured is None else origin_of(model.measured),
        )

    async def _result(self, work: Coroutine[Any, Any, R]) -> R:
        task = self._work.task(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise ServiceUnavailable("service selector is stopping") from None
            raise

    def _model_of(self, package: ModelPackage) -> LoadedModel:
        stated, confidence = package.accuracy, self._settings.selector.floor_confidence
        profile = ModelProfile(
            dict(stated.sets),
            stated.samples,
            package.default_min_accuracy,
            certificates=certificates(package.calibration, confidence),
        )
        return LoadedModel(package, profile, lanes_of(package, self._settings))


def _not_done(error: BaseException) -> None:
    log.warning("models stay as they are", extra={"reason": str(error)})


def _read(settings: Settings, name: str) -> ModelPackage:
    """A model's package with its accuracies, proven to belong to its weights."""
    package = find_package(settings.models_dir, name)
    package.check_unchanged()
    return package
