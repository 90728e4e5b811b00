"""The recurrent models against slow loops in float64, other implementations, and themselves step by step."""

import pytest
import torch
from torch import Tensor, nn

from dl7cli.models.attention import GeneralAttention
from dl7cli.models.recurrent import BidirectionalLSTM, reverse
from dl7cli.models.seq2seq import Seq2Seq

PAD, BOS = 0, 2
WORDS = 11


def model(dropout: float = 0.0, layers: int = 1) -> Seq2Seq:
    torch.manual_seed(3)
    sizes = {"embedding_width": 6, "encoder_width": 5, "encoder_layers": layers, "decoder_width": 7}
    made = Seq2Seq(WORDS, pad=PAD, **sizes, dropout=dropout).double()
    with torch.no_grad():
        made.output_bias.normal_()
    return made


def sources() -> tuple[Tensor, Tensor]:
    return torch.tensor([[4, 5, 6, 7, 3], [8, 9, 3, 0, 0], [10, 3, 0, 0, 0]]), torch.tensor([5, 3, 2])


def cell(lstm: nn.LSTM, x: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """One LSTM step for one row, gate by gate: input, forget, candidate, output."""
    gates = lstm.weight_ih_l0 @ x + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ hidden + lstm.bias_hh_l0
    enter, forget, candidate, leave = gates.chunk(4)
    memory = torch.sigmoid(forget) * memory + torch.sigmoid(enter) * torch.tanh(candidate)
    return torch.sigmoid(leave) * torch.tanh(memory), memory


def slow_readouts(net: Seq2Seq, source: list[int], previous: list[int]) -> Tensor:
    """The whole model for one unpadded sentence pair, one step at a time, as the paper's equations read."""
    embedded = [net.embedding.weight[word] for word in source]
    ahead, back = net.encoder.forwards[0], net.encoder.backwards[0]
    zero = torch.zeros(5, dtype=torch.float64)
    read_ahead, read_back = [], []
    hidden, memory = zero, zero
    for x in embedded:
        hidden, memory = cell(ahead, x, hidden, memory)
        read_ahead.append(hidden)
    hidden, memory = zero, zero
    for x in reversed(embedded):
        hidden, memory = cell(back, x, hidden, memory)
        read_back.insert(0, hidden)
    annotations = [torch.cat(both) for both in zip(read_ahead, read_back, strict=True)]
    last = torch.cat([read_ahead[-1], read_back[0]])
    lower = torch.tanh(net.start_lower.weight @ last + net.start_lower.bias)
    upper = torch.tanh(net.start_upper.weight @ last + net.start_upper.bias)
    lower_memory = upper_memory = torch.zeros(7, dtype=torch.float64)
    readouts = []
    for word in previous:
        x = net.embedding.weight[word]
        lower, lower_memory = cell(net.lower, x, lower, lower_memory)
        scores = torch.stack([lower @ (net.attention.project.weight @ one) for one in annotations])
        weights = scores.exp() / scores.exp().sum()
        found = sum((weight * one for weight, one in zip(weights, annotations, strict=True)), start=zero.repeat(2))
        upper, upper_memory = cell(net.upper, torch.cat([lower, found]), upper, upper_memory)
        readouts.append(torch.tanh(net.readout.weight @ torch.cat([upper, found, x]) + net.readout.bias))
    return torch.stack(readouts)


def test_the_model_is_the_slow_loop() -> None:
    net = model()
    source, lengths = sources()
    previous = torch.tensor([[BOS, 5, 6, 4], [BOS, 9, 0, 0], [BOS, 7, 8, 0]])
    fast = net(source, lengths, previous)[0].readout
    for row, steps in enumerate((4, 2, 3)):
        slow = slow_readouts(net, source[row, : lengths[row]].tolist(), previous[row, :steps].tolist())
        # Attention weights are computed in float32 whatever the rest is.
        torch.testing.assert_close(fast[row, :steps], slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_encoder_is_torchs_own_bidirectional_lstm_on_packed_sequences(layers: int) -> None:
    torch.manual_seed(1)
    ours = BidirectionalLSTM(4, 3, layers, dropout=0.0)
    theirs = nn.LSTM(4, 3, num_layers=layers, bidirectional=True, batch_first=True)
    with torch.no_grad():
        for layer in range(layers):
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(theirs, f"{name}_l{layer}").copy_(getattr(ours.forwards[layer], f"{name}_l0"))
                getattr(theirs, f"{name}_l{layer}_reverse").copy_(getattr(ours.backwards[layer], f"{name}_l0"))
    x, lengths = torch.randn(4, 6, 4), torch.tensor([6, 1, 4, 2])
    outputs, last = ours(x, lengths)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    expected, (hidden, _) = theirs(packed)
    expected, _ = nn.utils.rnn.pad_packed_sequence(expected, batch_first=True)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(outputs[row, :length], expected[row, :length])
    torch.testing.assert_close(last, torch.cat([hidden[-2], hidden[-1]], dim=1))


def test_reverse_turns_only_the_real_steps_and_undoes_itself() -> None:
    x = torch.arange(8.0).reshape(2, 4, 1)
    lengths = torch.tensor([3, 4])
    turned = reverse(x, lengths)
    assert turned[0, :, 0].tolist() == [2, 1, 0, 3]
    assert turned[1, :, 0].tolist() == [7, 6, 5, 4]
    assert torch.equal(reverse(turned, lengths), x)


def test_step_by_step_is_the_whole_sequence() -> None:
    net = model(layers=2).eval()
    source, lengths = sources()
    previous = torch.tensor([[BOS, 5, 6, 4], [BOS, 9, 1, 4], [BOS, 7, 8, 10]])
    whole = net.logits(*net(source, lengths, previous)).float().log_softmax(dim=1).unflatten(0, previous.shape)
    context, state = net.encode(source, lengths)
    for step in range(4):
        log_probabilities, state, _ = net.step(previous[:, step], context, state)
        torch.testing.assert_close(log_probabilities, whole[:, step])


def test_the_hypotheses_of_a_sentence_share_its_context() -> None:
    net = model().eval()
    source, lengths = sources()
    context, state = net.encode(source, lengths)
    words = torch.tensor([4, 5, 6, 7, 8, 9])
    twice = tuple(one.repeat_interleave(2, dim=0) for one in state)
    together, _, _ = net.step(words, context, twice)
    for row in range(6):
        alone_context = tuple(one[row // 2 : row // 2 + 1] for one in context)
        alone, _, _ = net.step(words[row : row + 1], alone_context, tuple(one[row : row + 1] for one in twice))
        torch.testing.assert_close(together[row : row + 1], alone)


def test_padding_changes_nothing() -> None:
    net = model(layers=2).eval()
    source, lengths = sources()
    previous = torch.tensor([[BOS, 5, 6], [BOS, 9, 4], [BOS, 7, 8]])
    together = net(source, lengths, previous)[0].readout
    for row, length in enumerate(lengths.tolist()):
        alone = net(source[row : row + 1, :length], lengths[row : row + 1], previous[row : row + 1])[0].readout
        torch.testing.assert_close(together[row : row + 1], alone)


def test_attention_sums_to_one_over_real_steps_and_is_zero_on_padding() -> None:
    attention = GeneralAttention(4, 3)
    memory, queries = torch.randn(2, 5, 3), torch.randn(2, 6, 4)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    found, weights = attention(queries, attention.keys(memory), memory, mask)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(2, 6))
    assert not weights[1, :, 2:].any()
    torch.testing.assert_close(found[1], weights[1, :, :2] @ memory[1, :2])


def test_gradients_reach_every_parameter_and_never_the_padding_row() -> None:
    net = model(dropout=0.2).train()
    source, lengths = sources()
    net.logits(*net(source, lengths, torch.tensor([[BOS, 5], [BOS, 9], [BOS, PAD]]))).logsumexp(dim=1).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
