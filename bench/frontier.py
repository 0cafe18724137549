"""What a frontier takes to compute, and how far from the optimum it is.

Times are of one thread, with profiles of random models. For the distance, frontiers of jobs of so many items that not
all mixes are looked at are compared with all mixes of all modality sets, for random models with slight, usual and heavy
overheads of a call: by how much the cheapest strategy that is as accurate as an optimum is dearer than it.
"""

import bisect
import itertools
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from mosel.modality import ModalitySet, subsets
from selector.core.frontier import Frontier, frontier
from selector.core.profile import LatencyCurve, ModelProfile

# What a call costs before its first item, in items of the same modality: from, to.
OVERHEADS = {"slight": (0.05, 0.5), "usual": (0.5, 8.0), "heavy": (8.0, 80.0)}
_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
_REPEATS = 5
_PROFILES = 20
# Modalities and items: so many mixes can be looked at, one by one.
_COMPARED = ((3, 12), (3, 16), (4, 6))
_SUM_TOLERANCE = 1e-9

console = Console(width=140)


def main() -> None:
    """Measures and prints."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    console.print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), load {load}, "
        f"Python {platform.python_version()}, numpy {np.__version__}"
    )
    _print_times()
    _print_distances()


def random_profile(seed: int, modalities: int, overhead: tuple[float, float]) -> ModelProfile:
    """A profile with latencies as services show them, a few percent of noise included.

    Args:
        seed: same seed, same profile.
        modalities: how many; every set of them can be run.
        overhead: between what a call costs before its first item, in items.
    """
    chance = random.Random(seed)  # noqa: S311
    names = "abcdefgh"[:modalities]

    def curve(item_ms: float) -> LatencyCurve:
        call_ms = item_ms * math.exp(chance.uniform(math.log(overhead[0]), math.log(overhead[1])))
        return LatencyCurve(tuple((n, (call_ms + item_ms * n) * chance.uniform(0.97, 1.03)) for n in _BATCH_SIZES))

    errors = {name: chance.uniform(0.3, 0.8) for name in names}
    return ModelProfile(
        accuracy={
            s: min(1.0, max(0.0, 1.0 - math.prod(errors[m] for m in s) + chance.uniform(-0.03, 0.03)))
            for s in subsets(names)
        },
        samples=1000,
        encoders={name: curve(math.exp(chance.uniform(math.log(0.1), math.log(10.0)))) for name in names},
        fusion={s: curve(0.02 * (1 + len(s))) for s in subsets(names)},
    )


def excess(found: Frontier, accuracy: float, cost_ms: float) -> float:
    """By which share the cheapest of some strategies that is as accurate is dearer than `cost_ms`."""
    return float(found.cost_ms[bisect.bisect_left(found.accuracy, accuracy - _SUM_TOLERANCE)] / cost_ms - 1)


def all_mixes(sets: Sequence[ModalitySet], size: int) -> Iterator[dict[ModalitySet, int]]:
    """Every strategy that there is for a job of this size."""
    for bars in itertools.combinations(range(size + len(sets) - 1), len(sets) - 1):
        edges = (-1, *bars, size + len(sets) - 1)
        counts = (after - before - 1 for before, after in itertools.pairwise(edges))
        yield {s: count for s, count in zip(sets, counts, strict=True) if count}


def optima(profile: ModelProfile, sets: Sequence[ModalitySet], size: int) -> list[tuple[float, float]]:
    """Accuracy and cost of the mixes that no other beats, by looking at all."""
    points = sorted(
        (profile.mixed_cost_ms(counts), -sum(profile.accuracy[s] * n for s, n in counts.items()) / size)
        for counts in all_mixes(sets, size)
    )
    best: list[tuple[float, float]] = []
    for cost_ms, negative in points:
        if not best or -negative > best[-1][0] + _SUM_TOLERANCE:
            best.append((-negative, cost_ms))
    return best


def _print_times() -> None:
    table = Table(
        "modalities", "sets", "items", "strategies", "mixes compared", "median (ms)", "least (ms)", title="one frontier"
    )  # fmt: skip
    for modalities, size in itertools.product((2, 3, 4, 5, 6, 8), (1, 8, 32, 256)):
        profile = random_profile(1, modalities, OVERHEADS["usual"])
        sets = tuple(profile.accuracy)
        found = frontier(profile, sets, size)
        times = sorted(_seconds(profile, sets, size) for _ in range(_REPEATS))
        shown = f"{statistics.median(times) * 1000:.1f}", f"{times[0] * 1000:.1f}"
        table.add_row(str(modalities), str(len(sets)), str(size), str(len(found)), str(found.considered), *shown)
    console.print(table)


def _seconds(profile: ModelProfile, sets: Iterable[ModalitySet], size: int) -> float:
    """Processor time of one frontier."""
    started = time.thread_time()
    frontier(profile, sets, size)
    return time.thread_time() - started


def _print_distances() -> None:
    table = Table(
        "modalities", "items", "overhead", "profiles", "exact", "all strategies, mean", "worst strategy, mean",
        "worst strategy, largest", title="frontier against all mixes",
    )  # fmt: skip
    for (modalities, size), (name, overhead) in itertools.product(_COMPARED, OVERHEADS.items()):
        distances = [_distances(random_profile(seed, modalities, overhead), size) for seed in range(_PROFILES)]
        worst = [max(of_one) for of_one in distances]
        exact = sum(distance < _SUM_TOLERANCE for distance in worst) / _PROFILES
        means = statistics.mean(map(statistics.mean, distances)), statistics.mean(worst)
        shown = *(f"{mean:.3%}" for mean in means), f"{max(worst):.2%}"
        table.add_row(str(modalities), str(size), name, str(_PROFILES), f"{exact:.1%}", *shown)
    console.print(table)


def _distances(profile: ModelProfile, size: int) -> list[float]:
    sets = tuple(profile.accuracy)
    found = frontier(profile, sets, size)
    return [max(excess(found, *optimum), 0.0) for optimum in optima(profile, sets, size)]


if __name__ == "__main__":
    main()
