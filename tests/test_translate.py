"""`dl7 translate`: what goes in, in which form, and what comes out for it."""

import contextlib
import gzip
import io
import json
import os
import re
import select
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from running import TINY_SEQ2SEQ, dl7, succeed

from dl7cli.cli import main
from dl7cli.cli.progress import Nothing, Plain
from dl7cli.cli.sentences import BATCH, Line, display, field, read
from dl7cli.errors import UserError

BY = "by runs/seq2seq-1: en to de\n"
"""Said where the run was not named."""


def test_one_line_in_one_line_out(translator: Path, tmp_path: Path) -> None:
    sentences = ["red blue big small", "", "old new small red", "  ", "big old blue new"]
    alone = [succeed("translate", sentence, cwd=translator).out for sentence in sentences]
    assert [line.count("\n") for line in alone] == [1] * 5
    assert alone[1] == alone[3] == "\n"
    assert len(set(alone)) == 4, "that lines are in order is seen only where they differ"
    expected = "".join(alone)
    assert succeed("translate", *sentences, cwd=translator).out == expected
    text = "\n".join(sentences)
    for data in (text.encode(), f"{text}\n".encode(), f"\ufeff{text}".replace("\n", "\r\n").encode()):
        assert succeed("translate", cwd=translator, stdin=data).out == expected
    (tmp_path / "in.txt").write_text(text, encoding="utf-8")
    written = succeed(
        "translate", "--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.txt"), cwd=translator
    )
    assert written.out == ""
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == expected
    assert succeed("translate", cwd=translator, stdin=b"").out == ""


def test_gives_several(translator: Path) -> None:
    sentences = ("red blue big small", "", "old new small red")
    shown = succeed("translate", *sentences, "--n-best", "3", "--beam", "4", cwd=translator).out
    rows = [line.split("\t") for line in shown.splitlines()]
    assert [row[0] for row in rows] == ["1", "1", "1", "2", "3", "3", "3"]
    best = succeed("translate", *sentences, "--beam", "4", cwd=translator).out.splitlines()
    assert [rows[0][2], rows[3][2], rows[4][2]] == best
    scores = [float(row[1]) for row in rows]
    assert scores[:3] == sorted(scores[:3], reverse=True)
    failed = dl7("translate", "old", "--n-best", "3", "--beam", "2", cwd=translator)
    assert (failed.code, failed.out) == (1, "")
    assert "hint: add `--beam 3`" in failed.err


def test_to_json(translator: Path) -> None:
    document = succeed("translate", "red blue big small", "", "--n-best", "2", "--json", cwd=translator).document
    assert document["run"] == "runs/seq2seq-1"
    first, blank = document["translations"]
    assert first["source"] == "red blue big small"
    assert first["text"] == succeed("translate", "red blue big small", cwd=translator).out.removesuffix("\n")
    keys = ("text", "score", "log_probability", "tokens", "token_log_probabilities", "alignment")
    assert first["alternatives"][0] == {key: first[key] for key in keys}
    assert len(first["alternatives"]) == 2
    for one in first["alternatives"]:
        assert "".join(one["tokens"][:-1]).replace("▁", " ").strip() == one["text"]
        assert one["tokens"][-1] == first["source_tokens"][-1] == "</s>"
        assert sum(one["token_log_probabilities"]) == pytest.approx(one["log_probability"])
        # Wu et al. 2016, eq. 14, with the recipe's exponent of 1.
        length = len(one["tokens"])
        assert one["score"] == pytest.approx(one["log_probability"] / ((5 + length) / 6))
        assert len(one["alignment"]) == len(one["token_log_probabilities"]) == length
        assert all(0 <= place < len(first["source_tokens"]) for place in one["alignment"])
    assert (blank["source"], blank["text"], blank["alternatives"]) == ("", "", [])
    assert set(blank) == set(first)
    (alone,) = succeed("translate", "red blue big small", "--json", cwd=translator).document["translations"]
    assert set(first) - set(alone) == {"alternatives"}


