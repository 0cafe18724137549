"""The networks of one modality, for every model that has it. Knows no gRPC."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from mosel.compute import networks
from mosel.compute.forms import Forms
from mosel.compute.joined import Embedded
from mosel.deadline import Deadline
from mosel.errors import ModelNotFound
from mosel.packages.model_package import ModelPackage
from mosel.transport import Reader
from mosel.transport.torch_exchange import TensorPublisher
from mosel.v1 import tensor_pb2


class ModalityEncoder:
    """Chosen payload rows in, embeddings out. Thread-safe.

    Args:
        modality: which one.
        device: where the networks run.
        reader: gathers payload rows.
        publisher: keeps the embeddings.
        forms: finds the form that a network is fastest in; None: it is served as it is made.

    Attributes:
        networks: those that are loaded, by model, `name@revision`.
    """

    def __init__(
        self,
        modality: str,
        device: torch.device,
        reader: Reader,
        publisher: TensorPublisher,
        forms: Forms | None = None,
    ) -> None:
        self.modality = modality
        self.counters: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._device, self._reader, self._publisher = device, reader, publisher
        fastest = partial(forms.of_encoder, modality=modality) if forms else None
        self.networks = networks.Hosted(self._make, self._warm, device, fastest)

    def encode(
        self,
        model: str,
        rows: Sequence[tensor_pb2.RowSlice],
        rung: tensor_pb2.Rung.ValueType,
        lease_s: float,
        wait_s: float = 0.0,
        deadline: Deadline | None = None,
    ) -> tuple[tensor_pb2.TensorRef, float]:
        """Encodes rows of one or more payloads as one batch.

        Args:
            model: whose network, `name@revision`.
            rows: payload rows; every payload is [B, *shape] of the modality's dtype.
            rung: where fusion reaches the embeddings.
            lease_s: seconds for which they are kept.
            wait_s: seconds to wait for room for them.
            deadline: until when payload rows may be fetched; None: for a minute.

        Returns:
            A ref to the embeddings [rows, *embedding], and the seconds that the network took.

        Raises:
            ModelNotFound, InvalidRequest, ReadNotProven, Overloaded.
            InternalError: an embedding is not finite.
            DeadlineExceeded: payload rows could not be fetched in time.
        """
        batch = self._gather(model, rows, deadline)
        started = time.perf_counter()
        embedded = self._embed(model, batch)
        networks.synchronize(self._device)
        seconds = time.perf_counter() - started
        embedded.check_finite()
        self._count(batch)
        return self._publisher.publish(embedded.embeddings, rung, lease_s, wait_s), seconds

    def embed(self, model: str, rows: Sequence[tensor_pb2.RowSlice], deadline: Deadline | None = None) -> Embedded:
        """As `encode`, for fusion in the same process: the embeddings stay where they are, on a GPU unfinished."""
        batch = self._gather(model, rows, deadline)
        embedded = self._embed(model, batch)
        self._count(batch)
        return embedded

    @property
    def resource(self) -> str:
        """What the networks compute on: "cpu", or the GPU's UUID."""
        return networks.resource_of(self._device)

    def ready_call(self, model: str, batch_size: int) -> Callable[[], torch.Tensor]:
        """A call of the network for a batch of this size, to be timed; it has run once.

        Raises:
            ModelNotFound: the model is not loaded here.
            PackageError: the network fails, or returns another shape than model.toml states, or no finite numbers.
        """
        return self._ready_call(self._loaded(model), batch_size)

    def _gather(
        self, model: str, rows: Sequence[tensor_pb2.RowSlice], deadline: Deadline | None
    ) -> NDArray[np.generic]:
        spec = self._loaded(model).package.modalities[self.modality]
        return self._reader.gather(rows, spec.dtype, spec.shape, deadline)

    def _embed(self, model: str, batch: NDArray[np.generic]) -> Embedded:
        loaded = self._loaded(model)
        dtype, part = loaded.package.modalities[self.modality].dtype, self._part(loaded.package)
        embeddings = networks.as_fp32(loaded.network(networks.to_tensor(batch, dtype, self._device)))
        part.check_shape(embeddings, len(batch))
        # Computed where they are, before the wait for them that there is anyway.
        return Embedded(embeddings, networks.finite_soon(embeddings), part)

    def _count(self, batch: NDArray[np.generic]) -> None:
        with self._lock:
            self.counters["calls"] += 1
            self.counters["items"] += len(batch)
            self.counters["payload_bytes_read"] += batch.nbytes

    def _make(self, package: ModelPackage) -> torch.nn.Module:
        if self.modality not in package.modalities:
            raise ModelNotFound(f"model '{package.name}' has no modality '{self.modality}'")
        return networks.load_encoder(package, self.modality, self._device)

    def _warm(self, loaded: networks.Loaded) -> None:
        self._part(loaded.package).check_rows_apart(self._call(loaded, 2), loaded.precision)

    def _ready_call(self, loaded: networks.Loaded, batch_size: int) -> Callable[[], torch.Tensor]:
        run = partial(self._call(loaded, batch_size), slice(None))
        self._part(loaded.package).run(run, batch_size)
        return run

    def _call(self, loaded: networks.Loaded, rows: int) -> Callable[[slice], torch.Tensor]:
        """The network on some of so many example rows."""
        tensor = networks.encoder_inputs(loaded.package, self.modality, rows, self._device)

        def run(some: slice) -> torch.Tensor:
            embeddings: torch.Tensor = loaded.network(tensor[some]).cpu()
            return embeddings

        return run

    def _part(self, package: ModelPackage) -> networks.Part:
        return networks.encoder_part(package, self.modality)

    def _loaded(self, model: str) -> networks.Loaded:
        loaded = self.networks.get(model)
        if loaded is None:
            raise ModelNotFound(f"model '{model}' is not loaded in encoder/{self.modality}")
        return loaded
