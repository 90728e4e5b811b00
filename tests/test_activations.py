"""Activations: each is its formula, has the slope of its formula, and stays finite far out."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from dl7cli.models.activations import NAMES, Activation
from dl7cli.recipe import ResNetModel

WIDTH = 3
WITH_OPTIONS = [
    *[Activation(name) for name in NAMES],  # type: ignore[arg-type]
    Activation("maxout", pieces=5),
    Activation("swish", beta=1.7),
    Activation("swish", beta=0.6, learned_beta=True),
]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def formula(activation: Activation, x: list[float]) -> float:
    """One output of the `inputs` numbers it is made of, as the papers write it."""
    z = x[0]
    match activation.name:
        case "relu":
            return max(z, 0)
        case "leaky_relu":
            return z if z > 0 else 0.01 * z
        case "prelu":
            return z if z > 0 else 0.25 * z
        case "elu":
            return z if z > 0 else math.exp(z) - 1
        case "gelu":
            return z * 0.5 * (1 + math.erf(z / math.sqrt(2)))
        case "swish":
            return z / (1 + math.exp(-activation.beta * z))
        case "su":
            return max(z, z * math.exp(-abs(z)))
        case "mish":
            return z * math.tanh(math.log(1 + math.exp(z)))
        case "tanh":
            return (math.exp(z) - math.exp(-z)) / (math.exp(z) + math.exp(-z))
        case "sigmoid":
            return sigma(z)
        case "hardtanh":
            return -1 if z < -1 else 1 if z > 1 else z
        case "softsign":
            return z / (1 + abs(z))
        case "maxout":
            return max(x)
        case "glu":
            return z * sigma(x[1])
    raise AssertionError(activation)


def inputs(activation: Activation) -> Tensor:
    """(2, inputs·WIDTH, 4) in float64, from -6 to 6, no two alike and none at a kink."""
    torch.manual_seed(0)
    count = 2 * activation.inputs * WIDTH * 4
    return (torch.randperm(count, dtype=torch.float64) * (12 / count) - 5.987).reshape(2, -1, 4)


def test_a_recipe_takes_all_of_them_and_no_others() -> None:
    assert set(get_args(ResNetModel.model_fields["activation"].annotation)) == set(NAMES)


@pytest.mark.parametrize("activation", WITH_OPTIONS, ids=str)
def test_values_are_those_of_the_formula(activation: Activation) -> None:
    x = inputs(activation)
    y = activation.module(WIDTH).double()(x.clone())
    assert y.shape == (2, WIDTH, 4)
    for row in range(2):
        for channel in range(WIDTH):
            for column in range(4):
                taken = [x[row, piece * WIDTH + channel, column].item() for piece in range(activation.inputs)]
                # What is learned is kept in float32: 0.6 is not exactly 0.6.
                assert math.isclose(y[row, channel, column].item(), formula(activation, taken), rel_tol=2e-7)


@pytest.mark.parametrize("activation", WITH_OPTIONS, ids=str)
def test_slopes_are_those_of_the_values(activation: Activation) -> None:
    module = activation.module(WIDTH).double()
    x = inputs(activation).requires_grad_()
    assert torch.autograd.gradcheck(module, x)
    assert torch.autograd.gradgradcheck(module, x)
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        call = lambda value, name=name: torch.func.functional_call(module, {name: value}, x.detach())  # noqa: E731
        assert torch.autograd.gradcheck(call, parameter.detach().requires_grad_())


@pytest.mark.parametrize("activation", WITH_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_far_out_value_and_slope_are_finite(activation: Activation, dtype: torch.dtype) -> None:
    corners = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], dtype=dtype)
    x = torch.cartesian_prod(*[corners] * activation.inputs).reshape(-1, activation.inputs, 1).requires_grad_()
    module = activation.module(1)
    y = module(x)
    y.float().sum().backward()
    assert x.grad is not None
    assert y.dtype == dtype, "a parameter does not make narrow activations wide"
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sus_function_is_finite_up_to_the_greatest_number_under_any_gradient(dtype: torch.dtype) -> None:
    """By autograd alone a gradient of 1,000, as loss scaling makes them, gives infinity times zero in float16."""
    greatest = torch.finfo(dtype).max
    x = torch.tensor([-math.inf, -greatest, -1e3, -1.0, 0.0, 1e3, greatest], dtype=dtype, requires_grad=True)
    y = Activation("su").module(1)(x)
    y.backward(torch.full_like(y, 1000.0))
    expected = torch.tensor([0, 0, 0, -math.exp(-1), 0, 1e3, greatest], dtype=dtype)
    torch.testing.assert_close(y.detach(), expected)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([0, 0, 0, 0, 1e3, 1e3, 1e3], dtype=dtype))


def test_swish_is_a_glu_of_twice_the_same() -> None:
    x = torch.randn(4, WIDTH, 5, dtype=torch.float64, requires_grad=True)
    twice = x.detach().clone().requires_grad_()
    swish, glu = Activation("swish").module(WIDTH)(x), Activation("glu").module(WIDTH)(torch.cat([twice, twice], 1))
    torch.testing.assert_close(swish, glu)
    weights = torch.randn_like(swish)
    (swish * weights).sum().backward()
    (glu * weights).sum().backward()
    torch.testing.assert_close(x.grad, twice.grad)


def test_a_learned_beta_starts_as_a_fixed_one() -> None:
    x = torch.randn(4, WIDTH, 5, 5)
    fixed, learned = (Activation("swish", beta=1.5, learned_beta=learned).module(WIDTH) for learned in (False, True))
    torch.testing.assert_close(fixed(x), learned(x))
    assert [tuple(parameter.shape) for parameter in learned.parameters()] == [(WIDTH,)]


@pytest.mark.parametrize("activation", WITH_OPTIONS, ids=str)
def test_channels_last_comes_out_as_channels_last(activation: Activation) -> None:
    x = torch.randn(2, activation.inputs * 8, 5, 5)
    module = activation.module(8)
    y = module(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, module(x))  # the ends of a row are rounded otherwise than its middle


@pytest.mark.parametrize("activation", WITH_OPTIONS, ids=str)
def test_the_gain_gives_outputs_a_mean_square_of_one(activation: Activation) -> None:
    """Of 300,000 draws, whose mean square is off by about half a percent."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(300_000, activation.inputs, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        y = activation.module(1).double()(z)
    assert math.isclose(activation.gain**2 * (y**2).mean().item(), 1, rel_tol=0.02)


def test_the_gain_of_relu_is_that_of_the_paper() -> None:
    assert Activation("relu").gain == nn.init.calculate_gain("relu")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no activation `relo`"):
        Activation("relo").module(1)  # type: ignore[arg-type]
