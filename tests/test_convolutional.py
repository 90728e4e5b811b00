"""ConvS2S against a slow loop in float64, torch's convolution, and the variances its paper wants."""

import math

import pytest
import torch
from torch import Tensor, nn

from dl7cli.models.convolutional import ConvS2S, DecoderLayer, GatedConvolution
from dl7cli.models.embedding import Tied
from dl7cli.recipe import ConvS2SModel
from dl7cli.tasks.translation import translator

PAD, BOS = 0, 2
WORDS = 11
POSITIONS = 4


def model(kernel: int = 3, tied: Tied = "all") -> ConvS2S:
    torch.manual_seed(3)
    made = ConvS2S(
        WORDS, WORDS, pad=PAD, embedding_width=6, width=8, encoder_layers=2, decoder_layers=3, kernel=kernel,
        positions=POSITIONS, dropout=0.0, tied=tied,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    return made.double().eval()


def gated(convolution: GatedConvolution, steps: list[Tensor], around: range, at: int) -> Tensor:
    """One step of a convolution with a gate: the neighbours `around` step `at`, zero where there are none."""
    zero = torch.zeros_like(steps[0])
    window = [steps[at + offset] if 0 <= at + offset < len(steps) else zero for offset in around]
    linear = convolution.linear
    value, gate = (linear.weight @ torch.cat(window) + linear.bias).chunk(2)
    return value * torch.sigmoid(gate)


def slow(net: ConvS2S, source: list[int], previous: list[int]) -> tuple[Tensor, Tensor]:
    """Readouts and attention of one unpadded sentence pair, step by step, as §3 of the paper reads."""
    half = math.sqrt(0.5)
    kernel = net.kernel
    embedded = [
        net.words.source.weight[word] + net.source_positions.weight[min(at, POSITIONS - 1)]
        for at, word in enumerate(source)
    ]
    steps = [net.encoder_in(one) for one in embedded]
    before = (kernel - 1) // 2
    for convolution in net.encoder:
        assert isinstance(convolution, GatedConvolution)
        read = [gated(convolution, steps, range(-before, kernel - before), at) for at in range(len(steps))]
        steps = [(one + same) * half for one, same in zip(read, steps, strict=True)]
    keys = [net.encoder_out(one) for one in steps]
    values = [(key + one) * half for key, one in zip(keys, embedded, strict=True)]
    embedded = [
        net.words.target.weight[word] + net.target_positions.weight[min(at, POSITIONS - 1)]
        for at, word in enumerate(previous)
    ]
    steps = [net.decoder_in(one) for one in embedded]
    looks = torch.zeros(len(previous), len(source), dtype=torch.float64)
    for layer in net.decoder:
        assert isinstance(layer, DecoderLayer)
        after = []
        for at in range(len(steps)):
            read_one = gated(layer.convolution, steps, range(1 - kernel, 1), at)
            asked = (layer.ask(read_one) + embedded[at]) * half
            scores = torch.stack([asked @ key for key in keys]).exp()
            weights = scores / scores.sum()
            looks[at] += weights / len(net.decoder)
            found = sum(weight * value for weight, value in zip(weights, values, strict=True))
            found = layer.answer(found * len(source) * math.sqrt(1 / len(source)))
            after.append(((read_one + found) * half + steps[at]) * half)
        steps = after
    return torch.stack([net.decoder_out(one) for one in steps]), looks


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_the_model_is_the_slow_loop(kernel: int) -> None:
    """Some rows are longer than there are positions: further steps share the last."""
    net = model(kernel)
    source, lengths = torch.tensor([[4, 5, 6, 7, 8, 3], [8, 9, 3, 0, 0, 0]]), torch.tensor([6, 3])
    previous = torch.tensor([[BOS, 5, 6, 4, 9, 7], [BOS, 9, 4, 0, 0, 0]])
    with torch.no_grad():
        fast, context = net(source, lengths, previous)
        for row, steps in enumerate((6, 3)):
            expected, looks = slow(net, source[row, : lengths[row]].tolist(), previous[row, :steps].tolist())
            torch.testing.assert_close(fast.readout[row, :steps], expected)
            torch.testing.assert_close(fast.attention[row, :steps, : lengths[row]], looks)
        expected = fast.readout.flatten(0, 1) @ net.words.target.weight.T + net.words.output.bias
        torch.testing.assert_close(net.logits(fast, context), expected)


def test_the_gated_convolution_is_torchs() -> None:
    own = GatedConvolution(4, 3, dropout=0.0)
    theirs = nn.Conv1d(4, 8, 3)
    with torch.no_grad():
        theirs.weight.copy_(own.linear.weight.unflatten(1, (3, 4)).transpose(1, 2))
        theirs.bias.copy_(own.linear.bias.normal_())
    x = torch.randn(2, 7, 4)
    expected = nn.functional.glu(theirs(x.transpose(1, 2)), dim=1).transpose(1, 2)
    torch.testing.assert_close(own(x), expected)


def test_variance_starts_as_the_paper_has_it() -> None:
    """§3.5: four times the variance goes into a gate, whatever the dropout; other projections keep it."""
    torch.manual_seed(1)
    x = torch.randn(8, 40, 256)
    expected = 4 * (2 * torch.randn(100_000)).sigmoid().square().mean().item()
    for dropout in (0.0, 0.3):
        found = GatedConvolution(256, 3, dropout)(nn.functional.dropout(x, dropout))
        assert found.var().item() == pytest.approx(expected, rel=0.1)
    assert DecoderLayer(256, 128, 3, 0.3).ask(x).var().item() == pytest.approx(1.0, rel=0.1)


def test_each_attention_adds_its_share_to_the_gradient_of_the_encoder() -> None:
    """The gradient of the keys is divided by the number of attentions, that of the source embedding is not."""
    net = model(tied="none")
    source, lengths = torch.tensor([[4, 5, 3]]), torch.tensor([3])
    (_, _, keys, _), _ = net.encode(source, lengths)
    keys.sum().backward()
    scaled = net.encoder_out.weight.grad.clone()
    net.zero_grad()
    x = net.encoder_in(net.words.source(source) + net.source_positions.weight[:3])
    for convolution in net.encoder:
        x = (convolution(nn.functional.pad(x, (0, 0, 1, 1))) + x) * math.sqrt(0.5)
    torch.testing.assert_close(net.encoder_out(x), keys)
    net.encoder_out(x).sum().backward()
    torch.testing.assert_close(scaled * 3, net.encoder_out.weight.grad)


@pytest.mark.parametrize(("tied", "matrices"), [("all", 1), ("output", 2), ("none", 3)])
def test_the_parameters_are_those_its_sizes_give(tied: Tied, matrices: int) -> None:
    width, embedding, words, positions, kernel = 256, 256, 4000, 256, 3
    convolution = kernel * width * 2 * width + 2 * width
    between = width * embedding
    encoder = between + width + 4 * convolution + between + embedding
    decoder = between + width + 3 * (convolution + between + embedding + between + width) + between + embedding
    with torch.device("meta"):
        net = translator(ConvS2SModel(kind="convs2s", tied=tied), words, words)
    found = sum(parameter.numel() for parameter in net.parameters())
    assert found == encoder + decoder + 2 * positions * embedding + matrices * words * embedding + words
