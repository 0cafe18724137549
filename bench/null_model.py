"""A model with the inputs and outputs of another, whose networks do nothing, or just take their time."""

import json
from pathlib import Path

from mosel.modality import format_set, subsets
from mosel.packages.model_package import ModelPackage, load_package

NAME = "nothing"
_BUSY = """
def compute(seconds):
    # Matrix products, which hold the core but not Python's lock, until this thread has had so much processor time.
    until, matrix = time.thread_time() + seconds, torch.ones(64, 64)
    while time.thread_time() < until:
        torch.mm(matrix, matrix)

"""
_ENCODER = """
class {name}(torch.nn.Module):
    def forward(self, payload: torch.Tensor) -> torch.Tensor:
        compute({busy_s} * len(payload))
        return torch.zeros(len(payload), {embedding})
"""
_FUSION = """
class Fusion(torch.nn.Module):
    def forward(self, embeddings: dict[str, torch.Tensor]) -> torch.Tensor:
        rows = len(next(iter(embeddings.values())))
        return torch.zeros(rows, {output})
"""


def write_null_model(
    models: Path, like: ModelPackage, only: tuple[str, ...] = (), busy_ms: float = 0.0
) -> ModelPackage:
    """Writes the package into a folder of model folders.

    Args:
        models: the folder of folders.
        like: the model whose shapes it takes.
        only: some of its modalities; empty: all.
        busy_ms: milliseconds of processor time that each encoder takes for each item.
    """
    folder = models / NAME
    folder.mkdir(parents=True)
    code, toml = (
        ["import time\n\nimport torch\n", _BUSY],
        [f'name = "{NAME}"\nversion = "1"\ndefault_min_accuracy = 0.0\nrandom_weights = true\noptimise = false\n'],
    )
    modalities = only or tuple(like.modalities)
    for modality in modalities:
        spec = like.modalities[modality]
        name = f"{modality.title()}Encoder"
        code.append(_ENCODER.format(name=name, busy_s=busy_ms / 1000, embedding=", ".join(map(str, spec.embedding))))
        toml.append(
            f'[modalities.{modality}]\ndtype = "{spec.dtype}"\nshape = {list(spec.shape)}\n'
            f'encoder = "networks:{name}"\nembedding = {list(spec.embedding)}\n'
        )
    code.append(_FUSION.format(output=", ".join(map(str, like.output.shape))))
    toml.append(f'[output]\nshape = {list(like.output.shape)}\n[fusion]\nclass = "networks:Fusion"\n')
    (folder / "networks.py").write_text("\n".join(code))
    (folder / "model.toml").write_text("\n".join(toml))
    # Made up, so that every modality helps: otherwise fewer would be run.
    sets = {format_set(chosen): len(chosen) / len(modalities) for chosen in subsets(modalities)}
    accuracy = {"source": "made up", "metric": "accuracy", "validation": {"samples": 0, "sets": sets}}
    (folder / "accuracy.json").write_text(json.dumps(accuracy))
    return load_package(folder)