def test_warns_of_a_line_that_is_cut(translator: Path) -> None:
    done = succeed("translate", cwd=translator, stdin=b"red\n" + b"red " * 30 + b"\nblue\n")
    assert done.out.count("\n") == 3
    assert done.err == f"{BY}warning: line 2 is longer than 20 subwords and was cut\n"


def test_says_which_lines_have_what_the_vocabulary_has_not(translator: Path) -> None:
    never = "characters or words that the vocabulary has not\n"
    many = b"red\nblue \xe2\x98\x83\nred\n\xe2\x98\x83\n"
    assert succeed("translate", cwd=translator, stdin=many).err == f"{BY}note: 2 lines, the first line 2, have {never}"
    one = succeed("translate", "red ☃", "--json", cwd=translator)
    assert one.err == f"{BY}note: line 1 has {never}"
    assert "<unk>" in one.document["translations"][0]["source_tokens"]
    assert succeed("translate", "red", "☃", cwd=translator).err == f"{BY}note: line 2 has {never}"
    assert succeed("translate", "red", cwd=translator).err == BY
    assert succeed("translate", "red", "--run", "runs/seq2seq-1", cwd=translator).err == "", "it was named"


def test_leaves_nothing_half_written(translator: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"red\nblue\nna\xefve\n")
    (tmp_path / "out.txt").write_text("as it was", encoding="utf-8")
    command = ("translate", "--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.txt"))
    failed = dl7(*command, cwd=translator)
    assert failed.code == 1
    assert failed.err.startswith(f"{BY}error: {tmp_path}/in.txt: line 3 is not UTF-8 (byte 3 is 0xef)\nhint: ")
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.txt"]


@pytest.mark.parametrize(
    ("data", "tool"), [("red".encode("utf-16"), "iconv -f utf-16 -t utf-8"), (gzip.compress(b"red"), "gunzip")]
)
def test_what_is_in_another_encoding_or_packed_is_told_how_to_convert(data: bytes, tool: str, translator: Path) -> None:
    failed = dl7("translate", cwd=translator, stdin=data)
    assert (failed.code, failed.out) == (1, "")
    assert "standard input: line 1 is not UTF-8" in failed.err
    assert f"`{tool}`" in failed.err


def test_prompts_at_a_terminal(translator: Path) -> None:
    typed = b"red blue big small\nold new small red\n"
    shown = succeed("translate", cwd=translator, stdin=typed, terminal=True, TERM="xterm")
    assert shown.out == succeed("translate", cwd=translator, stdin=typed).out
    assert shown.err == f"{BY}one line in, one line out; Ctrl-D ends\n> > > \n"


class Dribble(io.BytesIO):
    """A pipe that has these chunks, one at each reading."""

    def __init__(self, *chunks: bytes) -> None:
        super().__init__()
        self.chunks = list(chunks)

    def read1(self, size: int | None = -1, /) -> bytes:
        return self.chunks.pop(0) if self.chunks else b""


def test_lines_are_read_as_they_come_and_never_too_many_at_once() -> None:
    stream: Any = Dribble(b"one\ntw", b"o\n\n", b"three" + b"\n" * 3000, b"last")
    batches = list(read(stream, "pipe"))
    assert [[line.text for line in batch] for batch in batches[:2]] == [["one"], ["two", ""]]
    assert max(map(len, batches)) <= BATCH
    assert [line.number for batch in batches for line in batch] == list(range(1, 3005))
    assert batches[-1][-1].text == "last"


