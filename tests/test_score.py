"""`dl7 score`: what a translator says of given translations, checked against its search and by hand."""

import json
import math
import re
from pathlib import Path

import pytest
from running import dl7, succeed

from dl7cli.tasks.translation import ScoredPair, Translation

SENTENCES = ("red blue big small", "old new small red", "new")


def test_the_best_translation_has_the_probability_that_search_gives_it(translator: Path, tmp_path: Path) -> None:
    found = succeed("translate", *SENTENCES, "--json", cwd=translator).document["translations"]
    (tmp_path / "pairs.tsv").write_text("".join(f"{one['source']}\t{one['text']}\n" for one in found), encoding="utf-8")
    given = ("--input", str(tmp_path / "pairs.tsv"))
    document = succeed("score", *given, "--json", cwd=translator).document
    assert (document["run"], document["others"]) == ("runs/seq2seq-1", [])
    for one, pair in zip(found, document["pairs"], strict=True):
        assert (pair["source"], pair["target"], pair["tokens"]) == (one["source"], one["text"], one["tokens"])
        assert pair["log_probability"] == pytest.approx(one["log_probability"], abs=1e-4)
        assert pair["token_log_probabilities"] == pytest.approx(one["token_log_probabilities"], abs=1e-4)
        assert pair["perplexity"] == pytest.approx(math.exp(-pair["log_probability"] / len(pair["tokens"])))
    total = sum(pair["log_probability"] for pair in document["pairs"])
    tokens = sum(len(pair["tokens"]) for pair in document["pairs"])
    assert (document["log_probability"], document["tokens"]) == (pytest.approx(total), tokens)
    assert document["perplexity"] == pytest.approx(math.exp(-total / tokens))
    shown = succeed("score", *given, cwd=translator)
    expected = [[pair["log_probability"], len(pair["tokens"]), pair["perplexity"]] for pair in document["pairs"]]
    for row, pair in zip(numbers(shown.out), expected, strict=True):
        assert row == pytest.approx(pair, abs=2e-3)
    said = re.fullmatch(
        r"by runs/seq2seq-1: en to de\nperplexity (.+) per token: 3 pairs, (\d+) tokens, log-probability (.+)\n",
        shown.err,
    )
    assert said is not None
    assert [*map(float, said.groups())] == pytest.approx([document["perplexity"], tokens, total], abs=2e-3)


@pytest.mark.parametrize("header", ["en\tde", "DE\tEN"])
def test_a_header_is_no_pair(header: str, translator: Path) -> None:
    failed = dl7("score", cwd=translator, stdin=f"{header}\nred\trot\n".encode())
    assert (failed.code, failed.out) == (1, "")
    assert "error: standard input: line 1 is a header and no pair\nhint: leave it out" in failed.err
    assert "the first column has to be en\n" in failed.err


def test_what_it_learnt_is_more_probable_than_the_same_words_of_another(translator: Path) -> None:
    lines = ["red blue\trot blau", "red blue\tgroß klein"]
    right, wrong = (
        float(line.split("\t")[0])
        for line in succeed("score", cwd=translator, stdin="\n".join(lines).encode()).out.splitlines()
    )
    assert right > wrong


@pytest.mark.bf16
def test_the_precision_asked_for_is_that_of_search_and_scores(translator: Path) -> None:
    pairs = b"red blue\trot blau\n"
    commands = {"score": {"stdin": pairs}, "translate": {}}
    for command, options in commands.items():
        arguments = [command, "--json", "--device", "cpu", *(["red blue"] if command == "translate" else [])]
        found = {}
        for flags in ((), ("--precision", "fp32"), ("--precision", "bf16")):
            document = succeed(*arguments, *flags, cwd=translator, **options).document
            (one,) = document["pairs" if command == "score" else "translations"]
            found[flags] = one["log_probability"]
        automatic, exact, rough = found.values()
        assert automatic == exact != rough
        assert rough == pytest.approx(exact, abs=0.2)


def numbers(text: str) -> list[list[float]]:
    """What stands on each line. The last digits of float32 depend on how many are run at once, and on the machine."""
    return [[*map(float, line.split("\t"))] if line else [] for line in text.split("\n")[:-1]]


