"""What a model is judged by: accuracy, and BLEU with the signature that makes it comparable."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """The result of one evaluation; of every value, higher is better."""

    primary: str  # the key of `values` by which models are compared
    values: dict[str, float]  # `accuracy` as a fraction, `bleu` from 0 to 100
    examples: int
    signature: str | None = None  # of BLEU, as sacrebleu writes it

    @property
    def score(self) -> float:
        """The primary value."""
        return self.values[self.primary]


def accuracy(logits: Tensor, labels: Tensor) -> Scores:
    """Give the fraction of rows of `logits` (N, classes) whose greatest entry is at `labels` (N,).

    Among equal entries the first counts. A row that holds a NaN is wrong, whatever its label. Raises
    ValueError for shapes that do not fit and when there is nothing to score.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit together")
    if not len(labels):
        raise ValueError("accuracy of no examples")
    correct = (logits.argmax(dim=1) == labels) & ~logits.isnan().any(dim=1)
    return Scores("accuracy", {"accuracy": int(correct.sum()) / len(labels)}, len(labels))


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
