"""Residual networks: He et al. 2015 (arXiv 1512.03385) and its descendants, one model with options. Knows tensors only.

A first convolution, three or four stages of blocks of convolutions, global average pooling and one linear layer. Each
stage halves rows and columns and doubles the channels. With three stages and the default options, §4.2 of the paper:

    stage   output of a 32x32 image   channels   layers
    first   32x32                     16         1
    1       32x32                     16         2n
    2       16x16                     32         2n
    3       8x8                       64         2n
    last    1x1                       classes    1

    depth        20     32     44     56     110    1202
    parameters   0.27M  0.46M  0.66M  0.85M  1.7M   19.4M     (the paper's table 6, ten classes)

`architectures` has the options of the published networks. Letters in shapes: B images, H and W rows and columns.
"""

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dl7cli.models import activations
from dl7cli.models.activations import Activation
from dl7cli.models.blocks import Block, BlockKind, Options, copies, spread
from dl7cli.models.folding import Foldable
from dl7cli.models.outline import outline

# He et al. 2015, table 1, by depth.
_FOUR_STAGES: dict[BlockKind, dict[int, tuple[int, ...]]] = {
    "basic": {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)},
    "bottleneck": {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)},
}


class Stage(NamedTuple):
    blocks: int
    width: int
    """Channels of a block's output."""
    inner: int
    """Channels between its convolutions."""


class ResNet(Foldable):
    """Images (B, 3, H, W), normalised, to class scores (B, classes) before the softmax.

    - `depth` layers with weights: see `blocks_per_stage`. `width` channels after the stem and in the first stage, whose
      blocks have `widening` times as many (Zagoruyko & Komodakis 2016, arXiv 1605.07146).
    - `shortcut`: see `Block.shortcut`; `residual=False` leaves shortcuts out, which is the plain net of the paper.
    - `groups` of `group_width` channels each (twice as many each stage) in the 3x3 convolution of a bottleneck: ResNeXt
      (Xie et al. 2017, arXiv 1611.05431). `squeeze_excitation` is its reduction r, 0 for none.
    - `dropout` of activations before the second convolution of a block.
    - `survival`: the probability that the last block takes part in a training step, falling to it linearly from 1 at
      the stem: Huang et al. 2016 (arXiv 1603.09382), eq. 4; eq. 5 when evaluating. What is left out has gradient zero.
    - `stem`: "cifar" is a 3x3 convolution; "imagenet" a 7x7 one and a max-pooling, each of stride 2.
    - `activation`, `pieces`, `beta`, `learned_beta`: see `Activation`. With `match` "parameters" a network whose
      activation takes several inputs is made narrower, by one factor for all widths, until it has about as many
      parameters as with one input; "width" leaves the channels as they are.
    - `checkpointing` keeps each block's input only and computes the rest again for the gradient: less memory, a third
      more time, the same gradients.

    Convolutions start as in He et al. 2015b (arXiv 1502.01852), eq. 14, with the activation's gain.
    Raises ValueError for a depth that does not fit and for groups without bottleneck.
    """

    def __init__(
        self,
        depth: int = 20,
        classes: int = 10,
        *,
        stages: Literal[3, 4] = 3,
        block: BlockKind = "basic",
        preactivation: bool = False,
        residual: bool = True,
        width: int = 16,
        widening: int = 1,
        shortcut: Literal["A", "B"] = "A",
        groups: int = 1,
        group_width: int | None = None,
        squeeze_excitation: int = 0,
        dropout: float = 0.0,
        survival: float = 1.0,
        stem: Literal["cifar", "imagenet"] = "cifar",
        activation: activations.Name = "relu",
        pieces: int = 2,
        beta: float = 1.0,
        learned_beta: bool = False,
        match: Literal["width", "parameters"] = "width",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        counts = blocks_per_stage(depth, stages=stages, block=block, preactivation=preactivation)
        if (groups > 1 or group_width is not None) and (block != "bottleneck" or group_width is None):
            raise ValueError("groups need bottleneck blocks and a group_width")
        chosen = Activation(activation, pieces, beta, learned_beta)
        options = Options(
            block, preactivation, residual, shortcut, groups, squeeze_excitation, dropout, activation=chosen
        )
        first, plan = _plan(counts, width, widening, block, groups, group_width)
        if match == "parameters" and chosen.inputs > 1:
            one_input = Options(**{**vars(options), "activation": Activation()})
            target = _parameters(first, plan, one_input, classes, stem)
            # The number of parameters rises with the factor, in steps: the best of what halving tries is a step away.
            low, high, least = 0.0, 1.0, target
            for _ in range(20):
                factor = (low + high) / 2
                tried = _plan(counts, width * factor, widening, block, groups, group_width and group_width * factor)
                excess = _parameters(*tried, options, classes, stem) - target
                low, high = (factor, high) if excess < 0 else (low, factor)
                if abs(excess) <= least:
                    (first, plan), least = tried, abs(excess)
        self.preactivation = preactivation
        self.checkpointing = checkpointing
        self.imagenet_stem = stem == "imagenet"
        self.copies = chosen.inputs if preactivation else 1
        activated = plan[-1].width if preactivation else first
        self.convolution = _first_convolution(first, options, stem)
        self.normalisation = nn.BatchNorm2d(activated * chosen.inputs)
        self.activation = chosen.module(activated, inplace=True)
        blocks: list[nn.Module] = []
        width_in, total = first, sum(counts)
        for number, layout in enumerate(plan):
            for position in range(layout.blocks):
                stride = 2 if number > 0 and position == 0 else 1
                lasting = 1 - (len(blocks) + 1) / total * (1 - survival)
                blocks.append(
                    Block(
                        width_in,
                        layout.width,
                        stride,
                        inner=layout.inner,
                        first=not blocks,
                        survival=lasting,
                        options=options,
                    )
                )
                width_in = layout.width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width_in, classes)
        if preactivation and chosen.name == "maxout":
            spread(self.normalisation, self.copies)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels // module.groups * module.weight[0, 0].numel()
                nn.init.normal_(module.weight, std=chosen.gain / math.sqrt(fan_out))

    def foldable(self) -> dict[str, str]:
        """As `Foldable` says, of the stem."""
        return {} if self.preactivation else {"convolution": "normalisation"}

    def forward(self, images: Tensor) -> Tensor:
        x = self.convolution(images)
        if not self.preactivation:
            x = self.activation(self.normalisation(x))
        if self.imagenet_stem:
            x = functional.max_pool2d(x, 3, stride=2, padding=1)
        if self.checkpointing and self.training and torch.is_grad_enabled():
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False, context_fn=partial(_contexts, block))
        else:
            x = self.blocks(x)
        if self.preactivation:
            x = self.activation(self.normalisation(copies(x, self.copies)))
        # Not by `mean`: compiled for a CPU, its neighbours are made slow, by a tenth of a step.
        scores: Tensor = self.classifier(functional.avg_pool2d(x, tuple(x.shape[2:])).flatten(1))
        return scores


