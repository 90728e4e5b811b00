"""The Transformer of Vaswani et al. 2017 (arXiv 1706.03762), normalised before each sublayer or after.

With `norm` "pre" a sublayer f is x + f(norm(x)), and each stack ends in one more normalisation (Xiong et al. 2020,
arXiv 2002.04745, fig. 1b): the residual path is never normalised, which makes training stable from the first step.
With "post" it is norm(x + f(x)), as in the paper, §3.1.

Letters in shapes: B sentences, S source steps, T target steps, P target steps before them, R = B·K hypotheses, H heads,
D width of a head, W = H·D width.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from dl7cli.models.dropout import dropout
from dl7cli.models.embedding import Embeddings, Tied
from dl7cli.models.translator import Decoded, State, Translator

Norm = Literal["pre", "post"]


def sinusoids(first: int, steps: int, width: int, like: Tensor) -> Tensor:
    """Positions `first`, `first` + 1 … as vectors (steps, width): §3.5, PE(p, 2i) = sin(p / 10000^(2i/W)), then cos."""
    positions = torch.arange(first, first + steps, dtype=like.dtype, device=like.device)
    exponents = torch.arange(0, width, 2, dtype=like.dtype, device=like.device) / width
    angles = positions[:, None] / 10000**exponents
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(QKᵀ)·V for queries (…, Q, D), keys (…, S, D), values (…, S, M), mask broadcast to (…, Q, S), true where a
    query may look → found (…, Q, M), weights (…, Q, S).

    Written out: sentences are short, and torch's fused kernel takes four times as long on a CPU in bfloat16. -inf is
    added, not filled in, which costs nothing in the backward pass.
    """
    scores = queries @ keys.transpose(-2, -1)
    bias = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device).masked_fill(~mask, float("-inf"))
    weights = (scores + bias).softmax(dim=-1)
    return weights @ values, weights


class Attention(nn.Module):
    """Multi-head attention, §3.2.2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        # The three projections as one matrix (3W, W) of Glorot & Bengio 2010, so that scores are small at first.
        bound = (6 / (4 * width)) ** 0.5
        for linear in (self.query, self.key_value):
            nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.zeros_(linear.bias)
        _glorot(self.out)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory (B, S, W) → keys and values, each (B, H, S, D)."""
        keys, values = self.key_value(memory).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return keys, values

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x (R, T, W), keys and values (B, H, S, D), mask broadcast to (B, H, K·T, S) → (R, T, W), weights
        (B, H, K·T, S). The hypotheses of a sentence share its keys: their queries stand in one row.
        """
        head = keys.size(3)
        queries = (self.query(x) * head**-0.5).reshape(keys.size(0), -1, self.heads, head).transpose(1, 2)
        found, weights = attend(queries, keys, values, mask)
        answer: Tensor = self.out(found.transpose(1, 2).reshape(x.shape))
        return answer, weights


class FeedForward(nn.Sequential):
    """Eq. 2: max(0, xW₁ + b₁)W₂ + b₂."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))
        for linear in (self[0], self[2]):
            _glorot(linear)


class Layer(nn.Module):
    """Of encoder or decoder: sublayers, each with a normalisation of its own, before it or after."""

    def __init__(self, dropout: float, norm: Norm) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm = norm

    def read(self, x: Tensor, norm: nn.Module) -> Tensor:
        """What the sublayer of `norm` reads of x (R, T, W)."""
        return norm(x) if self.norm == "pre" else x

    def add(self, x: Tensor, found: Tensor, norm: nn.Module) -> Tensor:
        """x and what the sublayer of `norm` has found, each (R, T, W), as one."""
        x = x + dropout(found, self.dropout, self.training)
        return x if self.norm == "pre" else norm(x)


