"""Optimisers, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dl7cli.device import without_tf32
from dl7cli.models.embedding import Embeddings
from dl7cli.recipe import Optim


class Together(torch.optim.Optimizer):
    """Several optimisers, each of parameters of its own, as one; `parts` share its state and groups as they now are.

    A step is left out where `found_inf` is not 0, as by torch's fused optimisers, though the processor waits for a GPU
    to say so; in fp16 the gradient scaler waits so before each step.
    """

    found_inf: Tensor | None = None

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            self.state.update(part.state)
            part.state = self.state
        self.parts = parts

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a loss is never evaluated twice here
        """One step of each by the gradients that are there; a parameter without one is left as it is."""
        if self.found_inf is not None and self.found_inf.item():
            return
        for part in self.parts:
            part.step()


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal: a step goes along the semi-orthogonal matrix that is nearest to Nesterov's momentum.

    Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon). A group with `norm_kept` is of filters, in the form
    they use for CIFAR: a bank of filters, seen as a matrix of one row per output channel, is brought to the norm √rows
    before each step, since what normalises afterwards makes the scale of filters meaningless. Other groups are of
    matrices, with weight decay and steps as large as those of AdamW (Liu et al. 2025, arXiv 2502.16982, §2.2).

    torch.optim.Muon takes matrices one by one and in bfloat16, which is very slow on a CPU that lacks it; here those of
    one shape go through the iteration together, in their own precision.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "norm_kept": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step by the gradients that are there; what has none is left as it is."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in parameters if p.grad is not None]
            if not parameters:
                continue
            for p in parameters:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in parameters]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            updates = torch._foreach_add(gradients, buffers, alpha=group["momentum"])
            rate = group["lr"]
            for number, direction in _directions(updates):
                p = parameters[number]
                rows, columns = direction.shape
                if not group["norm_kept"]:
                    p.mul_(1 - rate * group["weight_decay"])
                    size = 0.2 * max(rows, columns) ** 0.5
                elif rate > 0:  # at a rate of 0 the weights stay: what a step costs is timed so
                    p.mul_(rows**0.5 / p.norm().clamp(min=1e-12))
                    # With more rows than columns not all rows can be of length one; a factor keeps the norm √rows.
                    size = max(1.0, rows / columns) ** 0.5
                else:
                    continue
                p.sub_(direction.view(p.shape), alpha=rate * size)


def _directions(updates: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """The number of each update and `orthogonalise` of it as a matrix, a row for each of its first dimension.

    Those of one shape come one after another, as they are worked out together.
    """
    by_shape: dict[tuple[int, int], list[int]] = {}
    for number, update in enumerate(updates):
        by_shape.setdefault((len(update), update[0].numel()), []).append(number)
    for numbers in by_shape.values():
        yield from zip(numbers, orthogonalise(torch.stack([updates[n].flatten(1) for n in numbers])), strict=True)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """(N, rows, columns) → for each about U·Vᵀ of its singular value decomposition U·S·Vᵀ: singular values from 0.7 to
    1.2, but for those that were next to nothing.

    The quintic Newton-Schulz iteration of Jordan et al. 2024, with their coefficients, which go for speed rather than
    for singular values of exactly one: X ← (aI + bXXᵀ + c(XXᵀ)²)·X. Every factor is a polynomial of the first XXᵀ, so
    they commute, and iterating on that square alone takes less than half the work where it is small. It needs real
    float32, since what XXᵀ is off by grows some 10⁴-fold; TF32, which some containers ask for, or bfloat16 do not do.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    with without_tf32():
        square = x @ x.mT
        identity = torch.eye(square.shape[1], device=x.device, dtype=x.dtype)
        factor = product = torch.baddbmm(square, square, square, beta=b, alpha=c) + a * identity
        for _ in range(iterations - 1):
            square = factor @ square @ factor
            factor = torch.baddbmm(square, square, square, beta=b, alpha=c) + a * identity
            product = factor @ product
        orthogonal: Tensor = product @ x
    return orthogonal.mT if tall else orthogonal


def build_optimiser(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The recipe's optimiser over the model's parameters; weight decay spares vectors (biases, normalisation).

    `sgd` is with Nesterov momentum (Sutskever et al. 2013), `adamw` is Loshchilov & Hutter 2019 with a second beta of
    0.98 (Vaswani et al. 2017, §5.3). `muon` is `Muon` for the filters of convolutions over images, with `sgd` for the
    rest; where a model has none, for the matrices of its layers, with `adamw`. A group's `share` is its rate as a part
    of the recipe's.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    chosen: set[Tensor] = set()
    share = 1.0
    if optim.name == "muon":
        # The first convolution reads the colours.
        chosen = {one.weight for one in convolutions[1:]} if convolutions else _matrices(model)
        if optim.other_learning_rate is not None:
            share = optim.other_learning_rate / optim.learning_rate
    others = [p for p in parameters if p not in chosen]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": optim.weight_decay, "share": share},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0, "share": share},
    ]
    match optim.name:
        case "sgd":
            return _sgd(groups, optim)
        case "adamw":
            return _adamw(groups, optim)
        case "muon":
            inner: dict[str, Any] = {"params": [p for p in parameters if p in chosen], "share": 1.0}
            inner |= {"norm_kept": True} if convolutions else {"weight_decay": optim.weight_decay}
            muon = Muon([inner], lr=optim.learning_rate, momentum=optim.momentum)
            return Together(_sgd(groups, optim) if convolutions else _adamw(groups, optim), muon)


