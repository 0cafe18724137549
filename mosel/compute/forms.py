"""The form that a network is fastest in: as it is, channels last, or traced, frozen and optimised by TorchScript.

Every form computes the same as the network; whether it does is checked wherever a form is used.
"""

import copy
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.jit import TracerWarning  # type: ignore[attr-defined] # not in its list of names

from mosel.compute import networks
from mosel.compute.networks import Inputs, Loaded, Part, some_rows
from mosel.config import Settings
from mosel.modality import FUSION, subsets
from mosel.profiles.forms import Choice, keep_choice, kept_choice
from mosel.profiles.hardware import device_name, this_hardware, this_software

EAGER, CHANNELS_LAST, TORCHSCRIPT = "eager", "channels_last", "torchscript"
# Forms are compared, and timed, on batches of so many rows, the larger ones only of networks that are not slow; and
# traced with others, the last rows.
_BATCH_SIZES, _LEAST, _TRACED = (1, 3, 8, 32), 3, slice(32, 34)
_ROWS = 34
_COMPARING_S = 0.25
# Another form is taken if it is faster by so much: below that times differ by chance.
_GAIN = 0.05
_TIMING_S, _ROUNDS, _LEAST_ROUNDS = 0.5, 30, 3
# TorchScript keeps weights once for each modality set of a fusion; so much of them at most.
_COPIES_MIB = 256

Examples = Sequence[tuple[Part, Inputs]]

log = logging.getLogger(__name__)


