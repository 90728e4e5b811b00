"""Checkpoints that earlier versions have written answer as they did then.

Those under `older/` are of 0.1.0 in the state of November 2026, trained for some steps on pictures of one colour and on
digits to be turned round. What they answer was noted then.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import succeed

OLDER = Path(__file__).parent / "older"
ON_CPU = ("--device", "cpu", "--precision", "fp32", "--json")
TRANSLATIONS = {
    "seq2seq": [("3 2 1", -3.26855), ("8 7 5", -3.3005), ("6 6 9", -3.9726)],
    "transformer": [("2 2 2 2", -4.9851), ("6 6 6", -4.9921), ("4 4 4", -6.34195)],
    "convs2s": [("3 2 1", -3.34883), ("8 7 6 5 4", -2.8645), ("0 9 0 9", -2.74332)],
}
PROBABILITIES = [("red", 0.96552), ("green", 0.78319), ("green", 0.56363)]


@pytest.mark.parametrize("name", TRANSLATIONS)
def test_a_translator_of_then(name: str, tmp_path: Path) -> None:
    sources = ("1 2 3", "4 5 6 7 8", "9 0 9 0")
    answers = succeed("translate", "--run", str(OLDER / name), *ON_CPU, *sources, cwd=tmp_path).document["translations"]
    for answer, (text, score) in zip(answers, TRANSLATIONS[name], strict=True):
        assert answer["text"] == text
        assert answer["score"] == pytest.approx(score, abs=1e-4)


def test_a_classifier_of_then(tmp_path: Path) -> None:
    images = [tmp_path / f"{number}.png" for number in range(3)]
    for number, file in enumerate(images):
        pixels = np.full((8, 8, 3), 60, dtype=np.uint8)
        pixels[:, ::2, number] += 60
        Image.fromarray(pixels).save(file)
    answers = succeed("classify", "--run", str(OLDER / "resnet"), *ON_CPU, *map(str, images), cwd=tmp_path).document[
        "images"
    ]
    for answer, (name, probability) in zip(answers, PROBABILITIES, strict=True):
        assert answer["classes"][0]["class"] == name
        assert answer["classes"][0]["probability"] == pytest.approx(probability, abs=1e-4)
