"""Changes to training images, made by tensor operations on whole batches, and the way from bytes to network input.

Letters in shapes: B images, H and W rows and columns; three colour channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


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
    rows = (down + torch.arange(height)).to(images.device)
    columns = (right + torch.where(mirrored, columns.flip(0), columns)).to(images.device)
    padded = fill.expand(count, height + 2 * padding, width + 2 * padding, 3).clone()
    padded[:, padding : padding + height, padding : padding + width] = images
    index = torch.arange(count, device=images.device)
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalise(images: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """images (B, H, W, 3) uint8 → (B, 3, H, W) float32 of zero mean and unit deviation per channel, channels last."""
    scale = torch.tensor([1 / (255 * value) for value in deviation], device=images.device)
    shift = torch.tensor([-m / d for m, d in zip(mean, deviation, strict=True)], device=images.device)
    return (images * scale + shift).permute(0, 3, 1, 2)
