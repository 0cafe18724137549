"""The sizes of `tvlt` at a scale, and how many multiplications each modality set takes. Knows no torch."""

import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mosel.errors import PackageError
from mosel.modality import ModalitySet, format_set, subsets

MODALITIES = ("audio", "video")
HEAD_WIDTH = 64
FRAMES, COLOURS = 8, 3

# How often the rows and the columns of the patch grids halve; the patches shrink the other way round, which keeps
# frames square and the spectrogram's ratio.
_HALVED = {1.0: (1, 1), 0.5: (2, 1), 0.25: (2, 2)}


@dataclass(frozen=True)
class Geometry:
    """TVLT (Tang et al., "TVLT: Textless Vision-Language Transformer", NeurIPS 2022) at a scale.

    At scale 1: 12 layers, 768 wide, 8 frames of 14 x 14 patches of 16 x 16 x 3 values, and a log-mel spectrogram of
    128 bands x 1024 moments in 8 x 64 patches of 16 x 16. Depth, width and the number of tokens shrink alike, see
    README.md.

    Attributes:
        scale: 1, 0.5 or 0.25.

    Raises:
        PackageError: another scale.
    """

    scale: float

    def __post_init__(self) -> None:
        if self.scale not in _HALVED:
            raise PackageError(f"tvlt: parameters.scale holds {self.scale}; expected one of 1, 0.5, 0.25")

    @property
    def width(self) -> int:
        """Values of a token."""
        return round(768 * self.scale)

    @property
    def depth(self) -> int:
        """Layers of the joint transformer."""
        return round(12 * self.scale)

    @property
    def heads(self) -> int:
        """Attention heads, each 64 wide."""
        return self.width // HEAD_WIDTH

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch: pixels of a frame, or bands and moments of the spectrogram."""
        rows_halved, columns_halved = _HALVED[self.scale]
        return 16 // columns_halved, 16 // rows_halved

    @property
    def frame_grid(self) -> tuple[int, int]:
        """Rows and columns of patches in a frame."""
        rows_halved, columns_halved = _HALVED[self.scale]
        return 14 // rows_halved, 14 // columns_halved

    @property
    def audio_grid(self) -> tuple[int, int]:
        """Patches along frequency and along time in the spectrogram."""
        rows_halved, columns_halved = _HALVED[self.scale]
        return 8 // rows_halved, 64 // columns_halved

    @property
    def payloads(self) -> dict[str, tuple[int, ...]]:
        """Payload shape of one item by modality, UINT8."""
        height, width = self.patch
        (rows, columns), (bands, moments) = self.frame_grid, self.audio_grid
        return {
            "audio": (bands * height, moments * width),
            "video": (FRAMES, COLOURS, rows * height, columns * width),
        }

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of one item by modality."""
        return {"audio": math.prod(self.audio_grid), "video": FRAMES * math.prod(self.frame_grid)}

    @cached_property
    def multiplications(self) -> dict[ModalitySet, int]:
        """Multiplications of one item by modality set, in matrix products: encoders and joint transformer."""
        return {modality_set: self._multiplications(modality_set) for modality_set in subsets(MODALITIES)}

    def _multiplications(self, modality_set: Iterable[str]) -> int:
        patch_values = {"audio": math.prod(self.patch), "video": COLOURS * math.prod(self.patch)}
        encoders = sum(self.tokens[modality] * patch_values[modality] * self.width for modality in modality_set)
        tokens = 1 + sum(self.tokens[modality] for modality in modality_set)  # 1: the class token
        # Per token and layer: queries, keys, values and their output 4 width^2, the MLP 8 width^2; every pair of
        # tokens meets twice.
        layer = tokens * self.width * (12 * self.width + 2 * tokens)
        return encoders + self.depth * layer

    def ratios(self) -> dict[str, float]:
        """Multiplications of each modality set over those of all modalities."""
        full = max(self.multiplications.values())
        return {format_set(modality_set): count / full for modality_set, count in self.multiplications.items()}


def of_this_package() -> Geometry:
    """The geometry at the scale that model.toml beside this file states."""
    content = tomllib.loads((Path(__file__).parent / "model.toml").read_text(encoding="utf-8"))
    return Geometry(float(content["parameters"]["scale"]))
