"""A residual network for few epochs: whitened patches, three wide stages, a maximum at the end. Knows tensors only.

After the networks that reach 94 % on CIFAR-10 in the fewest operations: the whitening first layer of Page 2019 ("How to
train your ResNet", part 8), the filters that begin as identity and the widths of Jordan 2024 (arXiv 2404.00498). Here
the second convolution of each stage is a residual branch, as in Page's ResNet-9.

    layer             output of a 32x32 image   channels
    whitening 2x2     31x31                     24
    stage 1           15x15                     64
    stage 2           7x7                       256
    stage 3           3x3                       256
    maximum, linear   1x1                       classes

Letters in shapes: B images, H and W rows and columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dl7cli.models.folding import Foldable

_PATCH = 2
_PATCH_VALUES = 3 * _PATCH**2
_CLASSIFIER_RATE = 0.67 / 0.053
"""The classifier's learning rate over that of the shifts, in Jordan's airbench94_muon.py (cifar10-airbench, 2024)."""


class _Stage(Foldable):
    """Convolution, maximum of 2x2, normalisation, GELU; and x + F(x), F being convolution, normalisation, GELU."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.convolution1 = _identity_convolution(width_in, width)
        self.normalisation1 = _Normalisation(width)
        self.convolution2 = _identity_convolution(width, width)
        self.normalisation2 = _Normalisation(width)

    def foldable(self) -> dict[str, str]:
        """As `Foldable` says; the scale is 1 over the deviation, so the maximum may be between."""
        return {"convolution1": "normalisation1", "convolution2": "normalisation2"}

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.normalisation1(functional.max_pool2d(self.convolution1(x), 2)))
        return x + functional.gelu(self.normalisation2(self.convolution2(x)))


class _Normalisation(nn.BatchNorm2d):
    """Batch normalisation that learns a shift and no scale."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.weight.requires_grad_(False)


class FastResNet(nn.Module):
    """Images (B, 3, H, W), normalised, of `smallest_image` pixels a side or more, to class scores (B, classes).

    The first layer is random until `whiten` has seen images; it is not trained, apart from its shift.
    """

    def __init__(self, classes: int, widths: Sequence[int] = (64, 256, 256)) -> None:
        super().__init__()
        self.whitening = nn.Conv2d(3, 2 * _PATCH_VALUES, _PATCH)
        self.whitening.weight.requires_grad_(False)
        nn.init.zeros_(self.whitening.bias)  # type: ignore[arg-type]  # it has one
        self.stages = nn.Sequential(
            *(_Stage(width_in, width) for width_in, width in zip((2 * _PATCH_VALUES, *widths), widths, strict=False))
        )
        self.classifier = nn.Linear(widths[-1], classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=_CLASSIFIER_RATE**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stages(functional.gelu(self.whitening(images)))
        # Jordan's weights have variance 1, and the channels divide. A factor of √r here and 1/√r in the weights gives
        # the same scores, and at the rate of the shifts steps that are r times as large.
        scores: Tensor = _CLASSIFIER_RATE**0.5 / x.shape[1] * self.classifier(x.amax(dim=(2, 3)))
        return scores

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Make the outputs of the first layer uncorrelated and of unit variance on `images` (B, 3, H, W), normalised.

        Its filters are the eigenvectors of the covariance of all 2x2 patches, each over the root of its eigenvalue, and
        their negatives, so that what a GELU cuts off in one is kept by the other.
        """
        products = torch.zeros(_PATCH_VALUES, _PATCH_VALUES, dtype=torch.float64)
        count = 0
        for some in torch.split(images, 100):  # each image becomes four times as large
            patches = functional.unfold(some.double(), _PATCH).transpose(1, 2).reshape(-1, _PATCH_VALUES)
            products += patches.T @ patches
            count += len(patches)
        values, vectors = torch.linalg.eigh(products / count)
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(-1, 3, _PATCH, _PATCH)
        self.whitening.weight.copy_(torch.cat([filters, -filters]))


def smallest_image(stages: int) -> int:
    """Pixels a side of the smallest image that a network of so many stages leaves anything of."""
    return (1 << stages) + 1


def _identity_convolution(width_in: int, width: int) -> nn.Conv2d:
    """3x3, whose first `width_in` filters hand on their own channel at first (Jordan 2024, §3.3)."""
    convolution = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight[: min(width_in, width)])
    return convolution
