"""What every image becomes.

Input: options and the files' own sizes, as the driver settles them. Output: one size and mode for all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pipeline.model import ModelInput


@dataclass(frozen=True)
class Target:
    """What every image becomes: `height` and `width` in pixels, and `mode` L or RGB.

    `draft` lets a JPEG of at least four times these sides be decoded at a reduced scale. `model_input` is what it
    becomes a second time, for a model that is given other pixels.
    """

    height: int
    width: int
    mode: Literal["L", "RGB"]
    draft: bool = True
    model_input: ModelInput | None = None

    @property
    def channels(self) -> int:
        """1 for L, 3 for RGB."""
        return len(self.mode)

    @property
    def num_values(self) -> int:
        """Values of one image, D = H·W·C, which is also its size in bytes."""
        return self.height * self.width * self.channels

    @property
    def decoded_bytes(self) -> int:
        """Bytes of a decoded image, with those for the model."""
        return self.num_values + (self.model_input.num_values if self.model_input else 0)

    @property
    def without_model(self) -> Target:
        """The same for images that the model is not run on: the same pixels, decoded at the same scale."""
        return replace(self, model_input=self.model_input and replace(self.model_input, is_made=False))

    @property
    def largest(self) -> tuple[int, int]:
        """Height and width that a file is needed at, for whatever it becomes."""
        heights, widths = zip(
            (self.height, self.width), *([self.model_input.scaled] if self.model_input else []), strict=True
        )
        return max(heights), max(widths)

    @property
    def sides(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.height, self.width, self.channels

    @property
    def shape(self) -> list[int]:
        """[H, W], or [H, W, 3] for RGB."""
        return [self.height, self.width] if self.mode == "L" else [self.height, self.width, 3]
