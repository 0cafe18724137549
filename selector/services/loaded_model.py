"""A model as it is, or is about to be, loaded: its files, its profile, and which services have its networks."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mosel.config import Settings
from mosel.errors import MoselError
from mosel.modality import FUSION, modality_of
from mosel.packages.model_package import ModelPackage
from mosel.profiles.files import Point, Profile
from selector.core.profile import ModelProfile

Points = tuple[Point, ...]

log = logging.getLogger(__name__)


@dataclass(eq=False)
class LoadedModel:
    """A model as it is, or is about to be, loaded.

    Attributes:
        package: its files.
        profile: what the core plans with; latencies are put into it.
        lanes: the services that have a part in it.
        encoders, fusion: what was measured since the start, by modality and by modality set.
        others_share: the share of the processors that others used when that was measured, 0..1.
        measured: what its latencies are from; None while some are not known, or if services are on other machines.
        looked: whether a kept profile was looked for.
        lacking: why a service does not have its networks, by lane.
        freed: set when no service has them any more.
    """

    package: ModelPackage
    profile: ModelProfile
    lanes: Sequence[str]
    encoders: dict[str, Points] = field(default_factory=dict)
    fusion: dict[str, Points] = field(default_factory=dict)
    others_share: float = 0.0
    measured: Profile | None = None
    looked: bool = False
    lacking: dict[str, str] = field(default_factory=dict)
    freed: asyncio.Event = field(default_factory=asyncio.Event)

    def lacks(self, lane: str, reason: str) -> None:
        """Notes why a service does not have its networks; empty if it has them."""
        self.lacking.pop(lane, None)
        if reason:
            self.lacking[lane] = reason
        self.profile.lacking.clear()
        self.profile.lacking.update(self.lacking)
        had = {modality_of(lane) for lane in self.lanes if lane not in self.lacking}
        self.profile.unavailable = frozenset(s for s in self.profile.accuracy if not had >= {FUSION, *s})

    def replicas(self, modality: str) -> list[str]:
        """The encoders of a modality; or fusion."""
        return [lane for lane in self.lanes if modality_of(lane) == modality]


def lanes_of(package: ModelPackage, settings: Settings) -> list[str]:
    """The services that have a part in a model."""
    encoders = [lane for modality in sorted(package.modalities) for lane in settings.encoder_addresses(modality)]
    return [*encoders, FUSION]


async def each(lanes: Sequence[str], call: Callable[[str], Awaitable[None]]) -> dict[str, MoselError]:
    """Calls every lane at once and waits for all; returns what went wrong, by lane."""
    results = await asyncio.gather(*map(call, lanes), return_exceptions=True)
    errors = {lane: result for lane, result in zip(lanes, results, strict=True) if result is not None}
    for error in errors.values():
        if not isinstance(error, MoselError):
            raise error
    return {lane: error for lane, error in errors.items() if isinstance(error, MoselError)}


def but_for_replicas(lanes: Sequence[str], errors: Mapping[str, MoselError]) -> dict[str, str]:
    """What went wrong with lanes that others of the same modality stand in for; raises what nobody stands in for."""
    well = {modality_of(lane) for lane in lanes if lane not in errors}
    for lane, error in errors.items():
        if modality_of(lane) not in well:
            raise error
        log.warning("a replica lacks a model", extra={"peer": lane, "reason": str(error)})
    return {lane: str(error) for lane, error in errors.items()}
