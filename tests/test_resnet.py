"""Residual networks against the paper's parameter counts and depth, and blocks against their formula."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from dl7cli.models.resnet import Block, ResNet, multiply_adds


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7), (1202, 19.4)]
)
def test_parameters_are_those_of_the_paper(depth: int, millions: float) -> None:
    """He et al. 2015, table 6; the paper rounds to two figures."""
    with torch.device("meta"):
        model = ResNet(depth, classes=10)
    count = sum(parameter.numel() for parameter in model.parameters())
    digits = 1 if millions > 1 else 2
    assert round(count / 1e6, digits) == millions


@pytest.mark.parametrize("depth", [8, 20, 56])
def test_depth_counts_the_layers_with_weights(depth: int) -> None:
    layers = [module for module in ResNet(depth, classes=10).modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


@pytest.mark.parametrize("depth", [2, 7, 21])
def test_other_depths_are_refused(depth: int) -> None:
    with pytest.raises(ValueError, match="6n"):
        ResNet(depth, classes=10)


def test_multiply_adds_are_those_counted_by_hand() -> None:
    """Published counts of 40.8 million are with projections (option B) in two shortcuts; ours have none."""
    model = ResNet(20, classes=10)
    by_hand = 32 * 32 * 27 * 16  # first convolution
    by_hand += 6 * 32 * 32 * 9 * 16 * 16
    by_hand += 16 * 16 * 9 * 16 * 32 + 5 * 16 * 16 * 9 * 32 * 32
    by_hand += 8 * 8 * 9 * 32 * 64 + 5 * 8 * 8 * 9 * 64 * 64
    by_hand += 64 * 10
    assert multiply_adds(model, 32) == by_hand
    projections = 16 * 16 * 16 * 32 + 8 * 8 * 32 * 64
    assert round((by_hand + projections) / 1e6, 1) == 40.8
    assert model.training


@pytest.mark.parametrize("size", [32, 33, 48])
def test_any_image_size_gives_one_score_per_class(size: int) -> None:
    assert ResNet(8, classes=7)(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_the_shortcut_has_no_parameters_and_pads_the_new_channels_with_zeros() -> None:
    block = Block(16, 32, stride=2)
    assert {name.split(".")[0] for name, _ in block.named_parameters()} == {
        "convolution1",
        "normalisation1",
        "convolution2",
        "normalisation2",
    }
    x = torch.randn(2, 16, 6, 6)
    short = block.shortcut(x)
    assert short.shape == (2, 32, 3, 3)
    for row in range(3):
        for column in range(3):
            assert torch.equal(short[:, 8:24, row, column], x[:, :, 2 * row, 2 * column])
    assert not short[:, :8].any()
    assert not short[:, 24:].any()


def test_a_block_is_its_formula() -> None:
    """relu(x + F(x)) in float64, with the normalisation written out."""
    torch.manual_seed(0)
    block = Block(4, 4, stride=1).double()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)

    def normalised(y: torch.Tensor, layer: nn.BatchNorm2d) -> torch.Tensor:
        mean = y.mean(dim=(0, 2, 3), keepdim=True)
        variance = ((y - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
        scale, shift = layer.weight[:, None, None], layer.bias[:, None, None]
        return (y - mean) / (variance + layer.eps).sqrt() * scale + shift

    inner = normalised(functional.conv2d(x, block.convolution1.weight, padding=1), block.normalisation1)
    residual = normalised(
        functional.conv2d(inner.clamp(min=0), block.convolution2.weight, padding=1), block.normalisation2
    )
    torch.testing.assert_close(block(x), (x + residual).clamp(min=0))


def test_evaluation_of_an_image_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    model = ResNet(8, classes=10).eval()
    images = torch.randn(6, 3, 32, 32)
    with torch.inference_mode():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone)


def test_memory_layout_does_not_change_the_answer() -> None:
    torch.manual_seed(0)
    model = ResNet(8, classes=10).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        rows_first = model(images)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.testing.assert_close(model(images.contiguous(memory_format=torch.channels_last)), rows_first)
