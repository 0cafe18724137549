"""The networks of the reference model `har`: one encoder per modality and one fusion for every modality set.

The costs differ on purpose and honestly: `motion` is a small perceptron on 16 numbers, `gyro` a short and narrow
convolution stack, `acc`, the input that says most, a deeper and wider one. Batch norm is used with its running
statistics at inference, so rows never see each other.
"""

import torch
from torch import Tensor, nn

EMBEDDING = 64
CLASSES = 6
MODALITIES = ("acc", "gyro", "motion")


def convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    """One step of a stack: a padded 1-d convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv1d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm1d(outputs),
        nn.ReLU(),
    )


class SignalEncoder(nn.Module):
    """Convolutions over time, then the mean and the maximum over time, then one embedding.

    Args:
        layers: (channels, kernel, stride) of each convolution.
        scale: what one unit of the signal is multiplied with, to bring it near unit variance.
    """

    def __init__(self, layers: tuple[tuple[int, int, int], ...], scale: float) -> None:
        super().__init__()
        self.scale = scale
        steps: list[nn.Module] = []
        channels = 3
        for width, kernel, stride in layers:
            steps.append(convolution(channels, width, kernel, stride))
            channels = width
        self.steps = nn.Sequential(*steps)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(2 * channels, EMBEDDING))

    def forward(self, payload: Tensor) -> Tensor:
        """Encode windows, FP32 `[N, 128, 3]`, to embeddings, FP32 `[N, 64]`."""
        hidden = self.steps(payload.transpose(1, 2) * self.scale)
        pooled = torch.cat([hidden.mean(2), hidden.amax(2)], dim=1)
        embedding: Tensor = self.head(pooled)
        return embedding


class AccelerationEncoder(SignalEncoder):
    """Encodes `acc`, in g: the deep stack, about 8 million multiplications per item."""

    def __init__(self) -> None:
        super().__init__(((48, 9, 2), (96, 5, 1), (96, 5, 1), (128, 5, 2), (128, 3, 1)), scale=2.0)


class RotationEncoder(SignalEncoder):
    """Encodes `gyro`, in rad/s: the short stack, about 0.3 million multiplications per item."""

    def __init__(self) -> None:
        super().__init__(((24, 7, 2), (32, 5, 2), (48, 5, 2)), scale=2.5)


class MotionEncoder(nn.Module):
    """Encodes `motion`, the 4 x 4 summary of the acceleration magnitude."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Sequential(
            nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, EMBEDDING)
        )

    def forward(self, payload: Tensor) -> Tensor:
        """Encode summaries, FP32 `[N, 4, 4]`, to embeddings, FP32 `[N, 64]`."""
        embedding: Tensor = self.steps(payload)
        return embedding


class Fusion(nn.Module):
    """Adds one projection per modality that is there, each with its own bias, so the set itself is an input too."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleDict({name: nn.Linear(EMBEDDING, 96) for name in MODALITIES})
        self.head = nn.Sequential(nn.ReLU(), nn.Dropout(0.2), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def logits(self, embeddings: dict[str, Tensor]) -> Tensor:
        """Fuse embeddings, FP32 `[N, 64]` each, to logits, FP32 `[N, 6]`; what training needs."""
        parts = [self.projections[name](embeddings[name]) for name in sorted(embeddings)]
        logits: Tensor = self.head(torch.stack(parts).sum(0))
        return logits

    def forward(self, embeddings: dict[str, Tensor]) -> Tensor:
        """Fuse embeddings, FP32 `[N, 64]` each, to probabilities, FP32 `[N, 6]`."""
        return self.logits(embeddings).softmax(1)
