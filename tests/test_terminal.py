"""Text that others wrote, on a terminal: it is shown, and never obeyed, taken for markup or for the program's own. And
what is typed there.
"""

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fuzzing
import pytest
from running import ENVIRONMENT, TINY_SEQ2SEQ, dl7, succeed

from dl7cli import training
from dl7cli.cli import console, progress
from dl7cli.metrics import Scores

TEXTS = {
    "title": "\x1b]0;title\x07",
    "link": "\x1b]8;;http://x\x1b\\x\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;aGk=\x07",
    "colour": "\x1b[31mred\x1b[0m",
    "screen": "\x1b[2J\x1b[H\x1bc",
    "eight bits": "\x9b31m\x9d0;x\x9c",
    "delete": "x\x7f\x08\x08y",
    "return": "all is well\rerror",
    "turned": "\u202egnp.exe\u202c \u2066x\u2069",
    "separators": "a\u2028b\u2029c\x85d\x0be",
    "markup": "[bold red]x[/] [link=http://x]y[/link] :smile: [/nothing]",
    "message": "x\nerror: forged\nhint: forged",
}
SENT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
each_text = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)


def check(*shown: str, text: str) -> None:
    """Nothing is sent that a terminal obeys, markup is there as it was written, and no line is forged."""
    for part in shown:
        assert not SENT.search(part), part
        assert "\nerror: forged" not in part
        assert "\nhint: forged" not in part
    if text.startswith("[bold"):
        assert text in "".join(shown)


@each_text
def test_printable(text: str) -> None:
    seen = console.printable(text, keep="")
    assert not SENT.search(seen)
    if "\\" not in text:
        assert seen.encode("ascii").decode("unicode_escape") == text, "nothing of it is lost"


def test_what_people_write_is_left_alone() -> None:
    """Persian and Indic scripts and emoji are joined and parted by characters that are not seen."""
    for text in ("naïve ß 猫", "می‌خواهم", "क्‍ष", "👩‍👩‍👧", "שלום\u200f!", "e\u0301", "a\tb", "\ue000", "\U000e0100"):
        assert console.printable(text) == text


@each_text
def test_mistakes(text: str, tmp_path: Path) -> None:
    name = text.replace("/", "|")
    (tmp_path / f"{name}.toml").write_text("[", encoding="utf-8")
    (tmp_path / "mine.toml").write_text(f"{json.dumps(text)} = 1\nmodel.kind = {json.dumps(text)}\n", encoding="utf-8")
    (tmp_path / "x.jsonl").write_text(json.dumps({text: text}), encoding="utf-8")
    for arguments in (
        ["recipes", "show", text],
        ["recipes", "show", f"{name}.toml"],
        ["recipes", "show", "mine.toml"],
        ["recipes", "show", "resnet", "--set", text],
        ["recipes", "show", "resnet", "--set", f"model.kind={text}"],
        ["recipes", "copy", "resnet", f"{name}/x.toml"],
        ["train", "resnet", "--data", f"./{name}"],
        ["train", "resnet", "--data", "builtin:shapes", "--device", text],
        ["train", "--resume", text],
        ["eval", text],
        ["eval", "--beam", text],
        ["eval", "--split", text],
        ["translate", "--run", text, "x"],
        ["translate", "--input", name],
        ["translate", "--output", f"{name}/out", "x"],
        ["score", "--input", name],
        ["classify", "--run", text, "x"],
        ["data", "info", f"./{name}"],
        ["data", "info", "x.jsonl", "--task", "translation"],
        ["plot", "activations", text],
        ["plot", "activations", "--output", f"{name}.gif"],
        ["bench", f"{name}.toml"],
        [text],
    ):
        failed = dl7(*arguments, cwd=tmp_path, terminal=True, TERM="dumb")
        assert failed.code in (1, 2), arguments
        assert failed.out == ""
        assert failed.err
        check(failed.err, text="")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Path]) -> Path:
    """A classifier that has learnt images of classes with such names, from a recipe and into a run of such names."""
    folder = tmp_path_factory.mktemp("hostile")
    names = [text.replace("/", "|") for text in TEXTS.values()]
    for number, name in enumerate(names):
        place = folder / "data" / "train" / name
        place.mkdir(parents=True)
        for image in range(3):
            (place / f"{image}.png").write_bytes(fuzzing.IMAGES[(number + image) % 5])
    shutil.copytree(folder / "data" / "train", folder / "data" / "test")
    shutil.move(folder / "data", folder / TEXTS["colour"])
    keys = ["training.epochs=1", "data.image_size=8", "name='[bold]x[/]'", f"data.source={TEXTS['colour']}"]
    settings = [part for key in keys for part in ("--set", key)]
    out = ("--out", f"runs/{TEXTS['eight bits']}")
    shown = succeed("train", str(tiny["resnet"]), *settings, *out, cwd=folder)
    check(shown.out, shown.err, text="")
    assert "[bold]x[/]" in shown.err
    return folder


