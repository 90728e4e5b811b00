"""Residual networks against the paper's parameter counts and depth, and blocks against their formula."""

import itertools
import math
from typing import Any

import pytest
import torch
from networks import IMAGENET, on_meta, size
from torch import Tensor, nn
from torch.nn import functional

from dl7cli.models.activations import NAMES, Activation
from dl7cli.models.architectures import ARCHITECTURES, multiply_adds
from dl7cli.models.blocks import Block, Options, SqueezeExcitation
from dl7cli.models.resnet import ResNet


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


# The network that earlier checkpoints hold


class FirstBlock(nn.Module):
    """The block of §4.2 and nothing else: what `Block` must be, to the bit, where no option is chosen."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.added = width - width_in
        self.convolution1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.normalisation1 = nn.BatchNorm2d(width)
        self.convolution2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.normalisation2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.normalisation1(self.convolution1(x)))
        y = self.normalisation2(self.convolution2(y))
        short = x[:, :, :: self.stride, :: self.stride]
        return functional.relu(y + functional.pad(short, (0, 0, 0, 0, self.added // 2, self.added // 2)))


class FirstResNet(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.normalisation = nn.BatchNorm2d(16)
        widths = [16] + [16] * n + [32] * n + [64] * n
        self.blocks = nn.Sequential(*(FirstBlock(a, b, b // a) for a, b in itertools.pairwise(widths)))
        self.classifier = nn.Linear(64, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.normalisation(self.convolution(images)))
        scores: Tensor = self.classifier(functional.avg_pool2d(self.blocks(x), 8).flatten(1))
        return scores


def test_the_default_is_bit_for_bit_the_network_of_the_paper() -> None:
    """Names, weights for a seed, scores, gradients and running statistics: checkpoints and their scores stay good."""
    torch.manual_seed(3)
    first = FirstResNet(3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.manual_seed(3)
    now = ResNet(depth=20, classes=10).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for model in (first, now):
        model(images).square().sum().backward()
    assert list(now.state_dict()) == list(first.state_dict())
    for name, value in first.state_dict().items():
        assert torch.equal(now.state_dict()[name], value), name
    for (name, parameter), other in zip(first.named_parameters(), now.parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        assert torch.equal(parameter.grad, other.grad), name
    assert torch.equal(first.eval()(images), now.eval()(images))


# The options


def variants() -> dict[str, dict[str, Any]]:
    """Small networks that together take every branch of the model."""
    small: dict[str, dict[str, Any]] = {
        "post": {"depth": 8, "shortcut": "B"},
        "plain": {"depth": 8, "residual": False},
        "bottleneck": {"depth": 11, "block": "bottleneck"},
        "bottleneck, plain": {"depth": 11, "block": "bottleneck", "residual": False},
        "groups": {"depth": 11, "block": "bottleneck", "shortcut": "B", "groups": 2, "group_width": 3},
        "pre": {"depth": 8, "preactivation": True},
        "pre, B": {"depth": 8, "preactivation": True, "shortcut": "B"},
        "pre, plain": {"depth": 8, "preactivation": True, "residual": False},
        "pre, bottleneck": {"depth": 11, "preactivation": True, "block": "bottleneck", "shortcut": "B"},
        "wide": {"depth": 10, "preactivation": True, "shortcut": "B", "widening": 2, "dropout": 0.3},
        "squeeze": {"depth": 8, "squeeze_excitation": 4},
        "stochastic": {"depth": 14, "survival": 0.3},
        "stochastic, pre": {"depth": 8, "survival": 0.3, "preactivation": True},
        "stochastic, pre, B": {"depth": 14, "survival": 0.3, "preactivation": True, "shortcut": "B"},
    }
    return {name: {"width": 4, "classes": 3, **options} for name, options in small.items()}


VARIANTS = variants()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("activation", [{}, {"activation": "maxout", "pieces": 3}, {"activation": "glu"}])
def test_checkpointing_changes_memory_and_nothing_else(name: str, activation: dict[str, Any]) -> None:
    """Scores, gradients, running statistics and what is random afterwards, to the bit, after two steps."""
    images = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    seen = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = ResNet(**VARIANTS[name], **activation, checkpointing=checkpointing)
        for batch in images:
            scores = model(batch)
            scores.square().sum().backward()
        gradients = [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
        seen.append([scores.detach(), *gradients, *model.state_dict().values(), torch.rand(3)])
    assert len(seen[0]) == len(seen[1])
    assert all(torch.equal(left, right) for left, right in zip(*seen, strict=True))


def test_checkpointing_keeps_less() -> None:
    """Elements that autograd holds between forward and backward."""
    held = []
    for checkpointing in (False, True):
        model = ResNet(32, classes=3, width=4, checkpointing=checkpointing)
        total = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.randn(8, 3, 16, 16))
        held.append(total)
    assert held[1] < held[0] / 3


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("activation", NAMES)
def test_every_network_takes_every_activation(name: str, activation: Any) -> None:
    """Residual and plain: every parameter has a gradient that is a number, and in most places not zero."""
    torch.manual_seed(0)
    model = ResNet(**{**VARIANTS[name], "survival": 1.0}, activation=activation)
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(bool(p.grad.any()) for p in model.parameters() if p.grad is not None) > 0.9 * len([*model.parameters()])
    assert model.eval()(torch.randn(2, 3, 9, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    "base",
    [
        {"depth": 20},
        {"depth": 20, "residual": False},
        {"depth": 164, "block": "bottleneck", "preactivation": True, "shortcut": "B"},
        ARCHITECTURES["wrn-16-4"],
        ARCHITECTURES["resnext-29-8x64d"],
        {**ARCHITECTURES["resnet-18"], "squeeze_excitation": 16},
    ],
)
@pytest.mark.parametrize("activation", [{"activation": "glu"}, {"activation": "maxout", "pieces": 4}])
def test_matching_parameters_holds_their_number(base: dict[str, Any], activation: dict[str, Any]) -> None:
    relu = size(on_meta(**base))
    matched = on_meta(**base, **activation, match="parameters")
    assert abs(size(matched) / relu - 1) < 0.03
    wide = on_meta(**base, **activation)
    assert size(wide) > 1.2 * relu
    with_relu = on_meta(**base)
    assert wide.classifier.in_features == with_relu.classifier.in_features > matched.classifier.in_features


def test_activations_of_one_input_leave_the_widths_alone() -> None:
    relu = ResNet(8)
    for name in ("su", "swish", "elu"):
        assert size(ResNet(8, activation=name, match="parameters")) == size(relu)  # type: ignore[arg-type]


@pytest.mark.parametrize("preactivation", [False, True])
def test_a_glu_block_whose_halves_are_alike_is_a_swish_block(preactivation: bool) -> None:
    """The article: Swish is a GLU whose two halves share their weights. So it is in a network, shortcuts included."""
    torch.manual_seed(0)
    options = {"depth": 8, "width": 4, "classes": 3, "preactivation": preactivation, "shortcut": "B"}
    swish, glu = (ResNet(**options, activation=name).double() for name in ("swish", "glu"))  # type: ignore[arg-type]
    shared = {}
    for name, value in glu.state_dict().items():
        own = swish.state_dict()[name]
        shared[name] = own if own.shape == value.shape else torch.cat([own, own])
        assert shared[name].shape == value.shape
    glu.load_state_dict(shared)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(glu(images), swish(images))


def test_after_a_sum_maxout_chooses_among_the_branches() -> None:
    """max_j (x + F_j) = x + max_j F_j: the shortcut stays one of identity."""
    torch.manual_seed(0)
    block = Block(4, 4, 1, options=Options(activation=Activation("maxout", pieces=3))).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    inner = block.normalisation1(block.convolution1(x)).reshape(2, 3, 4, 5, 5).amax(dim=1)
    branches = block.normalisation2(block.convolution2(inner)).reshape(2, 3, 4, 5, 5)
    torch.testing.assert_close(block(x), x + branches.amax(dim=1))


def test_a_preactivation_block_is_its_formula() -> None:
    """He et al. 2016, figure 4e; where the shape changes the projection reads what is activated."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    norm = lambda y: functional.batch_norm(y, None, None, training=True)  # noqa: E731
    block = Block(4, 4, 1, options=Options(preactivation=True)).double()
    y = functional.conv2d(norm(x).relu(), block.convolution1.weight, padding=1)
    y = functional.conv2d(norm(y).relu(), block.convolution2.weight, padding=1)
    torch.testing.assert_close(block(x), x + y)
    block = Block(4, 8, 2, inner=2, options=Options("bottleneck", preactivation=True, shortcut="B")).double()
    assert block.projection is not None
    activated = norm(x).relu()
    y = functional.conv2d(activated, block.convolution1.weight)
    y = functional.conv2d(norm(y).relu(), block.convolution2.weight, padding=1, stride=2)
    y = functional.conv2d(norm(y).relu(), block.convolution3.weight)
    torch.testing.assert_close(block(x), y + functional.conv2d(activated, block.projection.weight, stride=2))


