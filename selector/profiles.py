"""From a profile file to what the core plans with."""

from collections.abc import Iterable

from mosel.modality import parse_set
from mosel.profiles import FUSION, Call, Point, Profile
from selector.profile import LatencyCurve, ModelProfile


def model_profile(profile: Profile, default_min_accuracy: float | None) -> ModelProfile:
    """A model's profile with every latency known.

    Args:
        profile: what was measured.
        default_min_accuracy: the model package's, see `ModelProfile`.
    """
    return ModelProfile(
        accuracy={parse_set(name): accuracy.value for name, accuracy in profile.accuracy.items()},
        samples=min(accuracy.samples for accuracy in profile.accuracy.values()),
        default_min_accuracy=default_min_accuracy,
        encoders={m: latency_curve(points, profile.calls[m]) for m, points in profile.encoders.items()},
        fusion={parse_set(s): latency_curve(points, profile.calls[FUSION]) for s, points in profile.fusion.items()},
    )


def latency_curve(points: Iterable[Point], call: Call) -> LatencyCurve:
    """The time of calls as the selector sees them: network, transport and message."""
    return LatencyCurve(tuple((p.batch_size, call.overhead_ms + call.factor * p.p50_ms) for p in points))
