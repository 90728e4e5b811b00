"""Recurrent encoders over padded batches: whole sequences through fused kernels, no sentence sees its padding.

Letters in shapes: B sentences, S steps, W input width, H units per direction.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


def reverse(x: Tensor, lengths: Tensor) -> Tensor:
    """Turn the first `lengths[b]` steps of each row of `x` (B, S, W) round; padding stays where it is."""
    steps = torch.arange(x.size(1), device=x.device)
    ends = lengths[:, None]
    index = torch.where(steps < ends, ends - 1 - steps, steps)
    return x.gather(1, index[:, :, None].expand_as(x))


def run(lstm: nn.LSTM, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run an LSTM over x (B, S, W) from `state` (zeros if not given) → outputs (B, S, H), state after the last step.

    On CUDA always in float32: autocast gives cuDNN's recurrent kernels float16 even where bfloat16 was asked for, and
    float16 gradients underflow.
    """
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        with torch.autocast("cuda", enabled=False):
            state = None if state is None else (state[0].float(), state[1].float())
            outputs, after = lstm(x.float(), state)
    else:
        outputs, after = lstm(x, state)
    return outputs, after


class BidirectionalLSTM(nn.Module):
    """Two LSTMs (Hochreiter & Schmidhuber 1997), one reading each way (Schuster & Paliwal 1997), in one or more layers.

    Each layer reads both directions of the one below. Rows are reversed by their own length, so the backward direction
    starts at a sentence's last word and not at its padding; packed sequences, which run one small product per step,
    are not needed.
    """

    def __init__(self, width: int, units: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        widths = [width] + [2 * units] * (layers - 1)
        self.forwards = nn.ModuleList(nn.LSTM(width_in, units, batch_first=True) for width_in in widths)
        self.backwards = nn.ModuleList(nn.LSTM(width_in, units, batch_first=True) for width_in in widths)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, S, W), lengths (B,) → outputs (B, S, 2H), last step of both directions of the top layer (B, 2H).

        Outputs at padded steps have no meaning.
        """
        last = (lengths - 1)[:, None, None]
        for layer, (ahead, back) in enumerate(zip(self.forwards, self.backwards, strict=True)):
            assert isinstance(ahead, nn.LSTM)
            assert isinstance(back, nn.LSTM)
            if layer > 0:
                x = functional.dropout(x, self.dropout, self.training)
            read_ahead, _ = run(ahead, x)
            read_back, _ = run(back, reverse(x, lengths))
            end_ahead = read_ahead.gather(1, last.expand(-1, 1, read_ahead.size(2)))
            read_back = reverse(read_back, lengths)
            x = torch.cat([read_ahead, read_back], dim=2)
        return x, torch.cat([end_ahead[:, 0], read_back[:, 0]], dim=1)