SHOWING = "classify {image}|eval|runs list|runs show|data info ./{data}|eval --plot plot.svg|train --resume {run}"


@pytest.mark.parametrize("arguments", [one.split() for one in SHOWING.split("|")], ids=" ".join)
@pytest.mark.parametrize("flag", [(), ("--json",)])
def test_names_that_come_from_data(arguments: list[str], flag: tuple[str, ...], hostile: Path) -> None:
    image = f"{TEXTS['colour']}/train/{TEXTS['message']}/0.png"
    places = {"image": image, "data": TEXTS["colour"], "run": f"runs/{TEXTS['eight bits']}"}
    command = [argument.format(**places) for argument in arguments]
    shown = dl7(*command, *flag, cwd=hostile, terminal=True, TERM="dumb")
    assert shown.code == ("--resume" in arguments)
    check(shown.out, shown.err, text="")
    if flag and not shown.code:
        assert json.loads(shown.out)
    elif arguments[0] in ("eval", "data"):
        check(shown.out, text=TEXTS["markup"].replace("/", "|"))
    if "--plot" in arguments:
        assert not SENT.search((hostile / "plot.svg").read_text(encoding="utf-8"))


def test_progress_on_a_terminal_is_no_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dl7cli.cli.progress import Terminal

    monkeypatch.setenv("TERM", "dumb")
    display = Terminal()
    for text in TEXTS.values():
        display.note(text)
        display.progress(text, 1, 3)
    shown = capsys.readouterr().err
    assert not SENT.search(shown.replace("\r", ""))
    assert TEXTS["markup"] in shown


# Translations


