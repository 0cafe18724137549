"""The networks of `tvlt`: encoders make tokens of patches, and one transformer sees the tokens of all modalities."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .geometry import COLOURS, FRAMES, HEAD_WIDTH, MODALITIES, of_this_package

CLASSES = 2
GEOMETRY = of_this_package()
WIDTH = GEOMETRY.width


def _embedding(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, WIDTH) * 0.02)


class PatchEmbedding(nn.Module):
    """Patches on a grid -> tokens: a linear map, plus what tells the patch's modality, row and column."""

    def __init__(self, rows: int, columns: int, patch_values: int) -> None:
        super().__init__()
        self.project = nn.Linear(patch_values, WIDTH)
        self.rows, self.columns, self.modality = _embedding(rows, 1), _embedding(columns), _embedding()

    def forward(self, patches: Tensor) -> Tensor:
        """Patches, uint8 [N, rows, columns, values] -> tokens, float32 [N, rows * columns, width]."""
        tokens: Tensor = self.project(patches.float() / 127.5 - 1)
        return (tokens + (self.rows + self.columns + self.modality)).flatten(1, 2)


class VideoEncoder(nn.Module):
    """For frames; the rows of its grid are the frames, the columns the places within one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = PatchEmbedding(FRAMES, math.prod(GEOMETRY.frame_grid), COLOURS * math.prod(GEOMETRY.patch))

    def forward(self, payload: Tensor) -> Tensor:
        """Frames, uint8 [N, 8, 3, height, width] -> tokens [N, tokens, width]."""
        (rows, columns), (height, width) = GEOMETRY.frame_grid, GEOMETRY.patch
        patches = payload.reshape(-1, FRAMES, COLOURS, rows, height, columns, width).permute(0, 1, 3, 5, 2, 4, 6)
        tokens: Tensor = self.embed(patches.reshape(-1, FRAMES, rows * columns, COLOURS * height * width))
        return tokens


class AudioEncoder(nn.Module):
    """For log-mel spectrograms; the rows of its grid are frequencies, the columns moments."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = PatchEmbedding(*GEOMETRY.audio_grid, math.prod(GEOMETRY.patch))

    def forward(self, payload: Tensor) -> Tensor:
        """Spectrograms, uint8 [N, bands, moments] -> tokens [N, tokens, width]."""
        (rows, columns), (height, width) = GEOMETRY.audio_grid, GEOMETRY.patch
        patches = payload.reshape(-1, rows, height, columns, width).transpose(2, 3)
        tokens: Tensor = self.embed(patches.reshape(-1, rows, columns, height * width))
        return tokens


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.queries_keys_values, self.attended = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [N, tokens, width] -> the same shape."""
        parts = self.queries_keys_values(self.norm(tokens)).unflatten(-1, (3, -1, HEAD_WIDTH))
        queries, keys, values = parts.permute(2, 0, 3, 1, 4).unbind()  # each [N, heads, tokens, 64]
        attended = scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
        tokens = tokens + self.attended(attended)
        result: Tensor = tokens + self.mlp(self.mlp_norm(tokens))
        return result


class Fusion(nn.Module):
    """The joint transformer over a class token and whatever tokens are there, and the head on the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.class_token = _embedding(1, 1)
        self.layers = nn.Sequential(*(Layer() for _ in range(GEOMETRY.depth)))
        self.head = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, CLASSES)
        )

    def forward(self, embeddings: dict[str, Tensor]) -> Tensor:
        """Tokens [N, tokens, width] by modality, any non-empty subset -> probabilities of the sentiments [N, 2]."""
        present = [embeddings[modality] for modality in MODALITIES if modality in embeddings]
        tokens = self.layers(torch.cat([self.class_token.expand(present[0].shape[0], -1, -1), *present], 1))
        output: Tensor = self.head(tokens[:, 0]).softmax(-1)
        return output
