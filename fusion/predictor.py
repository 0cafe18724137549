"""The fusion networks of every model. Knows no gRPC."""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from mosel.compute import networks
from mosel.compute.forms import Forms
from mosel.compute.joined import Embedded, JoinedEncoders
from mosel.deadline import Deadline
from mosel.errors import InvalidRequest, ModelNotFound
from mosel.modality import ModalitySet, format_set, parse_set, subsets
from mosel.packages.model_package import ModelPackage
from mosel.tensors import DTYPES, from_proto, to_proto
from mosel.transport.torch_exchange import TensorReader
from mosel.v1 import fusion_pb2, tensor_pb2

# The rows of one group's embeddings, or payloads, by modality.
GroupRows = Mapping[str, Sequence[tensor_pb2.RowSlice]]


class Predictor:
    """Rows of any non-empty set of modalities in, outputs out. Thread-safe.

    Args:
        device: where the networks run.
        reader: gathers embedding rows.
        forms: finds the form that a network is fastest in; None: it is served as it is made.
        joined: the encoders that it may call itself.

    Attributes:
        networks: those that are loaded, by model, `name@revision`.
        joined: as given.
    """

    def __init__(
        self,
        device: torch.device,
        reader: TensorReader,
        forms: Forms | None = None,
        joined: JoinedEncoders | None = None,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._device, self._reader, self.joined = device, reader, joined or JoinedEncoders()
        self.networks = networks.Hosted(
            lambda package: networks.load_fusion(package, device),
            self._warm,
            device,
            forms.of_fusion if forms else None,
        )

    def fuse(
        self,
        model: str,
        groups: Sequence[GroupRows],
        deadline: Deadline | None = None,
        *,
        from_payloads: bool = False,
    ) -> tuple[list[tensor_pb2.Tensor], float]:
        """Predicts groups of items; groups with the same modality set are one batch.

        Args:
            model: whose network, `name@revision`.
            groups: rows of embeddings by modality, all modalities of a group with the same number of rows.
            deadline: until when rows may be fetched; None: for a minute.
            from_payloads: they are rows of payloads, which joined encoders encode first.

        Returns:
            The output [rows, *output] of each group, and the seconds that the networks took.

        Raises:
            ModelNotFound, InvalidRequest, ReadNotProven.
            ServiceUnavailable: an encoder is not joined.
            InternalError: an output is not finite.
            DeadlineExceeded: rows could not be fetched in time.
        """
        loaded = self._loaded(model)
        package = loaded.package
        sizes = [_row_count(group, package) for group in groups]
        by_set: dict[frozenset[str], list[int]] = {}
        for index, group in enumerate(groups):
            by_set.setdefault(frozenset(group), []).append(index)
        outputs = [tensor_pb2.Tensor()] * len(groups)
        seconds = 0.0
        for modality_set, indices in by_set.items():
            rows = {m: [part for i in indices for part in groups[i][m]] for m in sorted(modality_set)}
            embedded = list[Embedded]()
            started = time.perf_counter()
            if from_payloads:
                embedded = [self.joined.of(m).embed(model, parts, deadline) for m, parts in rows.items()]
                batch = {m: one.embeddings for m, one in zip(rows, embedded, strict=True)}
            else:
                batch = {m: self._gather(package, m, parts, deadline) for m, parts in rows.items()}
                started = time.perf_counter()
            output = networks.as_fp32(loaded.network(batch))
            output = output.cpu() if output.is_cuda else output
            seconds += time.perf_counter() - started
            for one in embedded:
                one.check_finite()
            part = networks.fusion_part(package, modality_set)
            part.check_shape(output, sum(sizes[i] for i in indices))
            part.check_finite(networks.are_finite(output))
            answers, answered_in = output.numpy(), DTYPES[package.output.dtype]
            if answers.dtype != answered_in:
                answers = answers.astype(answered_in)
                # Numbers may be too large for the type that they are answered in.
                part.check_finite(bool(np.isfinite(answers).all()))
            done = 0
            for index in indices:
                outputs[index] = to_proto(answers[done : done + sizes[index]])
                done += sizes[index]
        with self._lock:
            self.counters["calls"] += 1
            self.counters["items"] += sum(sizes)
            self.counters["embedding_bytes_read"] = self._reader.bytes_read
        return outputs, seconds

    @property
    def resource(self) -> str:
        """What the networks compute on: "cpu", or the GPU's UUID."""
        return networks.resource_of(self._device)

    def ready_call(self, model: str, modality_set: str, batch_size: int) -> Callable[[], torch.Tensor]:
        """A call of the network for a batch of this size, to be timed; it has run once.

        Raises:
            ModelNotFound: there is no such model.
            InvalidRequest: the model does not have these modalities.
            PackageError: the network fails, or returns another shape than model.toml states, or no finite numbers.
        """
        loaded = self._loaded(model)
        package, modalities = loaded.package, parse_set(modality_set)
        if not modalities <= package.modalities.keys():
            raise InvalidRequest(
                f"modality_set is '{modality_set}'; expected a subset of {format_set(package.modalities)}"
            )
        return self._ready_call(loaded, modalities, batch_size)

    def _warm(self, loaded: networks.Loaded) -> None:
        for modality_set in subsets(loaded.package.modalities):
            call = self._call(loaded, modality_set, 2)
            networks.fusion_part(loaded.package, modality_set).check_rows_apart(call, loaded.precision)

    def _ready_call(
        self, loaded: networks.Loaded, modalities: ModalitySet, batch_size: int
    ) -> Callable[[], torch.Tensor]:
        run = partial(self._call(loaded, modalities, batch_size), slice(None))
        networks.fusion_part(loaded.package, modalities).run(run, batch_size)
        return run

    def _call(self, loaded: networks.Loaded, modalities: ModalitySet, rows: int) -> Callable[[slice], torch.Tensor]:
        """The network on some of so many example rows."""
        batch = networks.fusion_inputs(loaded.package, modalities, rows, self._device)

        def run(some: slice) -> torch.Tensor:
            output: torch.Tensor = loaded.network(networks.some_rows(batch, some)).cpu()
            return output

        return run

    def _gather(
        self, package: ModelPackage, modality: str, rows: Sequence[tensor_pb2.RowSlice], deadline: Deadline | None
    ) -> torch.Tensor:
        return self._reader.gather(rows, "FP32", package.modalities[modality].embedding, deadline)

    def _loaded(self, model: str) -> networks.Loaded:
        loaded = self.networks.get(model)
        if loaded is None:
            raise ModelNotFound(f"model '{model}' is not loaded in fusion")
        return loaded


def answers_of(outputs: Iterable[tensor_pb2.Tensor]) -> list[fusion_pb2.Answers]:
    """The index of the largest output of each row, over all its dimensions, and that output."""
    answers = []
    for output in outputs:
        array = from_proto(output, "output")
        rows = array.reshape(len(array), math.prod(array.shape[1:]))
        labels = rows.argmax(axis=1)
        largest = rows[np.arange(len(rows)), labels]
        answers.append(fusion_pb2.Answers(labels=labels.tolist(), confidences=largest.tolist()))
    return answers


def _row_count(group: GroupRows, package: ModelPackage) -> int:
    if not group or not group.keys() <= package.modalities.keys():
        raise InvalidRequest(f"a group has modalities {sorted(group)}; expected some of {sorted(package.modalities)}")
    counts = {modality: sum(part.row_count for part in rows) for modality, rows in group.items()}
    if len(set(counts.values())) != 1:
        raise InvalidRequest(f"a group has rows {counts}; expected as many for every modality")
    return next(iter(counts.values()))
