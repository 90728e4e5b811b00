"""Blocks of residual networks: He et al. 2015 (arXiv 1512.03385), 2016 (arXiv 1603.05027), and their descendants.

Letters in shapes: B images, C channels, H and W rows and columns, k inputs of the activation for each of its outputs (1
but for Maxout and GLU).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dl7cli.models.activations import Activation
from dl7cli.models.folding import Foldable

BlockKind = Literal["basic", "bottleneck"]


@dataclass(frozen=True)
class Options:
    """What all blocks of a network have in common; `ResNet` says what each means."""

    block: BlockKind = "basic"
    preactivation: bool = False
    residual: bool = True
    shortcut: Literal["A", "B"] = "A"
    groups: int = 1
    squeeze_excitation: int = 0
    dropout: float = 0.0
    activation: Activation = Activation()  # noqa: RUF009 - a NamedTuple never changes


class Block(Foldable):
    """f(x + F(x)), or with pre-activation x + F(x); (B, width_in, H, W) to (B, width, H/stride, W/stride).

    F is two 3x3 convolutions, or a 1x1, a 3x3 and a 1x1 one (He et al. 2015, figure 5; the 3x3 has the stride, as in
    all later work). Normalisation and the activation f follow each convolution, f but the last one, which follows the
    sum; with pre-activation they precede each (He et al. 2016, arXiv 1603.05027, figure 4e). Then the shortcut of the
    `first` block of a network, and one that is a projection, is of what is activated, too (appendix there).

    An activation of k inputs gets them from the k-fold output channels of the convolution before. Where it is given the
    stream that shortcuts pass on, it is given k copies: after a sum f(k copies of x + F(x)), which is x + max F_j for
    Maxout and (x + a)·σ(x + b) for GLU; and with pre-activation each copy has its own scale and shift of normalisation.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        stride: int,
        *,
        inner: int | None = None,
        first: bool = False,
        survival: float = 1.0,
        options: Options = Options(),
    ) -> None:
        super().__init__()
        inner = width if inner is None else inner
        k = options.activation.inputs
        self.stride = stride
        self.survival = survival
        self.preactivation = options.preactivation
        self.bottleneck = options.block == "bottleneck"
        self.residual = options.residual
        self.dropout = options.dropout
        self.copies = k
        self.new_channels = width - width_in
        pre = options.preactivation
        outer_k = 1 if pre else k  # of the convolution before the sum
        activation = partial(options.activation.module, inplace=True)
        kernel, second = (1, 3) if self.bottleneck else (3, 3)
        second_stride, groups = (stride, options.groups) if self.bottleneck else (1, 1)
        second_out = k * inner if self.bottleneck else outer_k * width
        self.convolution1 = nn.Conv2d(
            width_in, k * inner, kernel, 1 if self.bottleneck else stride, padding=kernel // 2, bias=False
        )
        self.normalisation1 = nn.BatchNorm2d(k * width_in if pre else k * inner)
        self.activation1 = activation(width_in if pre else inner)
        self.convolution2 = nn.Conv2d(inner, second_out, second, second_stride, padding=1, groups=groups, bias=False)
        self.normalisation2 = nn.BatchNorm2d(k * inner if pre else second_out)
        self.activation2 = activation(inner if pre or self.bottleneck else width)
        if self.bottleneck:
            self.convolution3 = nn.Conv2d(inner, outer_k * width, 1, bias=False)
            self.normalisation3 = nn.BatchNorm2d(k * inner if pre else outer_k * width)
            self.activation3 = activation(inner if pre else width)
        self.squeeze_excitation = (
            SqueezeExcitation(outer_k * width, options.squeeze_excitation) if options.squeeze_excitation else None
        )
        self.projection: nn.Conv2d | None = None
        self.projection_normalisation: nn.BatchNorm2d | None = None
        if self.residual and options.shortcut == "B" and (stride != 1 or self.new_channels):
            self.projection = nn.Conv2d(width_in, width, 1, stride, bias=False)
            if not pre:
                self.projection_normalisation = nn.BatchNorm2d(width)
        self.activates_shortcut = first or self.projection is not None
        if pre and options.activation.name == "maxout":
            spread(self.normalisation1, k)

    def foldable(self) -> dict[str, str]:
        """As `Foldable` says.

        With pre-activation the first normalisation of a block is of what came before it, which most shortcuts need as
        it is, and the last convolution goes to the sum.
        """
        if self.preactivation:
            pairs = {"convolution1": "normalisation2"}
            if self.bottleneck:
                pairs["convolution2"] = "normalisation3"
            return pairs
        pairs = {"convolution1": "normalisation1", "convolution2": "normalisation2"}
        if self.bottleneck:
            pairs["convolution3"] = "normalisation3"
        if self.projection is not None:
            pairs["projection"] = "projection_normalisation"
        return pairs

    def forward(self, x: Tensor) -> Tensor:
        # Drawn on the CPU: no device has to be waited for.
        if self.training and self.survival < 1 and torch.rand((), device="cpu").item() >= self.survival:
            return self._skip(x)
        return self._forward_pre(x) if self.preactivation else self._forward_post(x)

    def _forward_post(self, x: Tensor) -> Tensor:
        # In place where no gradient needs what is overwritten: these layers are bound by memory.
        residual = self.activation1(self.normalisation1(self.convolution1(x)))
        residual = self.normalisation2(self.convolution2(self._dropped(residual)))
        if self.bottleneck:
            residual = self.normalisation3(self.convolution3(self.activation2(residual)))
        residual = self._scaled(residual)
        if self.residual:
            residual = residual.add_(copies(self.shortcut(x), self.copies))
        y: Tensor = (self.activation3 if self.bottleneck else self.activation2)(residual)
        return y

    def _forward_pre(self, x: Tensor) -> Tensor:
        activated = self.activation1(self.normalisation1(copies(x, self.copies)))
        residual = self.activation2(self.normalisation2(self.convolution1(activated)))
        residual = self.convolution2(self._dropped(residual))
        if self.bottleneck:
            residual = self.convolution3(self.activation3(self.normalisation3(residual)))
        residual = self._scaled(residual)
        if self.residual:
            residual = residual.add_(self.shortcut(activated if self.activates_shortcut else x))
        return residual

    def _skip(self, x: Tensor) -> Tensor:
        """The block without F, as stochastic depth leaves it."""
        if not self.preactivation:
            y: Tensor = (self.activation3 if self.bottleneck else self.activation2)(
                self._without_gradient(copies(self.shortcut(x), self.copies))
            )
            return y
        if self.activates_shortcut:
            x = self.activation1(self.normalisation1(copies(x, self.copies)))
        return self._without_gradient(self.shortcut(x))

    def _without_gradient(self, x: Tensor) -> Tensor:
        y: Tensor = _ZeroGradients.apply(x, *self.parameters())  # type: ignore[no-untyped-call]
        return y

    def _dropped(self, residual: Tensor) -> Tensor:
        return functional.dropout(residual, self.dropout, self.training) if self.dropout else residual

    def _scaled(self, residual: Tensor) -> Tensor:
        """By squeeze and excitation, and when evaluating by how often the block took part in training."""
        if self.squeeze_excitation is not None:
            residual = self.squeeze_excitation(residual)
        return residual if self.training or self.survival == 1 else residual * self.survival

    def shortcut(self, x: Tensor) -> Tensor:
        """x in the block's output shape: itself; else by 1x1 convolution (option B), or every second row and column
        and zeros for the new channels (option A), which has no parameters.
        """
        if self.projection is not None:
            x = self.projection(x)
            return x if self.projection_normalisation is None else self.projection_normalisation(x)
        if self.stride == 1 and self.new_channels == 0:
            return x
        before = self.new_channels // 2
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))


