"""Changes to training images, made by tensor operations on whole batches, and the way from bytes to network input.

Letters in shapes: B images, H and W rows and columns; three colour channels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dl7cli.data.transfer import moved


def shift_and_flip(
    images: Tensor, generator: torch.Generator, *, padding: int, mirrored: Tensor, fill: Tensor | None
) -> Tensor:
    """Shift each image by up to `padding` pixels in both directions and mirror those of `mirrored` (B,), a CPU mask.

    images (B, H, W, 3) uint8 → the same shape; what a shift uncovers gets the colour `fill` (3,) (He et al. 2015, §4.2)
    or, without one, reflects the image at its outermost pixels; then `padding` must be less than either side. The
    random numbers come from `generator`, a CPU one, so that every device makes the same changes.
    """
    count, height, width, _ = images.shape
    size = 2 * padding + 1
    down = torch.randint(size, (count, 1), generator=generator)
    right = torch.randint(size, (count, 1), generator=generator)
    columns = torch.arange(width)
    rows = down + torch.arange(height)
    columns = right + torch.where(mirrored[:, None], columns.flip(0), columns)
    if fill is None:
        rows, columns = _reflected(rows - padding, height), _reflected(columns - padding, width)
    else:
        padded = fill.expand(count, height + 2 * padding, width + 2 * padding, 3).clone()
        padded[:, padding : padding + height, padding : padding + width] = images
        images = padded
    index = torch.arange(count, device=images.device)
    rows, columns = moved(rows, images.device), moved(columns, images.device)
    return images[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def cutout(images: Tensor, generator: torch.Generator, *, side: int, fill: Tensor) -> Tensor:
    """Blot a square of `side` pixels out of every image with the colour `fill` (3,) (DeVries & Taylor 2017, §3.2).

    images (B, H, W, 3) uint8 → the same shape. The centre is any pixel, so the square may reach over the edge.
    """
    count, height, width, _ = images.shape
    top = torch.randint(height, (count,), generator=generator) - side // 2
    left = torch.randint(width, (count,), generator=generator) - side // 2
    inside = _rectangles(top, left, torch.full((count,), side), torch.full((count,), side), height, width)
    return torch.where(moved(inside, images.device)[..., None], fill, images)


def random_erasing(images: Tensor, generator: torch.Generator, *, probability: float) -> Tensor:
    """Fill a rectangle of an image with noise, with the probability given (Zhong et al. 2017, arXiv 1708.04896, §3).

    images (B, H, W, 3) uint8 → the same shape. The area is 2 to 40 % of the image, the ratio of its sides 0.3 to 1/0.3,
    its logarithm drawn evenly. Of ten such rectangles the first that fits is taken; where none does the image stays
    whole. (The paper's algorithm 1 draws the ratio itself evenly and goes on until one fits.)
    """
    count, height, width, _ = images.shape
    area = (0.02 + 0.38 * torch.rand((count, 10), generator=generator)) * height * width
    ratio = (math.log(0.3) * (2 * torch.rand((count, 10), generator=generator) - 1)).exp()
    heights, widths = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (heights < height) & (widths < width)
    first = fits.int().argmax(dim=1, keepdim=True)
    erased = fits.any(dim=1) & (torch.rand(count, generator=generator) < probability)
    tall = torch.where(erased, heights.gather(1, first)[:, 0], 0)
    wide = torch.where(erased, widths.gather(1, first)[:, 0], 0)
    top = (torch.rand(count, generator=generator) * (height - tall + 1)).long()
    left = (torch.rand(count, generator=generator) * (width - wide + 1)).long()
    noise = torch.randint(256, images.shape, generator=generator, dtype=torch.uint8)
    inside = _rectangles(top, left, tall, wide, height, width)
    return torch.where(moved(inside, images.device)[..., None], moved(noise, images.device), images)


def mixup(images: Tensor, order: Tensor, weight: float) -> Tensor:
    """Blend images (B, ...) with themselves in another order: weight·x + (1-weight)·x[order] (Zhang et al. 2018)."""
    return torch.lerp(images[order], images, weight)


def cutmix(images: Tensor, order: Tensor, weight: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """Put one rectangle of the images in another order into all (Yun et al. 2019, arXiv 1905.04899, appendix A).

    images (B, 3, H, W); the rectangle has the image's proportions and an area of 1-weight before it is cut at the edge.
    Returns the images and the part of their area that is still their own.
    """
    height, width = images.shape[2:]
    tall, wide = (int(size * (1 - weight) ** 0.5) for size in (height, width))
    row, column = (int(torch.randint(size, (), generator=generator)) for size in (height, width))
    rows = slice(max(row - tall // 2, 0), min(row + tall // 2, height))
    columns = slice(max(column - wide // 2, 0), min(column + wide // 2, width))
    mixed = images.clone()
    mixed[:, :, rows, columns] = images[order][:, :, rows, columns]
    return mixed, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)


def shrink(images: Tensor, size: int) -> Tensor:
    """images (B, 3, H, W) to `size` pixels a side, each pixel a weighted mean of those it covers."""
    return functional.interpolate(images, (size, size), mode="bilinear", antialias=True)


def shifted(images: Tensor, pixels: int) -> list[Tensor]:
    """images (B, 3, H, W) moved up left and down right by some pixels; what a shift uncovers reflects the image."""
    height, width = images.shape[2:]
    padded = functional.pad(images, (pixels,) * 4, mode="reflect")
    return [padded[:, :, at : at + height, at : at + width] for at in (0, 2 * pixels)]


def _reflected(index: Tensor, size: int) -> Tensor:
    """Indices up to `size - 1` beyond either end → those of what a mirror on the outermost pixel shows."""
    return size - 1 - (size - 1 - index.abs()).abs()


def _rectangles(top: Tensor, left: Tensor, tall: Tensor, wide: Tensor, height: int, width: int) -> Tensor:
    """(B, height, width), true inside the rectangle of each image, whose corner and sides are (B,)."""
    rows, columns = torch.arange(height), torch.arange(width)
    vertical = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    horizontal = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    return vertical[:, :, None] & horizontal[:, None, :]


class Normalisation:
    """Zero mean and unit deviation per channel, by constants that are copied to the device once."""

    def __init__(self, mean: Sequence[float], deviation: Sequence[float], device: torch.device) -> None:
        self._scale = torch.tensor([1 / (255 * value) for value in deviation], device=device)
        self._shift = torch.tensor([-m / d for m, d in zip(mean, deviation, strict=True)], device=device)

    def __call__(self, images: Tensor) -> Tensor:
        """images (B, H, W, 3) uint8 → (B, 3, H, W) float32, channels last."""
        return (images * self._scale + self._shift).permute(0, 3, 1, 2)
