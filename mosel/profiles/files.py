"""Profile files: what was measured of a model on one kind of hardware, and where that is kept."""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from mosel.config import Settings
from mosel.errors import ConfigError
from mosel.modality import FUSION, format_set, parse_set
from mosel.packages.model_package import ModelPackage
from mosel.profiles.forms import kept_forms
from mosel.profiles.hardware import Hardware, Versions, this_hardware, this_software
from mosel.profiles.writing import write_whole
from mosel.validation import explain

_Z95 = 1.959964
# Of all processors: what else runs on a machine that counts as quiet.
BUSY_SHARE = 0.1

log = logging.getLogger(__name__)


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0, le=1)]
Milliseconds = Annotated[float, Field(ge=0)]


class MeasuredAccuracy(_Value):
    """Accuracy of a modality set, 0..1, on so many samples, and its 95 % interval."""

    value: Fraction
    samples: int = Field(ge=0)
    low: Fraction
    high: Fraction


class Point(_Value):
    """Time of the network alone for one batch, with `Profile.concurrency` of them at the same time."""

    batch_size: PositiveInt
    p50_ms: Milliseconds
    p95_ms: Milliseconds


class JobPoint(_Value):
    """Time of one job at the client, on an idle system."""

    size: PositiveInt
    p50_ms: Milliseconds
    p95_ms: Milliseconds


class CallCost(_Value):
    """What a call costs as the selector sees it: `overhead_ms + factor * Point.p50_ms`."""

    overhead_ms: Milliseconds
    factor: float = Field(1.0, gt=0)


def _rising(points: tuple[Point, ...]) -> tuple[Point, ...]:
    sizes = [point.batch_size for point in points]
    if sizes != sorted(set(sizes)):
        raise ValueError(f"batch sizes are {sizes}; expected them to rise")
    return points


Points = Annotated[tuple[Point, ...], Field(min_length=1), AfterValidator(_rising)]


class Profile(_Value):
    """A model's profile.

    Attributes:
        content_hash: of the package that was measured.
        measured_on: day of the measurement, UTC.
        quick: made by the selector at its first start: no end-to-end times, calls never seen under load.
        others_share: the share of the machine's processors, 0..1, that others used when a quick one was made.
        concurrency: calls that ran at the same time while networks were timed.
        accuracy_source: where `accuracy` comes from, in words.
        accuracy_measured: it was measured with this profile, through the services; else it is the model package's.
        accuracy: by modality set, such as `audio+image`.
        encoders: by modality.
        fusion: by modality set.
        end_to_end: by modality set; empty if quick.
        calls: on an idle system, by lane: a modality, or `fusion`.
        loaded_calls: the same while the services are saturated, relative to `calls`; empty if quick.
        edge_ms: what client and gateway add to a job of one item.
        edge_item_ms: what each further item adds to that.
        edge_cpu_ms: processor time that client, gateway and selector spend on a job; 0 if quick.
    """

    model: str
    version: str
    content_hash: str
    hardware: Hardware
    versions: Versions
    measured_on: date
    quick: bool
    others_share: Fraction = 0.0
    concurrency: PositiveInt
    accuracy_source: str
    accuracy_measured: bool
    accuracy: dict[str, MeasuredAccuracy]
    encoders: dict[str, Points]
    fusion: dict[str, Points]
    end_to_end: dict[str, tuple[JobPoint, ...]] = {}
    calls: dict[str, CallCost]
    loaded_calls: dict[str, CallCost] = {}
    edge_ms: Milliseconds = 0.0
    edge_item_ms: Milliseconds = 0.0
    edge_cpu_ms: Milliseconds = 0.0

    @model_validator(mode="after")
    def _complete(self) -> Self:
        modalities = {m for name in self.accuracy for m in parse_set(name)}
        _same("encoders", self.encoders, modalities)
        _same("fusion", self.fusion, self.accuracy)
        _same("calls", self.calls, modalities | {FUSION})
        return self

    @property
    def busy(self) -> bool:
        """Whether it was made while others used more of the machine than they may for times to be believed."""
        return self.others_share > BUSY_SHARE

    @property
    def spread(self) -> float:
        """By how much times vary: the largest ratio of p95 to p50 of any network and batch size."""
        points = [p for of_one in (*self.encoders.values(), *self.fusion.values()) for p in of_one]
        return max((p.p95_ms / p.p50_ms for p in points if p.p50_ms), default=1.0)


def wilson(value: float, samples: int) -> MeasuredAccuracy:
    """An accuracy with its 95 % interval. Without samples it is everything.

    It is Wilson's: `(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)` (E. B. Wilson, "Probable inference, the law
    of succession, and statistical inference", JASA 22, 1927).
    """
    if not samples:
        return MeasuredAccuracy(value=value, samples=0, low=0.0, high=1.0)
    centre = value + _Z95**2 / (2 * samples)
    spread = _Z95 * math.sqrt(value * (1 - value) / samples + (_Z95 / (2 * samples)) ** 2)
    scale = 1 + _Z95**2 / samples
    low, high = (centre - spread) / scale, (centre + spread) / scale
    # Rounding must not put the value itself outside.
    return MeasuredAccuracy(
        value=value, samples=samples, low=max(0.0, min(low, value)), high=min(1.0, max(high, value))
    )


