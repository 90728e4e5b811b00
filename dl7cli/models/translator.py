"""What training and search ask of a translation model, whatever it is made of.

Letters in shapes: B sentences, S source steps, T target steps, R = B·K hypotheses (K = 1 in training), V words, E width
of the readout.
"""

from typing import NamedTuple

from torch import Tensor, nn

State = tuple[Tensor, ...]
"""Tensors that have the row on axis 0."""


class Decoded(NamedTuple):
    readout: Tensor
    """(R, T, E), of which `logits` makes words."""
    attention: Tensor | None
    """(R, T, S), what each target step looked at; sums to one over the real source steps. None: it looks at nothing."""
    state: State
    """After the last target step, with R rows."""


class Translator(nn.Module):
    """An encoder and a decoder. Context belongs to a sentence and is never changed, state belongs to a hypothesis."""

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[State, State]:
        """source (B, S) padded ids, lengths (B,) → context, state before the first target word."""
        raise NotImplementedError

    def decode(self, previous: Tensor, context: State, state: State) -> Decoded:
        """Run over the target words `previous` (R, T) that follow those which `state` has seen.

        R may be a multiple K of the sentences in `context`, the hypotheses of one sentence side by side.
        """
        raise NotImplementedError

    def logits(self, decoded: Decoded, context: State, at: Tensor | None = None) -> Tensor:
        """Scores before the softmax, (N, V), of the target steps `at` (N,), counted through (R·T); without, of all."""
        raise NotImplementedError

    def forward(self, source: Tensor, lengths: Tensor, previous: Tensor) -> tuple[Decoded, State]:
        """Teacher forcing: source (B, S), lengths (B,), previous (B, T) from bos on → what was decoded, context."""
        context, state = self.encode(source, lengths)
        return self.decode(previous, context, state), context

    def begin(self, source: Tensor, lengths: Tensor, hypotheses: int) -> tuple[State, State]:
        """As `encode`, with what `step` can be faster by in the context, for so many hypotheses a sentence."""
        return self.encode(source, lengths)

    def step(self, previous: Tensor, context: State, state: State) -> tuple[Tensor, State, Tensor | None]:
        """One target word for every hypothesis: previous (R,), context of `begin` or `encode` → log-probabilities
        (R, V) in float32, state, attention (R, S).
        """
        return self.answer(self.decode(previous[:, None], context, state), context)

    def answer(self, decoded: Decoded, context: State) -> tuple[Tensor, State, Tensor | None]:
        """What `step` returns, of a single target step."""
        log_probabilities = self.logits(decoded, context).float().log_softmax(dim=1)
        return log_probabilities, decoded.state, None if decoded.attention is None else decoded.attention[:, 0]
