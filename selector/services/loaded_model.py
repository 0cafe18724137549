"""A model as it is, or is about to be, loaded: its files, its profile, and which services have its networks."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from mosel.config import Settings
from mosel.modality import FUSION, modality_of
from mosel.packages.model_package import ModelPackage
from mosel.profiles.files import Point, Profile
from selector.core.profile import ModelProfile

Points = tuple[Point, ...]


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