def test_one_line_in_one_line_out(translator: Path, tmp_path: Path) -> None:
    pairs = ["red\trot", "", "big old\talt", " \t ", "red\t"]
    alone = [numbers(succeed("score", cwd=translator, stdin=f"{pair}\n".encode()).out) for pair in pairs]
    assert alone[1] == alone[3] == [[]], "a blank line stays blank"
    assert alone[4][0][1] == 1, "of a translation that is empty only its end is counted"
    written = succeed("score", "--output", str(tmp_path / "out"), cwd=translator, stdin="\n".join(pairs).encode())
    assert written.out == ""
    outputs = [(tmp_path / "out").read_text(encoding="utf-8")]
    for data in ("\n".join(pairs), "\ufeff" + "\r\n".join(pairs) + "\r\n"):
        outputs.append(succeed("score", cwd=translator, stdin=data.encode()).out)
    for output in outputs:
        for together, (single,) in zip(numbers(output), alone, strict=True):
            assert together == pytest.approx(single, abs=2e-3)
    documents = succeed("score", "--json", cwd=translator, stdin="\n".join(pairs).encode()).document["pairs"]
    assert [pair["perplexity"] is None for pair in documents] == [False, True, False, True, False]
    nothing = succeed("score", cwd=translator)
    assert (nothing.out, nothing.err) == ("", "by runs/seq2seq-1: en to de\n")
    assert succeed("score", "--json", cwd=translator).document["perplexity"] is None


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"red rot", "line 3 has no tab, not one\nhint: "),
        (b"red\trot\t1", "line 3 has 2 tabs, not one\nhint: "),
        (b"red\tr\xf6t", "line 3 is not UTF-8 (byte 6 is 0xf6)\nhint: "),
    ],
)
def test_wrong_lines_are_told_by_their_number(line: bytes, expected: str, translator: Path, tmp_path: Path) -> None:
    (tmp_path / "in.tsv").write_bytes(b"red\trot\n\n" + line + b"\nred\trot\n")
    (tmp_path / "out").write_text("as it was", encoding="utf-8")
    files = ("--input", str(tmp_path / "in.tsv"), "--output", str(tmp_path / "out"))
    failed = dl7("score", *files, cwd=translator)
    assert (failed.code, failed.out) == (1, "")
    assert f"error: {tmp_path / 'in.tsv'}: {expected}" in failed.err
    assert (tmp_path / "out").read_text(encoding="utf-8") == "as it was"
    assert len(list(tmp_path.iterdir())) == 2


def test_says_which_lines_have_what_the_vocabulary_has_not(translator: Path) -> None:
    never = "characters or words that the vocabulary has not\n"
    shown = succeed("score", cwd=translator, stdin="red\trot\nred ☃\trot\n\nblue\tblau ☃\n".encode())
    assert f"note: 2 lines, the first line 2, have {never}" in shown.err
    assert "vocabulary" not in succeed("score", cwd=translator, stdin=b"red\trot\n").err


def test_a_perplexity_beyond_a_float_is_none(translator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = ScoredPair(-2000.0, ["rot", "</s>"], [-1000.0, -1000.0], None, False)
    monkeypatch.setattr(Translation, "score", lambda *_, **__: [pair])
    shown = succeed("score", cwd=translator, stdin=b"red\trot\n")
    assert shown.out == "-2000.0000\t2\t-\n"
    assert (
        shown.err
        == "by runs/seq2seq-1: en to de\nperplexity - per token: 1 pair, 2 tokens, log-probability -2000.0000\n"
    )
    document = succeed("score", "--json", cwd=translator, stdin=b"red\trot\n").document
    assert (document["perplexity"], document["pairs"][0]["perplexity"]) == (None, None)


@pytest.mark.parametrize("others", [(), ("runs/seq2seq-1/last",)])
def test_an_evaluation_has_the_perplexity_of_the_references(
    others: tuple[str, ...], translator: Path, pairs: Path
) -> None:
    sides = [(pairs / f"test.{language}").read_text(encoding="utf-8").splitlines() for language in ("en", "de")]
    given = "".join(f"{source}\t{target}\n" for source, target in zip(*sides, strict=True)).encode()
    runs = ("runs/seq2seq-1/best", *others)
    named = [flag for run in runs for flag in ("--run", run)]
    expected = succeed("score", *named, "--json", cwd=translator, stdin=given).document["perplexity"]
    beside = [flag for run in others for flag in ("--with", run)]
    details = succeed("eval", runs[0], *beside, "--json", cwd=translator).document["details"]
    assert details["perplexity"] == pytest.approx(expected)


def test_warns_of_a_line_that_is_cut(translator: Path) -> None:
    done = succeed("score", cwd=translator, stdin=b"red\trot\n\n" + b"red " * 30 + b"\trot\nblue\tblau\n")
    assert done.out.count("\n") == 4
    assert done.err.startswith(
        "by runs/seq2seq-1: en to de\nwarning: line 3 is longer than 20 subwords and was cut\nperplexity "
    )


def test_an_ensemble_is_the_mean_of_its_members(translator: Path) -> None:
    """Token by token, of probabilities; the second member is the checkpoint of the last epoch."""
    data = b"red blue big\trot gro\xc3\x9f\nold\tneu\n"
    members = [("--run", "runs/seq2seq-1/best"), ("--run", "runs/seq2seq-1/last")]
    alone = [succeed("score", *member, "--json", cwd=translator, stdin=data).document for member in members]
    both = succeed("score", *members[0], *members[1], "--json", cwd=translator, stdin=data).document
    for number, pair in enumerate(both["pairs"]):
        values = [one["pairs"][number]["token_log_probabilities"] for one in alone]
        expected = [math.log((math.exp(one) + math.exp(other)) / 2) for one, other in zip(*values, strict=True)]
        assert pair["token_log_probabilities"] == pytest.approx(expected, abs=1e-5)
    assert both["others"] == ["runs/seq2seq-1/last"]
    assert json.dumps(both["pairs"]) != json.dumps(alone[0]["pairs"])
