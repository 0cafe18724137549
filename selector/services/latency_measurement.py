"""How the models get their latencies: from the profile that is kept for this hardware, else by a quick measurement."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from mosel.config import Settings
from mosel.errors import ConfigError
from mosel.modality import FUSION, format_set, modality_of, parse_set
from mosel.observability.processors import busy_share
from mosel.packages.model_package import ModelPackage
from mosel.profiles.files import (
    BUSY_SHARE,
    CallCost,
    Point,
    Profile,
    load_profile,
    profile_file,
    quick_profile,
    save_profile,
)
from mosel.profiles.hardware import Hardware, device_name, this_hardware
from mosel.v1 import encoder_pb2, fusion_pb2, service_pb2
from selector.conversions import latency_curve, model_profile, path_curves
from selector.core.profile import ModelProfile
from selector.services.loaded_model import LoadedModel, Points

if TYPE_CHECKING:
    from mosel.v1.encoder_pb2_grpc import EncoderAsyncStub
    from mosel.v1.fusion_pb2_grpc import FusionAsyncStub

# Of one batch size, which the service bounds to little more than 0.1 s for each repeat.
_PROFILE_TIMEOUT_S = 60.0
_EMPTY_CALLS = 200

log = logging.getLogger(__name__)


def _go_on() -> None:
    """Nothing ends a measurement but an error."""


class Latencies:
    """Puts latencies into the profiles of models, one service at a time.

    Args:
        settings: the effective settings.
        others_share: says which share of the processors others use, 0..1; asked while no service computes.
    """

    def __init__(self, settings: Settings, others_share: Callable[[], Awaitable[float]] = busy_share) -> None:
        self._settings, self._others_share = settings, others_share
        # What an empty call to each service took, in milliseconds.
        self._ways: dict[str, float] = {}
        self._lock = asyncio.Lock()

    async def of_encoder(
        self,
        modality: str,
        stub: "EncoderAsyncStub",
        models: Iterable[LoadedModel],
        resources: Mapping[str, str],
        *,
        idle: bool = True,
        check: Callable[[], None] = _go_on,
    ) -> None:
        """Makes sure that the latencies of a modality are known for models; they are those of the encoder asked first.

        Args:
            modality: which one.
            stub: calls an encoder.
            models: those that have this modality.
            resources: what each service computes on, by lane, as far as it is known.
            idle: whether nothing else is computed meanwhile; otherwise what is measured now is not kept for later.
            check: called around each measurement, which lasts about half a second at most; what it raises ends it.

        Raises:
            grpc.RpcError: the service failed or went away.
        """
        async with self._lock:
            for model in models:
                hardware = await self.look(model, resources)
                if modality not in model.profile.encoders:
                    share = await self._others_share()
                    await self._time_the_way(modality, stub)
                    model.encoders[modality] = await self._encoder_points(stub, model.package.id, check)
                    model.others_share = max(model.others_share, share)
                    self._put(model)
                    await self._complete(model, hardware, keep=idle)

    async def of_fusion(
        self,
        stub: "FusionAsyncStub",
        models: Iterable[LoadedModel],
        resources: Mapping[str, str],
        *,
        idle: bool = True,
        check: Callable[[], None] = _go_on,
    ) -> None:
        """The same for fusion, for every modality set."""
        async with self._lock:
            for model in models:
                hardware = await self.look(model, resources)
                missing = sorted(model.profile.accuracy.keys() - model.profile.fusion.keys(), key=format_set)
                for name in (name for name in map(format_set, missing) if name not in model.fusion):
                    share = await self._others_share()
                    await self._time_the_way(FUSION, stub)
                    model.fusion[name] = await self._fusion_points(stub, model.package.id, name, check)
                    model.others_share = max(model.others_share, share)
                if missing:
                    self._put(model)
                    await self._complete(model, hardware, keep=idle)

    async def is_quiet(self) -> bool:
        """Whether others leave the machine to this system, so that times can be believed."""
        return await self._others_share() <= BUSY_SHARE

    def forget_ways(self) -> None:
        """Has the ways to services timed anew, as they may have been timed on a busy machine."""
        self._ways.clear()

    async def look(self, model: LoadedModel, resources: Mapping[str, str]) -> Hardware | None:
        """The first time, puts the profile that is kept of a model into it; returns what hardware that is of."""
        known = [lane for lane in model.lanes if lane in resources]
        if {*map(modality_of, known)} != {*map(modality_of, model.lanes)} or not _all_on_this_machine(self._settings):
            return None
        names = await asyncio.to_thread(device_name, {resources[lane] for lane in known})
        hardware = await asyncio.to_thread(this_hardware, self._settings, names)
        if not model.looked:
            model.looked = True
            kept = await asyncio.to_thread(load_profile, model.package, self._settings, hardware.device)
            if kept is not None and kept.busy and await self.is_quiet():
                log.info("measuring again what was measured on a busy machine", extra={"model": kept.model})
            elif kept is not None and self._is_as_asked_for(kept):
                self._take(model, kept)
        return hardware

    def _take(self, model: LoadedModel, kept: Profile) -> None:
        """Puts a kept profile into a model."""
        known, profile = self._believed(kept, model.package), model.profile
        profile.encoders.update(known.encoders)
        profile.fusion.update(known.fusion)
        profile.paths.update(known.paths)
        if kept.accuracy_measured:
            profile.accuracy, profile.samples = known.accuracy, known.samples
        model.measured = kept
        _tell(kept, "profile")

    def _believed(self, kept: Profile, package: ModelPackage) -> ModelProfile:
        return model_profile(kept, package.default_min_accuracy)

    def _is_as_asked_for(self, kept: Profile) -> bool:
        """Whether a quick profile has the batch sizes of the settings; a full one was asked for with its own."""
        sizes = {tuple(p.batch_size for p in points) for points in (*kept.encoders.values(), *kept.fusion.values())}
        return not kept.quick or sizes == {self._settings.selector.profile_batch_sizes}

    async def _complete(self, model: LoadedModel, hardware: Hardware | None, *, keep: bool) -> None:
        """Makes a quick profile once everything in it was measured; it is kept so that the next start is faster."""
        package = model.package
        complete = model.encoders.keys() == package.modalities.keys() and len(model.fusion) == len(
            model.profile.accuracy
        )
        if not complete or hardware is None:
            return
        calls = {name: self._call(name) for name in (*package.modalities, FUSION)}
        # It looks up which software is installed.
        quick = await asyncio.to_thread(
            quick_profile, package, hardware, model.encoders, model.fusion, calls, model.others_share
        )
        model.measured = quick
        _tell(quick, "profile measured")
        if keep:
            await self._keep(quick, package, hardware)

    async def _keep(self, quick: Profile, package: ModelPackage, hardware: Hardware) -> None:
        kept = await asyncio.to_thread(load_profile, package, self._settings, hardware.device)
        if kept is not None and not kept.quick:
            # `mosel profile` has made it meanwhile, and it says more.
            return
        file = await asyncio.to_thread(profile_file, package, hardware, self._settings)
        try:
            await asyncio.to_thread(save_profile, quick, file)
        except ConfigError as error:
            log.warning("profile not kept", extra={"reason": str(error)})

    async def _encoder_points(self, stub: "EncoderAsyncStub", model: str, check: Callable[[], None]) -> Points:
        def ask(size: int) -> Awaitable[service_pb2.ProfileReply]:
            request = encoder_pb2.ProfileEncoderRequest(
                model=model,
                batch_sizes=[size],
                repeats=self._settings.selector.profile_repeats,
                concurrency=self._settings.workers,
            )
            return stub.Profile(request, timeout=_PROFILE_TIMEOUT_S)

        return await self._points(ask, check)

    async def _fusion_points(
        self, stub: "FusionAsyncStub", model: str, modality_set: str, check: Callable[[], None]
    ) -> Points:
        def ask(size: int) -> Awaitable[service_pb2.ProfileReply]:
            request = fusion_pb2.ProfileFusionRequest(
                model=model,
                modality_set=modality_set,
                batch_sizes=[size],
                repeats=self._settings.selector.profile_repeats,
                concurrency=self._settings.workers,
            )
            return stub.Profile(request, timeout=_PROFILE_TIMEOUT_S)

        return await self._points(ask, check)

    async def _time_the_way(self, lane: str, stub: "EncoderAsyncStub | FusionAsyncStub") -> None:
        """Times, once, the way to a service and back: the fastest of some empty calls."""
        if lane in self._ways:
            return
        times: list[float] = []
        for _ in range(_EMPTY_CALLS):
            started = time.perf_counter()
            await stub.Status(service_pb2.StatusRequest(), timeout=_PROFILE_TIMEOUT_S)
            times.append((time.perf_counter() - started) * 1000)
        self._ways[lane] = min(times)

    def _call(self, lane: str) -> CallCost:
        """What the way to a service and back costs.

        By sockets it is the same to all: where one seems longer, something else was running, and small networks differ
        by less than that.
        """
        ways = self._ways.values() if _all_on_this_machine(self._settings) else (self._ways[lane],)
        return CallCost(overhead_ms=min(ways))

    def _put(self, model: LoadedModel) -> None:
        """Puts what was measured so far into a model's profile; all of it, for the way may have turned out shorter."""
        profile = model.profile
        profile.encoders |= {m: latency_curve(points, self._call(m)) for m, points in model.encoders.items()}
        profile.fusion |= {
            parse_set(s): latency_curve(points, self._call(FUSION)) for s, points in model.fusion.items()
        }
        if FUSION in self._ways:
            calls = {lane: self._call(lane) for lane in (*model.encoders, FUSION)}
            profile.paths |= path_curves(model.encoders, model.fusion, calls)

    async def _points(
        self, ask: Callable[[int], Awaitable[service_pb2.ProfileReply]], check: Callable[[], None]
    ) -> Points:
        points: list[service_pb2.LatencyPoint] = []
        for size in self._settings.selector.profile_batch_sizes:
            check()
            points += (await ask(size)).points
        check()
        return tuple(Point(batch_size=p.batch_size, p50_ms=p.p50_ms, p95_ms=p.p95_ms) for p in points)


def _tell(profile: Profile, event: str) -> None:
    facts: dict[str, object] = {"model": profile.model, "quick": profile.quick, "measured_on": str(profile.measured_on)}
    if profile.quick:
        facts |= {"spread": round(profile.spread, 2), "others_share": profile.others_share}
    if profile.busy:
        facts["reason"] = "it was made on a busy machine: times may be too long"
    log.log(logging.WARNING if profile.busy else logging.INFO, event, extra=facts)


def _all_on_this_machine(settings: Settings) -> bool:
    """Behind a TCP address there may be other hardware, so a profile of it is neither read nor written."""
    named = [address for of_one in settings.encoders.addresses.values() for address in of_one if address]
    return all(address.startswith("unix:") for address in (settings.fusion_address, *named))
