"""Sampling against the exact distribution, which a table's few outputs have."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import BOS, EOS, Model, Sentence, random_table, random_weights, together

from dl7cli.sampling import sample
from dl7cli.search import Hypothesis, beam_search


def draw(
    sentences: Sequence[Sentence], samples: int = 1, *, numbers: Sequence[int] = (), seed: int = 1, **options: Any
) -> list[list[Hypothesis]]:
    context, state, rules = together(sentences)
    chosen = numbers or range(len(sentences))
    return sample(Model(), context, state, rules, numbers=chosen, seed=seed, samples=samples, **options)


def distribution(
    sentence: Sentence, temperature: float, top_k: int, top_p: float, begun: tuple[int, ...] = ()
) -> dict[tuple[int, ...], float]:
    """The probability of every output, by the definition of what is kept at each step."""
    row = sentence.table[(BOS, BOS, *begun)[-2:]].tolist()
    kept = {one: math.exp(row[one] / temperature) for one in sentence.ids if sentence.allowed(begun, one)}
    ranked = sorted(kept, key=lambda one: -kept[one])[: top_k or None]
    whole, together = sum(kept[one] for one in ranked), 0.0
    nucleus = []
    for one in ranked:
        if together < top_p:
            nucleus.append(one)
        together += kept[one] / whole
    whole = sum(kept[one] for one in nucleus)
    found: dict[tuple[int, ...], float] = {}
    for one in nucleus:
        rest = {begun: 1.0} if one == EOS else distribution(sentence, temperature, top_k, top_p, (*begun, one))
        found |= {ids: kept[one] / whole * probability for ids, probability in rest.items()}
    return found


@pytest.mark.parametrize(
    ("options", "rules"),
    [
        ({}, {}),
        ({"temperature": 0.6}, {"min_length": 1}),
        ({"temperature": 1.7, "top_k": 3}, {"no_repeat_ngram": 1}),
        ({"top_p": 0.7}, {"prefix": [3]}),
        ({"temperature": 1.5, "top_k": 4, "top_p": 0.8}, {"forbidden": [BOS]}),
    ],
)
def test_samples_have_the_exact_distribution(options: dict[str, Any], rules: dict[str, Any]) -> None:
    sentence = Sentence(random_table(5, 3) / 2, 3, **rules)
    arguments = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    expected = distribution(sentence, **arguments)
    assert sum(expected.values()) == pytest.approx(1)
    number = 20_000
    found = draw([sentence] * 10, number // 10, seed=7, **options)
    counts = Counter(one.ids for samples in found for one in samples)
    assert sum(counts.values()) == number
    assert set(counts) <= set(expected)
    # The probability that one of the outputs is five standard deviations off is below 1e-4.
    for ids, probability in expected.items():
        deviation = math.sqrt(number * probability * (1 - probability))
        assert abs(counts[ids] - number * probability) <= 5 * deviation + 5, ids


def many() -> list[Sentence]:
    return [
        Sentence(
            random_table(40, at) / 2,
            3 + at,
            no_repeat_ngram=2,
            coverage_penalty=0.3,
            length_penalty=0.6,
            prefix=[5] if at % 3 else [],
            weights=random_weights(40, 2, 3, at),
            source_length=2,
        )
        for at in range(15)
    ]


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    sentences, options = many(), {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "attention": False}
    together = draw(sentences, 3, **options)
    assert len({one.ids for found in together for one in found}) > 40
    assert [draw([one], 3, numbers=[at], **options)[0] for at, one in enumerate(sentences)] == together
    order = list(range(15))
    random.Random(1).shuffle(order)
    assert draw([sentences[at] for at in order], 3, numbers=order, **options) == [together[at] for at in order]
    assert [found[:1] for found in together] == draw(sentences, 1, **options), "the first of many is the only one"


def test_seeds_numbers_and_samples_differ() -> None:
    one = Sentence(random_table(40, 1) / 2, 20)
    first, second = draw([one, one], 2)
    other = draw([one], 2, seed=2)[0]
    assert len({found.ids for found in (*first, *second, *other)}) == 6


def test_the_most_probable_alone_is_greedy_search() -> None:
    sentences = many()
    context, state, rules = together(sentences)
    greedy = beam_search(Model(), context, state, rules, beam=1)
    assert draw(sentences, top_k=1, temperature=3.0) == greedy
    assert draw(sentences, top_p=1e-9) == greedy
    for temperature in (1e-3, 1e-308):
        assert draw(sentences, temperature=temperature) == greedy


@given(seed=st.integers(0, 2**31), temperature=st.sampled_from([0.5, 1.0, 2.0]), top_k=st.sampled_from([0, 5]))
@settings(max_examples=20)
def test_what_is_reported_is_the_models_own(seed: int, temperature: float, top_k: int) -> None:
    sentences = many()
    found = draw(sentences, 2, seed=seed, temperature=temperature, top_k=top_k, attention=True)
    for sentence, samples in zip(sentences, found, strict=True):
        assert len(samples) == 2
        for one in samples:
            assert all(sentence.allowed(one.ids[:at], following) for at, following in enumerate((*one.ids, EOS)))
            assert one.token_log_probabilities == tuple(sentence.steps(one.ids))
            assert one.log_probability == pytest.approx(math.fsum(one.token_log_probabilities))
            assert one.score == pytest.approx(sentence.score(one.log_probability, one.ids))
            assert one.attention is not None
            assert np.array_equal(one.attention, torch.stack(sentence.attention(one.ids)))


def test_where_nothing_is_possible_nothing_is_drawn() -> None:
    table = random_table(4, 1)
    dead_end = table.clone()
    dead_end[BOS, BOS] = -math.inf
    found = draw([Sentence(dead_end, 3), Sentence(table, 3)], 2)
    assert [len(samples) for samples in found] == [0, 2]


def test_nan_is_an_error_that_says_so() -> None:
    table = random_table(6, 1)
    table[BOS, BOS, 3] = math.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        draw([Sentence(table, 5)])


@pytest.mark.parametrize(
    "options", [{"samples": 0}, {"temperature": 0.0}, {"temperature": math.inf}, {"top_k": -1}, {"top_p": 0.0}]
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="samples and temperature must be above 0"):
        draw([Sentence(random_table(4, 1), 2)], **options)


def test_every_sentence_needs_a_number() -> None:
    with pytest.raises(ValueError, match="max_length has 1 sentences, numbers has 2"):
        draw([Sentence(random_table(4, 1), 2)], numbers=[1, 2])
