"""The command line as its users meet it: exit codes, what is printed where, and every command on tiny data."""

import json
import os
import re
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import torch
import typer
from running import TINY_SEQ2SEQ, dl7, start, succeed

from dl7cli import __version__
from dl7cli.cli import app, console
from dl7cli.cli.progress import Plain
from dl7cli.errors import UserError

COMMON = "--device --gpus --precision --offline --json"
SURFACE = {
    "": "--version",
    "train": f"RECIPE --data --set --seed --out --resume {COMMON}",
    "eval": f"RUN --split --data --beam --length-penalty --rouge --output --plot {COMMON}",
    "average": f"RUN --last {COMMON}",
    "translate": "TEXT --run --input --jsonl --output --beam --length-penalty --n-best --sample --seed --prefix "
    f"--set --attention {COMMON}",
    "score": f"--run --input --output {COMMON}",
    "classify": f"IMAGE --run --top {COMMON}",
    "recipes": "",
    "recipes list": "--json",
    "recipes show": "NAME --data --set --seed --json",
    "recipes copy": "NAME FILE",
    "runs": "",
    "runs list": "--json",
    "runs show": "RUN --json",
    "data": "",
    "data list": "--json",
    "data get": "SOURCE --task --set --offline --json",
    "data info": "SOURCE --task --set --offline --json",
    "bench": "RECIPE --data --set --seconds --device --gpus --offline --json",
    "models": "--json",
    "plot": "",
    "plot activations": "NAME --all --output",
    "doctor": "--offline --json",
}


