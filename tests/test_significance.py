"""Spreads and tests against printed tables, published examples, whole enumerations and sacrebleu's own command."""

import itertools
import json
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from sacrebleu.metrics.bleu import BLEU

from dl7cli.significance import LEVEL, holm, mcnemar, paired_bleu, spread, t_quantile, t_tails, welch

TABLE = {
    **{1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228},
    **{15: 2.131, 20: 2.086, 29: 2.045, 30: 2.042, 40: 2.021, 60: 2.000, 120: 1.980},
}
"""Of Student's t, as printed in any book: the value that is exceeded on either side with probability 0.05."""


@pytest.mark.parametrize("freedom", TABLE)
def test_the_quantile_is_that_of_the_tables(freedom: int) -> None:
    assert round(t_quantile(freedom), 3) == TABLE[freedom]


def finite_series(t: float, freedom: int) -> float:
    """The same probability by Abramowitz & Stegun 26.7.3 and 26.7.4, for whole degrees of freedom."""
    angle = math.atan(t / math.sqrt(freedom))
    term = math.cos(angle) if freedom % 2 else 1.0
    total = 0.0
    for number in range(1 + freedom % 2, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * number / (number + 1)
    if freedom % 2:
        return 1 - 2 / math.pi * (angle + math.sin(angle) * total)
    return 1 - math.sin(angle) * total


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 10, 31])
def test_the_tails_are_those_of_the_finite_series(freedom: int) -> None:
    for t in (0.0, 0.01, 0.5, 1.0, 2.0, 5.0, 20.0):
        assert t_tails(t, freedom) == pytest.approx(finite_series(t, freedom), abs=1e-13)
        assert t_tails(-t, freedom) == t_tails(t, freedom)


def test_the_tails_between_and_beyond_whole_degrees() -> None:
    for t in (0.5, 2.0, 9.0):
        found = [t_tails(t, freedom) for freedom in (2, 2.25, 2.5, 2.75, 3)]
        assert found == sorted(found, reverse=True)
    assert t_tails(1e6, 1) == pytest.approx(2 / math.pi * math.atan(1e-6), rel=1e-11), "far out, with many digits"
    for t in (1.0, 4.0, 8.0):
        assert t_tails(t, 1e9) == pytest.approx(math.erfc(t / math.sqrt(2)), rel=1e-6), "in the end it is the normal"


def test_the_spread_worked_out_by_hand() -> None:
    mean, deviation, interval = spread([0.91, 0.92, 0.915, 0.925, 0.93])
    # The deviations are 10, 0, 5, 5, 10 thousandths: a sum of squares of 250.
    assert mean == pytest.approx(0.92)
    assert deviation == pytest.approx(math.sqrt(62.5e-6))
    half = 2.776445105 * math.sqrt(62.5e-6 / 5)
    assert interval == pytest.approx((0.92 - half, 0.92 + half), abs=1e-9)
    assert spread([0.5]) == (0.5, None, None), "one value has no spread"
    assert spread([0.5, 0.5]) == (0.5, 0.0, (0.5, 0.5))


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    """Three values at a time, of which the usual 1.96 standard errors would hold the mean 81 times in 100."""
    draws, size, times = random.Random(0), 3, 4000
    quantile = t_quantile(size - 1)
    held = 0
    for _ in range(times):
        values = [draws.gauss() for _ in range(size)]
        held += abs(statistics.fmean(values)) <= quantile * statistics.stdev(values) / math.sqrt(size)
    assert abs(held / times - 0.95) < 4 * math.sqrt(0.95 * 0.05 / times)


# Published with degrees of freedom and p-values, as examples of Welch's test (unequal variances and sizes).
WELCH = [
    (
        [27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4],
        [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 20.5, 24.4],
        (25.0, 0.021),
    ),
    (
        [17.2, 20.9, 22.6, 18.1, 21.7, 21.4, 23.5, 24.2, 14.7, 21.8],
        [
            *(21.5, 22.8, 21.0, 23.0, 21.6, 23.6, 22.5, 20.7, 23.4, 21.8),
            *(20.7, 21.7, 21.5, 22.5, 23.6, 21.5, 22.5, 23.5, 21.5, 21.8),
        ],
        (9.9, 0.149),
    ),
    (
        [19.8, 20.4, 19.6, 17.8, 18.5, 18.9, 18.3, 18.9, 19.5, 22.0],
        [
            *(28.2, 26.6, 20.1, 23.3, 25.2, 22.1, 17.7, 27.6, 20.6, 13.7),
            *(23.2, 17.5, 20.6, 18.0, 23.9, 21.6, 24.3, 20.4, 24.0, 13.2),
        ],
        (24.5, 0.036),
    ),
]


