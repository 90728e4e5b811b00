"""Beam search over any decoder that offers one step; beam 1 is greedy search. `sampling` walks along the same way.

What is found, exactly:

- The **score** of a hypothesis is `log-probability / penalty(length) + coverage_penalty * coverage`. The
  log-probability includes the closing eos, and so does the length. The penalty is `((5 + length) / 6) **
  length_penalty` for "gnmt" (Wu et al. 2016, Google's NMT system, eq. 14) and `length ** length_penalty` for
  "average". Coverage, of the same equation, is the sum over the source steps of `log(min(a, 1))`, where a is
  all the attention the target steps, eos included, have paid to a source step. An `a` below `LEAST_COVERAGE` counts as
  that, as rounding makes it 0.
- **A step** ranks all beam * V extensions of a sentence's live hypotheses by log-probability. Those among the
  first `beam` that end in eos are finished; the first `beam` that do not end go on. All of this lies within
  the first 2 * beam, as at most `beam` of them end. An extension of probability 0 is never taken.
- **At `max_length`** ids only eos may follow, and it is charged: every score equals that of teacher forcing.
- **A sentence ends** when `beam` hypotheses have finished, so that beam 1 is greedy search, or none lives. It stops
  early only where that changes nothing: when no live hypothesis can enter its `n_best` best. The log-probability of a
  hypothesis only falls as it grows, no penalty falls with the length, and coverage, though it may still grow, is never
  positive. So a live hypothesis can at most score its present log-probability divided by the penalty at the greatest
  length the sentence allows, whatever its least length. The first of many is therefore the same as the only one.
- **Ties** go to the lower candidate index, which is beam * V + id; among finished hypotheses to the one that
  finished first.

Sentences do not touch one another, so neither batch nor order matters to the result. What is kept of a step is which
hypothesis goes on with which id; outputs are read off backwards at the end. All of it runs where the tensors are, in
double precision (on the CPU where a device has none), and a device is waited for only at a look at which sentences are
done, every few steps. Where those are many they leave; until they do, nothing that happens to them counts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

State = tuple[Tensor, ...]

Step = Callable[[Tensor, State, State], tuple[Tensor, State, Tensor | None]]
"""`step(previous, context, state) -> (log_probabilities, new_state, attention)`.

