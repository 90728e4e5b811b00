"""Recurrent layers and encoders over padded batches: no sentence sees its padding.

Whole sequences run through fused kernels. What cannot (a step that needs the answer of the step before, deep
transitions) goes step by step over the same parameters, see `project` and `advance`.

Letters in shapes: B sentences, S steps, W input width, H units per direction, G gates of a cell (LSTM 4, GRU 3, RNN 1),
M width of what an encoder gives: H times its directions.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from dl7cli.models.dropout import Dropout
from dl7cli.models.translator import State


def layer(cell: str, width: int, units: int) -> nn.RNNBase:
    """One layer of cells: "lstm" (Hochreiter & Schmidhuber 1997), "gru" (Cho et al. 2014) or "rnn", with tanh."""
    kinds: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
    return kinds[cell](width, units, batch_first=True)


def state_size(network: nn.RNNBase) -> int:
    """Tensors in the state of one layer: what it gives and, in an LSTM, what it remembers."""
    return 2 if network.mode == "LSTM" else 1


def run(network: nn.RNNBase, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """Run one layer over x (B, S, W) from `state`, tensors (B, H), or zeros → outputs (B, S, H), state after the last
    step.

    On a GPU always in float32: autocast gives cuDNN's recurrent kernels float16 even where bfloat16 was asked for, and
    float16 gradients underflow; MPS has no such kernels in autocast.
    """
    kind = x.device.type
    if kind in ("cuda", "mps") and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return run(network, x.float(), None if state is None else tuple(part.float() for part in state))
    before = None if state is None else tuple(part[None] for part in state)
    if network.mode == "LSTM":
        outputs, (hidden, memory) = network(x, before)
        return outputs, (hidden[0], memory[0])
    outputs, hidden = network(x, None if before is None else before[0])
    return outputs, (hidden[0],)


def project(network: nn.RNNBase, x: Tensor) -> Tensor:
    """What the first W values of a layer's input bring to its gates, at every step: x (…, W) → (…, GH)."""
    weight, _, bias, _ = network.all_weights[0]
    # Autocast keeps what it made of a whole weight for the next step, not of a part.
    part = weight if weight.size(1) == x.size(-1) else weight[:, : x.size(-1)]
    return functional.linear(x, part, bias)


def advance(network: nn.RNNBase, entering: Tensor, state: State) -> State:
    """One step of a layer: what the input brings to the gates (B, GH), state before it → state after it."""
    _, weight, _, bias = network.all_weights[0]
    return _gated(network.mode, entering, functional.linear(state[0], weight, bias), state)


def _gated(mode: str, entering: Tensor, recurring: Tensor, state: State) -> State:
    match mode:
        case "LSTM":
            enter, forget, candidate, leave = (entering + recurring).chunk(4, dim=1)
            memory = forget.sigmoid() * state[1] + enter.sigmoid() * candidate.tanh()
            return leave.sigmoid() * memory.tanh(), memory
        case "GRU":
            units = state[0].size(1)
            both = (entering[:, : 2 * units] + recurring[:, : 2 * units]).sigmoid()
            reset, keep = both.chunk(2, dim=1)
            candidate = torch.tanh(entering[:, 2 * units :] + reset * recurring[:, 2 * units :])
            return (candidate + keep * (state[0] - candidate),)
        case _:
            return (torch.tanh(entering + recurring),)


def reverse(x: Tensor, lengths: Tensor) -> Tensor:
    """Turn the first `lengths[b]` steps of each row of `x` (B, S, W) round; padding stays where it is."""
    steps = torch.arange(x.size(1), device=x.device)
    ends = lengths[:, None]
    index = torch.where(steps < ends, ends - 1 - steps, steps)
    return x.gather(1, index[:, :, None].expand_as(x))


class Transitions(nn.Module):
    """A layer whose every step is several cells deep (Pascanu et al. 2014; Miceli Barone et al. 2017, eq. 5).

    The first cell reads the input, the others only the state that the one before them gives.
    """

    def __init__(self, cell: str, width: int, units: int, depth: int) -> None:
        super().__init__()
        self.first = layer(cell, width, units)
        gates = self.first.all_weights[0][1].size(0)
        self.further = nn.ModuleList(nn.Linear(units, gates) for _ in range(depth - 1))

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, State]:
        """x (B, S, W), lengths (B,) → outputs (B, S, H), state after the last real step, tensors (B, H)."""
        entering = project(self.first, x)
        nothing = torch.zeros_like(entering[:, 0])
        state: State = (x.new_zeros(len(x), self.first.hidden_size),) * state_size(self.first)
        outputs = []
        for step in range(x.size(1)):
            after = advance(self.first, entering[:, step], state)
            for further in self.further:
                after = _gated(self.first.mode, nothing, further(after[0]), after)
            outputs.append(after[0])
            real = (step < lengths)[:, None]
            state = tuple(torch.where(real, new, old) for new, old in zip(after, state, strict=True))
        return torch.stack(outputs, dim=1), state