@pytest.mark.parametrize(("first", "second", "published"), WELCH)
def test_welch_as_published(first: list[float], second: list[float], published: tuple[float, float]) -> None:
    found = welch(first, second)
    assert (round(found.freedom, 1), round(found.p_value, 3)) == published
    assert found.difference == pytest.approx(statistics.fmean(second) - statistics.fmean(first))
    low, high = found.interval
    assert (low > 0) == (found.p_value < LEVEL), "the interval leaves zero out where p is below the level"
    assert (low + high) / 2 == pytest.approx(found.difference)
    other = welch(second, first)
    assert (other.difference, other.p_value) == (-found.difference, found.p_value)


def test_welch_of_like_samples_is_students() -> None:
    """Sizes and variances are equal: the pooled test has 2n - 2 degrees of freedom, and t can be worked out by hand."""
    found = welch([1.0, 2.0, 3.0], [3.0, 4.0, 5.0])
    assert found.freedom == pytest.approx(4)
    assert found.p_value == pytest.approx(finite_series(2 / math.sqrt(1 / 3 + 1 / 3), 4), abs=1e-12)


def test_welch_without_any_spread_shows_nothing() -> None:
    for second in ([0.9, 0.9], [0.8, 0.8]):
        assert welch([0.9, 0.9], second).p_value == 1
    assert welch([0.9, 0.9], [0.8, 0.8]).difference == pytest.approx(-0.1)
    assert welch([0.9, 0.9], [0.8, 0.81]).freedom == pytest.approx(1), "the one that varies counts"


def test_mcnemar_is_the_share_of_all_outcomes_as_uneven() -> None:
    for pairs in range(12):
        heads = [sum(coins) for coins in itertools.product((0, 1), repeat=pairs)]
        for only_first in range(pairs + 1):
            uneven = abs(2 * only_first - pairs)
            expected = sum(abs(2 * count - pairs) >= uneven for count in heads) / len(heads)
            assert mcnemar(only_first, pairs - only_first) == expected


def test_mcnemar_worked_out_by_hand_and_of_many() -> None:
    assert mcnemar(11, 1) == 2 * (1 + 12) / 2**12
    assert mcnemar(0, 0) == 1
    # With continuity correction χ² is (|25 - 15| - 1)²/40 = 2.025, whose p is 0.1547 (Raschka 2018, §4).
    assert mcnemar(25, 15) == pytest.approx(math.erfc(math.sqrt(2.025 / 2)), abs=2e-3)
    assert mcnemar(5100, 4900) == pytest.approx(math.erfc(199 / math.sqrt(2 * 10_000)), abs=1e-4)
    assert 0 <= mcnemar(10_000, 0) < 1e-300


def test_holm_as_published() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4]) == [0.4]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_refuses_what_its_steps_refuse() -> None:
    """Step by step: the least p against level/m, the next against level/(m-1), up to the first that is not below."""
    draws = random.Random(1)
    for _ in range(200):
        values = [draws.random() ** 3 for _ in range(draws.randint(1, 6))]
        refused = set()
        for rank, at in enumerate(sorted(range(len(values)), key=values.__getitem__)):
            if values[at] >= LEVEL / (len(values) - rank):
                break
            refused.add(at)
        assert {at for at, value in enumerate(holm(values)) if value < LEVEL} == refused


# Translations

WORDS = ["der", "Hund", "die", "Katze", "läuft", "schläft", "schnell", "heute", "im", "Garten", "unter", "dem", "Baum"]


def sentences(count: int, seed: int) -> list[str]:
    draws = random.Random(seed)
    return [" ".join(draws.choices(WORDS, k=draws.randint(5, 9))) for _ in range(count)]


def spoilt(texts: Sequence[str], often: float, seed: int) -> list[str]:
    """Some of the words replaced."""
    draws = random.Random(seed)
    return [
        " ".join(draws.choice(WORDS) if draws.random() < often else word for word in text.split()) for text in texts
    ]