def commands(command: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command and group with what is typed after `dl7` to get there."""
    command = command or typer.main.get_command(app)
    yield name, command
    for inner, found in getattr(command, "commands", {}).items():
        yield from commands(found, f"{name} {inner}".strip())


def draw_images(folder: Path, splits: dict[str, int]) -> Path:
    """Save images of 16x16 in two classes that differ in colour, below folders for splits."""
    random = np.random.default_rng(0)
    for split, count in splits.items():
        for label, channel in (("red", 0), ("blue", 2)):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 100, (16, 16, 3), dtype=np.uint8)
                pixels[:, :, channel] += 150
                PIL.Image.fromarray(pixels).save(folder / split / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"), {"train": 16, "test": 4})


TINY_RESNET = ("--set", "model.depth=8", "--set", "training.batch_size=8", "--set", "data.crop_padding=1")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, images: Path, pairs: Path) -> Path:
    """A folder with `runs/resnet-1` and `runs/seq2seq-1`; what their training printed is beside them."""
    work = tmp_path_factory.mktemp("work")
    for name, *arguments in (
        ("resnet", "--data", str(images), *TINY_RESNET, "--set", "training.epochs=2", "--json"),
        ("seq2seq", "--data", str(pairs), *TINY_SEQ2SEQ, "--set", "training.epochs=30"),
    ):
        trained = succeed("train", name, *arguments, cwd=work)
        (work / f"{name}.out").write_text(trained.out, encoding="utf-8")
        (work / f"{name}.err").write_text(trained.err, encoding="utf-8")
    return work


# What every command is like


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_help_ends_with_an_example_that_exists(name: str, command: Any, tmp_path: Path) -> None:
    shown = succeed(*name.split(), "--help", cwd=tmp_path)
    *_, last = shown.out.rstrip().splitlines()
    _, separator, example = last.partition("Example: dl7 ")
    assert separator, last
    words = shlex.split(example)
    if name:
        assert words[: len(name.split())] == name.split()
    flags = set(re.findall(r"--[a-z-]+", example))
    assert flags <= {flag for _, found in commands() for parameter in found.params for flag in parameter.opts}


def test_the_flags_are_these_and_no_others() -> None:
    """A flag says where and how to run; what is trained belongs into the recipe."""
    found = {}
    for name, command in commands():
        names = [
            parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0]
            for parameter in command.params
            if "completion" not in parameter.name
        ]
        found[name] = " ".join(names)
    assert found == SURFACE


def test_options_are_explained() -> None:
    for name, command in commands():
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"
            assert parameter.help.endswith("."), f"{name} {parameter.name}"


def test_version(tmp_path: Path) -> None:
    assert succeed("--version", cwd=tmp_path).out == f"dl7 {__version__}\n"


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("train resnt", ["error: there is no recipe `resnt` (did you mean `resnet`?)", "hint: "]),
        ("train ./missing.toml", ["error: there is no recipe file `./missing.toml`", "hint: "]),
        ("train resnet --set model.depth", ["`--set model.depth` has no `=`"]),
        (
            "train resnet --set optim.learning_rat=1",
            ["unknown key `optim.learning_rat` (did you mean"],
        ),
        ("train resnet --set model.depth=21", ["`model.depth` is `21`", "6n+2"]),
        (
            "train resnet --set model.stages=4 --set model.depth=40",
            ["`model.depth` is `40`", "one of 18, 34", "the nearest is 34"],
        ),
        (
            "train resnet --set model.dept=8 --set training.epochs=0",
            ["recipe `resnet` has 2 mistakes", "`model.dept`", "`training.epochs` is `0`"],
        ),
        ("train resnet --data builtin:shapes --device cuda:99", ["error: there is no device `cuda:99`", "hint: "]),
        ("train resnet --data builtin:shapes --device gpu", ["error: there is no device `gpu`", "hint: "]),
        ("train resnet --data ./missing", ["error: there is no file or folder `./missing`", "hint: "]),
        ("train resnet --data builtin:nothing", ["builtin:nothing"]),
        (
            "train resnet --data builtin:shapes --set model.stem=imagenet",
            ["error: `model.stem` is `imagenet`, for images of 64 pixels and more", "have 32", "hint: "],
        ),
        ("train --resume runs/nothing", ["error: there is no run `runs/nothing`", "hint: "]),
        ("eval", ["error: there is no run with a checkpoint under `runs`", "hint: `dl7 train resnet` makes one"]),
        ("eval nothing", ["error: there is no run `nothing`", "hint: "]),
        ("translate --run nothing hello", ["error: there is no run `nothing`", "hint: "]),
        ("translate --input missing.txt", ["error: `missing.txt` cannot be read: no such file or directory"]),
        ("translate --output missing/out.txt hello", ["missing/out.txt` cannot be written: no such file or directory"]),
        ("classify cat.png", ["error: there is no classification run with a checkpoint under `runs`", "hint: "]),
        ("recipes show seq2sec", ["error: there is no recipe `seq2sec` (did you mean `seq2seq`?)"]),
        ("recipes copy resnet mine.txt", ["error: `mine.txt` does not end in `.toml`", "hint: "]),
        (
            "plot activations relo",
            ["error: there is no activation `relo` (did you mean `relu`?)", "hint: there are relu,"],
        ),
        ("plot activations --output a.jpg", ["error: `a.jpg` does not end in `.png` or `.svg`", "hint: "]),
        ("plot activations --output no/a.png", ["error: `no/a.png` cannot be written: no such file or directory"]),
        ("plot activations --output .", ["error: `.` does not end in `.png` or `.svg`"]),
        ("bench resnt", ["error: there is no recipe `resnt` (did you mean `resnet`?)", "hint: "]),
        ("bench resnet --data ./missing", ["error: there is no file or folder `./missing`", "hint: "]),
        ("runs show", ["error: there is no run with a checkpoint under `runs`"]),
        ("data info ./missing", ["error: there is no file or folder `./missing`"]),
        ("data get builtin:nothing", ["builtin:nothing"]),
    ],
)
@pytest.mark.parametrize("flag", [(), ("--json",)])
def test_mistakes_that_can_be_put_right(
    arguments: str, expected: list[str], flag: tuple[str, ...], tmp_path: Path
) -> None:
    if ("copy" in arguments or "plot" in arguments) and flag:
        pytest.skip("it prints nothing that could be JSON")
    failed = dl7(*shlex.split(arguments), *flag, cwd=tmp_path)
    assert failed.code == 1
    assert failed.out == ""
    assert failed.err.startswith("error: ")
    assert "Traceback" not in failed.err
    for text in expected:
        assert text in failed.err
    assert not any(tmp_path.iterdir()), "a mistake leaves nothing behind"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("train", "give a RECIPE"),
        ("train resnet --resume runs/x", "RECIPE cannot be given with it"),
        ("train --resume runs/x --data d --set a=1 --seed 1 --out o", "--data, --set, --seed, --out cannot be given"),
        ("train resnet --depth 20", "No such option: --depth"),
        ("train resnet --precision fp8", "'fp8'"),
        ("eval --split dev", "'dev'"),
        ("eval --beam 0", "'--beam'"),
        ("translate --input x.txt hello", "not both"),
        ("translate --length-penalty -1 hello", "'--length-penalty'"),
        ("classify", "IMAGE"),
        ("classify --top 0 x.png", "'--top'"),
        ("plot activations relu --all", "names or --all, not both"),
        ("trian", "No such command 'trian'"),
    ],
)
def test_wrong_usage(arguments: str, expected: str, tmp_path: Path) -> None:
    failed = dl7(*shlex.split(arguments), cwd=tmp_path)
    assert failed.code == 2
    assert failed.out == ""
    assert expected in failed.err


def test_a_bug_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it looks like a missing file: only a `UserError` is for the user."""

    def broken() -> list[str]:
        raise FileNotFoundError("a bug")

    monkeypatch.setattr("dl7cli.recipe.shipped", broken)
    with pytest.raises(FileNotFoundError, match="a bug"):
        dl7("recipes", "list", cwd=tmp_path)


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    for arguments in (["recipes", "list"], ["train", "--help"]):
        with start(*arguments, cwd=tmp_path) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == ""


# What is printed


def test_control_characters_are_shown_and_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    console.write("\x1b]0;title\x07 [red]ß\u2028日本\t.")
    console.row("a\tb\n", 1)
    console.error(UserError("\x1b[2J", hint="two\nlines"))
    printed = capsys.readouterr()
    assert printed.out == "\\x1b]0;title\\x07 [red]ß\\u2028日本\t.\na\\tb\\n\t1\n"
    assert printed.err == "error: \\x1b[2J\nhint: two\nlines\n"


def test_json_holds_a_file_name_that_is_not_utf8(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    console.document({"name": "ü\udcff"})
    assert json.loads(capsysbinary.readouterr().out) == {"name": "ü\udcff"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (89, "89s"), (90, "2m"), (1080, "18m"), (5399, "1h 30m"), (7500, "2h 05m"), (90000, "25h 00m")],
)
def test_durations(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


def test_plain_progress_is_a_line_every_five_seconds_after_two(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    display = Plain(clock=lambda: now)
    times = []
    for tenth in range(200):
        now = tenth / 10
        display.progress("reading", tenth, 200)
        if capsys.readouterr().err:
            times.append(now)
    assert times == [2.0, 7.0, 12.0, 17.0]
    display.progress("decoding", 1, 2)
    assert capsys.readouterr().err == "", "what is over within two seconds is not worth a line"


def test_on_a_terminal_there_is_a_bar_and_standard_output_is_for_data(tmp_path: Path, images: Path) -> None:
    arguments = ("--data", str(images), *TINY_RESNET, "--set", "training.epochs=1", "--out", "[red]x", "--json")
    trained = succeed("train", "resnet", *arguments, cwd=tmp_path, terminal=True, TERM="xterm", COLUMNS="120")
    assert trained.document["run"] == "[red]x"
    assert "  run        [red]x" in trained.err, "names are not markup"
    assert "━" in trained.err
    assert trained.err.count("\x1b[?25l") == trained.err.count("\x1b[?25h"), "the cursor comes back"
    assert re.search(r"epoch 1  validation accuracy [01]\.\d{4}  \(best\)", trained.err)


def test_errors_are_coloured_on_a_terminal_unless_unwanted(tmp_path: Path) -> None:
    coloured = dl7("recipes", "show", "x", cwd=tmp_path, terminal=True, TERM="xterm", NO_COLOR="")
    assert coloured.err.startswith("\x1b[31m\x1b[1merror:\x1b[0m there is no recipe `x`\n")
    plain = dl7("recipes", "show", "x", cwd=tmp_path, terminal=True, TERM="xterm", NO_COLOR="1")
    assert plain.err.startswith("error: there is no recipe `x`\n")


# Training and what comes after it


def test_train_prints_one_object_and_tells_the_rest_on_standard_error(work: Path, images: Path) -> None:
    result = json.loads((work / "resnet.out").read_text(encoding="utf-8"))
    assert set(result) == {
        *("run", "task", "recipe", "data", "split", "examples", "primary", "scores", "signature", "details", "seconds"),
        *("steps", "training_seconds", "best_epoch", "parameters", "device", "precision", "rate", "peak_memory_bytes"),
    }
    assert result["run"] == "runs/resnet-1"
    assert (result["split"], result["examples"], result["primary"]) == ("test", 8, "accuracy")
    assert 0 <= result["scores"]["accuracy"] <= 1
    assert result["signature"] is None
    told = (work / "resnet.err").read_text(encoding="utf-8")
    assert f"{images}: 29 train, 3 validation, 8 test" in told
    assert f"{result['parameters']:,} parameters (depth 8)" in told
    assert "8 in 2 epochs, seed 1" in told
    assert re.search(r"^epoch 1  validation accuracy [01]\.\d{4}  \(best\)$", told, re.MULTILINE)
    assert "dl7 eval runs/resnet-1" in told
    assert "dl7 classify --run runs/resnet-1 IMAGE" in told


def test_train_names_score_split_and_data(work: Path, pairs: Path) -> None:
    score, signature, *_ = (work / "seq2seq.out").read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(rf"BLEU \d+\.\d\d on the test split of {pairs} \(6 sentence pairs, \d+s\)", score)
    assert re.fullmatch(r"signature nrefs:1\|.*version:.*", signature)
    assert 'dl7 translate --run runs/seq2seq-1 --beam 5 "…"' in (work / "seq2seq.err").read_text(encoding="utf-8")


def test_eval_gives_the_score_of_training(work: Path) -> None:
    trained = json.loads((work / "resnet.out").read_text(encoding="utf-8"))
    result = succeed("eval", "runs/resnet-1", "--json", cwd=work).document
    assert set(result) == {
        *("run", "task", "recipe", "data", "split", "examples", "primary", "scores", "signature", "details", "seconds")
    }
    assert {**result, "seconds": 0} == {key: trained[key] for key in result} | {"seconds": 0}
    shown = succeed("eval", "runs/resnet-1", "--split", "validation", cwd=work).out
    first, interval, views, details, blank, *table = shown.splitlines()
    assert re.fullmatch(r"accuracy \d\.\d{4} on the validation split of .* \(3 images, \d+s\)", first)
    assert re.fullmatch(r"95 % interval \d\.\d{4} to \d\.\d{4} \(Wilson\)", interval)
    assert views == "scores are the mean of 2 views of each image (evaluation.flip, evaluation.shift)"
    number = r"\d\.\d{4}"
    assert re.fullmatch(
        rf"negative log-likelihood {number}, expected calibration error {number} \(15 bins\)", details
    ), "of two classes there is no top five"
    assert blank == ""
    assert [line.split()[0] for line in table] == ["CLASS", "blue", "red"]
    assert sum(int(line.split()[1]) for line in table[1:]) == 3


def result_of(confusion: list[list[int]], names: list[str]) -> dict[str, Any]:
    """What `training.evaluate` returns, as far as it is printed, for predictions counted by hand."""
    classes = [
        {"class": name, "examples": sum(row), "accuracy": row[number] / sum(row) if sum(row) else None}
        for number, (name, row) in enumerate(zip(names, confusion, strict=True))
    ]
    numbers = {"flip": True, "shift": 0, "accuracy_interval": [0.25, 0.75], "negative_log_likelihood": None}
    details = {**numbers, "expected_calibration_error": 0.125, "classes": classes, "confusion": confusion}
    return {
        **{"run": "r", "task": "classification", "recipe": "x", "data": "d", "split": "test", "examples": 9},
        **{"primary": "accuracy", "scores": {"accuracy": 0.5, "top_5_accuracy": 0.875}, "signature": None},
        **{"details": details, "seconds": 1.0},
    }


def test_classes_are_a_table_that_wide_characters_do_not_disturb(capsys: pytest.CaptureFixture[str]) -> None:
    from dl7cli.cli.evaluate import print_result

    print_result(result_of([[3, 1, 2], [0, 2, 0], [0, 0, 0]], ["犬", "cat", "none"]), as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "accuracy 0.5000 on the test split of d (9 images, 1s)",
        "95 % interval 0.2500 to 0.7500 (Wilson)",
        "scores are the mean of 2 views of each image (evaluation.flip, evaluation.shift)",
        "top-5 accuracy 0.8750, negative log-likelihood -, expected calibration error 0.1250 (15 bins)",
        "",
        "CLASS  IMAGES  ACCURACY  MOST OFTEN TAKEN FOR",
        "犬          6    0.5000  none (2)",
        "cat         2    1.0000",
        "none        0         -",
    ]


def test_of_many_classes_the_worst_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    from dl7cli.cli.evaluate import print_result

    confusion = [[0] * 30 for _ in range(30)]
    for number in range(29):  # class 29 has no images, and is not the worst
        confusion[number][number] = 60 - number
        confusion[number][(number + 1) % 30] = 40 + number
    print_result(result_of(confusion, [f"c{number}" for number in range(30)]), as_json=False)
    *_, said, header = (lines := capsys.readouterr().out.splitlines())[:-10]
    assert (said, header.split()[0]) == ("the worst 10 of 30 classes:", "CLASS")
    rows = [line.split() for line in lines[-10:]]
    assert [row[0] for row in rows] == [f"c{number}" for number in range(28, 18, -1)]
    assert rows[0] == ["c28", "100", "0.3200", "c29", "(68)"]


def test_eval_draws_the_confusion_matrix(work: Path, tmp_path: Path) -> None:
    for name in ("drawn.png", "drawn.SVG"):
        (tmp_path / name).write_text("as it was", encoding="utf-8")
        result = succeed("eval", "runs/resnet-1", "--plot", str(tmp_path / name), "--json", cwd=work)
        assert result.document["details"]["confusion"]
        assert f"drawn: {tmp_path / name}" in result.err
    with PIL.Image.open(tmp_path / "drawn.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 400
    assert "<svg" in (tmp_path / "drawn.SVG").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn.SVG", "drawn.png"]


def test_what_cannot_be_drawn_is_refused_before_anything_is_scored(work: Path, tmp_path: Path) -> None:
    readings = {run: (work / "runs" / run / "evaluations.jsonl").read_bytes() for run in ("resnet-1", "seq2seq-1")}
    (tmp_path / "folder.png").mkdir()
    for run, file, expected in (
        ("resnet-1", "x.pdf", "ends in neither `.png` nor `.svg`"),
        ("resnet-1", "png", "ends in neither `.png` nor `.svg`"),
        ("resnet-1", "missing/x.png", "there is no folder"),
        ("resnet-1", "folder.png", "it is a folder"),
        ("seq2seq-1", "x.png", "is a translator: it has no confusion matrix"),
    ):
        failed = dl7("eval", f"runs/{run}", "--plot", str(tmp_path / file), cwd=work)
        assert (failed.code, failed.out) == (1, "")
        assert expected in failed.err
        assert "\nhint: " in failed.err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]
    for run, content in readings.items():
        assert (work / "runs" / run / "evaluations.jsonl").read_bytes() == content


def test_eval_tells_what_was_done_to_the_data(work: Path, tmp_path: Path) -> None:
    other = draw_images(tmp_path / "other", {"train": 2, "test": 1})
    for file in other.rglob("*.png"):
        with PIL.Image.open(file) as image:
            small = image.resize((20, 10))
        small.save(file)
    told = succeed("eval", "runs/resnet-1", "--data", str(other), "--json", cwd=work).err
    assert "note: images of 20x10 resized and cropped to 16x16\n" in told
    assert told.count("resized") == 1, "not also of the size they would have had"


def test_eval_on_other_data(work: Path, tmp_path: Path) -> None:
    other = draw_images(tmp_path / "other", {"train": 2, "test": 1})
    result = succeed("eval", "runs/resnet-1", "--data", str(other), "--json", cwd=work).document
    assert (result["data"], result["examples"]) == (str(other), 2)


def test_eval_of_translation_takes_a_beam(work: Path) -> None:
    result = succeed("eval", "runs/seq2seq-1", "--beam", "2", "--length-penalty", "0.5", "--json", cwd=work).document
    assert result["primary"] == "bleu"
    assert result["signature"].startswith("nrefs:1|")
    failed = dl7("eval", "runs/resnet-1", "--beam", "2", cwd=work)
    assert (failed.code, failed.out) == (1, "")
    assert "classifier" in failed.err


def test_classify(work: Path, images: Path) -> None:
    files = [str(images / "test" / label / "0.png") for label in ("red", "blue")]
    rows = [line.split("\t") for line in succeed("classify", *files, cwd=work).out.splitlines()]
    assert [row[0] for row in rows] == [files[0], files[0], files[1], files[1]]
    for first, second in (rows[:2], rows[2:]):
        assert {first[1], second[1]} == {"red", "blue"}
        assert float(first[2]) >= float(second[2])
        assert float(first[2]) + float(second[2]) == pytest.approx(1, abs=1e-4)
    document = succeed("classify", *files, "--run", "runs/resnet-1/best", "--top", "1", "--json", cwd=work).document
    assert document["run"] == "runs/resnet-1"
    assert [image["classes"][0]["class"] for image in document["images"]] == [rows[0][1], rows[2][1]]
    assert [len(image["classes"]) for image in document["images"]] == [1, 1]


def test_classify_names_a_file_that_is_no_image(work: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    failed = dl7("classify", str(images / "test/red/0.png"), str(tmp_path / "text.png"), cwd=work)
    assert (failed.code, failed.out) == (1, "")
    assert "text.png` is not an image that can be read\nhint: what can be read are PNG, JPEG, " in failed.err


def test_runs(work: Path, images: Path) -> None:
    header, first, second = succeed("runs", "list", cwd=work).out.splitlines()
    assert header.split() == ["RUN", "RECIPE", "DATA", "STATE", "EPOCHS", "VALIDATION", "TEST"]
    assert first.split()[:5] == ["runs/resnet-1", "resnet", str(images), "finished", "2"]
    assert second.startswith("runs/seq2seq-1")
    listed = succeed("runs", "list", "--json", cwd=work).document["runs"]
    assert [run["name"] for run in listed] == ["resnet-1", "seq2seq-1"]
    before = succeed("runs", "show", "runs/resnet-1", "--json", cwd=work).document
    succeed("eval", "runs/resnet-1", cwd=work)
    after = succeed("runs", "show", "runs/resnet-1", "--json", cwd=work).document
    assert after["readings"]["test"] == before["readings"]["test"] + 1
    assert (after["epochs"], after["epochs_planned"]) == (2, 2)
    shown = succeed("runs", "show", "runs/resnet-1", cwd=work).out
    assert re.search(rf"^test +read {after['readings']['test']} times; newest: accuracy ", shown, re.MULTILINE)


def interrupt_once_it_grows(file: Path, number: int) -> None:
    """Send this process a signal when a line is added to the file."""
    size = file.stat().st_size if file.exists() else 0

    def watch() -> None:
        end = time.monotonic() + 300
        while time.monotonic() < end:
            if file.exists() and file.stat().st_size > size:
                os.kill(os.getpid(), number)
                return
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(number: int, code: int, images: Path, tmp_path: Path) -> None:
    endless = ("--data", str(images), *TINY_RESNET, "--set", "training.epochs=5000", "--out", "my run")
    metrics = tmp_path / "my run" / "metrics.jsonl"
    for arguments in (("resnet", *endless), ("--resume", "my run")):
        interrupt_once_it_grows(metrics, number)
        stopped = dl7("train", *arguments, "--json", cwd=tmp_path)
        assert stopped.code == code
        assert stopped.out == ""
        assert stopped.err.endswith("stopped; saved in my run\ngo on with: dl7 train --resume 'my run'\n")
    assert "  resumed    after step " in stopped.err


# Data


def test_the_built_in_set_stands_in_and_that_is_said(tmp_path: Path, images: Path) -> None:
    """A recipe whose own data are on a hub that cannot be reached, and which names a small folder for that case."""
    recipe = succeed("recipes", "show", "resnet", cwd=tmp_path).out
    (tmp_path / "mine.toml").write_text(f'{recipe}\n[fallback]\n"data.source" = "{images}"\n', encoding="utf-8")
    arguments = ("train", "mine.toml", *TINY_RESNET, "--set", "training.epochs=1", "--json")
    for flags, environment, said in (
        ((), {"HF_ENDPOINT": "http://127.0.0.1:9"}, "neither on disk nor reachable"),
        (("--offline",), {}, "neither on disk nor looked for, being offline"),
    ):
        begin = time.monotonic()
        trained = succeed(*arguments, *flags, cwd=tmp_path, **environment)
        assert trained.document["data"] == str(images)
        first, second, *_ = trained.err.splitlines()
        assert first == f"the data uoft-cs/cifar10 is {said}: training on the built-in set {images} instead"
        assert second == "  for scores on the real data: dl7 train mine.toml --data FOLDER"
        assert time.monotonic() - begin < 120
    asked = dl7(*arguments, "--data", "uoft-cs/cifar10", "--offline", cwd=tmp_path)
    assert (asked.code, asked.out) == (1, ""), "data asked for by name are not replaced"
    assert "uoft-cs/cifar10" in asked.err


def test_shipped_recipes_fall_back_on_built_in_sets(tmp_path: Path) -> None:
    from dl7cli.cli.train import choose

    for name, source in (("resnet", "builtin:shapes"), ("seq2seq", "builtin:phrases")):
        assert choose(name, [], data=None, seed=None, offline=True).data.source == source


def test_data_list_looks_at_the_disk_only(tmp_path: Path) -> None:
    document = succeed("data", "list", "--json", cwd=tmp_path).document
    states = {entry["source"]: entry["state"] for entry in document["sources"]}
    assert states["builtin:shapes"] == states["builtin:phrases"] == "built in"
    assert states["uoft-cs/cifar10"] == states["bentrevett/multi30k"] == "not on disk"
    shown = succeed("data", "list", cwd=tmp_path).out.splitlines()
    assert len(shown) == 1 + len(states)


def test_data_info_finds_out_what_the_data_are(images: Path, pairs: Path, tmp_path: Path) -> None:
    about = succeed("data", "info", str(images), "--json", cwd=tmp_path).document
    assert about["task"] == "classification"
    assert about["classes"] == {"blue": 16, "red": 16}
    assert about["splits"] == {"train": 32, "test": 8}
    about = succeed("data", "info", str(pairs), "--json", cwd=tmp_path).document
    assert about["task"] == "translation"
    assert (about["from"], about["to"], about["splits"]["train"]) == ("en", "de", 72)
    assert about["examples"][1] == ["red blue old big", "rot blau alt groß"]
    reversed_languages = ("--set", "data.source_language=de", "--set", "data.target_language=en")
    about = succeed("data", "info", str(pairs), *reversed_languages, "--json", cwd=tmp_path).document
    assert about["examples"][1] == ["rot blau alt groß", "red blue old big"]
    shown = succeed("data", "info", str(pairs), cwd=tmp_path).out
    assert "red blue old big → rot blau alt groß" in shown


def test_finding_out_what_the_data_are_leaves_nothing_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("DL7_CACHE", str(cache))
    pyarrow.parquet.write_table(pyarrow.table({"en": ["one"], "de": ["eins"]}), tmp_path / "train.parquet")
    about = succeed("data", "info", str(tmp_path / "train.parquet"), "--json", cwd=tmp_path).document
    assert (about["task"], about["splits"]) == ("translation", {"train": 1})
    assert list(cache.iterdir()) == []


def test_data_get(images: Path, tmp_path: Path) -> None:
    assert succeed("data", "get", str(images), cwd=tmp_path).out == f"{images}: 32 train, 8 test\n"
    assert succeed("data", "get", str(images), "--json", cwd=tmp_path).document["splits"] == {"train": 32, "test": 8}
    failed = dl7("data", "get", str(images), "--task", "translation", cwd=tmp_path)
    assert (failed.code, failed.out) == (1, "")


# Bench


SMALL_BENCH = ("--set", "model.depth=8", "--set", "training.batch_size=16", "--seconds", "0.01", "--json")


def check_bench(document: dict[str, Any]) -> None:
    """Every number is one, rates and times of a step agree, and the choice is the fastest."""
    results = document["results"]
    assert document["rounds"] == 5
    for result in results:
        assert list(result["step_ms"]) == ["data", "forward", "backward", "optimiser"]
        assert all(value > 0 for value in result["step_ms"].values())
        assert len(result["rates"]) == 5
        assert result["rate"] == sorted(result["rates"])[2]
    best = max(results, key=lambda result: result["rate"])
    assert document["chosen"] == {key: best[key] for key in ("precision", "layout", "compiled")}
    said = float(document["reason"].split()[0].replace(",", ""))
    assert said == pytest.approx(best["rate"], abs=1)


def test_bench_times_a_classifier_in_every_setting(tmp_path: Path) -> None:
    flags = ("--data", "builtin:shapes", "--set", "training.compile=never", "--device", "cpu", *SMALL_BENCH)
    document = succeed("bench", "resnet", *flags, cwd=tmp_path).document
    check_bench(document)
    assert (document["task"], document["data"], document["unit"]) == ("classification", "builtin:shapes", "images/s")
    found = [(one["precision"], one["layout"], one["compiled"], one["compile_seconds"]) for one in document["results"]]
    assert sorted(found) == [
        (precision, layout, False, None) for precision in ("bf16", "fp32") for layout in ("channels-last", "nchw")
    ]
    assert not list(tmp_path.iterdir()), "no run is made"


def test_bench_times_a_translator_in_every_precision(tmp_path: Path) -> None:
    sizes = [("embedding_width", 16), ("encoder_width", 16), ("decoder_width", 16)]
    flags = [text for name, size in sizes for text in ("--set", f"model.{name}={size}")]
    flags += ["--data", "builtin:phrases", "--set", "training.batch_tokens=256", "--seconds", "0.01", "--device", "cpu"]
    document = succeed("bench", "seq2seq", *flags, "--json", cwd=tmp_path).document
    check_bench(document)
    assert document["unit"] == "target tokens/s"
    assert [(one["precision"], one["layout"], one["compiled"]) for one in document["results"]] == [
        ("fp32", None, False),
        ("bf16", None, False),
    ]


def test_the_table_of_bench_names_the_fastest(tmp_path: Path) -> None:
    flags = ("--data", "builtin:shapes", "--set", "training.compile=never", "--device", "cpu", *SMALL_BENCH[:-1])
    shown = succeed("bench", "resnet", *flags, cwd=tmp_path)
    header, *rows, last = shown.out.splitlines()
    assert header.split()[:3] == ["PRECISION", "LAYOUT", "COMPILED"]
    rates = {tuple(row.split()[:2]): float(row.split()[-1].replace(",", "")) for row in rows}
    assert len(rates) == 4
    named = re.fullmatch(r"fastest: (\S+), (\S+): .*", last)
    assert named is not None
    assert rates[named[1], named[2]] == max(rates.values())


def test_bench_times_the_built_in_set_without_other_data(tmp_path: Path) -> None:
    flags = ("--offline", "--set", "training.compile=never", "--device", "cpu", *SMALL_BENCH)
    shown = succeed("bench", "resnet", *flags, cwd=tmp_path)
    assert shown.document["data"] == "builtin:shapes"
    assert "timing steps on the built-in set builtin:shapes instead" in shown.err
    assert "dl7 bench resnet --data FOLDER" in shown.err


# Recipes, models, doctor


def test_recipes_show_prints_a_recipe_that_can_be_trained(tmp_path: Path) -> None:
    from dl7cli.recipe import resolve

    arguments = ("seq2seq", "--set", "model.dropout=0.25", "--seed", "7")
    shown = succeed("recipes", "show", *arguments, cwd=tmp_path)
    assert shown.out.startswith("# ")
    (tmp_path / "shown.toml").write_text(shown.out, encoding="utf-8")
    expected = resolve("seq2seq", ["model.dropout=0.25"], seed=7).recipe
    assert resolve(str(tmp_path / "shown.toml")).recipe == expected
    document = succeed("recipes", "show", *arguments, "--json", cwd=tmp_path).document
    assert document["recipe"]["model"]["dropout"] == 0.25
    assert document["fallback"]["data"]["source"] == "builtin:phrases"


def test_recipes_list_and_copy(tmp_path: Path) -> None:
    names = [recipe["name"] for recipe in succeed("recipes", "list", "--json", cwd=tmp_path).document["recipes"]]
    lines = succeed("recipes", "list", cwd=tmp_path).out.splitlines()
    assert [line.split()[0] for line in lines] == ["RECIPE", *names]
    copied = succeed("recipes", "copy", "resnet", cwd=tmp_path)
    assert copied.out == ""
    assert "dl7 train resnet.toml" in copied.err
    (tmp_path / "resnet.toml").write_text("mine", encoding="utf-8")
    failed = dl7("recipes", "copy", "resnet", cwd=tmp_path)
    assert failed.code == 1
    assert (tmp_path / "resnet.toml").read_text(encoding="utf-8") == "mine"


def test_models_are_those_of_the_paper(tmp_path: Path) -> None:
    """He et al. 2015, table 6: ResNet-20 has 0.27M parameters; and 41M multiply-adds, as its shapes give by hand."""
    listed = {model["recipe"]: model for model in succeed("models", "--json", cwd=tmp_path).document["models"]}
    resnet = listed["resnet"]
    assert resnet["depth"] == 20
    assert round(resnet["parameters"] / 1e6, 2) == 0.27
    stages = (
        32 * 32 * 9 * (3 * 16 + 6 * 16 * 16),
        16 * 16 * 9 * (16 * 32 + 5 * 32 * 32),
        8 * 8 * 9 * (32 * 64 + 5 * 64 * 64),
    )
    assert resnet["multiply_adds"] == sum(stages) + 64 * 10
    assert listed["seq2seq"]["multiply_adds"] is None
    shown = succeed("models", cwd=tmp_path).out
    assert f"{resnet['parameters']:,}" in shown
    assert "depth=28 preactivation=true shortcut=B widening=10" in shown


def test_models_are_listed_with_keys_that_make_them(tmp_path: Path) -> None:
    """Typed after `--set`, the keys of a wide network with 36.5M parameters (its paper's table 5) give that network."""
    from dl7cli.models.resnet import ResNet
    from dl7cli.recipe import resolve

    listed = {model["model"]: model for model in succeed("models", "--json", cwd=tmp_path).document["models"]}
    wide = listed["wrn-28-10"]
    assert wide["recipe"] is None
    assert (wide["depth"], round(wide["parameters"] / 1e6, 1)) == (28, 36.5)
    assert round(wide["multiply_adds"] / 1e9, 2) == 5.24
    keys = [f"model.{key}={json.dumps(value)}" for key, value in wide["keys"].items()]
    with torch.device("meta"):
        model = ResNet(classes=10, **resolve("resnet", keys).recipe.model.model_dump(exclude={"kind"}))
    assert sum(parameter.numel() for parameter in model.parameters()) == wide["parameters"]


def test_doctor(tmp_path: Path) -> None:
    report = succeed("doctor", "--offline", "--json", cwd=tmp_path).document
    assert report["dl7"] == __version__
    assert report["chosen"]["reason"]
    assert report["data"]["builtin:shapes"] is True
    assert report["data"]["uoft-cs/cifar10"] is False
    shown = succeed("doctor", "--offline", cwd=tmp_path).out
    assert report["chosen"]["reason"] in shown
