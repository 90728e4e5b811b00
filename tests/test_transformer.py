"""The Transformer against torch's own layers, the paper's formulas and its published sizes."""

import math

import pytest
import torch
from torch import Tensor, nn

from dl7cli import recipe as recipes
from dl7cli.errors import UserError
from dl7cli.models.embedding import Tied
from dl7cli.models.transformer import Attention, DecoderLayer, EncoderLayer, Norm, Transformer, attend, sinusoids
from dl7cli.recipe import TransformerModel
from dl7cli.tasks.translation import translator

PAD, BOS = 0, 2
WORDS = 11
SOURCE, LENGTHS = torch.tensor([[4, 5, 6, 7, 3], [8, 9, 3, 0, 0]]), torch.tensor([5, 3])
PREVIOUS = torch.tensor([[BOS, 5, 6, 4], [BOS, 9, 1, 4]])
either_norm = pytest.mark.parametrize("norm", ["pre", "post"])


def model(tied: Tied = "all", norm: Norm = "pre") -> Transformer:
    torch.manual_seed(3)
    made = Transformer(
        WORDS, WORDS, pad=PAD, width=8, heads=2, feedforward_width=12, encoder_layers=2, decoder_layers=3, dropout=0.0,
        tied=tied, norm=norm,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    return made.double()


def copy(theirs: nn.Module, own: nn.Module) -> None:
    theirs.load_state_dict(own.state_dict())


def copy_attention(theirs: nn.MultiheadAttention, own: Attention) -> None:
    weights = {
        "in_proj_weight": torch.cat([own.query.weight, own.key_value.weight]),
        "in_proj_bias": torch.cat([own.query.bias, own.key_value.bias]),
        "out_proj.weight": own.out.weight,
        "out_proj.bias": own.out.bias,
    }
    theirs.load_state_dict(weights)


def torchs(own: Transformer, norm: Norm) -> tuple[nn.TransformerEncoder, nn.TransformerDecoder]:
    """torch's encoder and decoder with our weights."""
    sizes = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0, "batch_first": True}
    sizes["norm_first"] = norm == "pre"
    last = [nn.LayerNorm(8) if norm == "pre" else None for _ in range(2)]
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes), 2, last[0], enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), 3, last[1])
    for layer, ours in zip(encoder.layers, own.encoder, strict=True):
        assert isinstance(ours, EncoderLayer)
        copy_attention(layer.self_attn, ours.attention)
        copy(layer.norm1, ours.attention_norm)
        copy(layer.norm2, ours.feedforward_norm)
        copy(layer.linear1, ours.feedforward[0])
        copy(layer.linear2, ours.feedforward[2])
    for layer, ours in zip(decoder.layers, own.decoder, strict=True):
        assert isinstance(ours, DecoderLayer)
        copy_attention(layer.self_attn, ours.self_attention)
        copy_attention(layer.multihead_attn, ours.cross_attention)
        copy(layer.norm1, ours.self_norm)
        copy(layer.norm2, ours.cross_norm)
        copy(layer.norm3, ours.feedforward_norm)
        copy(layer.linear1, ours.feedforward[0])
        copy(layer.linear2, ours.feedforward[2])
    if norm == "pre":
        copy(encoder.norm, own.encoder_norm)
        copy(decoder.norm, own.decoder_norm)
    return encoder.double(), decoder.double()


def slow_sinusoids(steps: int, width: int) -> Tensor:
    """Vaswani et al. 2017, §3.5, number by number."""
    table = torch.zeros(steps, width, dtype=torch.float64)
    for position in range(steps):
        for i in range(width // 2):
            angle = position / 10000 ** (2 * i / width)
            table[position, 2 * i], table[position, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return table


@either_norm
def test_the_model_is_torchs_own_layers(norm: Norm) -> None:
    net = model(norm=norm)
    encoder, decoder = torchs(net, norm)
    scaled = net.words.target.weight * math.sqrt(8)
    padding = torch.arange(5) >= LENGTHS[:, None]
    memory = encoder(scaled[SOURCE] + slow_sinusoids(5, 8), src_key_padding_mask=padding)
    asked: list[Tensor] = []
    attention = decoder.layers[-1].multihead_attn
    attention.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0]))
    expected = decoder(
        scaled[PREVIOUS] + slow_sinusoids(4, 8),
        memory,
        tgt_mask=torch.ones(4, 4, dtype=torch.bool).triu(1),
        memory_key_padding_mask=padding,
    )
    looked = attention(asked[0], memory, memory, key_padding_mask=padding)[1]
    found, context = net(SOURCE, LENGTHS, PREVIOUS)
    torch.testing.assert_close(found.readout, expected)
    torch.testing.assert_close(found.attention, looked)
    torch.testing.assert_close(net.logits(found, context), (expected @ net.words.target.weight.T).flatten(0, 1))


