"""Convolutions that normalise, against the networks they come from, in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import distributed, nn

from dl7cli.distributed import Workers
from dl7cli.models.activations import NAMES
from dl7cli.models.fast_resnet import FastResNet
from dl7cli.models.folding import folded
from dl7cli.models.normalisation import share_statistics
from dl7cli.models.resnet import ResNet

BOTTLENECK = {"depth": 11, "block": "bottleneck"}
FOLDED_WHOLLY = [
    {"depth": 8},
    {"depth": 8, "residual": False},
    {"depth": 8, "shortcut": "B", "survival": 0.5, "dropout": 0.3},
    {"depth": 8, "squeeze_excitation": 4},
    {**BOTTLENECK, "shortcut": "B"},
    {**BOTTLENECK, "groups": 2, "group_width": 4},
    {"depth": 18, "stages": 4, "width": 8, "shortcut": "B", "stem": "imagenet"},
    *({"depth": 8, "activation": name} for name in NAMES),
]
FOLDED_IN_PART = [
    ({"depth": 8, "preactivation": True}, 3 + 1),  # the first of each block, and the last of all
    ({**BOTTLENECK, "preactivation": True, "shortcut": "B", "checkpointing": True}, 3 + 1),
    ({"depth": 8, "preactivation": True, "activation": "maxout"}, 3 + 1),
]


def trained(model: nn.Module) -> nn.Module:
    """With running statistics, scales and shifts that are no longer 0 and 1."""
    torch.manual_seed(0)
    model.double().train()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.weight is not None
                if layer.weight.requires_grad:
                    layer.weight.normal_(mean=0.5)  # some below 0
                layer.bias.normal_()
        for _ in range(3):
            model(torch.randn(8, 3, 32, 32, dtype=torch.float64))
    return model


@contextmanager
def solo_group() -> Iterator[distributed.ProcessGroup]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        group = distributed.group.WORLD
        assert group is not None
        yield group
    finally:
        distributed.destroy_process_group()


def normalisations_left(model: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


@pytest.mark.parametrize(
    ("options", "layers"), [*((options, 0) for options in FOLDED_WHOLLY), *FOLDED_IN_PART], ids=str
)
def test_a_folded_network_gives_the_same(options: dict[str, Any], layers: int) -> None:
    check(ResNet(**options), layers)


def test_a_maximum_before_normalisation_does_not_matter() -> None:
    check(FastResNet(10, widths=(8, 16, 16)), 0)


def test_statistics_that_workers_share_are_folded() -> None:
    """Their layers know how to reach the other workers, which cannot be copied."""
    model = trained(ResNet(8))
    with solo_group() as group:
        share_statistics(model, Workers(rank=0, count=1, group=group))
        check_trained(model, 0)


def check(model: nn.Module, layers: int) -> None:
    check_trained(trained(model), layers)


def check_trained(model: nn.Module, layers: int) -> None:
    """The same scores, so many layers of normalisation left, and the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy = folded(model)
    assert normalisations_left(copy) == layers
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(copy(images), model(images), rtol=1e-9, atol=1e-9)
