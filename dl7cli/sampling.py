"""Outputs drawn at random, id by id, over any decoder that offers one step.

Each id is drawn from the model's probabilities after the rules, the temperature, top-k and top-p, in this order: the
log-probabilities are divided by the temperature, the `top_k` most probable ids are kept (Fan et al. 2018), and of these
the fewest that together have `top_p` of what all of them have (Holtzman et al. 2020). A draw is a function of the seed,
the number of the sentence, the number of the sample and the step, and not of what stands in the same batch. What is
reported is the model's own log-probability, scored like what a beam finds.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dl7cli.search import Hypothesis, Rules, State, Step, Walk, best_ids


def sample(
    step: Step,
    context: State,
    state: State,
    rules: Rules,
    *,
    numbers: Sequence[int],
    seed: int,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    attention: bool = False,
) -> list[list[Hypothesis]]:
    """Draw `samples` outputs of every sentence, in the order they are drawn; the first of many is the only one.

    `numbers` are those of the sentences, `top_k = 0` and `top_p = 1` keep every id, and everything else is as in
    `beam_search`. A sentence gets fewer outputs where the rules leave nothing of positive probability.
    """
    if samples < 1 or not 0 < temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError("samples and temperature must be above 0, top_k not below it, and top_p in (0, 1]")
    if len(numbers) != len(rules.max_length):
        raise ValueError(f"max_length has {len(rules.max_length)} sentences, numbers has {len(numbers)}")
    walk = Walk(step, context, state, rules, width=samples, attention=attention)
    if not rules.max_length:
        return []
    penalties = rules.penalties().to(walk.books)
    endings = walk.no_endings(samples)
    ended = endings.clone()
    draws = torch.from_numpy(_draws(seed, numbers, samples, walk.longest + 1)).to(walk.books)
    totals = torch.zeros((len(numbers), samples), dtype=torch.float64, device=walk.books)
    parents = torch.arange(samples, device=walk.books).expand_as(totals)

    while len(walk.sentence) and walk.length <= walk.longest:
        log_probabilities = walk.look()
        live = totals > -math.inf
        walk.check(log_probabilities.amax(dim=1), live)
        point = draws[walk.sentence, :, walk.length].flatten()
        tokens = _drawn(log_probabilities, point, temperature, top_k, top_p)
        gains = log_probabilities.gather(1, tokens).double().view_as(totals)
        tokens = tokens.view_as(totals)
        totals = torch.where(live, totals + gains, -math.inf)
        ends = (tokens == rules.eos) & (totals > -math.inf)
        new = walk.endings(walk.scores(totals, parents, penalties), totals, gains, parents)
        ended = torch.where(ends[:, :, None], new, ended)
        endings.index_copy_(0, walk.sentence, ended)
        totals = totals.masked_fill(ends, -math.inf)
        kept = walk.advance(tokens, parents, gains, totals > -math.inf)
        if kept is not None:
            totals, parents, ended = totals[kept], parents[kept], ended[kept]
    return walk.hypotheses(endings)


def _draws(seed: int, numbers: Sequence[int], samples: int, steps: int) -> np.ndarray:
    """A number from [0, 1) for every sentence, sample and step."""
    return np.array(
        [[np.random.default_rng([seed, number, one]).random(steps) for one in range(samples)] for number in numbers]
    )


def _cumulative(probabilities: Tensor) -> Tensor:
    """probabilities (R, V) → their cumulative sums; of these torch has none on a GPU that gives the same bits again."""
    if torch.are_deterministic_algorithms_enabled():
        return probabilities.cpu().cumsum(dim=1).to(probabilities.device)
    return probabilities.cumsum(dim=1)


def _drawn(log_probabilities: Tensor, point: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """log_probabilities (R, V), point (R,) in [0, 1) → ids (R, 1) where the cumulative probability passes the point."""
    vocabulary = log_probabilities.shape[1]
    values, ids = log_probabilities, None
    if top_k or top_p < 1:
        values, ids = best_ids(log_probabilities, min(top_k or vocabulary, vocabulary))
    # Below the greatest, which no temperature is too low for.
    below = values.double() - values.amax(dim=1, keepdim=True)
    probabilities = (below / temperature).softmax(dim=1)
    if top_p < 1:
        before = _cumulative(probabilities) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    reached = _cumulative(probabilities)
    whole = reached[:, -1:]
    point = torch.minimum(
        point[:, None] * whole, whole.nextafter(torch.zeros_like(whole))
    )  # rounding must not reach it
    # Where nothing is possible every probability is NaN: any id will do, as its log-probability is -inf.
    at = torch.searchsorted(reached, point, right=True).clamp(max=values.shape[1] - 1)
    return at if ids is None else ids.gather(1, at)
