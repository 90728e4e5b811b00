"""Losses over a large vocabulary, a few rows at a time so that they stay in the cache."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_AT_ONCE = 1 << 19
"""Scores worked on at once: 2 MiB in float32."""


class _SmoothedCrossEntropy(torch.autograd.Function):
    """Keeps the scores as they came, often in bfloat16, and one number a row: the backward pass does the softmax again.

    torch's own makes copies of all scores in float32 instead, five of them with smoothing.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
        at_least_float = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=at_least_float, device=logits.device)
        normalisers = []
        rows = max(1, _AT_ONCE // logits.size(1))
        for some, words in zip(torch.split(logits[: len(target)], rows), torch.split(target, rows), strict=True):
            scores = some.to(at_least_float, copy=True)
            total -= (1 - smoothing) * scores.gather(1, words[:, None]).sum()
            if smoothing:  # a score may be -inf where no probability goes there
                total -= smoothing * scores.mean(dim=1).sum()
            greatest = scores.amax(dim=1, keepdim=True)
            normalisers.append(scores.sub_(greatest).exp_().sum(dim=1).log_().add_(greatest[:, 0]))
            total += normalisers[-1].sum()
        ctx.save_for_backward(logits, target, *normalisers)
        ctx.smoothing = smoothing
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, target, *normalisers = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        gradient[len(target) :] = 0
        rows = max(1, _AT_ONCE // logits.size(1))
        for number, normaliser in enumerate(normalisers):
            own = slice(number * rows, min((number + 1) * rows, len(target)))
            words = target[own, None]
            found = logits[own].to(normaliser.dtype, copy=True).sub_(normaliser[:, None]).exp_()
            found -= ctx.smoothing / logits.size(1)
            found.scatter_add_(1, words, torch.full_like(words, ctx.smoothing - 1, dtype=found.dtype))
            gradient[own] = found.mul_(gradients[0])
        return gradient, None, None


def smoothed_cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """logits (N or more, V), target (N,) → the sum over the first N, in float32, of minus the expected log-probability,
    where the target has 1 - smoothing and all V words share the rest evenly (Szegedy et al. 2016, arXiv 1512.00567,
    §7).

    In pieces on a CPU; a GPU is faster with all at once.
    """
    if logits.device.type != "cpu":
        logits = logits[: len(target)].float()
        return functional.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing)
    total: Tensor = _SmoothedCrossEntropy.apply(logits, target, smoothing)  # type: ignore[no-untyped-call]
    return total


class _AgreeingCrossEntropy(torch.autograd.Function):
    """Keeps the scores as they came and nothing else. Both losses at once, as each needs all probabilities."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, smoothing: float, weight: float) -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        for rows in _twins(logits):
            one, two = (_log_probabilities(logits[own]) for own in rows)
            words = target[rows[0], None]
            for scores in (one, two):
                total -= (1 - smoothing) * scores.gather(1, words).sum()
                if smoothing:
                    total -= smoothing * scores.mean(dim=1).sum()
            apart = one - two
            total += weight / 2 * ((one.exp_() - two.exp_()) * apart).sum()
        ctx.save_for_backward(logits, target)
        ctx.smoothing, ctx.weight = smoothing, weight
        return total / 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits, target = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in _twins(logits):
            one, two = (_log_probabilities(logits[own]) for own in rows)
            words = target[rows[0], None]
            apart = one - two
            difference = one.exp_() - two.exp_()
            for own, probabilities, sign in zip(rows, (one, two), (1, -1), strict=True):
                mean = (probabilities * apart).sum(dim=1, keepdim=True)
                found = (apart - mean).mul_(probabilities).add_(difference).mul_(sign * ctx.weight / 2)
                found += probabilities
                found -= ctx.smoothing / logits.size(1)
                found.scatter_add_(1, words, torch.full_like(words, ctx.smoothing - 1, dtype=found.dtype))
                gradient[own] = found.mul_(gradients[0] / 2)
        return gradient, None, None, None


def _twins(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of the first half, and those of the second that belong to them: a few on a CPU, on a GPU all at once."""
    half = len(logits) // 2
    rows = max(1, _AT_ONCE // logits.size(1) if logits.device.type == "cpu" else half)
    for begin in range(0, half, rows):
        end = min(begin + rows, half)
        yield slice(begin, end), slice(half + begin, half + end)


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.log_softmax(dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))


def agreeing_cross_entropy(logits: Tensor, target: Tensor, smoothing: float, weight: float) -> Tensor:
    """Half the objective of R-Drop (Liang et al. 2021, arXiv 2106.14448, eq. 4), summed over N, in float32.

    logits (2N, V) of two readings of everything, target (N,): the mean of both `smoothed_cross_entropy`, and half of
    `weight` times the mean of KL(P‖Q) and KL(Q‖P), where P is by row i and Q by row N + i.
    """
    total: Tensor = _AgreeingCrossEntropy.apply(logits, target, smoothing, weight)  # type: ignore[no-untyped-call]
    return total
