"""Optimisers, and the learning rate as a pure function of the step."""

import math

import torch
from torch import Tensor, nn

from dl7cli.recipe import Optim


def build_optimiser(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The recipe's optimiser over the model's parameters; weight decay spares vectors (biases, normalisation).

    `sgd` is with Nesterov momentum (Sutskever et al. 2013), `adamw` is Loshchilov & Hutter 2019 with a second beta of
    0.98 (Vaswani et al. 2017, §5.3).
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    match optim.name:
        case "sgd":
            return torch.optim.SGD(
                groups,
                lr=optim.learning_rate,
                momentum=optim.momentum,
                nesterov=optim.momentum > 0,
                fused=True,
            )
        case "adamw":
            return torch.optim.AdamW(groups, lr=optim.learning_rate, betas=(optim.momentum, 0.98), fused=True)


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The learning rate of step `step`, counted from 0, of `steps`: a linear rise, then the schedule."""
    rising = round(optim.warmup * steps)
    if step < rising:
        return optim.learning_rate * (step + 1) / rising
    done = (step - rising) / (steps - rising)
    match optim.schedule:
        case "constant":
            return optim.learning_rate
        case "linear":
            return optim.learning_rate * (1 - done)
        case "cosine":
            return optim.learning_rate * (1 + math.cos(math.pi * done)) / 2


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by name, `optimiser.<number of the parameter>.<name>`, for a checkpoint."""
    return {
        f"optimiser.{number}.{name}": value
        for number, state in optimiser.state_dict()["state"].items()
        for name, value in state.items()
        if value is not None
    }


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimiser_tensors` gave, with the memory layout of the parameters so that sums round alike.

    All of it goes to the parameter's device, the step count too: fused optimisers read it there.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        if not key.startswith("optimiser."):
            continue
        _, number, name = key.split(".")
        parameter = parameters[int(number)]
        like = parameter if value.shape == parameter.shape else value
        own = torch.empty_like(like, dtype=value.dtype, device=parameter.device)
        optimiser.state[parameter][name] = own.copy_(value)
