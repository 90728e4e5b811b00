"""Random segmentations against the probabilities of every one of them, worked out from the papers' definitions."""

import itertools
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dl7cli.data.segmentation import BPEDropout, UnigramSampling
from dl7cli.data.vocabulary import UNKNOWN, Subwords, Vocabulary

DRAWS = 20_000
SCORES = {"a": -2.0, "b": -2.5, "c": -3.0, "ab": -1.5, "bc": -2.2, "abc": -4.0, "ca": -3.5, "cab": -5.0}
RANKS = {"a": -9.0, "b": -9.0, "c": -9.0, "ab": 0.0, "bc": -1.0, "ca": -2.0, "abc": -3.0, "abca": -4.0}
LINES = [
    "Ein Mann mit einem grünen Hut, der über die Straße läuft.",
    "A man in a green hat is running across the street.",
    "Zwei Hunde spielen im Schnee.",
    "Two dogs play in the snow!",
] * 5
LETTERS = sorted({letter for line in LINES for letter in line})


def segmentations(word: str) -> Iterator[tuple[str, ...]]:
    if not word:
        yield ()
    for end in range(1, len(word) + 1):
        if word[:end] in SCORES:
            yield from ((word[:end], *rest) for rest in segmentations(word[end:]))


def algorithm_1(pieces: tuple[str, ...], probability: float) -> Counter[tuple[str, ...]]:
    """The probability of every outcome: at each step every set of merges may be what is left out."""
    merges = [at for at in range(len(pieces) - 1) if pieces[at] + pieces[at + 1] in RANKS]
    outcomes: Counter[tuple[str, ...]] = Counter()
    for left in itertools.product([False, True], repeat=len(merges)):
        share = math.prod(1 - probability if stays else probability for stays in left)
        possible = [at for at, stays in zip(merges, left, strict=True) if stays]
        if not possible:
            outcomes[pieces] += share  # type: ignore[assignment]
            continue
        at = max(possible, key=lambda at: (RANKS[pieces[at] + pieces[at + 1]], -at))
        after = (*pieces[:at], pieces[at] + pieces[at + 1], *pieces[at + 2 :])
        for outcome, part in algorithm_1(after, probability).items():
            outcomes[outcome] += share * part  # type: ignore[assignment]
    return outcomes


def assert_drawn_from(expected: dict[tuple[str, ...], float], drawn: Counter[tuple[str, ...]]) -> None:
    assert set(drawn) <= set(expected)
    assert sum(expected.values()) == pytest.approx(1)
    for outcome, share in expected.items():
        deviation = math.sqrt(DRAWS * share * (1 - share))
        assert abs(drawn[outcome] - DRAWS * share) <= 4.5 * deviation, outcome


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 3.0])
def test_unigram_draws_by_the_power_of_the_probability(alpha: float) -> None:
    word = "abcabc"
    weights = {found: math.exp(alpha * sum(SCORES[piece] for piece in found)) for found in segmentations(word)}
    assert len(weights) > 15
    sampling, random = UnigramSampling(SCORES, alpha), Random(1)
    drawn = Counter(tuple(sampling.sample(word, random)) for _ in range(DRAWS))
    assert_drawn_from({found: weight / sum(weights.values()) for found, weight in weights.items()}, drawn)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_bpe_dropout_is_algorithm_1(probability: float) -> None:
    expected = algorithm_1(tuple("abcabc"), probability)
    assert len(expected) > 8
    dropout, random = BPEDropout(RANKS, probability), Random(2)
    assert_drawn_from(expected, Counter(tuple(dropout.sample("abcabc", random)) for _ in range(DRAWS)))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def learnt(request: pytest.FixtureRequest) -> tuple[str, Subwords]:
    vocabulary = Vocabulary.train(LINES, 120, request.param)
    assert isinstance(vocabulary, Subwords)
    return request.param, vocabulary


@given(text=st.text(alphabet=LETTERS, max_size=60))
def test_without_chance_it_is_the_segmentation_of_sentencepiece(learnt: tuple[str, Subwords], text: str) -> None:
    kind, vocabulary = learnt
    random = Random(0)
    expected = vocabulary.encode(text)
    if kind == "bpe":
        assert vocabulary.sampler(kind, 0.0)(text, random) == expected
    else:  # of equally probable ones it may be another
        found = vocabulary.sampler(kind, 1e5)(text, random)
        scores = [sum(map(vocabulary._processor.get_score, ids)) for ids in (found, expected)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-3)


@given(text=st.text(max_size=60).filter(lambda text: "▁" not in text), seed=st.integers(0, 99))
def test_what_is_drawn_is_the_same_text(learnt: tuple[str, Subwords], text: str, seed: int) -> None:
    kind, vocabulary = learnt
    ids = vocabulary.sampler(kind, 0.3)(text, Random(seed))
    assert vocabulary.decode(ids) == "".join(letter if letter in LETTERS else "�" for letter in text)
    assert all(UNKNOWN <= one < len(vocabulary) for one in ids)


def test_all_merges_left_out_leave_letters() -> None:
    vocabulary = Vocabulary.train(LINES, 120, "bpe")
    assert isinstance(vocabulary, Subwords)
    assert vocabulary.pieces(vocabulary.sampler("bpe", 1.0)("Hut mit", Random(0))) == list("▁Hut▁mit")


def test_sentences_are_cut_in_ever_new_ways(learnt: tuple[str, Subwords]) -> None:
    kind, vocabulary = learnt
    sample, random = vocabulary.sampler(kind, 0.2), Random(0)
    assert len({tuple(sample(LINES[0], random)) for _ in range(50)}) > 40


def test_a_long_word_is_drawn_too() -> None:
    word = "abc" * 100
    for sampling in (UnigramSampling(SCORES, 1.0), BPEDropout({**RANKS, "aa": -5.0}, 0.9)):
        assert "".join(sampling.sample(word, Random(0))) == word


def test_every_process_draws_the_same() -> None:
    program = (
        "from random import Random; from dl7cli.data.segmentation import *; random = Random('1 2 3');"
        f"samplers = UnigramSampling({SCORES}, 0.5), BPEDropout({RANKS}, 0.3);"
        "print([list(one.sample('abcabc', random)) for one in samplers for _ in range(20)])"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    random = Random("1 2 3")
    samplers = UnigramSampling(SCORES, 0.5), BPEDropout(RANKS, 0.3)
    assert found == {f"{[list(one.sample('abcabc', random)) for one in samplers for _ in range(20)]}\n"}
