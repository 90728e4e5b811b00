"""Convolutional sequence to sequence learning, Gehring et al. 2017 (arXiv 1705.03122), ConvS2S.

Encoder and decoder are stacks of convolutions with gated linear units, and every decoder layer has an attention of its
own. Variance is kept as §3.4 and §3.5 have it: sums of two times √½, attention times √m for m source steps, the
gradient of the encoder divided by the number of attentions, and weights that start by their fan-in. Unlike there,
weights are not normalised (Salimans & Kingma 2016): that serves plain gradient descent, and Adam scales by itself.

Letters in shapes: B sentences, S source steps, T target steps, R = B·K hypotheses, E embedding width, C width in
channels, k kernel.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dl7cli.models.dropout import dropout
from dl7cli.models.embedding import Embeddings, Tied
from dl7cli.models.transformer import attend
from dl7cli.models.translator import Decoded, State, Translator

_HALF = 0.5**0.5


def _linear(fan_in: int, fan_out: int, *, dropout: float = 0.0) -> nn.Linear:
    """§3.5: weights from N(0, (1 - dropout) / fan-in), where `dropout` is that of the input."""
    linear = nn.Linear(fan_in, fan_out)
    nn.init.normal_(linear.weight, std=((1 - dropout) / fan_in) ** 0.5)
    nn.init.zeros_(linear.bias)
    return linear


class GatedConvolution(nn.Module):
    """A convolution over time to twice as many channels, and a gated linear unit (Dauphin et al. 2017), §3.2.

    It is one matrix product over windows, whose weights are those of a convolution, (2C, k·C) with the earliest step
    first.
    """

    def __init__(self, width: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.kernel = kernel
        self.linear = _linear(kernel * width, 2 * width, dropout=dropout)
        with torch.no_grad():
            self.linear.weight.mul_(2)  # the gate halves what goes through

    def forward(self, x: Tensor) -> Tensor:
        """x (R, k - 1 + T, C) → (R, T, C)."""
        steps = x.size(1) - self.kernel + 1
        windows = torch.cat([x[:, first : first + steps] for first in range(self.kernel)], dim=2)
        return functional.glu(self.linear(windows), dim=2)


class DecoderLayer(nn.Module):
    """A convolution over the target words so far and an attention, §3.3."""

    def __init__(self, width: int, embedding_width: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.convolution = GatedConvolution(width, kernel, dropout)
        self.ask = _linear(width, embedding_width)
        self.answer = _linear(embedding_width, width)

    def forward(self, x: Tensor, past: Tensor, embedded: Tensor, context: State) -> tuple[Tensor, Tensor, Tensor]:
        """x (R, T, C), the k - 1 inputs before (R, k - 1, C), embedded target words (R, T, E), context as in `ConvS2S`
        → (R, T, C), the last k - 1 inputs, weights (B, K·T, S).
        """
        mask, roots, keys, values = context
        inputs = torch.cat([past, dropout(x, self.dropout, self.training)], dim=1)
        read = self.convolution(inputs)
        queries = (self.ask(read) + embedded) * _HALF
        found, weights = attend(queries.reshape(len(keys), -1, keys.size(2)), keys, values, mask[:, None])
        found = self.answer((found * roots[:, None, None]).reshape(embedded.shape))
        return ((read + found) * _HALF + x) * _HALF, inputs[:, x.size(1) :], weights


class ConvS2S(Translator):
    """Context: mask (B, S), √m (B,), keys and values of the attention (B, S, E).

    State: the target steps so far (R,) and, for each decoder layer, its last k - 1 inputs (R, k - 1, C). Positions are
    learned, `positions` of them for either language; all steps beyond share the last. `Decoded.attention` is the mean
    over the layers.
    """

    def __init__(
        self,
        source_words: int,
        target_words: int,
        *,
        pad: int,
        embedding_width: int,
        width: int,
        encoder_layers: int,
        decoder_layers: int,
        kernel: int,
        positions: int,
        dropout: float,
        tied: Tied,
    ) -> None:
        super().__init__()
        self.width = width
        self.kernel = kernel
        self.dropout = dropout
        self.words = Embeddings(
            source_words, target_words, embedding_width, pad=pad, tied=tied, deviation=0.1, output_bias=True
        )
        self.source_positions = nn.Embedding(positions, embedding_width)
        self.target_positions = nn.Embedding(positions, embedding_width)
        self.encoder_in = _linear(embedding_width, width, dropout=dropout)
        self.encoder = nn.ModuleList(GatedConvolution(width, kernel, dropout) for _ in range(encoder_layers))
        self.encoder_out = _linear(width, embedding_width)
        self.decoder_in = _linear(embedding_width, width, dropout=dropout)
        self.decoder = nn.ModuleList(
            DecoderLayer(width, embedding_width, kernel, dropout) for _ in range(decoder_layers)
        )
        self.decoder_out = _linear(width, embedding_width)
        for table in (self.source_positions, self.target_positions):
            nn.init.normal_(table.weight, std=0.1)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[State, State]:
        steps = torch.arange(source.size(1), device=source.device)
        mask = steps < lengths[:, None]
        embedded = self._embedded(self.words.source(source), self.source_positions, steps)
        x = self.encoder_in(embedded)
        before = (self.kernel - 1) // 2
        around = (0, 0, before, self.kernel - 1 - before)
        for convolution in self.encoder:
            # What lies beyond a sentence is zero, whether its batch goes on or not.
            inputs = dropout(x, self.dropout, self.training) * mask[:, :, None]
            x = (convolution(functional.pad(inputs, around)) + x) * _HALF
        keys = self.encoder_out(x)
        keys = keys.lerp(keys.detach(), 1 - 1 / len(self.decoder))  # the same values with a smaller gradient
        values = (keys + embedded) * _HALF
        state = [keys.new_zeros((len(source), self.kernel - 1, self.width)) for _ in self.decoder]
        return (mask, lengths.to(embedded.dtype).sqrt(), keys, values), (torch.zeros_like(lengths), *state)

    def decode(self, previous: Tensor, context: State, state: State) -> Decoded:
        past, *inputs = state
        steps = past[:, None] + torch.arange(previous.size(1), device=past.device)
        embedded = self._embedded(self.words.target(previous), self.target_positions, steps)
        x = self.decoder_in(embedded)
        after, looks = [past + previous.size(1)], []
        for layer, before in zip(self.decoder, inputs, strict=True):
            x, kept, weights = layer(x, before, embedded, context)
            after.append(kept)
            looks.append(weights)
        readout = dropout(self.decoder_out(x), self.dropout, self.training)
        attention = torch.stack(looks).mean(dim=0).reshape(*previous.shape, -1)
        return Decoded(readout, attention, tuple(after))

    def logits(self, decoded: Decoded, context: State, at: Tensor | None = None) -> Tensor:
        return self.words.scores(decoded.readout, at)

    def _embedded(self, words: Tensor, table: nn.Embedding, steps: Tensor) -> Tensor:
        """Words (R, T, E) plus their learned positions, of steps (T,) or (R, T)."""
        x = words + table(steps.clamp(max=table.num_embeddings - 1))
        return dropout(x, self.dropout, self.training)