def test_positions_are_those_of_the_paper_however_far() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    expected = slow_sinusoids(3000, 6)
    torch.testing.assert_close(sinusoids(0, 3000, 6, like), expected)
    torch.testing.assert_close(sinusoids(2990, 10, 6, like), expected[2990:])
    assert (sinusoids(2990, 10, 6, like.float()) - expected[2990:]).abs().max() < 1e-3


def test_attention_is_the_slow_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    queries, keys, values = (torch.randn(2, steps, 4, generator=generator) for steps in (3, 5, 5))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    found, weights = attend(queries, keys, values, mask[:, None])
    for row, real in enumerate((5, 2)):
        for query in range(3):
            scores = [math.exp(float(queries[row, query] @ keys[row, step])) for step in range(real)]
            own = torch.tensor([score / sum(scores) for score in scores])
            torch.testing.assert_close(weights[row, query, :real], own)
            torch.testing.assert_close(found[row, query], own @ values[row, :real])
    assert not weights[1, :, 2:].any()


@either_norm
@pytest.mark.parametrize(("tied", "matrices"), [("all", 1), ("output", 2), ("none", 3)])
def test_the_tiny_transformer_has_the_parameters_its_sizes_give(tied: Tied, matrices: int, norm: Norm) -> None:
    width, inner, words = 128, 256, 10_000
    attention = 4 * (width * width + width)
    feedforward = width * inner + inner + inner * width + width
    each, last = 2 * width, 2 * width if norm == "pre" else 0
    encoder = 4 * (attention + feedforward + 2 * each) + last
    decoder = 4 * (2 * attention + feedforward + 3 * each) + last
    with torch.device("meta"):
        net = translator(TransformerModel(kind="transformer", tied=tied, norm=norm), words, words)
    found = sum(parameter.numel() for parameter in net.parameters())
    assert found == encoder + decoder + matrices * words * width


def test_tied_matrices_are_one_and_padding_is_nothing() -> None:
    for tied, source, output in (("all", True, True), ("output", False, True), ("none", False, False)):
        words = model(tied).words  # type: ignore[arg-type]
        assert (words.source.weight is words.target.weight) is source
        assert (words.output.weight is words.target.weight) is output
    fresh = translator(TransformerModel(kind="transformer", tied="none"), 50, 60)
    assert isinstance(fresh, Transformer)
    assert not fresh.words.source.weight[PAD].any()
    assert fresh.words.source.weight.shape == (50, 128)
    assert fresh.words.output.weight.shape == (60, 128)
    for weight in (fresh.words.source.weight[1:], fresh.words.target.weight[1:], fresh.words.output.weight):
        assert weight.std().item() == pytest.approx(128**-0.5, rel=0.1)
    with pytest.raises(ValueError, match="vocabularies of 50 and 60 words"):
        translator(TransformerModel(kind="transformer", tied="all"), 50, 60)


@pytest.mark.parametrize(
    ("override", "seen"),
    [
        ("model.heads=3", "`model.heads` is `3`: the heads must share a width of 128 evenly"),
        ("model.width=130", "`model.heads` is `4`: the heads must share a width of 130 evenly"),
        ("model.width=127", "`model.width` is `127`: input should be a multiple of 2"),
        ("model.tied=some", '`model.tied` is `"some"`'),
        ("model.kernel=3", "unknown key `model.kernel`"),
        ("model.with=64", "did you mean `model.width`?"),
        ("data.joint=false", 'a vocabulary for each language needs `model.tied = "output"`'),
        ("training.coverage_weight=1.0", "needs `model.coverage = true`"),
    ],
)
def test_a_mistake_names_its_key(override: str, seen: str) -> None:
    with pytest.raises(UserError) as caught:
        recipes.resolve("transformer-tiny", [override])
    assert seen in caught.value.message
