"""A decoder that is a table, what its outputs may be and what they score, and a slow search, all without tensors."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dl7cli.search import LEAST_COVERAGE, Rules, State

BOS, EOS = 0, 1

# A model of the second order: the row [before, previous] holds the log-probabilities of what comes next.
Table = Tensor  # (V, V, V)


def random_table(vocabulary: int, seed: int) -> Table:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(vocabulary, vocabulary, vocabulary, generator=generator)).log_softmax(dim=2)


def coarse_table(vocabulary: int, seed: int, levels: int) -> Table:
    """Few different values, all sums of which are exact: ties wherever one looks, and some impossible ids."""
    generator = torch.Generator().manual_seed(seed)
    shape = (vocabulary, vocabulary, vocabulary)
    table = -torch.randint(1, levels + 1, shape, generator=generator) / 4
    return table.masked_fill(torch.rand(shape, generator=generator) < 0.1, -math.inf)


def random_weights(vocabulary: int, real: int, padded: int, seed: int) -> Tensor:
    """What is looked at after each two ids, (V, V, padded), of which only the first `real` steps are not padding."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(vocabulary, vocabulary, padded)
    weights[:, :, :real] = (3 * torch.randn(vocabulary, vocabulary, real, generator=generator)).softmax(dim=2)
    return weights


class Model:
    """The step function of one table per sentence, and of attention where there are weights; counts its rows."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, previous: Tensor, context: State, state: State) -> tuple[Tensor, State, Tensor | None]:
        (tables, *weights), (before,) = context, state
        assert len(previous) == len(before)
        self.rows.append(len(previous))
        sentence = torch.arange(len(tables), device=previous.device)
        sentence = sentence.repeat_interleave(len(previous) // len(tables))
        attention = weights[0][sentence, before, previous] if weights else None
        return tables[sentence, before, previous], (previous,), attention


@dataclass(frozen=True)
class Sentence:
    """A table and the rules of one sentence, with a slow answer to every question."""

    table: Table
    max_length: int
    min_length: int = 0
    forbidden: Sequence[int] = ()
    no_repeat_ngram: int = 0
    prefix: Sequence[int] = ()
    normalisation: Literal["gnmt", "average"] = "gnmt"
    length_penalty: float = 0.0
    coverage_penalty: float = 0.0
    weights: Tensor | None = None
    source_length: int = 0
    ids: range = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", range(len(self.table)))

    def allowed(self, before: Sequence[int], following: int) -> bool:
        length, n = len(before), self.no_repeat_ngram
        if length < len(self.prefix):
            return following == self.prefix[length]
        if length >= self.max_length:
            return following == EOS
        if following in self.forbidden or (following == EOS and length < self.min_length):
            return False
        grown = (*before, following)
        earlier = [grown[at : at + n] for at in range(len(before) - n + 1)]
        return n == 0 or following == EOS or grown[-n:] not in earlier

    def steps(self, ids: Sequence[int]) -> list[float]:
        """The log-probabilities of `ids` and eos, by walking along them."""
        path = (BOS, BOS, *ids, EOS)
        return [float(self.table[a, b, c]) for a, b, c in zip(path, path[1:], path[2:], strict=False)]

    def attention(self, ids: Sequence[int]) -> list[Tensor]:
        assert self.weights is not None
        return [self.weights[a, b] for a, b in itertools.pairwise((BOS, BOS, *ids))]

    def score(self, log_probability: float, ids: Sequence[int]) -> float:
        length = len(ids) + 1
        penalty = {"gnmt": (5 + length) / 6, "average": length}[self.normalisation]
        score = log_probability / math.pow(penalty, self.length_penalty)
        if self.coverage_penalty:
            paid = [sum(float(step[at]) for step in self.attention(ids)) for at in range(self.source_length)]
            score += self.coverage_penalty * sum(math.log(min(max(one, LEAST_COVERAGE), 1)) for one in paid)
        return score

    def outputs(self, begun: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
        """Every output of positive probability."""
        for following in self.ids:
            if self.allowed(begun, following) and self.table[(BOS, BOS, *begun)[-2:]][following] > -math.inf:
                if following == EOS:
                    yield begun
                else:
                    yield from self.outputs((*begun, following))

    def enumerated(self) -> list[tuple[tuple[int, ...], float]]:
        """Every output with its score, best first."""
        scored = [(ids, self.score(math.fsum(self.steps(ids)), ids)) for ids in self.outputs()]
        return sorted(scored, key=lambda output: -output[1])

    def searched(self, beam: int, n_best: int) -> list[tuple[tuple[int, ...], float]]:
        """The rules of beam search, one candidate at a time and without any early stop."""
        live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
        finished: list[tuple[tuple[int, ...], float]] = []
        while live and len(finished) < beam:
            candidates = []
            for ids, total in live:
                row = self.table[(BOS, BOS, *ids)[-2:]].tolist()
                for following, value in enumerate(row):
                    if value > -math.inf and self.allowed(ids, following):
                        candidates.append((ids, following, total + value))
            candidates.sort(key=lambda candidate: -candidate[2])  # stable, and they come in order of their index
            for ids, following, total in candidates[:beam]:
                if following == EOS:
                    finished.append((ids, self.score(total, ids)))
            live = [((*ids, following), total) for ids, following, total in candidates if following != EOS][:beam]
        return sorted(finished, key=lambda output: -output[1])[:n_best]


def together(sentences: Sequence[Sentence], device: str = "cpu") -> tuple[State, State, Rules]:
    """Context, state and rules of sentences whose rules are the same but for lengths and prefixes."""
    one = sentences[0]
    rules = Rules(
        bos=BOS,
        eos=EOS,
        max_length=[sentence.max_length for sentence in sentences],
        min_length=one.min_length,
        forbidden=one.forbidden,
        no_repeat_ngram=one.no_repeat_ngram,
        prefixes=[sentence.prefix for sentence in sentences],
        normalisation=one.normalisation,
        length_penalty=one.length_penalty,
        coverage_penalty=one.coverage_penalty,
        source_lengths=[sentence.source_length for sentence in sentences],
    )
    context: State = (torch.stack([sentence.table for sentence in sentences]).to(device),)
    if one.weights is not None:
        weights = [sentence.weights for sentence in sentences if sentence.weights is not None]
        context = (*context, torch.stack(weights).to(device))
    return context, (torch.full((len(sentences),), BOS, device=device),), rules