@pytest.fixture(scope="module")
def obedient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has learnt to answer in such characters."""
    folder = tmp_path_factory.mktemp("obedient")
    rows = [{"en": word, "de": f"\x1b[31m{word}\n\x9b0m\u202e"} for word in ("red", "blue")] * 8
    for split in ("train", "validation", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    keys = ("--set", "data.vocabulary=character", "--set", "training.epochs=100")
    succeed("train", "seq2seq", "--data", str(folder), *TINY_SEQ2SEQ, *keys, cwd=folder)
    return folder


def test_a_translation_is_data_where_a_program_reads_it(obedient: Path) -> None:
    """Unchanged but for what would make two lines of it."""
    for flags in ((), ("--output", "out")):
        shown = succeed("translate", "red", "blue", *flags, cwd=obedient)
        lines = (shown.out or (obedient / "out").read_text(encoding="utf-8")).split("\n")
        assert lines == ["\x1b[31mred \x9b0m\u202e", "\x1b[31mblue \x9b0m\u202e", ""]
    succeed("eval", "--output", "out", cwd=obedient)
    assert (obedient / "out").read_text(encoding="utf-8").split("\n")[0] == "\x1b[31mred \x9b0m\u202e"
    document = succeed("translate", "red", "--json", cwd=obedient)
    assert document.document["translations"][0]["text"] == "\x1b[31mred\n\x9b0m\u202e"
    assert not SENT.search(document.out)


def on_a_terminal(*arguments: str, cwd: Path, stdin: bytes = b"") -> str:
    """What `dl7` sends to a real terminal."""
    terminal, end = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "dl7cli", *arguments]
    pipe: Any = subprocess.PIPE
    with subprocess.Popen(command, cwd=cwd, stdin=pipe, stdout=end, stderr=end, env=environment) as process:
        os.close(end)
        assert process.stdin is not None
        process.stdin.write(stdin)
        process.stdin.close()
        sent = b""
        with contextlib.suppress(OSError):  # the end, on Linux
            while part := os.read(terminal, 1 << 16):
                sent += part
        process.wait(timeout=60)
    os.close(terminal)
    return sent.decode("utf-8").replace("\r\n", "\n")


def test_a_translation_is_shown_on_a_terminal(obedient: Path) -> None:
    record = '{"en": "red", "x": "\x9b2J"}'.encode()
    flags = ("--run", "runs/seq2seq-1", "--jsonl", "--n-best", "2")
    sent = on_a_terminal("translate", *flags, cwd=obedient, stdin=record)
    assert not SENT.search(sent)
    assert sent.startswith('{"en": "red", "x": "\\x9b2J", "translation": "\\u001b[31mred\\n\\x9b0m\\u202e", "score": ')


def test_a_sample_stays_on_its_line() -> None:
    sample = {"source": 99 * "a" + "\nb", "translation": "c\x1b[2Jd\u2028e", "reference": ""}
    scores = Scores("bleu", {"bleu": 12.345}, 5, details={"sample": sample})
    assert progress.summary(training.Epoch(3, scores, False)) == (
        "epoch 3  validation BLEU 12.35, greedy\n  " + 99 * "a" + "… → c\\x1b[2Jd\\u2028e"
    )


def test_what_has_not_come_yet_is_not_the_end(tmp_path: Path) -> None:
    """Of standard input that does not block, as some programs hand it over."""
    code = (
        "from dl7cli.cli import sentences\n"
        "with sentences.opened(None) as (_, batches):\n"
        "    for batch in batches: print(len(batch), flush=True)"
    )
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=reading, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        os.close(reading)
        assert process.stdout is not None
        for lines in (1, 2):
            os.write(writing, b"red\n" * lines)
            assert process.stdout.readline() == b"%d\n" % lines
        os.close(writing)
        assert process.stdout.read() == b""
        assert process.wait() == 0


def test_typed_lines_can_be_edited_and_called_back(tmp_path: Path) -> None:
    """At a terminal that the test holds the other end of; the arrow up brings the line before."""
    pytest.importorskip("readline")
    code = (
        "from dl7cli.cli.sentences import typed\n"
        "for (line,) in typed(): print(line.number, line.text.upper(), flush=True)"
    )
    terminal, end = pty.openpty()
    environment = {**ENVIRONMENT, "HOME": str(tmp_path), "TERM": "xterm"}
    command = [sys.executable, "-c", code]
    shown = b""
    with subprocess.Popen(command, stdin=end, stdout=subprocess.PIPE, stderr=end, env=environment) as process:
        os.close(end)
        assert process.stdout is not None
        for keys, answer in (
            (b"red ca\x1b[D\xc3\xa4\n", "1 RED CÄA\n"),  # an arrow to the left before the letter
            (b"\x1b[A blue\n", "2 RED CÄA BLUE\n"),
            (b"\x04", ""),
        ):
            while not shown.endswith(b"> "):
                shown += os.read(terminal, 1 << 16)
            os.write(terminal, keys)
            shown += b"|"
            assert process.stdout.readline().decode("utf-8") == answer
        with contextlib.suppress(OSError):  # the end, on Linux
            while chunk := os.read(terminal, 1 << 16):
                shown += chunk
        assert process.wait() == 0
    os.close(terminal)
    assert shown.startswith(b"one line in, one line out; Ctrl-D ends\r\n> ")
    assert shown.count(b"> ") >= 3
    assert b"Traceback" not in shown
    assert list(tmp_path.iterdir()) == [], "nothing of what was typed is kept"