class Encoder(nn.Module):
    """Layers that read a sentence forward, or both ways (Schuster & Paliwal 1997).

    Rows are reversed by their own length, so the backward direction starts at a sentence's last word and not at its
    padding; packed sequences, which run one small product per step, are not needed.

    A "bidirectional" stack has layers that each read both directions of the one below. An "alternating" one (Zhou et
    al. 2016, arXiv 1606.04199, as in Miceli Barone et al. 2017, arXiv 1707.07631, §2.3) is two stacks, whose layers
    turn round from one to the next, one beginning forward and one backward; they meet at the top. With transitions of
    `depth` 2 or more it is the BiDeep encoder of the latter, §2.4. With `residual`, every layer but the first adds its
    input to what it gives.
    """

    def __init__(
        self,
        width: int,
        units: int,
        layers: int,
        *,
        dropout: Dropout,
        cell: str = "lstm",
        both: bool = True,
        alternating: bool = False,
        residual: bool = False,
        depth: int = 1,
        final: bool = False,
    ) -> None:
        """`final`: whether the whole state after the last word is asked for. Fused kernels do not show what an LSTM
        remembers in the midst of a row, so it then goes step by step.
        """
        super().__init__()
        self.width = units * (2 if both else 1)
        self.dropout = dropout
        self.alternating = alternating
        self.residual = residual
        stepwise = depth > 1 or (final and cell == "lstm")
        widths = [width] + [units if alternating else self.width] * (layers - 1)

        def one(width_in: int) -> nn.Module:
            return Transitions(cell, width_in, units, depth) if stepwise else layer(cell, width_in, units)

        self.forwards = nn.ModuleList(one(width_in) for width_in in widths)
        self.backwards = nn.ModuleList(one(width_in) for width_in in widths) if both else nn.ModuleList()

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, list[State]]:
        """x (B, S, W), lengths (B,) → outputs (B, S, M), of every layer the state after its last word, tensors (B, M).

        Outputs at padded steps have no meaning. The states of an LSTM lack what it remembers but with `final`.
        """
        stacks = [self.forwards, self.backwards][: 1 + bool(self.backwards)]
        inputs = [x] * len(stacks)
        ends = []
        for at in range(len(self.forwards)):
            if at > 0 and self.alternating:
                inputs = [self.dropout(one) for one in inputs]
            elif at > 0:
                inputs = [self.dropout(inputs[0])] * len(stacks)
            read = [
                _read(stack[at], one, lengths, backward=(number + at * self.alternating) % 2 == 1)
                for number, (stack, one) in enumerate(zip(stacks, inputs, strict=True))
            ]
            outputs = [one for one, _ in read]
            ends.append(tuple(torch.cat(parts, dim=1) for parts in zip(*(end for _, end in read), strict=True)))
            if not self.alternating:
                outputs = [torch.cat(outputs, dim=2)] * len(stacks)
            if self.residual and at > 0:
                outputs = [one + below for one, below in zip(outputs, inputs, strict=True)]
            inputs = outputs
        return torch.cat(inputs, dim=2) if self.alternating else inputs[0], ends


def _read(network: nn.Module, x: Tensor, lengths: Tensor, *, backward: bool) -> tuple[Tensor, State]:
    """One layer in one direction over x (B, S, W) → outputs (B, S, H), each at the step it belongs to, and the end."""
    x = reverse(x, lengths) if backward else x
    if isinstance(network, Transitions):
        outputs, end = network(x, lengths)
    else:
        assert isinstance(network, nn.RNNBase)
        outputs, _ = run(network, x)
        last = (lengths - 1)[:, None, None].expand(-1, 1, outputs.size(2))
        end = (outputs.gather(1, last)[:, 0],)
    return reverse(outputs, lengths) if backward else outputs, end