def test_a_line_is_answered_before_the_next_is_written(translator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through real pipes, to a process that writes a line only when it has the answer to the one before."""
    (into, writing), (reading, out) = os.pipe(), os.pipe()
    lines, answers = [b"red blue\n", b"big\n", b"\n", b"small old new\n"], []

    def converse() -> None:
        with os.fdopen(writing, "wb", buffering=0) as stream, os.fdopen(reading, "rb") as answering:
            for line in lines:
                stream.write(line)
                if not select.select([answering], [], [], 60)[0]:
                    break
                answers.append(answering.readline())

    expected = succeed("translate", cwd=translator, stdin=b"".join(lines)).out
    other = threading.Thread(target=converse)
    other.start()
    monkeypatch.chdir(translator)
    monkeypatch.setattr(sys, "argv", ["dl7", "translate"])
    with os.fdopen(into, encoding="utf-8") as stdin, os.fdopen(out, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit, match="0"):
            main()
    other.join()
    assert b"".join(answers).decode("utf-8") == expected


# JSON lines


def test_json_lines_come_out_as_they_came_in_with_their_translation(translator: Path, tmp_path: Path) -> None:
    lines = [
        '{"id": 123456789012345678901234567890, "x": 1.10e-0, "en": "red blue", "again": 1, "again": 2}',
        "",
        '{ "source":"big\\u0020old" , "nested": {"b": [1.0, null], "a": "\u2028\x7f\\ud83d"}}  ',
        '{"text": "small\\nnew", "de": "klein"}',
        '{"text": "   "}',
    ]
    file = tmp_path / "in.JSONL"
    file.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8", newline="")
    shown = succeed("translate", "--input", str(file), cwd=translator).out.split("\n")
    assert shown.pop() == ""
    plain = succeed("translate", "--json", "red blue", "", "big old", "small new", "", cwd=translator).document
    for line, got, translated in zip(lines, shown, plain["translations"], strict=True):
        if not line:
            assert got == ""
            continue
        assert got.startswith(line.rstrip().removesuffix("}").rstrip() + ", ")
        record = json.loads(got)
        assert list(record)[-2:] == ["translation", "score"]
        assert (record["translation"], record["score"]) == (translated["text"], translated["score"])
    piped = succeed("translate", "--jsonl", cwd=translator, stdin="\n".join(lines).encode())
    assert piped.out.split("\n")[:-1] == shown
    written = ("--jsonl", "--n-best", "2", "--output", str(tmp_path / "out"))
    assert succeed("translate", *written, cwd=translator, stdin=lines[0].encode()).out == ""
    record = json.loads((tmp_path / "out").read_text(encoding="utf-8"))
    assert record["alternatives"][0] == {"text": record["translation"], "score": record["score"]}
    assert len(record["alternatives"]) == 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a"', "is not JSON: expecting ',' delimiter at character 13"),
        ('{"text": "a"} {}', "is not JSON: extra data at character 15"),
        ('{"text": "a", "x": NaN}', "is not JSON: NaN is no number there"),
        ('{"text": ' + "[" * 100_000, "is not JSON: "),
        ('["a"]', "is not a JSON object"),
        ('"a"', "is not a JSON object"),
        ("{}", "has no text to translate"),
        ('{"EN": "a"}', "has no text to translate"),
        ('{"en": {"text": "a"}}', "the field `en` is not text"),
        ('{"text": null}', "the field `text` is not text"),
        ('{"text": 5}', "the field `text` is not text"),
        ('{"text": 1.5e3, "x": "a"}', "the field `text` is not text"),
        ('{"text": "\\ud83d"}', "the field `text` holds half a character"),
        ('{"text": "a", "translation": {"en": "a"}}', "has a field `translation` already"),
    ],
)
def test_wrong_json_lines_are_told_by_their_number(line: str, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape("pipe: line 7")) as caught:
        field(Line(7, line), ("en", "source", "text"), ("translation", "score"), "pipe")
    assert expected in caught.value.message
    if "no text" in expected:
        assert caught.value.hint == "put it in a field `en`, `source` or `text`"


def test_after_a_wrong_json_line_there_is_no_output_file(translator: Path, tmp_path: Path) -> None:
    written = ("--jsonl", "--output", str(tmp_path / "out"))
    failed = dl7("translate", *written, cwd=translator, stdin=b'{"en": "red"}\n{"en": "red", "id": 1\n')
    assert (failed.code, failed.out) == (1, "")
    expected = "error: standard input: line 2 is not JSON: expecting ',' delimiter at character 22\n"
    assert failed.err.startswith(f"{BY}{expected}")
    assert list(tmp_path.iterdir()) == []


# How it is searched


def test_keys_of_decoding_can_be_set_and_no_others(translator: Path) -> None:
    sentence = "red blue big small"
    by_flag = succeed("translate", sentence, "--beam", "3", "--n-best", "3", cwd=translator).out
    assert succeed("translate", sentence, "--set", "decoding.beam=3", "--n-best", "3", cwd=translator).out == by_flag
    for setting, expected in (
        ("decoding.bem=3", "unknown key `decoding.bem` (did you mean `decoding.beam`?)"),
        ("decoding.beam=0", "`decoding.beam` is `0`: "),
        ("decoding.beam", "`--set decoding.beam` has no `=`"),
        ("model.dropout=0.5", "`model.dropout` was settled in training; only keys of `decoding` can be changed"),
        ("decoding=3", "`decoding` was settled in training"),
        ("decoding.length_penalty=nan", "`decoding.length_penalty` is `NaN`: "),
    ):
        failed = dl7("translate", sentence, "--set", setting, cwd=translator)
        assert (failed.code, failed.out) == (1, "")
        assert expected in failed.err
    failed = dl7("translate", sentence, "--set", "decoding.beam=0", "--set", "data.joint=3", cwd=translator)
    assert failed.err.startswith(f"{BY}error: `--set` has 2 mistakes:\n")


def test_samples_depend_on_the_seed_and_on_nothing_else(translator: Path) -> None:
    sentences = ("red blue big small", "old new small red", "big old blue new")
    flags = ("--sample", "--set", "decoding.temperature=3.0", "--n-best", "7")

    def samples(*arguments: str, data: bytes = b"") -> list[str]:
        return succeed("translate", *flags, *arguments, cwd=translator, stdin=data).out.splitlines()

    first = samples("--seed", "1", *sentences)
    assert len(first) == 3 * 7, "more than the beam"
    assert samples("--seed", "1", data="\n".join(sentences).encode()) == first
    assert samples(*sentences, "--set", "decoding.seed=1") == first
    assert samples("--seed", "1", *sentences[:2]) == first[: 2 * 7]
    assert samples("--seed", "2", *sentences) != first
    assert len(set(first[:7])) > 1


def test_a_seed_is_of_sampling(translator: Path) -> None:
    failed = dl7("translate", "red", "--seed", "3", cwd=translator)
    assert (failed.code, failed.out) == (2, "")
    assert "--seed is of what --sample draws; add --sample" in failed.err
    failed = dl7("translate", "red", "--sample", "--seed", "-1", cwd=translator)
    assert (failed.code, failed.out) == (2, "")
    drawn = succeed("translate", "red blue", "--seed", "3", "--set", "decoding.method=sample", cwd=translator).out
    assert drawn == succeed("translate", "red blue", "--seed", "3", "--sample", cwd=translator).out


def test_it_is_told_how_far_a_file_has_come(translator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dl7cli.cli.progress.FIRST_SECONDS", 0.0)
    monkeypatch.setattr("dl7cli.cli.progress.EVERY_SECONDS", 0.0)
    monkeypatch.setattr("dl7cli.cli.sentences.BATCH", 2)
    (tmp_path / "in.txt").write_text("red\nblue\nbig\n", encoding="utf-8")
    read = ("--input", str(tmp_path / "in.txt"))
    for flags in (("--output", str(tmp_path / "out.txt")), ("--json",)):
        assert succeed("translate", *read, *flags, cwd=translator).err == f"{BY}translating  2\ntranslating  3\n"
    assert succeed("translate", *read, cwd=translator).err == BY, "each answer is seen itself"
    (tmp_path / "in.txt").write_text("red\trot\n" * 3, encoding="utf-8")
    told = succeed("score", *read, "--json", cwd=translator).err.splitlines()
    assert told[:3] == [BY.rstrip(), "scoring  2", "scoring  3"]
    with (tmp_path / "out.txt").open("w") as file, contextlib.redirect_stdout(file):
        assert isinstance(display(None, is_silent=False), Plain)
    assert isinstance(display(None, is_silent=False), Nothing)


def test_a_beam_that_is_given_is_searched_with(pairs: Path, tmp_path: Path) -> None:
    sampling = ("--set", "decoding.method=sample", "--set", "decoding.temperature=9.0", "--set", "training.epochs=1")
    succeed("train", "seq2seq", "--data", str(pairs), *TINY_SEQ2SEQ, *sampling, cwd=tmp_path)
    sampled, searched, expected = (
        succeed("translate", "red blue big small", *flags, cwd=tmp_path).out
        for flags in ((), ("--beam", "1"), ("--set", "decoding.method=beam", "--set", "decoding.beam=1"))
    )
    assert searched == expected != sampled


def test_every_translation_begins_with_the_prefix(translator: Path) -> None:
    for flags in ((), ("--sample", "--seed", "3")):
        shown = succeed("translate", "red blue", "", "big", "--prefix", "klein alt", *flags, cwd=translator).out
        first, blank, second = shown.splitlines()
        assert blank == ""
        assert first.startswith("klein alt")
        assert second.startswith("klein alt")


def test_a_prefix_is_one_line_of_what_the_model_can_write(translator: Path, tmp_path: Path) -> None:
    one, two = (succeed("translate", "red", "--prefix", text, cwd=translator).out for text in ("rot alt", "rot\nalt"))
    assert one == two
    for prefix, expected, cwd in (
        ("\udcff", "`--prefix` is not UTF-8", tmp_path),  # where there is no model
        ("rot 猫", "`rot 猫` has characters or words that the model cannot write", translator),
    ):
        failed = dl7("translate", "red", "--prefix", prefix, cwd=cwd)
        assert (failed.code, failed.out) == (1, "")
        assert f"error: {expected}\nhint: " in failed.err


def test_several_runs_are_an_ensemble(translator: Path) -> None:
    """An ensemble of a model with itself is that model."""
    best = ("--run", "runs/seq2seq-1/best")
    alone = succeed("translate", "red blue big", *best, "--json", cwd=translator).document
    twice = succeed("translate", "red blue big", *best, *best, "--json", cwd=translator).document
    assert (alone["others"], twice["others"]) == ([], ["runs/seq2seq-1"])
    (one,), (two,) = alone["translations"], twice["translations"]
    assert (one["text"], one["alignment"]) == (two["text"], two["alignment"])
    assert one["score"] == pytest.approx(two["score"], abs=1e-5)


def test_runs_of_other_validation_sentences_and_seeds_are_an_ensemble(
    translator: Path, pairs: Path, tmp_path: Path
) -> None:
    """What they read and write is the same: the vocabulary is learnt from the training sentences."""
    changed = tmp_path / "pairs"
    shutil.copytree(pairs, changed)
    for language in ("en", "de"):
        file = changed / f"validation.{language}"
        file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    flags = (*TINY_SEQ2SEQ, "--set", "training.epochs=3", "--seed", "2", "--out", "other")
    succeed("train", "seq2seq", "--data", str(changed), *flags, cwd=tmp_path)
    members = ("--run", "runs/seq2seq-1", "--run", str(tmp_path / "other"))
    one, two, both = (
        succeed("translate", "red blue big", *chosen, "--beam", "1", "--json", cwd=translator).document
        for chosen in (members[:2], members[2:], members)
    )
    assert both["others"] == [str(tmp_path / "other")]
    scores = [told["translations"][0]["log_probability"] for told in (one, two, both)]
    assert len(set(scores)) == 3
    scored = succeed("score", *members, "--json", cwd=translator, stdin=b"red blue\trot blau\n").document
    assert scored["pairs"][0]["log_probability"] < 0


def test_checkpoints_of_one_run_are_told_apart(translator: Path) -> None:
    members = ("--run", "runs/seq2seq-1", "--run", "seq2seq-1/last")
    document = succeed("translate", "red", *members, "--json", cwd=translator).document
    assert (document["run"], document["others"]) == ("runs/seq2seq-1", ["runs/seq2seq-1/last"])


def test_runs_that_are_no_ensemble_are_told_as_they_were_named(translator: Path, pairs: Path, tmp_path: Path) -> None:
    keys = ("data.source_language=de", "data.target_language=en", "training.epochs=1")
    settings = [text for key in keys for text in ("--set", key)]
    other = str(tmp_path / "other")
    succeed("train", "seq2seq", "--data", str(pairs), *TINY_SEQ2SEQ, *settings, "--out", other, cwd=tmp_path)
    members = ("--run", "runs/seq2seq-1/last", "--run", other)
    for command in (["translate", "red"], ["score"]):
        failed = dl7(*command, *members, cwd=translator)
        assert (failed.code, failed.out) == (1, "")
        assert failed.err.startswith(f"error: `runs/seq2seq-1/last` and `{other}` differ in vocabulary, languages")


def test_a_line_that_nothing_can_translate_is_told_by_its_number(translator: Path) -> None:
    """As many words as are wanted there are not, where none may appear twice."""
    keys = ("no_repeat_ngram=1", "min_length=500", "max_length_offset=500")
    flags = [text for key in keys for text in ("--set", f"decoding.{key}")]
    warned = "warning: line 2 has no translation that the keys of decoding allow\n"
    for more, expected in (((), "\n\n"), (("--n-best", "2"), "1\t0.0000\t\n2\t-inf\t\n")):
        shown = succeed("translate", *flags, *more, cwd=translator, stdin=b"\nred\n")
        assert (shown.out, shown.err) == (expected, f"{BY}{warned}")
    json_flags = (*flags, "--json", "--n-best", "2")
    _, one = succeed("translate", *json_flags, "", "red", cwd=translator).document["translations"]
    assert (one["text"], one["score"], one["log_probability"], one["alternatives"]) == ("", None, None, [])
    piped = succeed("translate", *flags, "--jsonl", cwd=translator, stdin=b'\n{"en": "red"}\n')
    assert piped.out == '\n{"en": "red", "translation": "", "score": null}\n'
    assert piped.err == f"{BY}{warned}"


# What it looked at


def test_attention_is_drawn(translator: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.svg"):
        flags = ("--attention", str(tmp_path / name), "--json")
        shown = succeed("translate", "red blue big small", *flags, cwd=translator)
        assert shown.err == f"{BY}drawn: {tmp_path / name}\n"
    (translated,) = shown.document["translations"]
    weights = np.array(translated["attention"])
    assert weights.shape == (len(translated["tokens"]), len(translated["source_tokens"]))
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    assert weights.argmax(axis=1).tolist() == translated["alignment"]
    with PIL.Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
    text = (tmp_path / "b.svg").read_text(encoding="utf-8")
    assert translated["source_tokens"][0].removeprefix("▁") in text


@pytest.mark.parametrize("batch", [1, BATCH])
def test_attention_is_of_one_sentence(
    batch: int, translator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dl7cli.cli.sentences.BATCH", batch)
    flags = ("--attention", str(tmp_path / "a.png"))
    for data, expected in (
        (b"red\nblue\n", "`--attention` draws one sentence, and there are more"),
        (b"red\n\xff\n", "line 2 is not UTF-8"),
        (b"\n", "there is no sentence"),
    ):
        failed = dl7("translate", *flags, cwd=translator, stdin=data)
        assert failed.code == 1
        assert expected in failed.err
        assert list(tmp_path.iterdir()) == []
    assert succeed("translate", *flags, cwd=translator, stdin=b"\nred\n").out.count("\n") == 2
    failed = dl7("translate", "red", "--attention", str(tmp_path / "a.pdf"), cwd=translator)
    assert "ends in neither `.png` nor `.svg`" in failed.err


def test_a_model_that_looks_at_nothing_cannot_be_drawn(pairs: Path, tmp_path: Path) -> None:
    keys = ("model.attention=none", "model.decoder_width=16", "training.epochs=1")
    settings = [text for key in keys for text in ("--set", key)]
    succeed("train", "seq2seq", "--data", str(pairs), *TINY_SEQ2SEQ, *settings, cwd=tmp_path)
    failed = dl7("translate", "red", "--attention", "a.png", cwd=tmp_path)
    assert (failed.code, failed.out) == (1, ""), "it is told before anything is translated"
    assert failed.err.startswith(f"{BY}error: the model of run `runs/seq2seq-1` has no attention to draw\nhint: ")
    assert not (tmp_path / "a.png").exists()
    (told,) = succeed("translate", "red", "--json", cwd=tmp_path).document["translations"]
    assert told["alignment"] is None
