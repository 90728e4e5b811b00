"""Attention of decoder states over encoder outputs. Nothing is kept between calls.

Letters in shapes: B sentences, Q queries a sentence (target steps in training, beams in search), S source steps, D
width of a query, M width of the memory.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_BLOCK = 2**19
"""Numbers that stay in the caches of the cores."""


class Attention(nn.Module):
    """A softmax over s of what `scores` says, and the weighted sum of the memory."""

    def keys(self, memory: Tensor) -> Tensor:
        """memory (B, S, M) → what every query is compared with, (B, S, …), of a width of its own; once a sentence."""
        return memory

    def scores(self, queries: Tensor, keys: Tensor, coverage: Tensor | None) -> Tensor:
        """queries (B, Q, D), keys, coverage (B, Q, S) or None → how well each query goes with each step, (B, Q, S)."""
        raise NotImplementedError

    def forward(
        self, queries: Tensor, keys: Tensor, memory: Tensor, mask: Tensor, coverage: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """queries (B, Q, D), keys by `keys`, memory (B, S, M), mask (B, S) true at real steps
        → what is found (B, Q, M), weights (B, Q, S) that sum to one over the real steps, in float32 or wider.
        """
        weights = _softmax(self.scores(queries, keys, coverage), mask[:, None])
        return torch.bmm(weights.to(memory.dtype), memory), weights


class DotAttention(Attention):
    """Luong et al. 2015 (arXiv 1508.04025), eq. 8 "dot": qᵀ m_s."""

    def scores(self, queries: Tensor, keys: Tensor, coverage: Tensor | None) -> Tensor:
        return torch.bmm(queries, keys.transpose(1, 2))


class GeneralAttention(DotAttention):
    """Luong et al. 2015, eq. 8 "general": qᵀ W m_s."""

    def __init__(self, query_width: int, memory_width: int) -> None:
        super().__init__()
        self.project = nn.Linear(memory_width, query_width, bias=False)

    def keys(self, memory: Tensor) -> Tensor:
        projected: Tensor = self.project(memory)
        return projected


class AdditiveAttention(Attention):
    """Bahdanau et al. 2015 (arXiv 1409.0473), appendix A.1.2: vᵀ tanh(W q + U m_s).

    The "concat" of Luong et al. 2015, eq. 8, is the same: its matrix is W and U side by side. With `coverage` (See et
    al. 2017, arXiv 1704.04368, eq. 11) the sum of what earlier steps looked at joins in: vᵀ tanh(W q + U m_s + w c_s).

    Without it tanh(a + b) = 1 - 2 / (1 + e^2a e^2b) takes one exponential for each query and each step of the memory
    instead of a tanh for each pair of them: seven times as fast on a CPU. It is the same number where both are within
    30 of zero; beyond, which no use is made of, each counts as 30.
    """

    def __init__(self, query_width: int, memory_width: int, *, coverage: bool = False) -> None:
        super().__init__()
        self.query = nn.Linear(query_width, query_width)
        self.project = nn.Linear(memory_width, query_width, bias=False)
        self.energy = nn.Linear(query_width, 1, bias=False)
        self.covered = nn.Linear(1, query_width, bias=False) if coverage else None

    def keys(self, memory: Tensor) -> Tensor:
        projected: Tensor = self.project(memory)
        return _doubled_exponential(projected) if self.covered is None else projected

    def scores(self, queries: Tensor, keys: Tensor, coverage: Tensor | None) -> Tensor:
        asked = self.query(queries)
        if self.covered is None:
            asked = _doubled_exponential(asked)
            scores: Tensor = _AdditiveScores.apply(asked, keys, self.energy.weight[0])  # type: ignore[no-untyped-call]
            return scores
        assert coverage is not None
        asked = asked[:, :, None] + self.covered(coverage[..., None])
        energies: Tensor = self.energy(torch.tanh(asked + keys[:, None]))
        return energies[..., 0]


class MultiHeadAttention(Attention):
    """Vaswani et al. 2017 (arXiv 1706.03762), §3.2.2: scaled dot products in several heads, each with its own values.

    The weights that come back are the mean of the heads'.
    """

    def __init__(self, query_width: int, memory_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(query_width, memory_width)
        self.project = nn.Linear(memory_width, 2 * memory_width)
        self.join = nn.Linear(memory_width, memory_width)

    def keys(self, memory: Tensor) -> Tensor:
        """Keys and values side by side, (B, S, 2M)."""
        projected: Tensor = self.project(memory)
        return projected

    def forward(
        self, queries: Tensor, keys: Tensor, memory: Tensor, mask: Tensor, coverage: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        asked, offered, values = (
            part.view(*part.shape[:2], self.heads, -1).transpose(1, 2)
            for part in (self.query(queries), *keys.chunk(2, dim=2))
        )
        scores = asked @ offered.transpose(2, 3) * asked.size(3) ** -0.5
        weights = _softmax(scores, mask[:, None, None])
        found = weights.to(values.dtype) @ values
        return self.join(found.transpose(1, 2).flatten(2)), weights.mean(dim=1)


def _doubled_exponential(x: Tensor) -> Tensor:
    """e^2x in float32 or wider."""
    return (2 * x.to(torch.promote_types(x.dtype, torch.float32))).clamp(-60, 60).exp()


class _AdditiveScores(torch.autograd.Function):
    """vᵀ tanh(q + k) from e^2q (B, Q, D), e^2k (B, S, D) and v (D,) → (B, Q, S).

    What is as large as (B, Q, S, D) is never whole on a CPU: it is made, and for the gradient made again, in blocks
    that stay in the caches.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, energy: Tensor) -> Tensor:
        energy = energy.to(keys.dtype)
        ctx.save_for_backward(queries, keys, energy)
        scores = queries.new_empty(*queries.shape[:2], keys.size(1))
        for rows, columns in _blocks(queries, keys):
            inner = (queries[rows, columns, None] * keys[rows, None]).add_(1).reciprocal_()
            torch.matmul(inner, energy, out=scores[rows, columns])  # autocast lets what is written to `out` alone
        return scores.mul_(-2).add_(energy.sum())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, energy = ctx.saved_tensors
        of_queries, of_keys, of_energy = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(energy)
        for rows, columns in _blocks(queries, keys):
            outer = gradient[rows, columns]
            inner = (queries[rows, columns, None] * keys[rows, None]).add_(1).reciprocal_()
            of_energy += outer.reshape(-1) @ inner.flatten(0, 2)
            # A score is of -2v r with r = 1 / (1 + qk): its derivatives 2v r²k and 2v r²q are 2v (r - r²) over q and k.
            inner.addcmul_(inner, inner, value=-1).mul_(outer[..., None])
            of_queries[rows, columns] = inner.sum(dim=2)
            of_keys[rows] += inner.sum(dim=1)
        of_energy = of_energy.mul_(-2).add_(gradient.sum())
        return of_queries.mul_(2 * energy).div_(queries), of_keys.mul_(2 * energy).div_(keys), of_energy


def _blocks(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, slice]]:
    """Sentences and queries whose (B, Q, S, D) fits the caches; everything at once on other devices."""
    sentences, count, width = queries.shape
    together = max(1, _BLOCK // (keys.size(1) * width) if queries.device.type == "cpu" else sentences * count)
    step = max(1, together // count)
    across = -(-count // -(-count // together))  # of like size: a small block costs nearly as much as a full one
    for row in range(0, sentences, step):
        for column in range(0, count, across):
            yield slice(row, row + step), slice(column, column + across)


def _softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Over the last dimension where `mask` is true, in float32 or wider."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return functional.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1, dtype=wide)
