"""The networks of one modality, for every model that has it. Knows no gRPC."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from mosel.compute import networks
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

    Attributes:
        networks: those that are loaded, by model, `name@revision`.
    """

    def __init__(
        self,
        modality: str,
        device: torch.device,
        reader: Reader,
        publisher: TensorPublisher,
    ) -> None:
        self.modality = modality
        self.counters: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._device, self._reader, self._publisher = device, reader, publisher
        self.networks = networks.Hosted(self._make, lambda loaded: self._ready_call(loaded, 1), device)

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
            DeadlineExceeded: payload rows could not be fetched in time.
        """
        loaded = self._loaded(model)
        spec = loaded.package.modalities[self.modality]
        batch = self._reader.gather(rows, spec.dtype, spec.shape, deadline)
        started = time.perf_counter()
        embeddings = loaded.network(networks.to_tensor(batch, spec.dtype, self._device)).float()
        networks.synchronize(self._device)
        seconds = time.perf_counter() - started
        networks.check_shape(loaded.package, spec.encoder, embeddings, len(batch), spec.embedding)
        with self._lock:
            self.counters.update(calls=1, items=len(batch), payload_bytes_read=batch.nbytes)
        return self._publisher.publish(embeddings, rung, lease_s, wait_s), seconds

    @property
    def resource(self) -> str:
        """What the networks compute on: "cpu", or the GPU's UUID."""
        return networks.resource_of(self._device)

    def ready_call(self, model: str, batch_size: int) -> Callable[[], torch.Tensor]:
        """A call of the network for a batch of this size, to be timed; it has run once.

        Raises:
            ModelNotFound: the model is not loaded here.
            PackageError: the network fails, or returns another shape than model.toml states.
        """
        return self._ready_call(self._loaded(model), batch_size)

    def _make(self, package: ModelPackage) -> torch.nn.Module:
        if self.modality not in package.modalities:
            raise ModelNotFound(f"model '{package.name}' has no modality '{self.modality}'")
        return networks.load_encoder(package, self.modality, self._device)

    def _ready_call(self, loaded: networks.Loaded, batch_size: int) -> Callable[[], torch.Tensor]:
        spec = loaded.package.modalities[self.modality]
        batch = networks.example_payload(loaded.package, self.modality, batch_size)
        tensor = networks.to_tensor(batch, spec.dtype, self._device)

        def run() -> torch.Tensor:
            embeddings: torch.Tensor = loaded.network(tensor).cpu()
            return embeddings

        networks.check_runs(loaded.package, spec.encoder, run, batch_size, spec.embedding)
        return run

    def _loaded(self, model: str) -> networks.Loaded:
        loaded = self.networks.get(model)
        if loaded is None:
            raise ModelNotFound(f"model '{model}' is not loaded in encoder/{self.modality}")
        return loaded
