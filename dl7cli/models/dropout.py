"""Dropout whose random numbers cost a quarter of torch's on a CPU."""

import torch
from torch import Tensor
from torch.nn import functional


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Srivastava et al. 2014, scaled in training: on a CPU each element is dropped by a random byte, eight to a draw.

    So `probability` counts there to the nearest of 1/256 … 255/256, and the scale is that of what is really kept.
    """
    if not training or probability == 0 or x.device.type != "cpu":
        return functional.dropout(x, probability, training)
    dropped = min(max(round(256 * probability), 1), 255)
    draws = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    kept = draws.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
    return x * (kept.to(x.dtype) * (256 / (256 - dropped)))
