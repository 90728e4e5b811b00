"""Activation functions as modules, and the gain of the weights before them. Knows no network.

    name        f(x)                                     from
    relu        max(x, 0)                                Nair & Hinton 2010
    leaky_relu  max(x, x/100)                            Maas et al. 2013
    prelu       max(x, 0) + a·min(x, 0), a learned       He et al. 2015b (arXiv 1502.01852), eq. 1
    elu         x, or exp(x) - 1 below zero              Clevert et al. 2016 (arXiv 1511.07289), eq. 15
    gelu        x·Φ(x), Φ the normal distribution        Hendrycks & Gimpel 2016 (arXiv 1606.08415), §2
    swish       x·σ(βx)                                  Ramachandran et al. 2017 (arXiv 1710.05941), §3
    su          max(x, x·exp(-|x|))                      Su 2017, beside Swish
    mish        x·tanh(log(1 + exp(x)))                  Misra 2020 (arXiv 1908.08681), eq. 1
    tanh, sigmoid
    hardtanh    x cut to [-1, 1]                         Collobert 2004
    softsign    x / (1 + |x|)                            Bergstra et al. 2009
    maxout      max over k inputs                        Goodfellow et al. 2013 (arXiv 1302.4389), eq. 2
    glu         a·σ(b), two inputs                       Dauphin et al. 2017 (arXiv 1612.08083), eq. 1

Maxout and GLU take several inputs for each output: their input (B, kC, …) holds k groups of C channels one after the
other, of which channel c of the output takes the c-th of each. All others keep the shape. Letters in shapes: B images,
C channels, … any further axes.
"""

import functools
import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

Name = Literal[
    "relu", "leaky_relu", "prelu", "elu", "gelu", "swish", "su", "mish",
    "tanh", "sigmoid", "hardtanh", "softsign", "maxout", "glu",
]  # fmt: skip
NAMES: tuple[str, ...] = get_args(Name)


class Activation(NamedTuple):
    """Which activation a network uses, with what only some of them have."""

    name: Name = "relu"
    pieces: int = 2
    """Inputs that Maxout takes the greatest of."""
    beta: float = 1.0
    """Swish's slope of the gate; where it is learned, its first value."""
    learned_beta: bool = False
    """Whether each channel of a Swish learns its own β."""

    @property
    def inputs(self) -> int:
        """Inputs for each output."""
        match self.name:
            case "maxout":
                return self.pieces
            case "glu":
                return 2
            case _:
                return 1

    def module(self, width: int, *, inplace: bool = False) -> nn.Module:
        """The activation of (B, inputs·width, …) to (B, width, …).

        With `inplace` it may overwrite its input where its own gradient can be had from its output. Raises ValueError
        for a name that is none.
        """
        match self.name:
            case "relu":
                return nn.ReLU(inplace)
            case "leaky_relu":
                return nn.LeakyReLU(inplace=inplace)
            case "prelu":
                return PReLU(width)
            case "elu":
                return nn.ELU(inplace=inplace)
            case "gelu":
                return nn.GELU()
            case "swish" if self.learned_beta:
                return LearnedSwish(width, self.beta)
            case "swish":
                return nn.SiLU() if self.beta == 1 else Swish(self.beta)
            case "su":
                return Su()
            case "mish":
                return nn.Mish()
            case "tanh":
                return nn.Tanh()
            case "sigmoid":
                return nn.Sigmoid()
            case "hardtanh":
                return nn.Hardtanh(inplace=inplace)
            case "softsign":
                return nn.Softsign()
            case "maxout":
                return Maxout(self.pieces)
            case "glu":
                return nn.GLU(dim=1)
            case _:
                raise ValueError(f"there is no activation `{self.name}`; there are {', '.join(NAMES)}")

    @property
    def gain(self) -> float:
        """What the weights before it are scaled by, so that its outputs have a mean square of one.

        1 / √E[f(z)²] over inputs z of the standard normal distribution: √2 for ReLU, as in He et al. 2015b, eq. 10.
        """
        return math.sqrt(2.0) if self.name == "relu" else _gain(self)


@functools.cache
def _gain(activation: Activation) -> float:
    with torch.no_grad(), torch.device("cpu"):
        z = torch.linspace(-12, 12, 4801, dtype=torch.float64)
        density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        match activation.name:
            case "maxout":  # the density of the greatest of k
                k = activation.pieces
                density = k * density * torch.special.ndtr(z) ** (k - 1)
                value = z
            case "glu":  # E[a²·σ(b)²], and a and b are independent
                value = torch.sigmoid(z)
            case _:
                value = activation.module(1).double()(z[:, None])[:, 0]
        mean_square = torch.trapezoid(value**2 * density, z).item()
    return 1 / math.sqrt(mean_square)


class Swish(nn.Module):
    """x·σ(βx) with one β that stays; with β = 1 the GLU of (x, x)."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class LearnedSwish(nn.Module):
    """x·σ(βx) with a β for each channel."""

    def __init__(self, width: int, beta: float) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.full((width,), beta))

    def forward(self, x: Tensor) -> Tensor:
        # In x's type, or autocast's narrow activations would come out in the parameter's wide one.
        beta = self.beta.to(x.dtype).reshape(-1, *[1] * (x.ndim - 2))
        return x * torch.sigmoid(beta * x)


class PReLU(nn.PReLU):
    """max(x, 0) + a·min(x, 0) with an a for each channel, at first 1/4."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.prelu(x, self.weight.to(x.dtype))


class Maxout(nn.Module):
    """The greatest of k inputs: (B, kC, …) → (B, C, …)."""

    def __init__(self, pieces: int) -> None:
        super().__init__()
        self.pieces = pieces

    def forward(self, x: Tensor) -> Tensor:
        # Pairs, not `amax` over a new axis: the output then has the input's memory layout.
        return functools.reduce(torch.maximum, x.chunk(self.pieces, dim=1))


class Su(nn.Module):
    """max(x, x·exp(-|x|)), which is x above zero and x·exp(x) below; its slope there is (1 + x)·exp(x)."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Su.apply(x)  # type: ignore[no-untyped-call]
        return y


# exp(-1000) is zero in every format, and -1000 is a number in every format: from there on nothing becomes 0·∞.
_ZERO_FROM = -1000.0


class _Su(torch.autograd.Function):
    """Keeps the input only; and multiplies the gradient once, by a slope of at most one, so that it cannot overflow.

    Left to autograd, the gradient is multiplied by x and then by exp(x): in float16 that is ∞·0 far out.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        from_zero = x.clamp(min=_ZERO_FROM)
        # Autocast makes `exp` wide.
        return from_zero * from_zero.clamp(max=0).exp().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        below = x.clamp(_ZERO_FROM, 0)
        slope: Tensor = (1 + below) * below.exp()
        return gradients[0] * slope