def test_the_first_preactivation_block_of_a_network_passes_on_what_is_activated() -> None:
    """He et al. 2016, appendix: the first activation comes before the paths part; the others leave their input be."""
    torch.manual_seed(0)
    net = ResNet(14, classes=3, preactivation=True).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    norm = lambda y: functional.batch_norm(y, None, None, training=True)  # noqa: E731
    x = functional.conv2d(images, net.convolution.weight, padding=1)
    for number, block in enumerate(net.blocks):
        assert isinstance(block, Block)
        activated = norm(x).relu()
        y = functional.conv2d(activated, block.convolution1.weight, padding=1, stride=block.stride)
        y = functional.conv2d(norm(y).relu(), block.convolution2.weight, padding=1)
        short = activated if number == 0 else x
        if block.new_channels:
            half = block.new_channels // 2
            short = functional.pad(short[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
        x = short + y
    x = norm(x).relu().mean(dim=(2, 3))
    torch.testing.assert_close(net(images), functional.linear(x, net.classifier.weight, net.classifier.bias))


def test_a_bottleneck_with_projection_is_its_formula() -> None:
    """He et al. 2015, figure 5 and option B; squeeze and excitation scales what is added (Hu et al. 2018, figure 3)."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    norm = lambda y: functional.batch_norm(y, None, None, training=True)  # noqa: E731
    for reduction in (0, 2):
        options = Options("bottleneck", shortcut="B", squeeze_excitation=reduction)
        block = Block(4, 8, 2, inner=3, options=options).double()
        assert block.projection is not None
        y = norm(functional.conv2d(x, block.convolution1.weight)).relu()
        y = norm(functional.conv2d(y, block.convolution2.weight, padding=1, stride=2)).relu()
        y = norm(functional.conv2d(y, block.convolution3.weight))
        y = y if block.squeeze_excitation is None else block.squeeze_excitation(y)
        short = norm(functional.conv2d(x, block.projection.weight, stride=2))
        torch.testing.assert_close(block(x), (short + y).relu())


@pytest.mark.parametrize("preactivation", [False, True])
def test_dropout_is_between_the_two_convolutions(preactivation: bool) -> None:
    """Zagoruyko & Komodakis 2016, §2.4: what the second convolution reads has zeros, what the first reads has none."""
    torch.manual_seed(0)
    block = Block(4, 4, 1, options=Options(preactivation=preactivation, dropout=0.5, activation=Activation("sigmoid")))
    read: dict[str, Tensor] = {}
    for name in ("convolution1", "convolution2"):
        getattr(block, name).register_forward_hook(
            lambda module, inputs, output, name=name: read.update({name: inputs[0]})
        )
    block(torch.randn(2, 4, 5, 5))
    zeros = {name: float((x == 0).float().mean()) for name, x in read.items()}
    assert zeros["convolution1"] == 0
    assert 0.3 < zeros["convolution2"] < 0.7


def test_squeeze_and_excitation_costs_what_its_paper_says() -> None:
    """Hu et al. 2018, eq. 5: 2/r times the sum over stages of blocks times channels squared; 2.5 M in ResNet-50."""
    options = {**ARCHITECTURES["resnet-50"]}
    added = size(on_meta(**options, squeeze_excitation=16)) - size(on_meta(**options))
    assert added == 2 * (3 * 256**2 + 4 * 512**2 + 6 * 1024**2 + 3 * 2048**2) // 16
    assert round(added / 1e6, 1) == 2.5


def test_squeeze_and_excitation_by_a_loop() -> None:
    torch.manual_seed(0)
    part = SqueezeExcitation(6, reduction=3).double()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    y = part(x)
    for image in range(2):
        means = [x[image, channel].sum().item() / 12 for channel in range(6)]
        narrow = [max(0, sum(w * m for w, m in zip(row, means, strict=True))) for row in part.squeeze.weight.tolist()]
        for channel, row in enumerate(part.excite.weight.tolist()):
            gate = 1 / (1 + math.exp(-sum(w * m for w, m in zip(row, narrow, strict=True))))
            torch.testing.assert_close(y[image, channel], x[image, channel] * gate)


def test_stochastic_depth_falls_linearly_to_the_last_block() -> None:
    """Huang et al. 2016, eq. 4: p_l = 1 - l/L·(1 - p_L); three quarters of the blocks on average for p_L = 1/2."""
    blocks = [block for block in ResNet(110, survival=0.5).blocks if isinstance(block, Block)]
    assert [block.survival for block in blocks] == pytest.approx([1 - layer / 54 * 0.5 for layer in range(1, 55)])


@pytest.mark.parametrize("preactivation", [False, True])
def test_stochastic_depth_leaves_out_blocks_and_scales_when_evaluating(preactivation: bool) -> None:
    torch.manual_seed(0)
    block = Block(4, 4, 1, survival=0.25, options=Options(preactivation=preactivation)).double()
    always = Block(4, 4, 1, options=Options(preactivation=preactivation)).double()
    always.load_state_dict(block.state_dict())
    x = torch.rand(2, 4, 5, 5, dtype=torch.float64)
    whole = always(x)
    kinds = []
    for _ in range(200):
        y = block(x)
        kinds.append(torch.equal(y, whole))
        assert kinds[-1] or torch.equal(y, x)
    # Binomial: further from 50 than this once in a billion.
    assert 15 < sum(kinds) < 90
    block.load_state_dict(always.state_dict())
    block.eval()
    always.eval()
    residual = always.normalisation2(always.convolution2(always.normalisation1(always.convolution1(x)).relu()))
    if preactivation:
        torch.testing.assert_close(block(x) - x, (always(x) - x) * 0.25)
    else:
        torch.testing.assert_close(block(x), (x + 0.25 * residual).relu())


def test_stochastic_depth_is_the_same_for_the_same_seed() -> None:
    images = torch.randn(2, 3, 8, 8)
    model = ResNet(20, survival=0.2)

    def losses(seed: int) -> list[float]:
        torch.manual_seed(seed)
        return [model(images).sum().item() for _ in range(4)]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


@pytest.mark.parametrize("preactivation", [False, True])
def test_a_block_left_out_passes_the_gradient_on_and_has_zero_itself(preactivation: bool) -> None:
    block = Block(4, 4, 1, survival=1e-9, options=Options(preactivation=preactivation))
    x = torch.rand(2, 4, 5, 5, requires_grad=True)
    block(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in block.parameters())


def test_the_imagenet_stem_makes_an_image_a_quarter() -> None:
    with torch.device("meta"):
        model = ResNet(18, **{**IMAGENET, "classes": 10})
        seen = []
        model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    assert seen == [(2, 64, 16, 16)]


def test_dropout_is_in_training_only() -> None:
    torch.manual_seed(0)
    model = ResNet(**VARIANTS["wide"])
    images = torch.randn(4, 3, 8, 8)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))