def blocks_per_stage(depth: int, *, stages: int, block: BlockKind, preactivation: bool) -> tuple[int, ...]:
    """How many blocks each stage has. Raises ValueError for a depth that none has.

    Three stages of n blocks: 6n+2 layers with weights, or 9n+2 for bottlenecks; with pre-activation also 6n+4, as wide
    networks count, with the three projections. Four stages: 18 or 34, and 50, 101 or 152 for bottlenecks.
    """
    if stages == 4:
        if depth not in _FOUR_STAGES[block]:
            raise ValueError(f"depth must be one of {', '.join(map(str, _FOUR_STAGES[block]))}, not {depth}")
        return _FOUR_STAGES[block][depth]
    period = 9 if block == "bottleneck" else 6
    extra = (2, 4) if preactivation and block == "basic" else (2,)
    for more in extra:
        if depth - more >= period and (depth - more) % period == 0:
            return ((depth - more) // period,) * 3
    raise ValueError(f"depth must be {' or '.join(f'{period}n+{more}' for more in extra)}, not {depth}")


def _plan(
    counts: tuple[int, ...],
    width: float,
    widening: int,
    block: BlockKind,
    groups: int,
    group_width: float | None,
) -> tuple[int, list[Stage]]:
    """Channels of the stem, and the stages; widths that are no whole numbers are rounded."""

    def whole(channels: float) -> int:
        return max(1, round(channels))

    plan = []
    for number, count in enumerate(counts):
        wide = width * widening * 2**number
        inner = whole(wide) if group_width is None else groups * whole(group_width * widening * 2**number)
        plan.append(Stage(count, whole(4 * wide) if block == "bottleneck" else whole(wide), inner))
    return whole(width), plan


def _parameters(
    first: int, plan: list[Stage], options: Options, classes: int, stem: Literal["cifar", "imagenet"]
) -> int:
    """The parameters of a network, without building more than two blocks of a stage and without memory for them."""

    def size(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    with outline():
        activated = plan[-1].width if options.preactivation else first
        total = size(_first_convolution(first, options, stem)) + 2 * options.activation.inputs * activated
        total += size(options.activation.module(activated)) + (plan[-1].width + 1) * classes
        width_in = first
        for number, stage in enumerate(plan):
            build = partial(Block, width=stage.width, inner=stage.inner, options=options)
            total += size(build(width_in, stride=1 if number == 0 else 2))
            total += (stage.blocks - 1) * size(build(stage.width, stride=1))
            width_in = stage.width
    return total


def _first_convolution(width: int, options: Options, stem: Literal["cifar", "imagenet"]) -> nn.Conv2d:
    kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
    outputs = width if options.preactivation else options.activation.inputs * width
    return nn.Conv2d(3, outputs, kernel, stride, padding=kernel // 2, bias=False)


def _contexts(
    block: nn.Module,
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    return contextlib.nullcontext(), _statistics_put_back(block)


@contextlib.contextmanager
def _statistics_put_back(block: nn.Module) -> Iterator[None]:
    """Let computing a block again update copies of its running statistics: they have seen this batch already."""
    layers = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    kept = [dict(layer.named_buffers(recurse=False)) for layer in layers]
    for layer, buffers in zip(layers, kept, strict=True):
        for name, buffer in buffers.items():
            setattr(layer, name, buffer.clone())
    try:
        yield
    finally:
        for layer, buffers in zip(layers, kept, strict=True):
            for name, buffer in buffers.items():
                setattr(layer, name, buffer)
