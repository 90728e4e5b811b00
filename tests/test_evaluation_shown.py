"""What `dl7 eval` prints of a result."""

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dl7cli.cli import app, figures
from dl7cli.cli.evaluate import _draw, parse_beams, print_result


def entry_of(beam: int, score: float) -> dict[str, Any]:
    details = {"length_ratio": 0.98765, "brevity_penalty": 1.0, "signatures": {"chrf": "nc:6"}}
    return {"beam": beam, "scores": {"bleu": score, "chrf": 60.0}, "details": details, "seconds": 1.25}


def result_of(**changes: Any) -> dict[str, Any]:
    """What `training.evaluate` returns, as far as it is printed."""
    return {
        **{"run": "r", "checkpoint": "last", "task": "translation", "recipe": "x", "data": "d", "split": "test"},
        **{"examples": 1000, "details": {"cut_sources": 1, "unknown_sources": 20}},
        **{"primary": "bleu", "scores": {"bleu": 38.307}, "signature": "case:mixed", "seconds": 1.0, **changes},
    }


@pytest.mark.parametrize(
    ("changes", "models"),
    [
        ({"checkpoint": "best"}, "r"),
        ({}, "r/last"),
        ({"others": ["s"]}, "r/last and s together"),
        ({"checkpoint": "best", "others": ["s", "t"]}, "r, s and t together"),
    ],
)
def test_a_figure_names_the_models_that_are_scored(
    changes: dict[str, Any], models: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles = []

    def confusion_matrix(counts: Any, names: Any, title: str, *, suffix: str) -> tuple[None, list[str]]:
        titles.append(title)
        return None, []

    monkeypatch.setattr(figures, "confusion_matrix", confusion_matrix)
    monkeypatch.setattr(figures, "save", lambda figure, path, notes: None)
    details = {"classes": [{"class": "a"}], "confusion": [[1]]}
    _draw(Path("x.png"), result_of(scores={"accuracy": 0.5}, details=details, **changes))
    assert titles == [f"{models}: accuracy 0.5000 on the test split of d"]


def test_the_table_of_beams(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(result_of(beams=[entry_of(1, 38.307), entry_of(10, 9.5)]), as_json=False)
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "note: 1 source of 1,000 had more subwords than `data.max_length` and was cut",
        "note: 20 sources of 1,000 had characters or words that the vocabulary has not",
    ]
    assert shown.out.splitlines() == [
        "by beam on the test split of d (1,000 sentence pairs, 1s), by r/last",
        "signature case:mixed",
        "chrF (nc:6)",
        "",
        "BEAM   BLEU   CHRF  LENGTH RATIO  BREVITY PENALTY  SECONDS",
        "   1  38.31  60.00         0.988            1.000      1.2",
        "  10   9.50  60.00         0.988            1.000      1.2",
    ]


def test_a_checkpoint_out_of_its_run_is_told_as_it_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"run": "models/mine", "checkpoint": "mine", "details": {}, "beams": [entry_of(1, 1.0)]}
    print_result(result_of(**changes), as_json=False)
    assert capsys.readouterr().out.splitlines()[0].endswith(", by models/mine")


def test_a_translator_that_says_one_thing_only_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    repetition = {"most_frequent": "\x1b[2Jein Hund .", "times": 51, "looping": 50, "copied": 50}
    print_result(result_of(beams=[entry_of(1, 1.0)], details={"repetition": repetition}), as_json=False)
    said = "note: 51 of 1,000 translations are the same: \\x1b[2Jein Hund .\n"
    assert capsys.readouterr().err == said
    repetition = {"most_frequent": "ein Hund .", "times": 50, "looping": 51, "copied": 51}
    print_result(result_of(beams=[entry_of(1, 1.0)], details={"repetition": repetition}), as_json=False)
    told = capsys.readouterr().err
    assert "note: 51 of 1,000 translations have three words in a row three times or more" in told
    assert "note: 51 of 1,000 translations are their source, left as it is\n" in told


def test_beams_that_are_none() -> None:
    assert parse_beams(None) == []
    assert parse_beams("5") == [5]
    assert parse_beams("10, 1,2,1") == [10, 1, 2]
    for text in ("", "0", "101", "1,", "1;2", "x", "1.5", "-1", "²"):
        with pytest.raises(typer.BadParameter, match="is not widths from 1 to 100 with commas"):
            parse_beams(text)
    refused = CliRunner().invoke(app, ["eval", "run", "--beam", "1-5"])
    assert (refused.exit_code, refused.stdout) == (2, "")
