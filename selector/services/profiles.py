"""From a profile file to what the core plans with."""

from collections.abc import Iterable
from statistics import NormalDist

from mosel.modality import parse_set
from mosel.profiles.files import FUSION, CallCost, Point, Profile, wilson_interval
from selector.core.profile import LatencyCurve, ModelProfile


def model_profile(profile: Profile, default_min_accuracy: float | None, floor_confidence: float = 0.5) -> ModelProfile:
    """A model's profile with every latency known.

    Args:
        profile: what was measured.
        default_min_accuracy: the model package's, see `ModelProfile`.
        floor_confidence: see `believed_accuracy`.
    """
    return ModelProfile(
        accuracy={
            parse_set(name): believed_accuracy(accuracy.value, accuracy.samples, floor_confidence)
            for name, accuracy in profile.accuracy.items()
        },
        samples=min(accuracy.samples for accuracy in profile.accuracy.values()),
        default_min_accuracy=default_min_accuracy,
        encoders={m: latency_curve(points, profile.calls[m]) for m, points in profile.encoders.items()},
        fusion={parse_set(s): latency_curve(points, profile.calls[FUSION]) for s, points in profile.fusion.items()},
    )


def believed_accuracy(value: float, samples: int, confidence: float) -> float:
    """What an accuracy is at least, with a confidence, given the samples that it was measured on.

    Args:
        value: as measured, 0..1.
        samples: 0 if unknown; then nothing can be said, and the value is taken as it is.
        confidence: 0.5 to below 1; 0.5 gives the value itself.
    """
    if not samples:
        return value
    return wilson_interval(value, samples, NormalDist().inv_cdf(confidence))[0]


def latency_curve(points: Iterable[Point], call: CallCost) -> LatencyCurve:
    """The time of calls as the selector sees them: network, transport and message."""
    return LatencyCurve(tuple((p.batch_size, call.overhead_ms + call.factor * p.p50_ms) for p in points))
