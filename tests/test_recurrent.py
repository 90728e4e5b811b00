"""Recurrent layers and encoders against torch's own cells, packed sequences and slow loops."""

from typing import Any

import pytest
import slow_seq2seq
import torch
from torch import Tensor, nn

from dl7cli.models.dropout import Dropout
from dl7cli.models.recurrent import Encoder, advance, layer, project, reverse, run

CELLS = ("lstm", "gru", "rnn")


def encoder(layers: int, **keys: Any) -> Encoder:
    torch.manual_seed(1)
    return Encoder(4, 3, layers, dropout=Dropout(0.0), **keys).double()


@pytest.mark.parametrize("cell", CELLS)
def test_a_step_is_torchs_own_cell_and_a_whole_run_is_its_steps(cell: str) -> None:
    torch.manual_seed(2)
    network = layer(cell, 4, 3)
    theirs = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}[cell](4, 3)
    theirs.load_state_dict({name.removesuffix("_l0"): value for name, value in network.state_dict().items()})
    x = torch.randn(5, 6, 4)
    state: tuple[Tensor, ...] = tuple(torch.randn(5, 3) for _ in range(2 if cell == "lstm" else 1))
    outputs, end = run(network, x, state)
    for step in range(6):
        expected = theirs(x[:, step], state if cell == "lstm" else state[0])
        state = advance(network, project(network, x[:, step]), state)
        torch.testing.assert_close(state, expected if cell == "lstm" else (expected,))
        torch.testing.assert_close(outputs[:, step], state[0])
    torch.testing.assert_close(end, state)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("final", [False, True])
def test_the_encoder_is_torchs_own_bidirectional_one_on_packed_sequences(cell: str, layers: int, final: bool) -> None:
    ours = encoder(layers, cell=cell, final=final)
    kind = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[cell]
    theirs = kind(4, 3, num_layers=layers, bidirectional=True, batch_first=True).double()
    with torch.no_grad():
        for at in range(layers):
            for suffix, stack in (("", ours.forwards), ("_reverse", ours.backwards)):
                for name, value in stack[at].named_parameters():
                    getattr(theirs, f"{name.removeprefix('first.')[:-1]}{at}{suffix}").copy_(value)
    x, lengths = torch.randn(4, 6, 4).double(), torch.tensor([6, 1, 4, 2])
    outputs, ends = ours(x, lengths)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    expected, last = theirs(packed)
    expected, _ = nn.utils.rnn.pad_packed_sequence(expected, batch_first=True)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(outputs[row, :length], expected[row, :length])
    for at, end in enumerate(ends):
        for ours_last, theirs_last in zip(end, last if cell == "lstm" else [last], strict=cell != "lstm" or final):
            torch.testing.assert_close(ours_last, torch.cat([theirs_last[2 * at], theirs_last[2 * at + 1]], dim=1))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "keys",
    [
        {"both": False, "residual": True},
        {"both": False, "depth": 3},
        {"residual": True},
        {"alternating": True},
        {"alternating": True, "residual": True, "depth": 2},
    ],
    ids=str,
)
def test_every_encoder_is_the_slow_loop(cell: str, keys: dict[str, Any]) -> None:
    net = encoder(3, cell=cell, final=True, **keys)
    x, lengths = torch.randn(3, 5, 4).double(), torch.tensor([5, 1, 3])
    outputs, ends = net(x, lengths)
    assert outputs.shape == (3, 5, net.width)
    for row, length in enumerate(lengths):
        slow, slow_ends = slow_seq2seq.encoder(net, list(x[row, :length]))
        torch.testing.assert_close(outputs[row, :length], torch.stack(slow))
        for end, slow_end in zip(ends, slow_ends, strict=True):
            torch.testing.assert_close([part[row] for part in end], slow_end)


def test_alternating_stacks_meet_only_at_the_top() -> None:
    """The first stack's second layer reads backward, so its output at the first word knows the last one."""
    net = encoder(2, alternating=True)
    x, lengths = torch.randn(1, 5, 4).double().requires_grad_(), torch.tensor([5])
    outputs, _ = net(x, lengths)
    assert torch.autograd.grad(outputs[0, 0, :3].sum(), x)[0][0, 4].abs().sum() > 0
    with torch.no_grad():
        net.backwards[0].weight_ih_l0.zero_()
    changed, _ = net(x, lengths)
    assert torch.equal(changed[..., :3], outputs[..., :3])
    assert not torch.equal(changed[..., 3:], outputs[..., 3:])


def test_reverse_turns_only_the_real_steps_and_undoes_itself() -> None:
    x = torch.arange(8.0).reshape(2, 4, 1)
    lengths = torch.tensor([3, 4])
    turned = reverse(x, lengths)
    assert turned[0, :, 0].tolist() == [2, 1, 0, 3]
    assert turned[1, :, 0].tolist() == [7, 6, 5, 4]
    assert torch.equal(reverse(turned, lengths), x)
