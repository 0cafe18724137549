"""A model that exists as a profile only, for benchmarks of the core."""

from bench.simulation import World
from bench.workload import Demands
from mosel.modality import FUSION, ModalitySet, subsets
from selector.core.profile import LatencyCurve, ModelProfile

_SIZES = (1, 2, 4, 8, 16, 32)
_EDGE_MS = 2.0
# Milliseconds per call, and per item in it.
_ENCODERS = {"audio": (2.0, 1.0), "pen": (1.0, 0.1), "video": (3.0, 4.0)}
_FUSION_CALL_MS, _FUSION_MODALITY_MS = 1.0, 1.5
_ACCURACY = {"audio": 0.86, "pen": 0.66, "video": 0.71, "audio+pen": 0.94, "audio+video": 0.96, "pen+video": 0.91}


def example() -> tuple[World, Demands]:
    """Simulated services of a model with three modalities, and what jobs ask of it."""
    encoders = {modality: _curve(*ms) for modality, ms in _ENCODERS.items()}
    sets = subsets(_ENCODERS)
    fusion = {s: _curve(_FUSION_CALL_MS, _FUSION_MODALITY_MS * len(s)) for s in sets}
    accuracy: dict[ModalitySet, float] = {frozenset(name.split("+")): value for name, value in _ACCURACY.items()}
    profile = ModelProfile(accuracy | {sets[-1]: 0.98}, 2000, None, encoders, fusion)
    noise = dict.fromkeys((*encoders, FUSION), 0.1)
    latency = tuple((size, profile.idle_latency_ms(sets[-1], size) + _EDGE_MS) for size in _SIZES)
    return World(profile, edge_ms=_EDGE_MS, noise=noise), Demands(latency, 0.98, 0.66)


def _curve(call_ms: float, item_ms: float) -> LatencyCurve:
    return LatencyCurve(tuple((size, call_ms + item_ms * size) for size in _SIZES))
