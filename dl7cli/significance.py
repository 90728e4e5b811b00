"""Whether a difference may be chance: the spread of several runs, and tests of one model against another.

Knows no run and no network: it gets counts, scores and texts.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

LEVEL = 0.05
"""A smaller p-value is called a difference; intervals are of 95 %."""
RESAMPLES = 1000
"""Of the sentences, for the paired bootstrap."""
SHUFFLES = 10_000
"""Of the sentences between two translators, for approximate randomisation."""
ROUNDING = 1e-9
"""In BLEU: what differs by less is the same."""


class Spread(NamedTuple):
    """What several runs come to."""

    mean: float
    deviation: float | None
    """Sample standard deviation, with n - 1; None for a single run."""
    interval: tuple[float, float] | None
    """The two ends of Student's 95 % interval of the mean; None for a single run."""


class Welch(NamedTuple):
    difference: float
    """Mean of the second sample less that of the first."""
    interval: tuple[float, float]
    """The two ends of its 95 % interval."""
    freedom: float
    """Degrees of freedom."""
    p_value: float


class PairedBleu(NamedTuple):
    """Whether a translator has another BLEU than a first one, by the same sentences."""

    difference: float
    """In BLEU, 0 to 100, the first one's subtracted."""
    randomisation: float
    """p-value of approximate randomisation."""
    bootstrap: float
    """p-value of the paired bootstrap."""
    signatures: tuple[str, str]
    """Of both tests, as sacrebleu writes them."""


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation and interval of scores that differ by chance alone, such as by the seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Spread(mean, None, None)
    deviation = statistics.stdev(values)
    half = t_quantile(len(values) - 1) * deviation / math.sqrt(len(values))
    return Spread(mean, deviation, (mean - half, mean + half))


def t_tails(t: float, freedom: float) -> float:
    """The probability that Student's t with so many degrees of freedom is beyond t or -t.

    `freedom` is 1 or more and need not be whole. The density is integrated from |t| on by the exp-sinh rule of
    Takahasi & Mori 1974, to twelve digits.
    """
    norm = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi * freedom) / 2
    step, total = 1 / 32, 0.0
    for number in range(-128, 129):
        beyond = math.exp(math.pi / 2 * math.sinh(number * step))
        width = beyond * math.pi / 2 * math.cosh(number * step) * step
        total += width * math.exp(norm - (freedom + 1) / 2 * math.log1p((abs(t) + beyond) ** 2 / freedom))
    return min(1.0, 2 * total)


def t_quantile(freedom: float) -> float:
    """The t beyond which, or beyond -t, Student's t is with probability `LEVEL`."""
    low, high = 1.0, 13.0  # normal: 1.96; one degree of freedom: 12.71
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_tails(middle, freedom) > LEVEL else (low, middle)
    return high


def welch(first: Sequence[float], second: Sequence[float]) -> Welch:
    """Welch's t-test (1947) of the means of two samples of two values or more, whose variances may differ.

    Where no value of either sample differs from its mean nothing says how far chance goes, and p is 1.
    """
    parts = [statistics.variance(sample) / len(sample) for sample in (first, second)]
    difference = statistics.fmean(second) - statistics.fmean(first)
    error = math.sqrt(sum(parts))
    if not error:
        return Welch(difference, (difference, difference), float(len(first) + len(second) - 2), 1.0)
    # Welch's equation (28), known as Satterthwaite's; by shares, so that no square underflows.
    shares = [part / sum(parts) for part in parts]
    freedom = 1 / sum(share**2 / (len(sample) - 1) for share, sample in zip(shares, (first, second), strict=True))
    half = t_quantile(freedom) * error
    return Welch(difference, (difference - half, difference + half), freedom, t_tails(difference / error, freedom))


