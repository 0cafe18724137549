"""How the models get their latencies: from the profile that is kept for this hardware, else by a quick measurement."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mosel.config import Settings
from mosel.errors import ConfigError
from mosel.modality import format_set
from mosel.model_package import ModelPackage
from mosel.profiles import (
    FUSION,
    Call,
    Hardware,
    Point,
    Profile,
    device_name,
    load_profile,
    profile_file,
    quick_profile,
    save_profile,
    this_hardware,
)
from mosel.v1 import encoder_pb2, fusion_pb2, service_pb2
from selector.profile import ModelProfile
from selector.profiles import latency_curve, model_profile

if TYPE_CHECKING:
    from mosel.v1.encoder_pb2_grpc import EncoderAsyncStub
    from mosel.v1.fusion_pb2_grpc import FusionAsyncStub

# Of one batch size, which the service bounds to little more than 0.1 s for each repeat.
_PROFILE_TIMEOUT_S = 60.0
_EMPTY_CALLS = 20

log = logging.getLogger(__name__)

Points = tuple[Point, ...]


@dataclass
class _Measured:
    """What was measured of a model since the start: encoders by modality, fusion by modality set."""

    encoders: dict[str, Points] = field(default_factory=dict)
    fusion: dict[str, Points] = field(default_factory=dict)


class Latencies:
    """Puts latencies into the profiles of all models, one service at a time.

    Args:
        settings: the effective settings.
        packages: the models by name.
        profiles: of the same models.
    """

    def __init__(
        self, settings: Settings, packages: Mapping[str, ModelPackage], profiles: Mapping[str, ModelProfile]
    ) -> None:
        self._settings, self._packages, self._profiles = settings, packages, profiles
        self._measured = {name: _Measured() for name in packages}
        self._calls: dict[str, Call] = {}
        self._hardware: Hardware | None = None
        self._looked = False
        self._lock = asyncio.Lock()

    async def of_encoder(self, modality: str, stub: "EncoderAsyncStub", resources: Iterable[str]) -> None:
        """Makes sure that the latencies of an encoder are known for every model.

        Args:
            modality: which encoder.
            stub: calls it.
            resources: what each service computes on; one that is "" is not known.

        Raises:
            grpc.RpcError: the service failed or went away.
        """
        async with self._alone(resources):
            for model in [name for name, package in self._packages.items() if modality in package.modalities]:
                profile = self._profiles[model]
                if modality not in profile.encoders:
                    points = await self._encoder_points(stub, model)
                    call = await self._call(modality, stub)
                    self._measured[model].encoders[modality] = points
                    profile.encoders[modality] = latency_curve(points, call)
                    await self._keep(model)

    async def of_fusion(self, stub: "FusionAsyncStub", resources: Iterable[str]) -> None:
        """The same for fusion, for every modality set."""
        async with self._alone(resources):
            for model, profile in self._profiles.items():
                missing = sorted(profile.accuracy.keys() - profile.fusion.keys(), key=format_set)
                for modality_set in missing:
                    name = format_set(modality_set)
                    points = await self._fusion_points(stub, model, name)
                    call = await self._call(FUSION, stub)
                    self._measured[model].fusion[name] = points
                    profile.fusion[modality_set] = latency_curve(points, call)
                if missing:
                    await self._keep(model)

    @contextlib.asynccontextmanager
    async def _alone(self, resources: Iterable[str]) -> AsyncIterator[None]:
        """While no other service is measured; the first time, kept profiles are loaded."""
        async with self._lock:
            if not self._looked:
                await asyncio.to_thread(self._load, set(resources))
                self._looked = True
            yield

    def _load(self, resources: set[str]) -> None:
        if "" in resources or not _all_on_this_machine(self._settings):
            return
        self._hardware = this_hardware(self._settings, device_name(resources))
        for name, package in self._packages.items():
            kept = load_profile(package, self._settings, self._hardware.device)
            if kept is None or not self._is_as_asked_for(kept):
                continue
            known, profile = self._believed(kept, package), self._profiles[name]
            profile.encoders.update(known.encoders)
            profile.fusion.update(known.fusion)
            if kept.accuracy_measured:
                profile.accuracy, profile.samples = known.accuracy, known.samples
            log.info("profile", extra={"model": name, "quick": kept.quick, "measured_on": str(kept.measured_on)})

    def _believed(self, kept: Profile, package: ModelPackage) -> ModelProfile:
        return model_profile(kept, package.default_min_accuracy, self._settings.selector.floor_confidence)

    def _is_as_asked_for(self, kept: Profile) -> bool:
        """Whether a quick profile has the batch sizes of the settings; a full one was asked for with its own."""
        sizes = {tuple(p.batch_size for p in points) for points in (*kept.encoders.values(), *kept.fusion.values())}
        return not kept.quick or sizes == {self._settings.selector.profile_batch_sizes}

    async def _keep(self, model: str) -> None:
        """Writes a quick profile once everything in it was measured, so that the next start is faster."""
        profile, measured, package = self._profiles[model], self._measured[model], self._packages[model]
        complete = measured.encoders.keys() == package.modalities.keys() and len(measured.fusion) == len(
            profile.accuracy
        )
        if not complete or self._hardware is None:
            return
        calls = {lane: self._calls[lane] for lane in (*package.modalities, FUSION)}
        quick = quick_profile(package, self._hardware, measured.encoders, measured.fusion, calls)
        file = await asyncio.to_thread(profile_file, package, self._hardware, self._settings)
        try:
            await asyncio.to_thread(save_profile, quick, file)
        except ConfigError as error:
            log.warning("profile not kept", extra={"reason": str(error)})

    async def _encoder_points(self, stub: "EncoderAsyncStub", model: str) -> Points:
        def ask(size: int) -> Awaitable[service_pb2.ProfileReply]:
            request = encoder_pb2.ProfileEncoderRequest(
                model=model,
                batch_sizes=[size],
                repeats=self._settings.selector.profile_repeats,
                concurrency=self._settings.workers,
            )
            return stub.Profile(request, timeout=_PROFILE_TIMEOUT_S)

        return await self._points(ask)

    async def _fusion_points(self, stub: "FusionAsyncStub", model: str, modality_set: str) -> Points:
        def ask(size: int) -> Awaitable[service_pb2.ProfileReply]:
            request = fusion_pb2.ProfileFusionRequest(
                model=model,
                modality_set=modality_set,
                batch_sizes=[size],
                repeats=self._settings.selector.profile_repeats,
                concurrency=self._settings.workers,
            )
            return stub.Profile(request, timeout=_PROFILE_TIMEOUT_S)

        return await self._points(ask)

    async def _call(self, lane: str, stub: "EncoderAsyncStub | FusionAsyncStub") -> Call:
        """What the way to a service and back costs: the fastest of some, so that it compares between services."""
        times: list[float] = []
        while lane not in self._calls and len(times) < _EMPTY_CALLS:
            started = time.perf_counter()
            await stub.Status(service_pb2.StatusRequest(), timeout=_PROFILE_TIMEOUT_S)
            times.append((time.perf_counter() - started) * 1000)
        return self._calls.setdefault(lane, Call(overhead_ms=min(times, default=0.0)))

    async def _points(self, ask: Callable[[int], Awaitable[service_pb2.ProfileReply]]) -> Points:
        points = [point for size in self._settings.selector.profile_batch_sizes for point in (await ask(size)).points]
        return tuple(Point(batch_size=p.batch_size, p50_ms=p.p50_ms, p95_ms=p.p95_ms) for p in points)


def _all_on_this_machine(settings: Settings) -> bool:
    """Behind a TCP address there may be other hardware, so a profile of it is neither read nor written."""
    addresses = (settings.fusion_address, *settings.encoders.addresses.values())
    return all(address.startswith("unix:") for address in addresses)
