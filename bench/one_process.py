"""What every yardstick has in common: the networks of a model, called in batches on the threads of one process."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mosel.compute import networks
from mosel.compute.forms import Forms
from mosel.compute.networks import Loaded
from mosel.config import Settings
from mosel.packages.model_package import ModelPackage

_WORKERS, _MOST_ITEMS = 2, 32

Array = NDArray[Any]
Payloads = Mapping[str, Array]
# Payloads of several jobs by the modalities that are run, in that order; gives the outputs of each job.
Compute = Callable[[Sequence[str], Sequence[Payloads]], list[Array]]
_Job = tuple[Payloads, "asyncio.Future[Array]"]


def networks_of(
    package: ModelPackage, settings: Settings, *, fast: bool = True
) -> tuple[dict[str, torch.nn.Module], torch.nn.Module]:
    """The encoders by modality, and the fusion; in the form that was found fastest here, or as they are made."""
    device = networks.choose_device(settings.device)
    encoders = {m: Loaded.plain(package, networks.load_encoder(package, m, device)) for m in package.modalities}
    fusion = Loaded.plain(package, networks.load_fusion(package, device))
    if fast:
        forms = Forms(settings, device)
        encoders = {m: forms.of_encoder(encoder, m) for m, encoder in encoders.items()}
        fusion = forms.of_fusion(fusion)
    return {m: encoder.network for m, encoder in encoders.items()}, fusion.network


def compute_with(encoders: Mapping[str, torch.nn.Module], fusion: torch.nn.Module) -> Compute:
    """Has networks on the processor compute several jobs in one call of each."""

    @torch.inference_mode()
    def compute(chosen: Sequence[str], jobs: Sequence[Payloads]) -> list[Array]:
        rows = {m: torch.from_numpy(np.concatenate([job[m] for job in jobs])) for m in chosen}
        outputs = fusion({m: encoders[m](rows[m]) for m in chosen}).numpy()
        return np.split(outputs, np.cumsum([_size(job) for job in jobs])[:-1])

    return compute


class Batches:
    """Answers jobs in batches of those that wait: one hand-off to a worker for each batch.

    Args:
        compute: see `Compute`.
    """

    def __init__(self, compute: Compute) -> None:
        self._compute, self._free = compute, _WORKERS
        self._pool = ThreadPoolExecutor(_WORKERS, "compute", torch.set_num_threads, (1,))
        self._waiting: defaultdict[tuple[str, ...], list[_Job]] = defaultdict(list)

    async def answer(self, chosen: Sequence[str], payloads: Payloads) -> Array:
        """The outputs of one job, of which some modalities are run."""
        answered: asyncio.Future[Array] = asyncio.get_running_loop().create_future()
        self._waiting[tuple(chosen)].append((payloads, answered))
        self._start()
        return await answered

    def _start(self) -> None:
        for chosen, queue in self._waiting.items():
            while queue and self._free:
                jobs: list[_Job] = []
                while queue and sum(_size(payloads) for payloads, _ in jobs) < _MOST_ITEMS:
                    jobs.append(queue.pop(0))
                self._free -= 1
                payloads = [job[0] for job in jobs]
                done = asyncio.get_running_loop().run_in_executor(self._pool, self._compute, chosen, payloads)
                done.add_done_callback(partial(self._finished, jobs))

    def _finished(self, jobs: Sequence[_Job], done: "asyncio.Future[list[Array]]") -> None:
        self._free += 1
        for (_, answered), outputs in zip(jobs, done.result(), strict=True):
            if not answered.done():
                answered.set_result(outputs)
        self._start()


def _size(payloads: Payloads) -> int:
    return len(next(iter(payloads.values())))
