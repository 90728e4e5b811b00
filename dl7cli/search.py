"""Beam search over any decoder that offers one step; beam 1 is greedy search.

What is found, exactly:

- The **score** of a hypothesis is its log-probability, the closing eos included, divided by the length
  penalty `((5 + length) / 6) ** length_penalty` of Wu et al. 2016 (Google's NMT system, eq. 14, without the
  coverage term), where length counts eos. `length_penalty = 0` ranks by plain log-probability.
- **A step** ranks all beam * V extensions of a sentence's live hypotheses by log-probability. Those among the
  first `beam` that end in eos are finished; the first `beam` that do not end go on. All of this lies within
  the first 2 * beam, as at most `beam` of them end. An extension of probability 0 is never taken.
- **At `max_length`** ids only eos may follow, and it is charged: every score equals that of teacher forcing.
- **A sentence stops** when `beam` hypotheses have finished, or when no live one can enter its `n_best` best:
  as log-probabilities are never positive, a live hypothesis can at most score its present log-probability
  divided by the penalty at the greatest length the sentence allows. So stopping early changes nothing, and
  the first of many is the same as the only one.
- **Ties** go to the lower candidate index, which is beam * V + id; among finished hypotheses to the one that
  finished first.

Sentences do not touch one another, so neither batch nor order matters to the result. The network and one
top-k run where the tensors are; the book-keeping, a few numbers per hypothesis, runs on the CPU in double
precision: its result is the same whatever the device, and MPS has no double precision.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

State = tuple[Tensor, ...]

Step = Callable[[Tensor, State, State], tuple[Tensor, State, Tensor | None]]
"""`step(previous, context, state) -> (log_probabilities, new_state, attention)`.

