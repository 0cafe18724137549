"""Encoders that share fusion's process and device: fusion calls them itself, without a step in between."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mosel.compute.networks import Part
from mosel.deadline import Deadline
from mosel.errors import ServiceUnavailable
from mosel.v1 import tensor_pb2


@dataclass(frozen=True)
class Embedded:
    """What an encoder made of some rows; on a GPU it may still be computed.

    Attributes:
        embeddings: [rows, *embedding], FP32, on the encoder's device.
        finite: whether all of them are; on a GPU a scalar there.
        part: of the package, for messages.
    """

    embeddings: torch.Tensor
    finite: torch.Tensor | bool
    part: Part

    def check_finite(self) -> None:
        """Waits for what is still computed.

        Raises:
            InternalError: an embedding is not finite.
        """
        self.part.check_finite(bool(self.finite))


class Embeds(Protocol):
    """An encoder as fusion sees it."""

    def embed(self, model: str, rows: Sequence[tensor_pb2.RowSlice], deadline: Deadline | None = None) -> Embedded:
        """Encodes payload rows, and leaves the embeddings where they are; errors as of `ModalityEncoder.encode`."""
        ...


class JoinedEncoders:
    """The encoders of one process that fusion may call. Thread-safe.

    Args:
        modalities: theirs; none where each service has a process of its own.
    """

    def __init__(self, modalities: Iterable[str] = ()) -> None:
        self.modalities = frozenset(modalities)
        self._encoders: dict[str, Embeds] = {}

    def join(self, modality: str, encoder: Embeds) -> None:
        """An encoder is there; of several for a modality, the first is taken."""
        if modality in self.modalities:
            self._encoders.setdefault(modality, encoder)

    def of(self, modality: str) -> Embeds:
        """The encoder of a modality.

        Raises:
            ServiceUnavailable: it is not there (yet).
        """
        if modality not in self._encoders:
            raise ServiceUnavailable(f"encoder/{modality} is not in the process of fusion")
        return self._encoders[modality]
