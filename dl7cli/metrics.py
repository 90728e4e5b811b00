"""What a model is judged by: accuracy and what explains it, and BLEU with the signature that makes it comparable."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CALIBRATION_BINS = 15
"""Of equal width, as in table 1 of Guo et al. 2017."""


@dataclass(frozen=True)
class Scores:
    """The result of one evaluation; of every value, higher is better.

    `details` are what else there is to read: numbers of which lower is better, intervals and tables. They are plain
    JSON, and nothing is chosen by them.
    """

    primary: str  # the key of `values` by which models are compared
    values: dict[str, float]  # `accuracy` and `top_5_accuracy` as fractions, `bleu` from 0 to 100
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
    classes = logits.shape[1]
    own = logits.gather(1, labels[:, None])
    # Entries that come before the label's: not `topk`, which leaves open which of equal entries it takes.
    earlier = torch.arange(classes, device=logits.device) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
    rank[logits.isnan().any(dim=1)] = classes
    values = {"accuracy": int((rank < 1).sum()) / len(labels)}
    if classes > 5:
        values["top_5_accuracy"] = int((rank < 5).sum()) / len(labels)
    return Scores("accuracy", values, len(labels))


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


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Scores:
    """Give the BLEU of a corpus, 0 to 100, as the `sacrebleu` command computes it (Post 2018).

    Cased, tokenised by sacrebleu itself (13a), one reference for each hypothesis. Both are plain text: the
    pieces of a vocabulary have to be joined before. Raises ValueError for unequal numbers and when there is
    nothing to score.
    """
    from sacrebleu.metrics.bleu import BLEU

    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses but {len(references)} references")
    if not hypotheses:
        raise ValueError("BLEU of no sentences")
    metric = BLEU()
    score = metric.corpus_score(hypotheses, [references])
    return Scores("bleu", {"bleu": score.score}, len(hypotheses), str(metric.get_signature()))