class Forms:
    """Finds the fastest form of networks on this hardware, and keeps what was found beside the profiles.

    Args:
        settings: the effective settings.
        device: where the networks are.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self._device, self._folder = device, settings.profiles_dir
        self._hardware = this_hardware(settings, device_name({networks.resource_of(device)}))

    def of_encoder(self, loaded: Loaded, modality: str) -> Loaded:
        """The encoder of a modality in its fastest form."""
        package = loaded.package
        inputs = networks.encoder_inputs(package, modality, _ROWS, self._device)
        return self._of(loaded, modality, [(networks.encoder_part(package, modality), inputs)])

    def of_fusion(self, loaded: Loaded) -> Loaded:
        """The fusion network in the form that is fastest over all modality sets."""
        package = loaded.package
        examples = [
            (networks.fusion_part(package, s), networks.fusion_inputs(package, s, _ROWS, self._device))
            for s in subsets(package.modalities)
        ]
        return self._of(loaded, FUSION, examples)

    def _of(self, loaded: Loaded, lane: str, examples: Examples) -> Loaded:
        if not loaded.package.optimise:
            return loaded
        started = time.perf_counter()
        with torch.inference_mode():
            trial = _Trial(loaded, examples, self._device)
            kept = kept_choice(loaded.package, lane, self._hardware, self._folder)
            if kept is None or not trial.add(kept.form):
                kept = self._choose(trial, lane)
        log.info(
            "form of a network",
            extra={
                "model": loaded.package.id,
                "lane": lane,
                "form": kept.form,
                "speedup": kept.speedup,
                "largest_difference": trial.differences.get(kept.form, 0.0),
                "not_used": kept.refused,
                "seconds": round(time.perf_counter() - started, 2),
            },
        )
        return trial.forms[kept.form]

    def _choose(self, trial: "_Trial", lane: str) -> Choice:
        """Tries all forms, takes the fastest, and keeps that."""
        for form in _MAKERS:
            trial.add(form)
        times = trial.relative_times()
        fastest = min(times, key=lambda form: times[form])
        form = fastest if times[fastest] < 1 - _GAIN else EAGER
        package = trial.forms[EAGER].package
        choice = Choice(
            model=package.name,
            code=package.code,
            lane=lane,
            hardware=self._hardware,
            torch=this_software().torch,
            tolerance=package.tolerance,
            form=form,
            speedup=round(1 / times[form], 2),
            refused=trial.refused,
        )
        # A replica that starts at the same time may have chosen something else just now.
        before = kept_choice(package, lane, self._hardware, self._folder)
        if before is not None and before.form in trial.forms:
            return before
        keep_choice(choice, package, self._folder)
        return choice


class _Trial:
    """The forms of one network that compute the same as it, and why others do not.

    Args:
        loaded: the network as it is.
        examples: what is expected of it, and rows to call it with: once, or for each modality set of a fusion.
        device: where it is.

    Attributes:
        forms: those that may be used, by name.
        differences: by how much their numbers differ from those of the network as it is; a share of the largest one.
        refused: why others may not be used, by name.
    """

    def __init__(self, loaded: Loaded, examples: Examples, device: torch.device) -> None:
        self.forms = {EAGER: loaded}
        self.differences: dict[str, float] = {}
        self.refused: dict[str, str] = {}
        self._examples, self._device = examples, device
        self._batches: list[tuple[Inputs, torch.Tensor]] = []
        # What one thread computes alone is timed without what others make it wait, as they start at the same time.
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self._clock = time.thread_time if alone else time.perf_counter

    def add(self, form: str) -> bool:
        """Makes a form and checks that it computes the same; returns whether it may be used."""
        if form in self.forms or form in self.refused:
            return form in self.forms
        eager = self.forms[EAGER]
        try:
            made = _MAKERS[form](eager.network, [inputs for _, inputs in self._examples])
            if made is None:
                return False
            self._check(replace(eager, network=made, form=form))
        except Exception as error:  # noqa: BLE001 (whatever networks and TorchScript raise)
            self.refused[form] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return form in self.forms

    def relative_times(self) -> dict[str, float]:
        """The time of each form as a share of that of the network as it is: the mean over batches of its medians."""
        batches = self._affordable()
        if not batches or len(self.forms) == 1:
            return {EAGER: 1.0}
        times: dict[str, list[list[float]]] = {form: [[] for _ in batches] for form in self.forms}
        until, rounds = time.perf_counter() + _TIMING_S, 0
        while rounds < _LEAST_ROUNDS or (rounds < _ROUNDS and time.perf_counter() < until):
            rounds += 1
            for index, batch in enumerate(batches):
                for form, loaded in self.forms.items():
                    times[form][index].append(self._seconds(loaded, batch))
        medians = {form: [statistics.median(of_batch) for of_batch in of_form] for form, of_form in times.items()}
        return {
            form: statistics.mean(own / eager for own, eager in zip(of_form, medians[EAGER], strict=True))
            for form, of_form in medians.items()
        }

    def _check(self, made: Loaded) -> None:
        for part, inputs in self._examples:

            def call(rows: slice, inputs: Inputs = inputs) -> torch.Tensor:
                output: torch.Tensor = made.network(some_rows(inputs, rows))
                return output

            part.check_rows_apart(call, made.precision)
        difference, allowed = self._difference(made), made.package.tolerance + networks.ROUNDINGS * made.precision
        if not difference <= allowed:
            raise ValueError(f"its numbers differ by {difference:.2g} of the largest; allowed is {allowed:.2g}")
        self.forms[made.form], self.differences[made.form] = made, difference

    def _difference(self, made: Loaded) -> float:
        """The largest share by which numbers differ, over all batches."""
        shares = [0.0]
        for inputs, expected in self._expected():
            found = made.network(inputs)
            if (found.shape, found.dtype) != (expected.shape, expected.dtype):
                raise ValueError(f"it returns {found.dtype} {list(found.shape)}; expected {list(expected.shape)}")
            largest = float(expected.double().abs().max())
            shares.append(float((found.double() - expected.double()).abs().max()) / max(largest, 1e-30))
        # Not by `max`, to which what is not a number is sometimes the smaller one.
        return float(torch.tensor(shares).max())

    def _expected(self) -> list[tuple[Inputs, torch.Tensor]]:
        """Batches of several sizes, and what the network as it is returns for them."""
        begun = time.perf_counter()
        for size in _BATCH_SIZES if not self._batches else ():
            if size > _LEAST and time.perf_counter() - begun > _COMPARING_S:
                break
            for _, inputs in self._examples:
                batch = some_rows(inputs, slice(size))
                self._batches.append((batch, self.forms[EAGER].network(batch)))
        return self._batches

    def _affordable(self) -> list[Inputs]:
        """The batches, in their order, that can be timed often enough; one at least."""
        batches: list[Inputs] = []
        left = _TIMING_S
        for inputs, _ in self._batches:
            left -= _LEAST_ROUNDS * len(self.forms) * self._seconds(self.forms[EAGER], inputs)
            if left < 0 and batches:
                break
            batches.append(inputs)
        return batches

    def _seconds(self, loaded: Loaded, inputs: Inputs) -> float:
        started = self._clock()
        loaded.network(inputs)
        networks.synchronize(self._device)
        return self._clock() - started


class _Traced(torch.nn.Module):
    """A traced network for each kind of input: the payload of an encoder, or each modality set of a fusion."""

    def __init__(self, traced: dict[frozenset[str], torch.nn.Module]) -> None:
        super().__init__()
        self._traced = traced

    def forward(self, inputs: Inputs) -> torch.Tensor:
        output: torch.Tensor = self._traced[_kind(inputs)](inputs)
        return output


def _kind(inputs: Inputs) -> frozenset[str]:
    return frozenset(inputs) if isinstance(inputs, dict) else frozenset()


def _channels_last(network: torch.nn.Module, _: Sequence[Inputs]) -> torch.nn.Module | None:
    """The same with images as height x width x channels; None if nothing in it knows images."""
    if not any(parameter.dim() == 4 for parameter in network.parameters()):
        return None
    changed: torch.nn.Module = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not known there
    return changed


def _torchscript(network: torch.nn.Module, examples: Sequence[Inputs]) -> torch.nn.Module:
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    if len(examples) > 1 and len(examples) * size > _COPIES_MIB << 20:
        raise ValueError(f"its weights would be there {len(examples)} times, of {size >> 20} MiB each")
    return _Traced({_kind(inputs): _trace(network, some_rows(inputs, _TRACED)) for inputs in examples}).eval()


def _trace(network: torch.nn.Module, inputs: Inputs) -> torch.nn.Module:
    with warnings.catch_warnings(record=True) as warned:
        # TorchScript is deprecated, and nothing replaces it here: what does needs a C++ compiler where it runs.
        warnings.filterwarnings("ignore", r"`?torch\.jit\.")
        # What the trace cannot follow, such as a branch on data, it warns of. In torch's own code that is harmless.
        warnings.simplefilter("always", TracerWarning)
        TracerWarning.ignore_lib_warnings()  # type: ignore[no-untyped-call] # of torch
        traced = torch.jit.trace(network, (inputs,), check_trace=False)  # type: ignore[no-untyped-call] # of torch
        if wrong := [warning for warning in warned if issubclass(warning.category, TracerWarning)]:
            raise ValueError(f"it cannot be traced: {wrong[0].message}")
        # Else it would optimise anew, in the middle of calls, for the first batch sizes that come.
        torch.jit.set_fusion_strategy([])
        # By way of a file in memory: what is optimised where it was traced is never freed again, weights included.
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)  # type: ignore[no-untyped-call] # of torch
        return torch.jit.optimize_for_inference(torch.jit.freeze(loaded))


_MAKERS: dict[str, Callable[[torch.nn.Module, Sequence[Inputs]], torch.nn.Module | None]] = {
    CHANNELS_LAST: _channels_last,
    TORCHSCRIPT: _torchscript,
}
