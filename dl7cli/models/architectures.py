"""The published residual networks by name, as options of `ResNet`, and what using a network costs."""

from typing import Any

import torch
from torch import Tensor, nn

from dl7cli.models.outline import outline
from dl7cli.models.resnet import ResNet

_BOTTLENECK = {"block": "bottleneck"}
_WIDE = {"preactivation": True, "shortcut": "B"}
_FOUR_STAGES = {"stages": 4, "width": 64, "shortcut": "B"}
_RESNEXT = {"depth": 29, "block": "bottleneck", "width": 64, "shortcut": "B", "group_width": 64}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # He et al. 2015 (arXiv 1512.03385), §4.2
    **{f"resnet-{depth}": {"depth": depth} for depth in (20, 32, 44, 56, 110, 1202)},
    "resnet-20-b": {"depth": 20, "shortcut": "B"},
    **{f"plain-{depth}": {"depth": depth, "residual": False} for depth in (20, 32, 44, 56, 110, 1202)},
    # He et al. 2016 (arXiv 1603.05027), table 4
    "preact-resnet-110": {"depth": 110, "preactivation": True},
    **{
        f"preact-resnet-{depth}": {"depth": depth, **_BOTTLENECK, "preactivation": True, "shortcut": "B", **more}
        for depth, more in ((164, {}), (1001, {"checkpointing": True}))
    },
    # Huang et al. 2016 (arXiv 1603.09382), §4
    "stochastic-depth-resnet-110": {"depth": 110, "survival": 0.5},
    # Hu et al. 2018 (arXiv 1709.01507), §6.3
    "se-resnet-110": {"depth": 110, "squeeze_excitation": 16},
    # Zagoruyko & Komodakis 2016 (arXiv 1605.07146), table 5
    **{
        f"wrn-{depth}-{widening}": {"depth": depth, **_WIDE, "widening": widening}
        for depth, widening in ((16, 4), (40, 4), (16, 8), (28, 10))
    },
    # Xie et al. 2017 (arXiv 1611.05431), table 7
    **{f"resnext-29-{groups}x64d": {**_RESNEXT, "groups": groups} for groups in (8, 16)},
    # He et al. 2015, table 1, with the stem for images of 32 pixels
    **{f"resnet-{depth}": {"depth": depth, **_FOUR_STAGES} for depth in (18, 34)},
    **{f"resnet-{depth}": {"depth": depth, **_BOTTLENECK, **_FOUR_STAGES} for depth in (50, 101, 152)},
    # The same with the stem of the paper, for images of 64 pixels or more
    **{f"resnet-{depth}-imagenet": {"depth": depth, **_FOUR_STAGES, "stem": "imagenet"} for depth in (18, 34)},
    **{
        f"resnet-{depth}-imagenet": {"depth": depth, **_BOTTLENECK, **_FOUR_STAGES, "stem": "imagenet"}
        for depth in (50, 101, 152)
    },
}


def multiply_adds(model: nn.Module, image_size: int) -> int:
    """Multiply-adds that convolutions and linear layers spend on one image of `image_size` pixels a side."""
    total = 0

    def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += output[0].numel() * module.in_features

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    was_training = model.training
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return total


def cost(options: dict[str, Any], *, classes: int, image_size: int) -> tuple[int, int]:
    """Parameters of a `ResNet` of these options, and its multiply-adds for one image.

    It is built where nothing has values, and not in its whole depth: all blocks of a stage but the first are alike, so
    that both numbers rise by the same with each. Thousands of layers are counted as fast as twenty.
    """
    depth = options["depth"]
    period = 9 if options.get("block") == "bottleneck" else 6
    more = (depth - 2) // period - 3  # blocks of a stage beyond the third
    if more <= 0 or options.get("stages") == 4 or options.get("match") == "parameters":
        return _counted(options, classes, image_size)
    two, three = (
        _counted({**options, "depth": depth - (more + fewer) * period}, classes, image_size) for fewer in (1, 0)
    )
    return three[0] + more * (three[0] - two[0]), three[1] + more * (three[1] - two[1])


def _counted(options: dict[str, Any], classes: int, image_size: int) -> tuple[int, int]:
    with outline():
        model = ResNet(classes=classes, **options)
    return sum(parameter.numel() for parameter in model.parameters()), multiply_adds(model, image_size)
