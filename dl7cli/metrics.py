"""What a model is judged by: accuracy and what explains it, BLEU and its like with what makes them comparable."""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dl7cli.letters import MARKS

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric, Score

CALIBRATION_BINS = 15
"""Of equal width, as in table 1 of Guo et al. 2017."""
SOURCE_WORDS = (5, 10, 15, 20, 30, 50)
"""Most words of a source in each of the groups whose BLEU is given; longer ones are the last group."""
RESAMPLES = 1000
"""Of the sentences, for an interval; fewer where the sentences are so many that memory would not hold them."""
_CHINESE = frozenset({"zh", "zho", "cmn", "yue", "cn", "chinese", "mandarin", "cantonese"})
_JAPANESE = frozenset({"ja", "jpn", "jp", "japanese"})
_SOUTH_EAST_ASIAN = frozenset(
    {"th", "tha", "thai", "lo", "lao", "km", "khm", "khmer", "my", "mya", "burmese", "myanmar"}
)
"""Other languages whose words have no spaces between them. All are codes of ISO 639-1 and 639-3, and what else columns
and files in these languages are called.
"""
_UNSPACED = r"\u3041-\u3096\u30a1-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
"""Kana and Chinese characters."""
_WORD = re.compile(rf"[{_UNSPACED}]|(?:[^\W_{_UNSPACED}][{MARKS}]*)+")
TER_WORDS = 30
"""Most words a reference may have, on average, for TER: looking for what was moved takes an hour in 1,000 summaries."""


@dataclass(frozen=True)
class Scores:
    """The result of one evaluation; of every value, higher is better.

    `details` are what else there is to read: numbers of which lower is better, intervals and tables. They are plain
    JSON, and nothing is chosen by them.
    """

    primary: str  # the key of `values` by which models are compared
    # `accuracy` and `top_5_accuracy` as fractions; `bleu`, `bleu_lowercase`, `chrf`, `chrf_lowercase`, `rouge_1`,
    # `rouge_2` and `rouge_l` from 0 to 100; `log_likelihood`, of a subword in nats, at most 0
    values: dict[str, float]
    examples: int
    signature: str | None = None  # of BLEU, as sacrebleu writes it
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The primary value."""
        return self.values[self.primary]


def accuracy(logits: Tensor, labels: Tensor) -> Scores:
    """Give the fraction of rows of `logits` (N, classes) whose greatest entry is at `labels` (N,).

    With more than five classes also `top_5_accuracy`, the fraction whose label is among the five greatest; of five
    or fewer it is always. Among equal entries the first counts. A row that holds a NaN is wrong, whatever
    its label. Raises ValueError for shapes that do not fit and when there is nothing to score.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit together")
    if not len(labels):
        raise ValueError("accuracy of no examples")
    values = {"accuracy": int(among_first(logits, labels, 1).sum()) / len(labels)}
    if logits.shape[1] > 5:
        values["top_5_accuracy"] = int(among_first(logits, labels, 5).sum()) / len(labels)
    return Scores("accuracy", values, len(labels))