`previous` (R,) are the latest ids and `log_probabilities` is (R, V) in float32, which the search overwrites. R is
sentences * hypotheses with those of one sentence adjacent, one each at the first step of a beam. `context` has one row
per sentence, `state` one per hypothesis; both lose rows as sentences finish. `attention` (R, S) is what the step looked
at, or None.
"""

LEAST_COVERAGE = 1e-6
STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 8, "mps": 1}
"""By device: to look costs nothing where the CPU knows the numbers anyway."""
_SCORE = 0
_BLOCK = 32
"""Ids of which the greatest log-probability is found before any is ranked."""


class Hypothesis(NamedTuple):
    """One finished output."""

    ids: tuple[int, ...]  # without bos and eos
    score: float  # what ranks
    log_probability: float  # natural logarithm, the sum over ids and the closing eos
    token_log_probabilities: tuple[float, ...]  # of each of the ids and of eos
    attention: np.ndarray | None = None  # (len(ids) + 1, S) in float32, where it was asked for and there is any


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What an output may be and what it scores. Raises ValueError for what is out of range."""

    bos: int
    eos: int
    max_length: Sequence[int]
    """Most ids before eos, for each sentence its own."""
    min_length: int = 0
    """Fewest ids before eos, as far as `max_length` allows."""
    forbidden: Sequence[int] = ()
    """Ids that are never chosen."""
    no_repeat_ngram: int = 0
    """So many ids in a row never appear twice in an output; 0: any may."""
    prefixes: Sequence[Sequence[int]] | None = None
    """Ids that the output of each sentence begins with, whatever the rules above say of them; charged like others."""
    normalisation: Literal["gnmt", "average"] = "gnmt"
    length_penalty: float = 0.0
    coverage_penalty: float = 0.0
    source_lengths: Sequence[int] | None = None
    """Source steps of each sentence that are not padding, for the coverage penalty."""

    def __post_init__(self) -> None:
        sentences, least = len(self.max_length), min(self.max_length, default=0)
        if least < 0:
            raise ValueError(f"max_length must not be negative, got {least}")
        for name in ("length_penalty", "coverage_penalty", "min_length", "no_repeat_ngram"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if self.eos in self.forbidden:
            raise ValueError(f"eos ({self.eos}) is forbidden, so nothing could ever finish")
        if self.coverage_penalty and self.source_lengths is None:
            raise ValueError("a coverage penalty needs source_lengths")
        for part in (self.prefixes, self.source_lengths):
            if part is not None and len(part) != sentences:
                raise ValueError(f"max_length has {sentences} sentences, another rule has {len(part)}")
        if any(len(prefix) > limit for prefix, limit in zip(self.prefixes or (), self.max_length, strict=False)):
            raise ValueError("a prefix is longer than max_length")

    def penalties(self) -> Tensor:
        """What the log-probability of an output is divided by, for each number of ids it may have before eos."""
        length = 1 + torch.arange(max(self.max_length) + 1, dtype=torch.float64)
        match self.normalisation:
            case "gnmt":
                return ((5 + length) / 6) ** self.length_penalty
            case "average":
                return length**self.length_penalty


class Extension(NamedTuple):
    """One more id for a live hypothesis, as a step of a beam has ranked it."""

    parent: int
    """The live hypothesis that it extends, by its `place`; 0 at the first step."""
    id: int
    log_probability: float
    """Of the whole hypothesis."""
    score: float | None
    """What ranks it, where it ends here."""
    place: int | None
    """Which of the live hypotheses of the next step it is; None where it ends, is dropped, or the search is over."""


def beam_search(
    step: Step,
    context: State,
    state: State,
    rules: Rules,
    *,
    beam: int,
    n_best: int = 1,
    attention: bool = False,
    tree: list[list[Extension]] | None = None,
) -> list[list[Hypothesis]]:
    """Find the `n_best` best outputs of every sentence, best first, sentences in the order given.

    `context` and `state` come with one row per sentence; `state` is re-ordered after every step, `context` only ever
    loses the rows of sentences that are done. A sentence gets fewer than `n_best` hypotheses where fewer were found,
    none where every output has probability 0. `attention`: whether they come with it. Of a single sentence `tree` is
    given the best of what each step has ranked, best first. Gradients are not needed: call it under
    `torch.inference_mode()`.

    Raises ValueError for arguments out of range and for log-probabilities above 0 or misshapen, and FloatingPointError
    for those that are NaN.
    """
    if beam < 1 or not 1 <= n_best <= beam:
        raise ValueError(f"1 <= n_best <= beam does not hold: n_best {n_best}, beam {beam}")
    walk = Walk(step, context, state, rules, attention=attention)
    if tree is not None and len(rules.max_length) != 1:
        raise ValueError(f"a tree is of one sentence, not of {len(rules.max_length)}")
    if not rules.max_length:
        return []
    penalties = rules.penalties().to(walk.books)
    most = penalties[walk.limits]
    # Of each sentence the log-probabilities of its live hypotheses, best first, with -inf where one is dead.
    totals = torch.zeros((len(walk.sentence), 1), dtype=torch.float64, device=walk.books)
    finished = torch.zeros(len(walk.sentence), dtype=torch.int64, device=walk.books)
    endings = walk.no_endings(n_best)
    best = endings.clone()

    while len(walk.sentence) and walk.length <= walk.longest:
        values, ids = best_ids(walk.look(), beam + 1)
        walk.check(values[:, 0], totals > -math.inf)
        rows, live = totals.shape
        values, ids = values.double().view(rows, live, -1), ids.view(rows, -1)
        # Not simply a sum: what the network says of a dead hypothesis may be NaN.
        extended = torch.where(totals[:, :, None] > -math.inf, totals[:, :, None] + values, -math.inf)
        ranked, order = extended.flatten(1).sort(dim=1, descending=True, stable=True)
        ranked, order = ranked[:, : 2 * beam], order[:, : 2 * beam]
        parents, tokens = order // values.shape[2], ids.gather(1, order)
        gains = values.flatten(1).gather(1, order)
        ends = (tokens == rules.eos) & (ranked > -math.inf)

        finishing = ends[:, :beam]
        scores = walk.scores(ranked[:, :beam], parents[:, :beam], penalties).masked_fill(~finishing, -math.inf)
        new = walk.endings(scores, ranked[:, :beam], gains[:, :beam], parents[:, :beam])
        best = torch.cat([best, new], dim=1)
        # Stable: of equal scores the one finished first stays first.
        first = best[:, :, _SCORE].sort(dim=1, descending=True, stable=True).indices[:, :n_best]
        best = best.gather(1, first[:, :, None].expand(-1, -1, best.shape[2]))
        endings.index_copy_(0, walk.sentence, best)
        finished = finished + finishing.sum(dim=1)

        going_on = ends.byte().argsort(dim=1, stable=True)[:, :beam]
        totals = ranked.masked_fill(ends, -math.inf).gather(1, going_on)
        done = (finished >= beam) | (totals[:, 0] / most <= best[:, -1, _SCORE])
        totals = totals.masked_fill(done[:, None], -math.inf)  # so nothing more of it can finish
        if tree is not None and (step_of_tree := _extensions(parents, tokens, ranked, scores, going_on, totals)):
            tree.append(step_of_tree)
        kept = walk.advance(
            tokens.gather(1, going_on), parents.gather(1, going_on), gains.gather(1, going_on), totals > -math.inf
        )
        if kept is not None:
            totals, finished, best, most = totals[kept], finished[kept], best[kept], most[kept]
    return walk.hypotheses(endings)


def _extensions(
    parents: Tensor, ids: Tensor, ranked: Tensor, scores: Tensor, going_on: Tensor, totals: Tensor
) -> list[Extension]:
    """What a step has ranked for the only sentence: parents, ids and log-probabilities (1, N), scores of the first that
    end (1, at most N), which of the N are kept (1, K) and with what log-probabilities, -inf where the search is over.
    """
    kept = zip(going_on[0].tolist(), totals[0].tolist(), strict=True)
    places = {number: place for place, (number, total) in enumerate(kept) if total > -math.inf}
    ended = {number: score for number, score in enumerate(scores[0].tolist()) if score > -math.inf}
    rows = zip(parents[0].tolist(), ids[0].tolist(), ranked[0].tolist(), strict=True)
    return [
        Extension(parent, one, total, ended.get(number), places.get(number))
        for number, (parent, one, total) in enumerate(rows)
        if total > -math.inf
    ]


class Walk:
    """The hypotheses of many sentences as they grow by one id a step, under the rules that hold for beam and sampling.

    In turn: `look` at what may follow, choose, `advance`. Letters in shapes: L sentences still walking, K hypotheses of
    each, S source steps, V words.
    """

    def __init__(
        self, step: Step, context: State, state: State, rules: Rules, *, width: int = 1, attention: bool = False
    ) -> None:
        sentences = len(rules.max_length)
        if any(len(part) != sentences for part in (*context, *state)):
            rows = [len(part) for part in (*context, *state)]
            raise ValueError(f"max_length has {sentences} sentences, context and state have {rows}")
        self._step = step
        self._rules = rules
        self._context = context
        self._state = state if width == 1 else tuple(part.repeat_interleave(width, dim=0) for part in state)
        self._device = next((part.device for part in (*context, *state)), torch.device("cpu"))
        self.books = torch.device("cpu") if self._device.type == "mps" else self._device
        """Where numbers in double precision are kept."""
        self.length = 0
        self.longest = max(rules.max_length, default=0)
        self.sentence = torch.arange(sentences, device=self.books)
        """(L,) numbers of those still walking."""
        self.limits = self._tensor(rules.max_length)
        self._least = self.limits.clamp(max=rules.min_length)
        self._shortest = min(rules.max_length, default=0)
        self._forced = self._table(rules.prefixes or [[]] * sentences)
        self._forbidden = self._tensor(sorted(set(rules.forbidden))).to(self._device)
        self._sources = None if rules.source_lengths is None else self._tensor(rules.source_lengths)
        self._width = width
        self._previous = torch.full((sentences * width,), rules.bos, device=self._device)
        self._history = torch.empty((sentences * width, 0), dtype=torch.int64, device=self._device)
        self._covered: Tensor | None = None
        self._attention: Tensor | None = None
        self._wants_attention = attention
        self._highest = torch.tensor(-math.inf, device=self.books)
        self._steps: list[_Taken] = []

    def look(self) -> Tensor:
        """Log-probabilities (L·K, V) of what may follow each hypothesis, -inf for what may not."""
        found, self._state, attention = self._step(self._previous, self._context, self._state)
        rows = len(self._previous)
        if found.ndim != 2 or len(found) != rows or found.shape[1] < 2:
            raise ValueError(f"step must return ({rows}, V >= 2) numbers, got {tuple(found.shape)}")
        if attention is not None:
            attention = attention.reshape(-1, self._width, attention.shape[1])
        self._attention = attention.float() if self._wants_attention and attention is not None else None
        if self._rules.coverage_penalty:
            if attention is None:
                raise ValueError("a coverage penalty needs attention")
            paid = attention.to(self.books).double()
            self._covered = paid if self._covered is None else self._covered + paid
        # Ranked where the books are: torch for MPS ranks integers by half of their bits.
        return self._constrained(found.float()).to(self.books)

    def _constrained(self, found: Tensor) -> Tensor:
        rules, length = self._rules, self.length
        forced = self._forced[:, length] if length < self._forced.shape[1] else None
        if length >= self._shortest:
            ending = torch.full_like(self.limits, rules.eos)
            forced = torch.where(self.limits <= length, ending, -1 if forced is None else forced)
        if forced is not None:
            forced = forced.repeat_interleave(self._width).to(self._device)[:, None]
            its_own = found.gather(1, forced.clamp(min=0))
        if len(self._forbidden):
            found.index_fill_(1, self._forbidden, -math.inf)
        if length < rules.min_length:
            early = (length < self._least).repeat_interleave(self._width).to(self._device)
            found[:, rules.eos].masked_fill_(early, -math.inf)
        n = rules.no_repeat_ngram
        if n and length >= n:
            # What followed the latest n - 1 ids each time they were there before may not follow them now.
            followers = self._history[:, n - 1 :]
            repeats = torch.ones_like(followers, dtype=torch.bool)
            for back in range(1, n):
                latest = self._history[:, length - back, None]
                repeats &= self._history[:, n - 1 - back : length - back] == latest
            found.scatter_reduce_(1, followers, torch.where(repeats, -math.inf, math.inf), "amin")
        if forced is not None:
            found.masked_fill_(forced >= 0, -math.inf)
            index = forced.clamp(min=0)
            found.scatter_(1, index, torch.where(forced >= 0, its_own, found.gather(1, index)))
        return found

    def check(self, greatest: Tensor, live: Tensor) -> None:
        """Note the `greatest` number (L·K,) said to follow each hypothesis; no log-probability, it is refused later.

        What is said of those that are not `live` (L, K) is arbitrary.
        """
        live = live.flatten()
        self._highest = torch.maximum(self._highest, torch.where(live, greatest, -math.inf).amax())  # NaN stays

    def scores(self, totals: Tensor, parents: Tensor, penalties: Tensor) -> Tensor:
        """What outputs of log-probability `totals` (L, N) score that end here after hypotheses `parents` (L, N)."""
        scores = totals / penalties[self.length]
        if self._covered is None:
            return scores
        assert self._sources is not None
        real = torch.arange(self._covered.shape[2], device=self.books) < self._sources[:, None]
        coverage = torch.where(real[:, None], self._covered.clamp(LEAST_COVERAGE, 1).log(), 0).sum(dim=2)
        return scores + self._rules.coverage_penalty * coverage.gather(1, parents)

    def endings(self, scores: Tensor, totals: Tensor, gains: Tensor, parents: Tensor) -> Tensor:
        """What `hypotheses` needs to know of outputs that end here (L, N) → (L, N, 5), the score as column `_SCORE`."""
        return torch.stack([scores, totals, gains, torch.full_like(scores, self.length), parents.double()], dim=2)

    def no_endings(self, number: int) -> Tensor:
        """Room for so many of every sentence."""
        return torch.full((len(self.sentence), number, 5), -math.inf, dtype=torch.float64, device=self.books)

    def advance(self, tokens: Tensor, parents: Tensor, gains: Tensor, live: Tensor) -> Tensor | None:
        """Go on with the hypotheses (L, K) that add `tokens` to `parents` by log-probabilities of `gains`.

        A sentence with none `live` is done. Returns the rows of the others, where some have left.
        """
        self._steps.append(_Taken(self.sentence, tokens, parents, gains, self._attention))
        self.length += 1
        kept = None
        if self.length % STEPS_BETWEEN_LOOKS.get(self._device.type, 8) == 0:
            self._refuse_nonsense()
            walking = live.any(dim=1)
            gone = len(walking) - int(walking.sum())
            # What stays is copied: that costs more than a step of the few that could have left.
            if gone * live.shape[1] * 4 >= len(walking):
                kept = walking.nonzero().flatten()
        rows = torch.arange(len(parents), device=self.books)[:, None] * self._width + parents
        moved = kept is not None or tokens.shape[1] > 1
        if kept is not None:
            rows, parents, tokens = rows[kept], parents[kept], tokens[kept]
            self.sentence, self.limits, self._least = self.sentence[kept], self.limits[kept], self._least[kept]
            self._forced = self._forced[kept]
            self._sources = None if self._sources is None else self._sources[kept]
            self._covered = None if self._covered is None else self._covered[kept]
            there = kept.to(self._device)
            self._context = tuple(part.index_select(0, there) for part in self._context)
        if moved:
            rows = rows.flatten().to(self._device)
            self._state = tuple(part.index_select(0, rows) for part in self._state)
            if self._covered is not None:
                self._covered = self._covered.gather(1, parents[:, :, None].expand(-1, -1, self._covered.shape[2]))
        self._width = tokens.shape[1]
        self._previous = tokens.flatten().to(self._device)
        if self._rules.no_repeat_ngram:
            history = self._history.index_select(0, rows) if moved else self._history
            self._history = torch.cat([history, self._previous[:, None]], dim=1)
        return kept

    def hypotheses(self, endings: Tensor) -> list[list[Hypothesis]]:
        """The outputs of every sentence that end as `endings` (sentences, N, 5) say; a score of -inf is none."""
        self._refuse_nonsense()
        told = endings.cpu().numpy()
        sentence, rank = np.nonzero(told[:, :, _SCORE] > -math.inf)
        scores, totals, gains, lengths, cursor = told[sentence, rank].T
        length, cursor = lengths.astype(np.int64), cursor.astype(np.int64)
        steps = range(1 + length.max(initial=-1))
        ids = np.zeros((len(length), len(steps)), dtype=np.int64)
        values = np.zeros((len(length), len(steps)))
        values[np.arange(len(length)), length] = gains
        looked: list[np.ndarray] = []
        places = np.empty(len(told), dtype=np.int64)
        for at in reversed(steps):
            taken = self._steps[at]
            walking = taken.sentence.cpu().numpy()
            places[walking] = np.arange(len(walking))
            on = np.nonzero(length > at)[0]
            here = places[sentence[on]], cursor[on]
            ids[on, at] = taken.tokens.cpu().numpy()[here]
            values[on, at] = taken.gains.cpu().numpy()[here]
            cursor[on] = taken.parents.cpu().numpy()[here]
            if taken.attention is not None:
                there = length >= at
                seen = np.zeros((len(length), taken.attention.shape[2]), dtype=np.float32)
                seen[there] = taken.attention.cpu().numpy()[places[sentence[there]], cursor[there]]
                looked.append(seen)
        rows = np.stack(looked[::-1], axis=1) if looked else None
        found: list[list[Hypothesis]] = [[] for _ in told]
        for one, end in enumerate(length.tolist()):
            found[sentence[one]].append(
                Hypothesis(
                    tuple(ids[one, :end].tolist()),
                    float(scores[one]),
                    float(totals[one]),
                    tuple(values[one, : end + 1].tolist()),
                    None if rows is None else rows[one, : end + 1],
                )
            )
        return found

    def _refuse_nonsense(self) -> None:
        highest = self._highest.item()
        if math.isnan(highest):
            raise FloatingPointError("the step function returned NaN as a log-probability")
        if highest > 1e-3:  # a little above 0 may be rounding
            raise ValueError(f"the step function returned a log-probability above 0: {highest}")

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.books)

    def _table(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows of ids (L, longest), -1 where one has no more."""
        longest = max((len(row) for row in rows), default=0)
        table = torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows], dtype=torch.int64)
        return table.view(len(rows), longest).to(self.books)


class _Taken(NamedTuple):
    """What was chosen at one step."""

    sentence: Tensor  # (L,)
    tokens: Tensor  # (L, K), K of the next step
    parents: Tensor  # (L, K)
    gains: Tensor  # (L, K) log-probabilities of the tokens
    attention: Tensor | None  # (L, K of this step, S)


def best_ids(log_probabilities: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The greatest entries of each row of (R, V) and their ids, (R, at most `number`): greatest first, lowest id first
    among equals, which `topk` does not promise, and NaN before everything.

    Only ids in the best blocks are ranked, of which no row needs more than `number`: that is what costs least.
    """
    vocabulary = log_probabilities.shape[1]
    whole = vocabulary // _BLOCK
    if whole <= number:
        first = _first(log_probabilities, min(number, vocabulary))
        return log_probabilities.gather(1, first), first
    blocks = log_probabilities[:, : whole * _BLOCK].reshape(-1, whole, _BLOCK).amax(dim=2)
    if whole * _BLOCK < vocabulary:
        rest = log_probabilities[:, whole * _BLOCK :].amax(dim=1, keepdim=True)
        blocks = torch.cat([blocks, rest], dim=1)
    chosen = _first(blocks, number).sort(dim=1).values
    ids = (chosen[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=chosen.device)).flatten(1)
    inside = ids.clamp(max=vocabulary - 1)
    values = log_probabilities.gather(1, inside).masked_fill(ids >= vocabulary, -math.inf)
    first = _first(values, number)
    return values.gather(1, first), inside.gather(1, first)


def _first(values: Tensor, number: int) -> Tensor:
    """Columns of the `number` greatest entries of each row of float32 `values`, in the order that `best_ids` promises.

    By keys that are all different: the number's bits, as an integer that rises with it, and then the column.
    """
    bits = values.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).view(torch.int32)
    rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    columns = torch.arange(values.shape[1] - 1, -1, -1, device=values.device)
    return ((rising << 32) | columns).topk(number, dim=1).indices