def package_accuracy(package: ModelPackage) -> dict[str, MeasuredAccuracy]:
    """The accuracies that a model package states.

    Raises:
        PackageError: it states none, or not for every set.
    """
    accuracy = package.accuracy
    return {format_set(s): wilson(value, accuracy.samples) for s, value in accuracy.sets.items()}


def package_accuracy_source(package: ModelPackage) -> str:
    """Where these are from, in words."""
    accuracy = package.accuracy
    samples = f"{accuracy.samples} samples" if accuracy.samples else "an unknown number of samples"
    return f"the model package: {accuracy.source or 'calibration split'}, {samples}"


def quick_profile(
    package: ModelPackage,
    hardware: Hardware,
    encoders: Mapping[str, tuple[Point, ...]],
    fusion: Mapping[str, tuple[Point, ...]],
    calls: Mapping[str, CallCost],
    others_share: float = 0.0,
) -> Profile:
    """A profile of what the selector measures by itself; accuracies are the model package's."""
    return Profile(
        model=package.name,
        version=package.version,
        content_hash=package.content_hash,
        hardware=hardware,
        versions=this_software(),
        measured_on=datetime.now(UTC).date(),
        quick=True,
        others_share=round(others_share, 3),
        concurrency=hardware.workers,
        accuracy_source=package_accuracy_source(package),
        accuracy_measured=False,
        accuracy=package_accuracy(package),
        encoders=dict(encoders),
        fusion=dict(fusion),
        calls=dict(calls),
    )


def profile_file(package: ModelPackage, hardware: Hardware, settings: Settings) -> Path:
    """Where the profile of a model on this hardware is kept, measured with its networks in the forms that are kept."""
    forms = kept_forms(package, hardware, settings.profiles_dir)
    key = hashlib.sha256(hardware.model_dump_json().encode() + (json.dumps(forms).encode() if forms else b""))
    return settings.profiles_dir / f"{_stem(package)}-{key.hexdigest()[:12]}.json"


def load_profile(package: ModelPackage, settings: Settings, device: str | None = None) -> Profile | None:
    """The kept profile of a model on this hardware, None if there is none. Damaged files are passed over.

    Args:
        package: the model.
        settings: the effective settings.
        device: what the networks compute on; None: whatever `settings.device` allows and in either placement, a full
            profile before a quick one, one of the placement of the settings before others, the newest before others.
    """
    found = []
    for file in sorted(settings.profiles_dir.glob(f"{_stem(package)}-*.json")):
        try:
            profile = read_profile(file, package)
        except ConfigError as error:
            log.warning("profile ignored", extra={"reason": str(error)})
            continue
        of_these_forms = file.name == profile_file(package, profile.hardware, settings).name
        if of_these_forms and _is_of(profile.hardware, settings, device):
            found.append(profile)

    def worth(profile: Profile) -> tuple[bool, bool, date]:
        return not profile.quick, profile.hardware.placement == settings.placement, profile.measured_on

    return max(found, key=worth, default=None)


def needed_profile(package: ModelPackage, settings: Settings, file: Path | None) -> Profile:
    """The profile in a file, or the kept one of this hardware.

    Raises:
        ConfigError: there is none, or the file is of something else.
    """
    profile = load_profile(package, settings) if file is None else read_profile(file, package)
    if profile is None:
        raise ConfigError(
            f"no profile of {package.name} for this hardware in {settings.profiles_dir}; "
            f"`mosel profile {package.name}` makes one"
        )
    return profile


def read_profile(file: Path, package: ModelPackage | None = None) -> Profile:
    """Reads a profile file.

    Args:
        file: as `save_profile` wrote it.
        package: the model that it is expected to be of, with these files; None: any.

    Raises:
        ConfigError: the file is not there, damaged, or of something else; names the file and the key.
    """
    try:
        profile = Profile.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"profile {file}: {error.strerror}; `mosel profile` makes one") from None
    except ValidationError as error:
        raise ConfigError(f"profile {file}: {explain(error)}") from None
    if package is None:
        return profile
    expected = {"model": package.name, "version": package.version, "content_hash": package.content_hash}
    for key, value in expected.items():
        if getattr(profile, key) != value:
            raise ConfigError(f"profile {file}: key '{key}' holds {getattr(profile, key)!r}; expected {value!r}")
    return profile


def save_profile(profile: Profile, file: Path) -> None:
    """Writes a profile file, whole or not at all, readable by this user alone; missing folders are made.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        write_whole(profile, file)
    except OSError as error:
        raise ConfigError(f"profile {file}: cannot be written: {error.strerror}") from None


def _same(key: str, holds: Iterable[str], expected: Iterable[str]) -> None:
    if sorted(holds) != sorted(expected):
        raise ValueError(f"{key} has {', '.join(sorted(holds))}; expected {', '.join(sorted(expected))}")


def _stem(package: ModelPackage) -> str:
    return f"{package.name}-{package.content_hash[:12]}"


def _is_of(hardware: Hardware, settings: Settings, device: str | None) -> bool:
    if device is None:
        device = hardware.device
        if settings.device != "auto" and (settings.device == "cpu") != (device == "cpu"):
            return False
        # Where services run is up to whoever started them.
        settings = settings.model_copy(update={"placement": hardware.placement})
    return hardware == this_hardware(settings, device)