class EncoderLayer(Layer):
    def __init__(self, width: int, heads: int, inner: int, dropout: float, norm: Norm) -> None:
        super().__init__(dropout, norm)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feedforward_norm = nn.LayerNorm(width)
        self.feedforward = FeedForward(width, inner)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, S, W), mask (B, 1, 1, S) true at real steps → (B, S, W)."""
        read = self.read(x, self.attention_norm)
        found, _ = self.attention(read, *self.attention.keys_values(read), mask)
        x = self.add(x, found, self.attention_norm)
        return self.add(x, self.feedforward(self.read(x, self.feedforward_norm)), self.feedforward_norm)


class DecoderLayer(Layer):
    def __init__(self, width: int, heads: int, inner: int, dropout: float, norm: Norm) -> None:
        super().__init__(dropout, norm)
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads)
        self.feedforward_norm = nn.LayerNorm(width)
        self.feedforward = FeedForward(width, inner)

    def forward(
        self, x: Tensor, causal: Tensor, past: tuple[Tensor, Tensor], memory: tuple[Tensor, Tensor], mask: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """x (R, T, W), causal (T, P + T), past keys and values (R, H, P, D), those of the source (B, H, S, D), mask
        (B, 1, 1, S) → (R, T, W), keys and values (R, H, P + T, D), what it looked at in the source (B, H, K·T, S).
        """
        read = self.read(x, self.self_norm)
        keys, values = self.self_attention.keys_values(read)
        keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        found, _ = self.self_attention(read, keys, values, causal)
        x = self.add(x, found, self.self_norm)
        found, weights = self.cross_attention(self.read(x, self.cross_norm), *memory, mask)
        x = self.add(x, found, self.cross_norm)
        x = self.add(x, self.feedforward(self.read(x, self.feedforward_norm)), self.feedforward_norm)
        return x, (keys, values), weights


class Transformer(Translator):
    """Context: mask (B, S), then keys and values of the source for each decoder layer, (B, H, S, D).

    State: keys and values of the target words so far for each decoder layer, (R, H, P, D). A sentence may be of any
    length. `Decoded.attention` is the mean over the heads of the last layer.
    """

    def __init__(
        self,
        source_words: int,
        target_words: int,
        *,
        pad: int,
        width: int,
        heads: int,
        feedforward_width: int,
        encoder_layers: int,
        decoder_layers: int,
        dropout: float,
        tied: Tied,
        norm: Norm,
    ) -> None:
        super().__init__()
        self.width = width
        self.dropout = dropout
        self.words = Embeddings(
            source_words, target_words, width, pad=pad, tied=tied, deviation=width**-0.5, output_bias=False
        )
        sizes = width, heads, feedforward_width, dropout, norm
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(encoder_layers))
        self.encoder_norm = _last_norm(width, norm)
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(decoder_layers))
        self.decoder_norm = _last_norm(width, norm)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[State, State]:
        mask = torch.arange(source.size(1), device=source.device) < lengths[:, None]
        x = self._embedded(self.words.source(source), 0)
        for layer in self.encoder:
            x = layer(x, mask[:, None, None])
        memory = self.encoder_norm(x)
        seen: list[Tensor] = []
        for layer in self.decoder:
            assert isinstance(layer, DecoderLayer)
            seen.extend(one.contiguous() for one in layer.cross_attention.keys_values(memory))
        # Of the type that projections have, which autocast chooses.
        state = tuple(one.new_empty((*one.shape[:2], 0, one.size(3))) for one in seen)
        return (mask, *seen), state

    def decode(self, previous: Tensor, context: State, state: State) -> Decoded:
        mask, *seen = context
        past, steps = state[0].size(2), previous.size(1)
        causal = torch.ones(steps, past + steps, dtype=torch.bool, device=previous.device).tril(past)
        x = self._embedded(self.words.target(previous), past)
        after: list[Tensor] = []
        for number, layer in enumerate(self.decoder):
            own = slice(2 * number, 2 * number + 2)
            x, kept, weights = layer(x, causal, state[own], seen[own], mask[:, None, None])
            after.extend(kept)
        attention = weights.mean(dim=1).reshape(*previous.shape, mask.size(1))
        return Decoded(self.decoder_norm(x), attention, tuple(after))

    def logits(self, decoded: Decoded, context: State, at: Tensor | None = None) -> Tensor:
        return self.words.scores(decoded.readout, at)

    def _embedded(self, words: Tensor, first: int) -> Tensor:
        """§3.4 and §3.5: words (R, T, W) times √W plus their positions from `first` on."""
        x = words * self.width**0.5 + sinusoids(first, words.size(1), self.width, words)
        return dropout(x, self.dropout, self.training)


def _last_norm(width: int, norm: Norm) -> nn.Module:
    """Of a stack: where each layer ends in a normalisation, there is no other."""
    return nn.LayerNorm(width) if norm == "pre" else nn.Identity()


def _glorot(linear: nn.Module) -> None:
    assert isinstance(linear, nn.Linear)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