def test_the_paired_tests_are_those_of_the_command_line(tmp_path: Path) -> None:
    references = sentences(40, 0)
    systems = [spoilt(references, often, seed) for often, seed in ((0.3, 1), (0.25, 2), (0.1, 3))]
    names = []
    for name, texts in zip(("ref", "a", "b", "c"), (references, *systems), strict=True):
        (tmp_path / name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        names.append(str(tmp_path / name))
    found = paired_bleu(systems[0], systems[1:], references)
    # The command leaves out the exchanges that differ by as much as what was seen, of which there are some.
    for flag, tested, ties in (("--paired-ar", "randomisation", 1e-3), ("--paired-bs", "bootstrap", 0)):
        command = [sys.executable, "-m", "sacrebleu", names[0], "-i", *names[1:], flag, "--format", "json", "-w", "6"]
        done = subprocess.run(command, capture_output=True, check=True, text=True)
        baseline, *others = (entry["BLEU"] for entry in json.loads(done.stdout))
        for one, its in zip(found, others, strict=True):
            assert -1e-6 <= getattr(one, tested) - its["p_value"] <= ties + 1e-6
            assert one.difference == pytest.approx(its["score"] - baseline["score"], abs=1e-5)
    assert "|ar:10000|seed:12345|case:mixed|" in found[0].signatures[0]
    assert "|bs:1000|seed:12345|case:mixed|" in found[0].signatures[1]


def test_randomisation_is_the_share_of_all_exchanges_that_differ_as_much() -> None:
    references = sentences(8, 4)
    first, second = spoilt(references, 0.5, 5), spoilt(references, 0.3, 6)
    bleu = BLEU()

    def difference(exchanged: Sequence[bool]) -> float:
        one = [b if swap else a for a, b, swap in zip(first, second, exchanged, strict=True)]
        other = [a if swap else b for a, b, swap in zip(first, second, exchanged, strict=True)]
        return bleu.corpus_score(other, [references]).score - bleu.corpus_score(one, [references]).score

    every = [difference(exchanged) for exchanged in itertools.product((False, True), repeat=len(references))]
    exact = sum(abs(one) >= abs(every[0]) - 1e-9 for one in every) / len(every)
    assert 0.01 < exact < 0.9, "or it would be no test"
    (found,) = paired_bleu(first, [second], references)
    assert found.difference == pytest.approx(every[0])
    assert found.randomisation == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 10_000))


def test_without_case_capitals_make_no_difference() -> None:
    references = sentences(30, 7)
    first = spoilt(references, 0.3, 8)
    (cased,) = paired_bleu(first, [[text.upper() for text in first]], references)
    (found,) = paired_bleu(first, [[text.upper() for text in first]], references, cased=False)
    assert cased.difference < -5
    assert (found.difference, found.bootstrap, found.randomisation) == (0, 1, 1)
    assert all("|case:lc|" in signature for signature in found.signatures)


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_few_sentences_that_differ_show_no_difference(count: int) -> None:
    """All exchanges that there are, of which sacrebleu leaves out those that differ by as much as what was seen."""
    references = sentences(30, 7)
    first = spoilt(references, 0.3, 8)
    second = [*references[:count], *first[count:]]
    assert sum(one != other for one, other in zip(first, second, strict=True)) == count
    second[-1] += " "  # another text, the same words
    (found,) = paired_bleu(first, [second], references)
    share = min(1, 2 / 2**count)
    chance = 5 * math.sqrt(share * (1 - share) / 10_000) + 1e-4
    assert found.randomisation == pytest.approx(share, abs=chance), "every sentence became better"
    assert found.bootstrap > 0.005
    if not count:
        assert (found.difference, found.bootstrap) == (0, 1)


def test_sentences_that_differ_in_the_same_way_are_as_many_coins() -> None:
    """Seven became better and one worse, each by the same word: by the sign test no difference, and none of BLEU."""
    references = [f"a b c d e f g h {number}" for number in range(60)]
    worse = [text.replace("d", "x") for text in references]
    first = [*worse[:7], references[7], *worse[8:]]
    second = [*references[:7], *worse[7:]]
    (found,) = paired_bleu(first, [second], references)
    exact = mcnemar(1, 7)
    assert exact == 2 * (1 + 8) / 2**8 > LEVEL
    assert found.randomisation == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 10_000))
