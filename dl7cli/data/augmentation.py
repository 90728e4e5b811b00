"""Changes to training images, made by tensor operations on whole batches, and the way from bytes to network input.

Letters in shapes: B images, H and W rows and columns; three colour channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dl7cli.data.transfer import moved


def shift_and_flip(images: Tensor, generator: torch.Generator, *, padding: int, flip: bool, fill: Tensor) -> Tensor:
    """Shift each image by up to `padding` pixels in both directions and mirror half of them (He et al. 2015, §4.2).

    images (B, H, W, 3) uint8 → the same shape; what a shift uncovers gets the colour `fill` (3,). The random numbers
    come from `generator`, a CPU one, so that every device makes the same changes.
    """
    count, height, width, _ = images.shape
    size = 2 * padding + 1
    down = torch.randint(size, (count, 1), generator=generator)
    right = torch.randint(size, (count, 1), generator=generator)
    mirrored = torch.rand((count, 1), generator=generator) < (0.5 if flip else 0.0)
    columns = torch.arange(width)
    rows = moved(down + torch.arange(height), images.device)
    columns = moved(right + torch.where(mirrored, columns.flip(0), columns), images.device)
    padded = fill.expand(count, height + 2 * padding, width + 2 * padding, 3).clone()
    padded[:, padding : padding + height, padding : padding + width] = images
    index = torch.arange(count, device=images.device)
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


class Normalisation:
    """Zero mean and unit deviation per channel, by constants that are copied to the device once."""

    def __init__(self, mean: Sequence[float], deviation: Sequence[float], device: torch.device) -> None:
        self._scale = torch.tensor([1 / (255 * value) for value in deviation], device=device)
        self._shift = torch.tensor([-m / d for m, d in zip(mean, deviation, strict=True)], device=device)

    def __call__(self, images: Tensor) -> Tensor:
        """images (B, H, W, 3) uint8 → (B, 3, H, W) float32, channels last."""
        return (images * self._scale + self._shift).permute(0, 3, 1, 2)
