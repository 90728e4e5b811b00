"""Attention of decoder states over encoder outputs. Nothing is kept between calls.

Letters in shapes: B sentences, Q queries a sentence (target steps in training, beams in search), S source steps.
"""

import torch
from torch import Tensor, nn


class GeneralAttention(nn.Module):
    """Luong et al. 2015 (arXiv 1508.04025), eq. 7 and 8 "general": softmax over s of qᵀ W m_s, and the weighted sum."""

    def __init__(self, query_width: int, memory_width: int) -> None:
        super().__init__()
        self.project = nn.Linear(memory_width, query_width, bias=False)

    def keys(self, memory: Tensor) -> Tensor:
        """W m for every step of `memory` (B, S, M) → (B, S, D): made once per sentence, used by every query."""
        projected: Tensor = self.project(memory)
        return projected

    def forward(self, queries: Tensor, keys: Tensor, memory: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """queries (B, Q, D), keys (B, S, D), memory (B, S, M), mask (B, S) true at real steps
        → context (B, Q, M), weights (B, Q, S) that sum to one over the real steps.
        """
        scores = torch.bmm(queries, keys.transpose(1, 2))
        scores = scores.masked_fill(~mask[:, None, :], float("-inf"))
        weights = scores.float().softmax(dim=2).to(memory.dtype)
        return torch.bmm(weights, memory), weights