def _sgd(groups: list[dict[str, Any]], optim: Optim) -> torch.optim.SGD:
    sgd = torch.optim.SGD(
        groups, lr=optim.learning_rate, momentum=optim.momentum, nesterov=optim.momentum > 0, fused=True
    )
    if optim.momentum > 0:
        # Left to the first step, it would be whatever lay in memory where that step is left out.
        for group in groups:
            for p in group["params"]:
                sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


def _adamw(groups: list[dict[str, Any]], optim: Optim) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=optim.learning_rate, betas=(optim.momentum, 0.98), fused=True)


def _matrices(model: nn.Module) -> set[Tensor]:
    """The matrices of linear and recurrent layers, without those of words and without single rows and columns."""
    words = {p for module in model.modules() if isinstance(module, Embeddings) for p in module.parameters()}
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.RNNBase)]
    within: set[Tensor] = {
        p for layer in layers for p in layer.parameters(recurse=False) if p.ndim == 2 and min(p.shape) > 1
    }
    return within - words


class WeightAverage:
    """An exponential moving average of a model's weights: after step t, d·average + (1-d)·weights.

    d is `decay`, but at first no more than (1+t)/(10+t): the weights before training are soon forgotten. Running
    statistics are averaged too, since they belong to the weights; what counts steps is copied. As in Polyak & Juditsky
    1992, with the exponential weights of Tarvainen & Valpola 2017.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._decay = decay
        # Tied weights have one average, too.
        tied = {value.data_ptr(): value.detach() for value in model.state_dict().values()}
        averages = {place: value.clone() for place, value in tied.items()}
        self.weights = {name: averages[value.data_ptr()] for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor | None = None) -> None:
        """Take the model's weights after step `step`, counted from 1, in; not where `skipped`, (), is true."""
        share: float | Tensor = 1 - min(self._decay, (1 + step) / (10 + step))
        if skipped is not None:
            share = torch.where(skipped, 0.0, share)
        done = set()
        for name, value in self._model.state_dict().items():
            average = self.weights[name]
            if id(average) in done:
                continue
            done.add(id(average))
            if value.is_floating_point():
                average.lerp_(value, share)
            else:
                average.copy_(value)


@contextmanager
def swapped(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Let the model have other weights, of the names in its `state_dict`, for a while."""
    own = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    try:
        yield
    finally:
        model.load_state_dict(own)


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The learning rate of step `step`, counted from 0, of `steps`: a rise over the warm-up, then the schedule.

    The rise is linear from zero, except with `one-cycle` (Smith & Topin 2018, arXiv 1708.07120, in the form of
    torch.optim.lr_scheduler.OneCycleLR, with a momentum that stays): half a cosine from 1/25 of the greatest rate, and
    half a cosine to 1/250,000.

    `inverse-sqrt` is Vaswani et al. 2017, eq. 3, with the greatest rate in place of 1/√(width · warm-up steps).
    """
    if optim.schedule == "one-cycle":
        return optim.learning_rate * _one_cycle(step, steps, optim.warmup)
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
        case "step":
            passed = sum(step >= round(milestone * steps) for milestone in optim.milestones)
            return optim.learning_rate * optim.factor**passed
        case "inverse-sqrt":
            return optim.learning_rate * math.sqrt(max(rising, 1) / (step + 1))


def _one_cycle(step: int, steps: int, warmup: float) -> float:
    first, last = 1 / 25, 1 / 250_000
    top = warmup * steps - 1
    if step <= top:
        return 1 + (first - 1) * (1 + math.cos(math.pi * step / top)) / 2 if top > 0 else 1.0
    top = max(top, 0.0)
    return last + (1 - last) * (1 + math.cos(math.pi * (step - top) / max(steps - 1 - top, 1))) / 2


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

    All of it goes to the parameter's device, the step count too: fused optimisers read it there. Raises ValueError and
    IndexError for what no such optimiser gave.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        if not key.startswith("optimiser."):
            continue
        _, number, name = key.split(".")
        parameter = parameters[int(number)]
        # Fused optimisers do not look at the shape before they read and write.
        if value.dtype != parameter.dtype or value.shape != (() if name == "step" else parameter.shape):
            raise ValueError(f"`{key}` is not of the optimiser")
        if not value.isfinite().all() or (name == "step" and value < 0):
            raise ValueError(f"`{key}` is not a number that an optimiser gives")
        like = parameter if value.shape == parameter.shape else value
        own = torch.empty_like(like, dtype=value.dtype, device=parameter.device)
        optimiser.state[parameter][name] = own.copy_(value)
    parts = optimiser.parts if isinstance(optimiser, Together) else (optimiser,)
    for part in parts:
        kept = {frozenset(part.state.get(p, {})) for group in part.param_groups for p in group["params"]}
        if len(kept) > 1:
            raise ValueError("the optimiser knows more of one parameter than of another")
