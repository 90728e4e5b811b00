"""Attention of decoder states over encoder outputs. Nothing is kept between calls.

Letters in shapes: B sentences, Q queries a sentence (target steps in training, beams in search), S source steps, D
width of a query, M width of the memory.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """A softmax over s of what `scores` says, and the weighted sum of the memory."""

    def keys(self, memory: Tensor) -> Tensor:
        """What every query is compared with, from `memory` (B, S, M): made once per sentence."""
        return memory

    def scores(self, queries: Tensor, keys: Tensor, coverage: Tensor | None) -> Tensor:
        """queries (B, Q, D), coverage (B, Q, S) or None → how well each query goes with each step, (B, Q, S)."""
        raise NotImplementedError

    def forward(
        self, queries: Tensor, keys: Tensor, memory: Tensor, mask: Tensor, coverage: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """queries (B, Q, D), keys, memory (B, S, M), mask (B, S) true at real steps
        → context (B, Q, M), weights (B, Q, S) that sum to one over the real steps, in float32 or wider.
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
    """

    def __init__(self, query_width: int, memory_width: int, *, coverage: bool = False) -> None:
        super().__init__()
        self.query = nn.Linear(query_width, query_width)
        self.project = nn.Linear(memory_width, query_width, bias=False)
        self.energy = nn.Linear(query_width, 1, bias=False)
        self.covered = nn.Linear(1, query_width, bias=False) if coverage else None

    def keys(self, memory: Tensor) -> Tensor:
        projected: Tensor = self.project(memory)
        return projected

    def scores(self, queries: Tensor, keys: Tensor, coverage: Tensor | None) -> Tensor:
        asked = self.query(queries)[:, :, None]
        if self.covered is not None:
            assert coverage is not None
            asked = asked + self.covered(coverage[..., None])
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


def _softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Over the last dimension where `mask` is true, in float32 or wider."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return functional.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1, dtype=wide)
