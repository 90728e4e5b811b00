"""Networks without values, for tests that only count."""

from typing import Any

from torch import nn

from dl7cli.models.outline import outline
from dl7cli.models.resnet import ResNet

IMAGENET: dict[str, Any] = {"classes": 1000, "stages": 4, "width": 64, "shortcut": "B", "stem": "imagenet"}


def on_meta(**options: Any) -> ResNet:
    """A network without values."""
    with outline():
        return ResNet(**options)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
