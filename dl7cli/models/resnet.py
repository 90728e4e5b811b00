"""Residual networks for small images: He et al. 2015 (arXiv 1512.03385), §4.2. Knows tensors only, no data.

A first 3x3 convolution, three stages of n blocks of two 3x3 convolutions, global average pooling and one linear layer:
6n+2 layers with weights.

    stage   output of a 32x32 image   channels   layers
    first   32x32                     16         1
    1       32x32                     16         2n
    2       16x16                     32         2n
    3       8x8                       64         2n
    last    1x1                       classes    1

    depth        20     32     44     56     110    1202
    parameters   0.27M  0.46M  0.66M  0.85M  1.7M   19.4M     (the paper's table 6, ten classes)

Letters in shapes: B images, C channels, H and W rows and columns.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

STAGE_WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """relu(x + F(x)), F being convolution, normalisation, ReLU, convolution, normalisation (figure 2, left).

    Where the block widens, the shortcut is option A: every second row and column, and zeros for the new channels, so
    that it has no parameters.
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = width - width_in
        self.convolution1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.normalisation1 = nn.BatchNorm2d(width)
        self.convolution2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.normalisation2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        # In place where no gradient needs what is overwritten: these layers are bound by memory.
        residual = functional.relu(self.normalisation1(self.convolution1(x)), inplace=True)
        residual = self.normalisation2(self.convolution2(residual))
        return functional.relu(residual.add_(self.shortcut(x)), inplace=True)

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.new_channels == 0:
            return x
        before = self.new_channels // 2
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))


class ResNet(nn.Module):
    """Images (B, 3, H, W), normalised, to class scores (B, classes) before the softmax.

    Raises ValueError unless `depth` is 6n+2. Convolutions start as in He et al. 2015b (arXiv 1502.01852), eq. 14.
    """

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n+2, not {depth}")
        blocks_per_stage = (depth - 2) // 6
        self.convolution = nn.Conv2d(3, STAGE_WIDTHS[0], 3, padding=1, bias=False)
        self.normalisation = nn.BatchNorm2d(STAGE_WIDTHS[0])
        blocks = []
        width_in = STAGE_WIDTHS[0]
        for stage, width in enumerate(STAGE_WIDTHS):
            for position in range(blocks_per_stage):
                stride = 2 if stage > 0 and position == 0 else 1
                blocks.append(Block(width_in, width, stride))
                width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.normalisation(self.convolution(images)), inplace=True)
        x = self.blocks(x)
        scores: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return scores


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
            model.eval()(torch.zeros(1, 3, image_size, image_size))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return total
