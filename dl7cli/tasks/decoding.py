"""How translators answer and score, one or several as an ensemble: the mean of their probabilities.

In float32 whatever the training precision, so that near ties do not depend on the batch, unless autocast is on.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dl7cli.data.vocabulary import BOS, EOS, PAD, UNKNOWN
from dl7cli.device import evaluation_mode
from dl7cli.errors import UserError
from dl7cli.models.translator import State, Translator
from dl7cli.recipe import Decoding
from dl7cli.sampling import sample
from dl7cli.search import Extension, Hypothesis, Rules, beam_search

ROWS_AT_ONCE = 1024
"""Target subwords for which the scores of all words are there at a time."""


def search(
    models: Sequence[Translator],
    source: Tensor,
    lengths: Tensor,
    decoding: Decoding,
    *,
    subwords: Sequence[int],
    prefixes: Sequence[Sequence[int]],
    numbers: Sequence[int],
    n_best: int,
    attention: bool,
    tree: list[list[Extension]] | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[list[Hypothesis]]:
    """The outputs for source (B, S) of lengths (B,): the `n_best` best, or so many samples.

    Of each sentence: `subwords`, by which its output is limited, however the model reads it; ids that it begins with;
    and its number, which samples depend on. `tree` is as for `beam_search`. `check` is called before every step and may
    raise. Attention is the mean over the models that look at something. Raises UserError where a model has diverged.
    """
    limits = [int(decoding.max_length_ratio * length) + decoding.max_length_offset for length in subwords]
    rules = Rules(
        bos=BOS,
        eos=EOS,
        max_length=[max(limit, len(prefix)) for limit, prefix in zip(limits, prefixes, strict=True)],
        min_length=decoding.min_length,
        forbidden=(PAD, BOS) if decoding.allow_unknown else (PAD, BOS, UNKNOWN),
        no_repeat_ngram=decoding.no_repeat_ngram,
        prefixes=prefixes,
        normalisation=decoding.length_normalisation,
        length_penalty=decoding.length_penalty,
        coverage_penalty=decoding.coverage_penalty,
        source_lengths=lengths.tolist() if decoding.coverage_penalty else None,
    )
    # A sample is to be the same to the last bit, however many are drawn.
    hypotheses = decoding.beam if decoding.method == "beam" else 1
    with evaluation_mode(*models):
        encoded = [model.begin(source, lengths, hypotheses) for model in models]

        def step(previous: Tensor, context: State, state: State) -> tuple[Tensor, State, Tensor | None]:
            check()
            found: list[Tensor] = []
            seen: list[Tensor] = []
            after: State = ()
            for model, (its_context, its_state) in zip(models, encoded, strict=True):
                own, context = context[: len(its_context)], context[len(its_context) :]
                before, state = state[: len(its_state)], state[len(its_state) :]
                log_probabilities, now, weights = model.step(previous, own, before)
                found.append(log_probabilities)
                after += now
                if weights is not None:
                    seen.append(weights.float())
            return _mean(found), after, torch.stack(seen).mean(dim=0) if seen else None

        context = tuple(part for one, _ in encoded for part in one)
        state = tuple(part for _, one in encoded for part in one)
        try:
            if decoding.method == "beam":
                return beam_search(
                    step,
                    context,
                    state,
                    rules,
                    beam=decoding.beam,
                    n_best=n_best,
                    attention=attention,
                    tree=tree,
                )
            return sample(
                step,
                context,
                state,
                rules,
                numbers=numbers,
                seed=decoding.seed,
                samples=n_best,
                temperature=decoding.temperature,
                top_k=decoding.top_k,
                top_p=decoding.top_p,
                attention=attention,
            )
        except FloatingPointError:
            raise _diverged() from None


def teacher_forced(
    models: Sequence[Translator], source: Tensor, lengths: Tensor, previous: Tensor, target: Tensor, real: Tensor
) -> Tensor:
    """source (B, S), lengths (B,), previous and target (B, T) → log-probabilities (N,) of the target at `real` (N,).

    Raises UserError where a model has diverged.
    """
    words = target.flatten().index_select(0, real)[:, None]
    found = []
    for model in models:
        with evaluation_mode(model):
            decoded, context = model(source, lengths, previous)
            # Of all words of the vocabulary for some rows at a time, which takes no more memory than training does.
            parts = zip(torch.split(real, ROWS_AT_ONCE), torch.split(words, ROWS_AT_ONCE), strict=True)
            own = [
                model.logits(decoded, context, at).float().log_softmax(dim=1).gather(1, wanted) for at, wanted in parts
            ]
            found.append(torch.cat(own))
    values = _mean(found)[:, 0]
    if values.isnan().any():
        raise _diverged()
    return values


def _diverged() -> UserError:
    return UserError("the model's output is not a number", hint="lower `--set optim.learning_rate=…` and train again")


def _mean(log_probabilities: list[Tensor]) -> Tensor:
    """The logarithm of the mean of probabilities given by their logarithms."""
    if len(log_probabilities) == 1:
        return log_probabilities[0]
    return torch.stack(log_probabilities).logsumexp(dim=0) - math.log(len(log_probabilities))
