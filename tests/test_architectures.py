"""The published networks against the counts of their papers and of other libraries, and the keys that make them."""

from typing import Any

import pytest
from networks import IMAGENET, on_meta, size
from pydantic import ValidationError
from torch import nn

from dl7cli.models.architectures import ARCHITECTURES, cost, multiply_adds
from dl7cli.models.blocks import Block, SqueezeExcitation
from dl7cli.models.resnet import blocks_per_stage
from dl7cli.recipe import ResNetModel


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("plain-20", 0.27),
        ("plain-32", 0.46),
        ("plain-44", 0.66),
        ("plain-56", 0.85),
        ("plain-110", 1.7),
        ("plain-1202", 19.4),
        ("preact-resnet-110", 1.7),
        ("preact-resnet-164", 1.7),
        ("stochastic-depth-resnet-110", 1.7),
        ("wrn-16-4", 2.7),
        ("wrn-40-4", 8.9),
        ("wrn-16-8", 11.0),
        ("wrn-28-10", 36.5),
        ("resnext-29-8x64d", 34.4),
        ("resnet-18", 11.2),
        ("resnet-34", 21.3),
        ("resnet-50", 23.5),
        ("resnet-101", 42.5),
        ("resnet-152", 58.2),
    ],
)
def test_published_networks_have_the_published_parameters(name: str, millions: float) -> None:
    assert round(size(on_meta(**ARCHITECTURES[name])) / 1e6, 2 if millions < 1 else 1) == millions


@pytest.mark.parametrize(("name", "millions"), [("preact-resnet-1001", 10.2), ("resnext-29-16x64d", 68.1)])
def test_two_papers_count_without_normalisation(name: str, millions: float) -> None:
    """All parameters are 10.3 and 68.2 million; those of convolutions and the linear layer are what is published."""
    model = on_meta(**ARCHITECTURES[name])
    assert abs(sum(p.numel() for p in model.parameters() if p.ndim > 1) / 1e6 - millions) < 0.051


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"depth": 18}, 11_689_512),
        ({"depth": 34}, 21_797_672),
        ({"depth": 50, "block": "bottleneck"}, 25_557_032),
        ({"depth": 101, "block": "bottleneck"}, 44_549_160),
        ({"depth": 152, "block": "bottleneck"}, 60_192_808),
        ({"depth": 50, "block": "bottleneck", "groups": 32, "group_width": 4}, 25_028_904),
        ({"depth": 50, "block": "bottleneck", "group_width": 128}, 68_883_240),
    ],
)
def test_with_the_imagenet_stem_parameters_are_those_of_torchvision(options: dict[str, Any], parameters: int) -> None:
    """To the last one; those of resnet18 to 152, resnext50_32x4d and wide_resnet50_2 in its documentation."""
    assert size(on_meta(**IMAGENET, **options)) == parameters


@pytest.mark.parametrize(
    ("options", "billions"), [({"depth": 18}, 1.814), ({"depth": 50, "block": "bottleneck"}, 4.089)]
)
def test_with_the_imagenet_stem_multiply_adds_are_those_of_torchvision(
    options: dict[str, Any], billions: float
) -> None:
    assert round(multiply_adds(on_meta(**IMAGENET, **options), 224) / 1e9, 3) == billions


def test_multiply_adds_with_projections_are_those_published() -> None:
    assert round(multiply_adds(on_meta(**ARCHITECTURES["resnet-20"]), 32) / 1e6, 2) == 40.55
    assert round(multiply_adds(on_meta(**ARCHITECTURES["resnet-20-b"]), 32) / 1e6, 1) == 40.8


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if not name.endswith(("1001", "1202", "110"))])
def test_the_cost_is_that_of_the_whole_network(name: str) -> None:
    model = on_meta(**ARCHITECTURES[name], classes=7)
    assert cost(ARCHITECTURES[name], classes=7, image_size=40) == (size(model), multiply_adds(model, 40))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_networks_have_their_depth_and_are_recipes(name: str) -> None:
    """Layers with weights, the projections of shortcuts aside but where a wide network counts them."""
    options = ARCHITECTURES[name]
    model = on_meta(**options)
    layers = [part for part in model.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    projections = [block.projection for block in model.blocks if isinstance(block, Block) and block.projection]
    gates = [layer for part in model.modules() if isinstance(part, SqueezeExcitation) for layer in part.children()]
    depth = len(layers) - len(projections) - len(gates)
    if name.startswith("wrn"):
        depth += len(projections) - 1  # and the linear layer is not counted
    assert depth == options["depth"]
    recipe = ResNetModel.model_validate({"kind": "resnet", **options})
    assert recipe.model_dump(exclude={"kind"}, exclude_defaults=True).items() <= options.items()


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("stages", [3, 4])
@pytest.mark.parametrize("preactivation", [False, True])
def test_recipes_and_networks_take_the_same_depths(block: Any, stages: int, preactivation: bool) -> None:
    for depth in range(0, 160):
        options = {"block": block, "stages": stages, "preactivation": preactivation}
        try:
            counts = blocks_per_stage(depth, **options)
        except ValueError:
            with pytest.raises(ValidationError, match=f"the nearest is {nearest(depth, options)}"):
                ResNetModel.model_validate({"kind": "resnet", "depth": depth, **options})
        else:
            assert len(counts) == stages
            assert ResNetModel.model_validate({"kind": "resnet", "depth": depth, **options}).depth == depth


def nearest(depth: int, options: dict[str, Any]) -> str:
    """A pattern of the nearest depths that a network takes, two where they are equally far."""
    for away in range(1, 200):
        found = []
        for near in (depth - away, depth + away):
            try:
                blocks_per_stage(near, **options)
            except ValueError:
                continue
            found.append(str(near))
        if found:
            return f"({'|'.join(found)})\\b"
    raise AssertionError(depth)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"groups": 8}, "bottleneck"),
        ({"group_width": 64}, "bottleneck"),
        ({"groups": 8, "block": "bottleneck", "depth": 29}, "8 groups need a width"),
        ({"residual": False, "survival": 0.5}, "without shortcuts"),
        ({"block": "bottleneck", "stages": 4}, "one of 50, 101, 152"),
        ({"depth": 50, "stages": 4}, "50, 101 and 152 have bottleneck blocks"),
        ({"pieces": 1}, "greater than or equal to 2"),
        ({"survival": 0.0}, "greater than 0"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ResNetModel.model_validate({"kind": "resnet", **keys})
