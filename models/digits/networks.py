"""The networks of `digits`: three encoders of very different cost, and a fusion that takes any of their embeddings."""

import math

import torch
from torch import Tensor, nn

CLASSES = 10
EMBEDDING = {"audio": 64, "image": 64, "pen": 32}


def _convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class PenEncoder(nn.Module):
    """For the first two points of a pen path."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, EMBEDDING["pen"])
        )

    def forward(self, payload: Tensor) -> Tensor:
        """Points, float32 [N, 2, 2] in -1..1 -> embedding [N, 32]."""
        embedding: Tensor = self.layers(payload)
        return embedding


class ImageEncoder(nn.Module):
    """For degraded images of handwritten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _convolution(1, 16, 5),
            nn.MaxPool2d(2),
            _convolution(16, 48),
            _convolution(48, 48),
            nn.MaxPool2d(2),
            _convolution(48, 32),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, EMBEDDING["image"]),
        )

    def forward(self, payload: Tensor) -> Tensor:
        """Images, float32 [N, 28, 28] -> embedding [N, 64]."""
        embedding: Tensor = self.layers(payload.unsqueeze(1))
        return embedding


def mel_filters(bins: int, mels: int, sample_rate_hz: int, low_hz: float, high_hz: float) -> Tensor:
    """Triangular filters of equal width on the HTK mel scale, mel = 2595 log10(1 + f/700); float32 [bins, mels]."""
    low, high = (2595 * math.log10(1 + hz / 700) for hz in (low_hz, high_hz))
    edges = 700 * (10 ** (torch.linspace(low, high, mels + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.linspace(0, sample_rate_hz / 2, bins, dtype=torch.float64).unsqueeze(1)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (frequencies - left) / (centre - left), (right - frequencies) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0).float()


class LogMel(nn.Module):
    """Log-mel spectrogram: windows of 25 ms every 10 ms, 40 bands from 60 to 3,900 Hz."""

    WINDOW, STEP, FFT, MELS = 200, 80, 256, 40

    window: Tensor
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        filters = mel_filters(self.FFT // 2 + 1, self.MELS, 8_000, 60, 3_900)
        self.register_buffer("window", torch.hann_window(self.WINDOW), persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """Audio at 8 kHz, float32 [N, 8000] -> [N, 98, 40], about -2..4."""
        spectrum = torch.fft.rfft(audio.unfold(-1, self.WINDOW, self.STEP) * self.window, self.FFT)
        power: Tensor = spectrum.real.square() + spectrum.imag.square()
        return ((power @ self.filters + 1e-4).log() + 4) / 3


class AudioEncoder(nn.Module):
    """For one second of noisy speech; the log-mel front end is part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.logmel = LogMel()
        self.layers = nn.Sequential(
            _convolution(1, 24, 5, stride=2),
            _convolution(24, 48),
            nn.MaxPool2d(2),
            _convolution(48, 80),
            nn.MaxPool2d(2),
            _convolution(80, 128),
        )
        self.attention = nn.Conv1d(128 * 5, 1, 1)
        self.project = nn.Sequential(nn.Dropout(0.3), nn.Linear(128 * 5, EMBEDDING["audio"]))

    def forward(self, payload: Tensor) -> Tensor:
        """Audio at 8 kHz, float32 [N, 8000] -> embedding [N, 64]."""
        return self.embed(self.logmel(payload))

    def embed(self, logmel: Tensor) -> Tensor:
        """Log-mel [N, 98, 40] -> embedding [N, 64]; apart from `forward` so that training can mask its input."""
        features: Tensor = self.layers(logmel.unsqueeze(1))  # [N, 128, time, mel]
        features = features.transpose(2, 3).flatten(1, 2)  # [N, 128 * mel, time]
        # Where the word is within the second is unknown: the network learns which moments to listen to.
        attention = self.attention(features).softmax(-1)
        embedding: Tensor = self.project((features * attention).sum(-1))
        return embedding


class Fusion(nn.Module):
    """Adds up the evidence of whatever modalities are there.

    The parts of an item are independent evidence given the digit, so their logits add up (a product of experts,
    Hinton 2002; the class prior is uniform). A small network that sees which modalities are there corrects the sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({modality: nn.Linear(width, CLASSES) for modality, width in EMBEDDING.items()})
        self.correction = nn.Sequential(
            nn.Linear(sum(EMBEDDING.values()) + len(EMBEDDING), 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, CLASSES)
        )

    def forward(self, embeddings: dict[str, Tensor]) -> Tensor:
        """Embeddings [N, width] by modality, any non-empty subset -> probabilities of the ten digits [N, 10]."""
        return self.logits(embeddings).softmax(-1)

    def logits(self, embeddings: dict[str, Tensor]) -> Tensor:
        """The same before the softmax, for training."""
        like = next(iter(embeddings.values()))
        present = [modality for modality in EMBEDDING if modality in embeddings]
        evidence = torch.stack([self.experts[modality](embeddings[modality]) for modality in present]).sum(0)
        # Not len(like), which a trace would take for a constant.
        items = like.shape[0]
        inputs = [embeddings.get(modality, like.new_zeros(items, width)) for modality, width in EMBEDDING.items()]
        mask = like.new_tensor([float(modality in embeddings) for modality in EMBEDDING]).expand(items, -1)
        corrected: Tensor = evidence + self.correction(torch.cat([*inputs, mask], 1))
        return corrected