def among_first(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Tell for each row of `logits` (N, classes) whether its label is among the `count` greatest entries: (N,) bool.

    Among equal entries the first counts; a row that holds a NaN is wrong.
    """
    own = logits.gather(1, labels[:, None])
    # Entries that come before the label's: not `topk`, which leaves open which of equal entries it takes.
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
    return (rank < count) & ~logits.isnan().any(dim=1)


def classification(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> Scores:
    """Give the accuracy of `logits` (N, classes) for `labels` (N,) as `accuracy` does, with these details.

    - `accuracy_interval`: the two ends of the 95 % Wilson score interval.
    - `negative_log_likelihood`: of the labels, in nats, the mean; null where it is not finite.
    - `expected_calibration_error`: see that function, with `CALIBRATION_BINS` bins; null where a row has no softmax.
    - `classes`: of each its name as `class`, its `examples`, and its `accuracy`, null where it has no example.
    - `confusion`: how many examples of class i were taken for class j, by row i and column j in the order of
      `classes`. Rows that hold a NaN were taken for nothing and are counted in `examples` only.

    Raises as `accuracy`.
    """
    # Where the arithmetic is exact enough whatever the device: some have no float64.
    logits, labels = logits.cpu().double(), labels.cpu()
    scores = accuracy(logits, labels)
    log_probabilities = logits.log_softmax(dim=1)
    likelihood = float(log_probabilities.gather(1, labels[:, None]).mean())
    predicted = logits.argmax(dim=1)
    confidence = log_probabilities.exp().amax(dim=1)
    calibration = expected_calibration_error(confidence, predicted == labels, CALIBRATION_BINS)
    valid = ~logits.isnan().any(dim=1)
    size = len(classes)
    confusion = torch.bincount(labels[valid] * size + predicted[valid], minlength=size * size).view(size, size)
    counts = torch.bincount(labels, minlength=size).tolist()
    right = confusion.diagonal().tolist()
    details = {
        "accuracy_interval": list(wilson_interval(sum(right), scores.examples)),
        "negative_log_likelihood": -likelihood if math.isfinite(likelihood) else None,
        "expected_calibration_error": calibration if math.isfinite(calibration) else None,
        "classes": [
            {"class": name, "examples": count, "accuracy": hits / count if count else None}
            for name, count, hits in zip(classes, counts, right, strict=True)
        ],
        "confusion": confusion.tolist(),
    }
    return Scores(scores.primary, scores.values, scores.examples, details=details)


def wilson_interval(right: int, examples: int) -> tuple[float, float]:
    """Give the 95 % score interval of a share, `right` of `examples` (Wilson 1927).

    Unlike the usual p ± 1.96·√(p(1-p)/n) it keeps what it promises near 0 and 1, where good classifiers are.
    """
    z = 1.959963984540054  # the normal distribution's quantile of 0.975
    share = right / examples
    centre = (share + z * z / (2 * examples)) / (1 + z * z / examples)
    half = z / (1 + z * z / examples) * math.sqrt(share * (1 - share) / examples + (z / (2 * examples)) ** 2)
    # At the ends both are equal, but for rounding.
    return (centre - half if right else 0.0), (centre + half if right < examples else 1.0)


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int) -> float:
    """Give by how much confidence and accuracy differ, weighted over bins of equal width (Guo et al. 2017, eq. 3).

    confidence (N,) float64, each the greatest probability of its row; correct (N,) bool. Bin m of M holds what is in
    ((m-1)/M, m/M], as there. NaN where a confidence is.
    """
    edges = torch.arange(1, bins, dtype=torch.float64) / bins
    number = torch.bucketize(confidence, edges)
    # |B|/n · |acc - conf| is the sum over the bin of (correct - confidence), as a magnitude, through n.
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, number, correct.double() - confidence)
    return float(gaps.abs().sum()) / len(confidence)


def bleu(
    hypotheses: Sequence[str], references: Sequence[str], *, cased: bool = True, language: str | None = None
) -> Scores:
    """Give the BLEU of a corpus, 0 to 100, as the `sacrebleu` command computes it (Post 2018).

    Tokenised by sacrebleu itself as `tokenizer` says, one reference for each hypothesis; as `bleu`, or not `cased` as
    `bleu_lowercase`. Both are plain text: the pieces of a vocabulary have to be joined before. Raises ValueError for
    unequal numbers and when there is nothing to score.
    """
    from sacrebleu.metrics.bleu import BLEU

    name = "bleu" if cased else "bleu_lowercase"
    metric = BLEU(lowercase=not cased, tokenize=tokenizer(language))
    score, signature = _corpus(metric, hypotheses, references)
    return Scores(name, {name: score.score}, len(hypotheses), signature)


def tokenizer(language: str | None) -> str:
    """Give the name of sacrebleu's tokenizer for a language such as `de` or `zh_CN`.

    It is 13a, the one for Chinese, or where words of another language have no spaces between them single characters:
    what sacrebleu has for those needs a dictionary or a model.
    """
    code = _code(language)
    return "zh" if code in _CHINESE else "char" if code in _JAPANESE | _SOUTH_EAST_ASIAN else "13a"


def words(text: str, language: str | None) -> list[str]:
    """Give the words of a text in a language: what lies between spaces.

    Where there are none: of Chinese and Japanese as `rouge` takes them, of others single characters.
    """
    code = _code(language)
    if code in _CHINESE | _JAPANESE:
        return _WORD.findall(text)
    return [one for one in text if not one.isspace()] if code in _SOUTH_EAST_ASIAN else text.split()


def _code(language: str | None) -> str:
    return re.split("[-_]", (language or "").lower())[0]


def chrf(hypotheses: Sequence[str], references: Sequence[str], *, cased: bool = True) -> Scores:
    """Give the chrF2 of a corpus, 0 to 100 (Popović 2015), as the `sacrebleu` command computes it. Raises as `bleu`.

    It is `chrf`, or not `cased` `chrf_lowercase`.
    """
    from sacrebleu.metrics.chrf import CHRF

    name = "chrf" if cased else "chrf_lowercase"
    score, signature = _corpus(CHRF(lowercase=not cased), hypotheses, references)
    return Scores(name, {name: score.score}, len(hypotheses), signature)


def translation(
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    cased: bool = True,
    language: str | None = None,
    source_language: str | None = None,
    with_rouge: bool = False,
) -> Scores:
    """Give the BLEU of translations from and into a language as `bleu` does, beside it that with or without case,
    whichever it is not, and chrF as `chrf` does; and `rouge` where asked for.

    These are the details, with case where BLEU is `cased`, but for TER, which never is:

    - `ter`: translation edit rate (Snover et al. 2006) in percent; lower is better. Of Chinese and Japanese with
      Tercom's normalisation, which parts Chinese characters and leaves a run of kana one word. Null where the
      references have more than `TER_WORDS` `words` on average, and in other languages without spaces.
    - `bleu_interval`: the two ends of sacrebleu's 95 % bootstrap interval (Koehn 2004), from a fixed seed.
    - `length_ratio`: tokens of the hypotheses through those of the references. `brevity_penalty`: what BLEU was
      multiplied by, 1 where the hypotheses are not the shorter ones.
    - `signatures`: of all these, as sacrebleu writes them, by the names they have in scores and details.
    - `source_lengths`: of each group of sources of like length its least and greatest number of `words` as
      `from` and `to`, null for no greatest; how many `sentences` it has, and as `bleu` their corpus BLEU, with case or
      without like the whole. Groups without a sentence are left out.
    - `repetition`: the translation that most sentences got as `most_frequent`, and how many as `times`; how many
      translations are `looping`: they have three `words` in a row three times or more; and how many are `copied`: their
      source, but for case, though the reference is not. All are signs of a model that has learnt too little, which
      BLEU does not tell from one that errs now and then.

    Raises as `bleu`.
    """
    from sacrebleu.metrics.bleu import BLEU, BLEUScore
    from sacrebleu.metrics.ter import TER

    resamples = max(39, min(RESAMPLES, 10_000_000 // max(len(hypotheses), 1)))  # 39: the fewest that have a 40th
    names = ("bleu", "bleu_lowercase") if cased else ("bleu_lowercase", "bleu")
    tokenize = tokenizer(language)
    main, signature = _corpus(BLEU(lowercase=not cased, tokenize=tokenize), hypotheses, references)
    assert isinstance(main, BLEUScore)
    # `force`: what sacrebleu says of text that looks tokenised is said once.
    quiet = BLEU(lowercase=not cased, tokenize=tokenize, force=True)
    resampled, interval = _corpus(quiet, hypotheses, references, resamples)
    turned = BLEU(lowercase=cased, tokenize=tokenize, force=True)
    other, other_signature = _corpus(turned, hypotheses, references)
    characters = chrf(hypotheses, references, cased=cased)
    code = _code(language)
    unspaced = code in _CHINESE | _JAPANESE
    short = sum(len(words(reference, language)) for reference in references) <= TER_WORDS * len(references)
    edits, ter_signature = None, None
    if short and code not in _SOUTH_EAST_ASIAN:
        metric = TER(normalized=unspaced, asian_support=unspaced)
        edits, ter_signature = _corpus(metric, hypotheses, references)
    values = {names[0]: main.score, names[1]: other.score, **characters.values}
    details = {
        "ter": None if edits is None else edits.score,
        "bleu_interval": _interval(resampled, interval),
        "length_ratio": main.ratio,
        "brevity_penalty": main.bp,
        "signatures": {
            names[0]: signature,
            "bleu_interval": interval,
            names[1]: other_signature,
            characters.primary: characters.signature,
            "ter": ter_signature,
        },
        "source_lengths": _by_source_length(
            [len(words(source, source_language)) for source in sources], hypotheses, references, quiet
        ),
        "repetition": _repetition(sources, hypotheses, references, language),
    }
    if with_rouge:
        values |= rouge(hypotheses, references, language)
    return Scores(names[0], values, len(hypotheses), signature, details)


def _corpus(
    metric: "Metric", hypotheses: Sequence[str], references: Sequence[str], resamples: int = 1
) -> "tuple[Score, str]":
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses but {len(references)} references")
    if not hypotheses:
        raise ValueError(f"{type(metric).__name__} of no sentences")
    score: Score = metric.corpus_score(hypotheses, [references], n_bootstrap=resamples)
    return score, str(metric.get_signature())


def _interval(score: "Score", signature: str) -> list[float]:
    # The numbers are public in what is printed alone; a score of 0 has none.
    printed = json.loads(score.format(width=12, signature=signature, is_json=True))
    mean, half = printed.get("confidence_mean", 0.0), printed.get("confidence_var", 0.0)
    return [max(0.0, mean - half), min(100.0, mean + half)]


def _by_source_length(
    lengths: Sequence[int], hypotheses: Sequence[str], references: Sequence[str], metric: "Metric"
) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []
    for least, most in zip((0, *(end + 1 for end in SOURCE_WORDS)), (*SOURCE_WORDS, None), strict=True):
        chosen = [at for at, count in enumerate(lengths) if count >= least and (most is None or count <= most)]
        if chosen:
            score, _ = _corpus(metric, [hypotheses[at] for at in chosen], [references[at] for at in chosen])
            groups.append({"from": least, "to": most, "sentences": len(chosen), "bleu": score.score})
    return groups


def rouge(hypotheses: Sequence[str], references: Sequence[str], language: str | None = None) -> dict[str, float]:
    """Give `rouge_1`, `rouge_2` and `rouge_l`, 0 to 100: the means over all pairs of their F1 (Lin 2004, §2 and §3).

    ROUGE-N counts the n-grams two texts share, ROUGE-L the words of their longest common subsequence, each text taken
    as one sequence. Words are runs of letters and digits in lower case, not stemmed; of Chinese, Japanese and the
    languages that `words` knows besides, which do not part them, single characters. A text without any scores 0.
    """
    sums = {"rouge_1": 0.0, "rouge_2": 0.0, "rouge_l": 0.0}
    by_character = _code(language) in _SOUTH_EAST_ASIAN
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        # One accent may be written in two ways.
        texts = [unicodedata.normalize("NFC", text.lower()) for text in (hypothesis, reference)]
        own, wanted = (words(text, language) if by_character else _WORD.findall(text) for text in texts)
        for name, size in (("rouge_1", 1), ("rouge_2", 2)):
            found, sought = (
                Counter(tuple(text[at : at + size]) for at in range(len(text) - size + 1)) for text in (own, wanted)
            )
            sums[name] += _f1((found & sought).total(), found.total(), sought.total())
        sums["rouge_l"] += _f1(_common_subsequence(own, wanted), len(own), len(wanted))
    return {name: 100 * value / len(hypotheses) for name, value in sums.items()}


def _repetition(
    sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], language: str | None
) -> dict[str, Any]:
    [(text, times)] = Counter(hypotheses).most_common(1)
    looping = 0
    for hypothesis in hypotheses:
        # Where words are single letters, three of them are the same in many a sentence.
        written = hypothesis.split() if _code(language) in _SOUTH_EAST_ASIAN else words(hypothesis, language)
        trigrams = Counter(zip(written, written[1:], written[2:], strict=False))
        looping += max(trigrams.values(), default=0) >= 3
    texts = zip(*([text.casefold() for text in side] for side in (sources, hypotheses, references)), strict=True)
    copied = sum(source == hypothesis != reference for source, hypothesis, reference in texts)
    return {"most_frequent": text, "times": times, "looping": looping, "copied": copied}


def _f1(shared: int, found: int, sought: int) -> float:
    """The harmonic mean of precision shared/found and recall shared/sought."""
    return 2 * shared / (found + sought) if shared else 0.0


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, by dynamic programming over the prefixes of both."""
    lengths = [0] * (len(other) + 1)
    for word in one:
        before = 0  # of the prefixes without this word and without the other one
        for at, its in enumerate(other, start=1):
            before, lengths[at] = lengths[at], before + 1 if word == its else max(lengths[at], lengths[at - 1])
    return lengths[-1]