def mcnemar(only_first: int, only_second: int) -> float:
    """p-value of McNemar's test (1947), in its exact form: the two-sided sign test.

    Of two classifiers of the same examples, `only_first` are right by the first alone and `only_second` by the second
    alone. Were both equally good, each of these would be one or the other with probability 1/2.
    """
    pairs, term, total = only_first + only_second, 1, 0
    for number in range(min(only_first, only_second) + 1):
        total += term  # term is "pairs over number"
        term = term * (pairs - number) // (number + 1)
    return min(1.0, 2 * total / (1 << pairs))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, raised so that all together err with probability `LEVEL` at most (Holm 1979)."""
    adjusted, greatest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        greatest = max(greatest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = greatest
    return adjusted


def paired_bleu(
    first: Sequence[str],
    others: Sequence[Sequence[str]],
    references: Sequence[str],
    *,
    cased: bool = True,
    tokenize: str = "13a",
) -> list[PairedBleu]:
    """Test each of `others` against `first`, translations of the same sentences, by sacrebleu's own paired tests.

    BLEU is that of `metrics.bleu`, by sacrebleu's tokenizer `tokenize`. Samples are drawn from a fixed seed, fewer of
    them where the sentences are so many that memory would not hold them. Paired bootstrap: Koehn 2004; approximate
    randomisation: Riezler & Maxwell 2005, who find that it takes chance for a difference less often.

    Of randomisation, sacrebleu counts the exchanges of sentences that differ by more than what was seen. Here those
    that differ by as much count, too, as the test demands: where few sentences differ, or many in the same way, they
    are most of them, and two translators that differ in one sentence would have p = 1/10,001. Likewise the bootstrap
    of two that have the same BLEU has p = 1.
    """
    from sacrebleu.metrics.bleu import BLEU, BLEUScore
    from sacrebleu.significance import PairedTest, Result

    class Noting(BLEU):
        """Notes the scores that sacrebleu's randomisation computes and does not return."""

        def __init__(self) -> None:
            # `force`: what it says of text that looks tokenised was said when it was scored.
            super().__init__(lowercase=not cased, tokenize=tokenize, force=True)
            self.noted: list[float] = []

        def _aggregate_and_compute(self, stats: list[list[int]]) -> BLEUScore:
            score = super()._aggregate_and_compute(stats)
            self.noted.append(score.score)
            return score

    def samples(wanted: int, most: int) -> int:
        return max(39, min(wanted, most // len(references)))  # 39: the fewest whose p can be below 0.05

    systems: list[tuple[str, Sequence[str]]] = [(str(number), texts) for number, texts in enumerate((first, *others))]
    bleu, shuffles = Noting(), samples(SHUFFLES, 100_000_000)
    signed, _ = PairedTest(systems, {"bleu": bleu}, [references], test_type="ar", n_samples=shuffles)()
    signatures = [str(signed["BLEU"])]
    # The score of the first translator; of each other one its own, those of all exchanges, and of these in reverse.
    baseline, each = bleu.noted[0], 1 + 2 * shuffles
    tested = [bleu.noted[start : start + each] for start in range(1, len(bleu.noted), each)]
    resamples = samples(RESAMPLES, 10_000_000)
    signed, results = PairedTest(systems, {"bleu": Noting()}, [references], test_type="bs", n_samples=resamples)()
    signatures.append(str(signed["BLEU"]))
    resampled = [result for result in results["BLEU"][1:] if isinstance(result, Result)]
    pairs = []
    for (score, *shuffled), result in zip(tested, resampled, strict=True):
        assert result.p_value is not None
        difference = score - baseline
        exchanged = zip(shuffled[:shuffles], shuffled[shuffles:], strict=True)
        as_far = sum(abs(one - other) >= abs(difference) - ROUNDING for one, other in exchanged)
        pairs.append(
            PairedBleu(
                difference=difference,
                randomisation=(as_far + 1) / (shuffles + 1),
                bootstrap=result.p_value if difference else 1.0,
                signatures=(signatures[0], signatures[1]),
            )
        )
    return pairs
