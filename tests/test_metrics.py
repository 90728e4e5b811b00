"""Accuracy against counting by hand, BLEU against the command line of sacrebleu."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dl7cli.metrics import Scores, accuracy, bleu

REFERENCES = [
    "Ein Mann mit einem orangefarbenen Hut, der etwas anstarrt.",
    "Ein Boston Terrier läuft über saftig-grünes Gras vor einem weißen Zaun.",
    "Ein Mädchen in einem Karateanzug bricht ein Brett mit einem Tritt.",
    "Die Dächer von 1,5 Häusern & einer »Hütte« kosten 3.000 €!",
    "Eine Gruppe von Menschen steht vor einem Iglu.",
]
HYPOTHESES = [
    "Ein Mann mit einem orangen Hut, der etwas anstarrt.",
    "ein Boston Terrier läuft über grünes Gras vor einem weißen Zaun .",
    "Ein Mädchen in einem Karateanzug bricht mit einem Tritt ein Brett.  ",
    "",
    "Eine Gruppe von Menschen steht vor einem &quot;Iglu&quot;.",
]


def command_line(hypotheses: list[str], references: list[str], folder: Path) -> tuple[float, str]:
    """The score and the signature that `sacrebleu` prints for two files."""
    for name, lines in (("hypotheses", hypotheses), ("references", references)):
        (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    command = ["-m", "sacrebleu", "references", "-i", "hypotheses", "-m", "bleu", "-f", "json", "-w", "14"]
    result = subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True, encoding="utf-8")
    answer = json.loads(result.stdout)
    return answer["score"], answer["signature"]


@pytest.mark.parametrize(
    "hypotheses",
    [HYPOTHESES, REFERENCES, [line.lower() for line in REFERENCES], ["nichts"] * 5, [""] * 5],
    ids=["near", "equal", "lower case", "no match", "empty"],
)
def test_bleu_is_that_of_the_command_line(hypotheses: list[str], tmp_path: Path) -> None:
    scores = bleu(hypotheses, REFERENCES)
    score, signature = command_line(hypotheses, REFERENCES, tmp_path)
    assert scores.values == {"bleu": pytest.approx(score, abs=1e-12)}
    assert scores.signature == signature
    assert scores.primary == "bleu"
    assert scores.examples == 5


def test_bleu_worked_out_by_hand() -> None:
    # Of "a b c d e f" against "a b c d e g": 5/6, 4/5, 3/4 and 2/3 of the n-grams match: 1/3 in all.
    assert bleu(["a b c d e f"], ["a b c d e g"]).score == pytest.approx(100 * (1 / 3) ** (1 / 4))
    # Everything matches, but the output has 5 words for 6: only the brevity penalty is left.
    assert bleu(["a b c d e"], ["a b c d e f"]).score == pytest.approx(100 * math.exp(1 - 6 / 5))


def test_bleu_is_cased_and_signed() -> None:
    scores = bleu(["das ist ein Haus ."], ["Das ist ein Haus ."])
    assert scores.score < 100
    assert scores.signature is not None
    assert "case:mixed" in scores.signature
    assert "tok:13a" in scores.signature


def test_bleu_of_unequal_numbers_or_of_nothing() -> None:
    with pytest.raises(ValueError, match="2 hypotheses but 1 references"):
        bleu(["ein", "zwei"], ["ein"])
    with pytest.raises(ValueError, match="no sentences"):
        bleu([], [])


def test_accuracy_counted_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, -1.0, 5.0], [-3.0, -2.0, -4.0], [1.0, 1.0, 0.0]])
    scores = accuracy(logits, torch.tensor([0, 2, 0, 0]))
    assert scores == Scores("accuracy", {"accuracy": 0.75}, examples=4)
    assert scores.score == 0.75
    assert scores.signature is None


def test_accuracy_of_half_precision_logits() -> None:
    logits = torch.eye(4, dtype=torch.bfloat16)
    assert accuracy(logits, torch.tensor([0, 1, 2, 0])).score == 0.75


def test_nan_is_never_right() -> None:
    logits = torch.tensor([[math.nan, 1.0], [0.0, math.nan], [0.0, 1.0]])
    assert accuracy(logits, torch.tensor([0, 1, 1])).score == pytest.approx(1 / 3)


def test_accuracy_of_shapes_that_do_not_fit_or_of_nothing() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        accuracy(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="do not fit"):
        accuracy(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="no examples"):
        accuracy(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