`previous` (R,) are the latest ids and `log_probabilities` is (R, V), where R = sentences * beam with the
hypotheses of one sentence adjacent. `context` has one row per sentence, `state` one per hypothesis; both lose
rows as sentences finish. `attention` (R, S) is what the step looked at, or None.
"""

_SPARE = 8  # candidates taken beyond the needed ones, so that the usual tie is settled without a second pass


class Hypothesis(NamedTuple):
    """One finished output."""

    ids: tuple[int, ...]  # without bos and eos
    score: float  # log-probability divided by the length penalty: what ranks
    log_probability: float  # natural logarithm, the sum over ids and the closing eos
    token_log_probabilities: tuple[float, ...]  # of each of the ids and of eos
    attention: Tensor | None = None  # (len(ids) + 1, S) on the CPU, where it was asked for and there is any


def beam_search(
    step: Step,
    context: State,
    state: State,
    *,
    beam: int,
    max_length: Tensor | Sequence[int],
    bos: int,
    eos: int,
    length_penalty: float = 0.0,
    n_best: int = 1,
    forbidden: Sequence[int] = (),
    attention: bool = False,
) -> list[list[Hypothesis]]:
    """Find the `n_best` best outputs of every sentence, best first, sentences in the order given.

    `context` and `state` come with one row per sentence; `state` is repeated per beam here and re-ordered
    after every step, `context` only ever loses the rows of sentences that are done. `max_length` (sentences,)
    is the greatest number of ids before eos, for each sentence its own. `forbidden` ids are never chosen. A
    sentence gets fewer than `n_best` hypotheses where fewer were found, none where every output has
    probability 0. Gradients are not needed: call it under `torch.inference_mode()`.

    Raises ValueError for arguments out of range and for log-probabilities that are NaN, above 0 or misshapen.
    """
    if beam < 1 or not 1 <= n_best <= beam:
        raise ValueError(f"1 <= n_best <= beam does not hold: n_best {n_best}, beam {beam}")
    if not 0 <= length_penalty < math.inf:
        raise ValueError(f"length_penalty must be finite and not negative, got {length_penalty}")
    if eos in forbidden:
        raise ValueError(f"eos ({eos}) is forbidden, so nothing could ever finish")
    limits = torch.as_tensor(max_length, dtype=torch.int64).cpu()
    sentences = len(limits)
    if any(len(part) != sentences for part in (*context, *state)):
        rows = [len(part) for part in (*context, *state)]
        raise ValueError(f"max_length has {sentences} sentences, context and state have {rows}")
    if not sentences:
        return []
    if int(limits.min()) < 0:
        raise ValueError(f"max_length must not be negative, got {int(limits.min())}")

    device = next((part.device for part in (*context, *state)), torch.device("cpu"))
    longest = int(limits.max())
    penalties = ((5 + torch.arange(longest + 2, dtype=torch.float64)) / 6) ** length_penalty
    banned = torch.tensor(sorted(set(forbidden)), dtype=torch.int64)
    results: list[list[Hypothesis]] = [[] for _ in range(sentences)]

    # One row for each sentence still being searched. `totals` are the log-probabilities of its live
    # hypotheses, best first, with -inf where there are fewer than `beam`.
    sentence = torch.arange(sentences)
    totals = torch.full((sentences, beam), -math.inf, dtype=torch.float64)
    totals[:, 0] = 0
    prefixes = torch.empty((sentences, beam, 0), dtype=torch.int64)
    gained = torch.empty((sentences, beam, 0), dtype=torch.float64)
    looked: Tensor | None = None
    finished = torch.zeros(sentences, dtype=torch.int64)
    best_scores = torch.full((sentences, n_best), -math.inf, dtype=torch.float64)
    previous = torch.full((sentences * beam,), bos, dtype=torch.int64, device=device)
    state = tuple(part.repeat_interleave(beam, dim=0) for part in state)

    for length in range(longest + 1):
        log_probabilities, state, weights = step(previous, context, state)
        if attention and weights is not None:
            now = weights.float().cpu().view(len(sentence), beam, 1, -1)
            looked = now if looked is None else torch.cat([looked, now], dim=2)
        live = totals.flatten() > -math.inf
        values, ids = _extensions(log_probabilities, live, needed=beam + 1 + len(banned))
        if len(banned):
            values = values.masked_fill(torch.isin(ids, banned), -math.inf)
        at_limit = (limits == length).repeat_interleave(beam)
        if at_limit.any():
            values = values.masked_fill(at_limit[:, None], -math.inf)
            values[at_limit, 0] = log_probabilities[:, eos].cpu().double()[at_limit]
            ids[at_limit, 0] = eos
        # Not simply a sum: what the network says of a dead hypothesis may be NaN.
        values = torch.where(live[:, None], totals.flatten()[:, None] + values, -math.inf)

        width = values.shape[1]
        ranked, order = values.view(-1, beam * width).sort(dim=1, descending=True, stable=True)
        ranked, order = ranked[:, : 2 * beam], order[:, : 2 * beam]
        tokens = ids.view(-1, beam * width).gather(1, order)
        parents = order // width
        gains = ranked - totals.gather(1, parents)
        ends = (tokens == eos) & (ranked > -math.inf)

        finishing = ends[:, :beam]
        if finishing.any():
            row, rank = finishing.nonzero(as_tuple=True)
            scores = ranked[:, :beam] / penalties[length + 1]
            found = zip(
                sentence[row].tolist(),
                prefixes[row, parents[row, rank]].tolist(),
                scores[row, rank].tolist(),
                ranked[row, rank].tolist(),
                torch.cat([gained[row, parents[row, rank]], gains[row, rank][:, None]], dim=1).tolist(),
                [None] * len(row) if looked is None else list(looked[row, parents[row, rank]]),
                strict=True,
            )
            for index, prefix, score, log_probability, tokens_gained, weights in found:
                one = Hypothesis(tuple(prefix), score, log_probability, tuple(tokens_gained), weights)
                results[index].append(one)
            finished = finished + finishing.sum(dim=1)
            scores = scores.masked_fill(~finishing, -math.inf)
            best_scores = torch.cat([best_scores, scores], dim=1).topk(n_best, dim=1).values

        going_on = ends.byte().argsort(dim=1, stable=True)[:, :beam]
        totals, tokens = ranked.gather(1, going_on), tokens.gather(1, going_on)
        parents, gains = parents.gather(1, going_on), gains.gather(1, going_on)
        reachable = totals[:, 0] / penalties[limits + 1]
        done = (finished >= beam) | (reachable <= best_scores[:, -1])  # -inf <= -inf where nothing lives
        kept = (~done).nonzero().flatten()
        if not len(kept):
            break

        totals, tokens, parents = totals[kept], tokens[kept], parents[kept]
        prefixes = torch.cat([prefixes[kept[:, None], parents], tokens[:, :, None]], dim=2)
        gained = torch.cat([gained[kept[:, None], parents], gains[kept][:, :, None]], dim=2)
        if looked is not None:
            looked = looked[kept[:, None], parents]
        if beam > 1 or len(kept) < len(done):
            rows_kept = (kept[:, None] * beam + parents).flatten().to(device)
            state = tuple(part.index_select(0, rows_kept) for part in state)
        if len(kept) < len(done):
            context = tuple(part.index_select(0, kept.to(device)) for part in context)
            sentence, limits = sentence[kept], limits[kept]
            finished, best_scores = finished[kept], best_scores[kept]
        previous = tokens.flatten().to(device)

    # sorted() is stable: of equal scores the one finished first stays first.
    return [sorted(found, key=lambda one: -one.score)[:n_best] for found in results]


def _extensions(log_probabilities: Tensor, live: Tensor, needed: int) -> tuple[Tensor, Tensor]:
    """Give the log-probabilities and ids of at least the `needed` best extensions of each row, by rising id.

    They come on the CPU. Among equals the lowest ids are in, which `topk` alone does not promise. What is
    said of rows that are not `live` is arbitrary. Logits rounded to bfloat16 make ties common: the spare
    candidates settle most, and where the values still tie at the edge, the row is ranked again by keys that
    are all different.
    """
    rows, vocabulary = log_probabilities.shape
    if rows != len(live) or vocabulary < 2:
        raise ValueError(f"step must return ({len(live)}, V >= 2) numbers, got ({rows}, {vocabulary})")
    top = log_probabilities.topk(min(needed + _SPARE, vocabulary), dim=1)
    values, ids = top.values.cpu().double(), top.indices.cpu()

    best = values[:, 0][live]  # NaN counts as the greatest
    if best.isnan().any():
        raise ValueError("the step function returned NaN as a log-probability")
    if (best > 1e-3).any():  # a little above 0 may be rounding
        raise ValueError(f"the step function returned a log-probability above 0: {float(best.max())}")

    if values.shape[1] < vocabulary:
        edge = values[:, needed - 1]
        tied = (live & (edge == values[:, -1]) & (edge > -math.inf)).nonzero().flatten()
        if len(tied):
            some = log_probabilities[tied.to(log_probabilities.device)]
            threshold = top.values[tied.to(some.device), needed - 1 : needed]
            falling = torch.arange(vocabulary, 0, -1, dtype=torch.int32, device=some.device)
            keys = torch.where(some > threshold, falling + vocabulary, falling * (some == threshold))
            chosen = keys.topk(values.shape[1], dim=1).indices
            values[tied], ids[tied] = some.gather(1, chosen).cpu().double(), chosen.cpu()

    ids, by_id = ids.sort(dim=1)
    return values.gather(1, by_id), ids