class _ZeroGradients(torch.autograd.Function):
    """A copy of x, and zero as the gradient of parameters that have no part in it.

    Fused optimisers cannot begin with some parameters later than with others, as they would have to where there is none
    at all in the first steps.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        # A copy: an activation in place must not overwrite what the block before keeps for its gradient.
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        zeros = zip(ctx.needs_input_grad[1:], ctx.saved_tensors, strict=True)
        return gradients[0], *(torch.zeros_like(parameter) if needed else None for needed, parameter in zeros)


class SqueezeExcitation(nn.Module):
    """x·σ(W2 relu(W1 m)), m the mean over rows and columns: Hu et al. 2018 (arXiv 1709.01507), eq. 2 to 4."""

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        narrow = max(1, width // reduction)
        self.squeeze = nn.Linear(width, narrow, bias=False)
        self.excite = nn.Linear(narrow, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(x.mean(dim=(2, 3))))))
        return x * gate[:, :, None, None]


def copies(x: Tensor, k: int) -> Tensor:
    """(B, C, H, W) → (B, kC, H, W), k times the same."""
    return x if k == 1 else torch.cat([x] * k, dim=1)


def spread(normalisation: nn.BatchNorm2d, k: int) -> None:
    """Let the k copies that a Maxout chooses from start as tangents of a rounded ReLU; for k = 2 they are x and 0.

    Were they alike, they would get the same gradient and stay alike.
    """
    slopes = [1 - copy / (k - 1) for copy in range(k)]
    with torch.no_grad():
        for values, starts in (
            (normalisation.weight, slopes),
            (normalisation.bias, [slope * (1 - slope) / 2 for slope in slopes]),
        ):
            values.copy_(torch.tensor(starts).repeat_interleave(len(values) // k))
