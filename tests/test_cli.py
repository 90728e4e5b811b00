"""The command line as its users meet it: exit codes, flags, what is printed where, and commands that need no data."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from running import ENVIRONMENT, dl7, start, succeed

from dl7cli import __version__, recipe
from dl7cli.cli import app, console
from dl7cli.cli.progress import Plain
from dl7cli.errors import UserError

COMMON = "--device --gpus --precision --offline --json"
SURFACE = {
    "": "--version",
    "train": "RECIPE --data --set --seed --seeds --out --init --resume --deterministic --device --gpus --workers "
    "--nodes --node-rank --rendezvous --timeout --precision --offline --json",
    "eval": f"RUN --with --split --data --beam --length-penalty --set --rouge --output --plot {COMMON}",
    "compare": f"RUN --split --data --beam {COMMON}",
    "average": f"RUN --last {COMMON}",
    "translate": "TEXT --run --input --jsonl --output --beam --length-penalty --n-best --sample --seed --prefix "
    f"--set --attention --tree {COMMON}",
    "score": f"--run --input --output {COMMON}",
    "classify": f"IMAGE --run --top {COMMON}",
    "recipes": "",
    "recipes list": "--json",
    "recipes show": "NAME --data --set --seed --explain --json",
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
    "plot curves": "RUN --output",
    "doctor": "--offline --json",
}


def commands(command: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command and group with what is typed after `dl7` to get there."""
    command = command or typer.main.get_command(app)
    yield name, command
    for inner, found in getattr(command, "commands", {}).items():
        yield from commands(found, f"{name} {inner}".strip())


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
        (f"train resnet --data builtin:shapes --out {'x' * 300}", ["error: cannot write `xxx", "name too long"]),
        (f"plot activations --output {'x' * 300}/a.png", ["error: ", "cannot be written"]),
        ("train resnet --data ./missing", ["error: there is no file or folder `./missing`", "hint: "]),
        ("train resnet --data builtin:nothing", ["builtin:nothing"]),
        (
            "train resnet --data builtin:shapes --set model.stem=imagenet",
            ["error: `model.stem` is `imagenet`, for images of 64 pixels and more", "have 32", "hint: "],
        ),
        ("train --resume runs/nothing", ["error: there is no run `runs/nothing`", "hint: "]),
        ("train --resume runs/a,runs/b --seeds 2", ["error: there is no run `runs/a`", "hint: "]),
        (
            "train resnet --data builtin:shapes --seeds 2 --seed 2147483647",
            ["error: `--seed` has one mistake:", "`training.seed` is `2147483648`", "hint: "],
        ),
        (
            "train resnet --data builtin:shapes --seeds 2 --gpus 97,98",
            ["error: `--gpus 97,98`: these are not all to be had; seen here: ", "hint: give numbers"],
        ),
        ("compare runs/a runs/b", ["error: there is no run `runs/a`", "hint: "]),
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
        ("plot activations --output a.jpg", ["error: `a.jpg` ends in neither `.png` nor `.svg`", "hint: "]),
        ("plot activations --output no/a.png", ["error: `no/a.png` cannot be written: there is no folder `", "hint: "]),
        ("plot activations --output .", ["error: `.` ends in neither `.png` nor `.svg`"]),
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
        ("train --resume runs/x --data d --init y --seed 1 --out o", "--seed, --init, --out cannot be given"),
        (
            "train --resume runs/x --seeds 2 --seed 1 --out o --data d --set a=1",
            "--seed, --data, --set cannot be given",
        ),
        ("train resnet --seeds 2 --init runs/x", "--init cannot be given"),
        ("train resnet --seeds 0", "'--seeds'"),
        ("train resnet --seeds 2 --workers 2", "--workers cannot be given"),
        ("train resnet --depth 20", "No such option: --depth"),
        ("compare runs/a", "give two runs or more"),
        ("compare runs/a runs/b,", "a comma with no run"),
        ("train resnet --precision fp8", "'fp8'"),
        ("eval --split dev", "'dev'"),
        ("eval --beam 0", "'--beam'"),
        ("eval --output a.svg --plot ./a.svg", "another file for each of --output and --plot"),
        ("train resnet --timeout inf", "'--timeout'"),
        ("bench resnet --seconds inf", "'--seconds'"),
        ("translate --input x.txt hello", "not both"),
        ("translate --sample --beam 2 hello", "give one of them"),
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


@pytest.mark.parametrize("arguments", ["--version", "recipes list", "train --help"])
def test_a_full_disk_is_said_to_be(arguments: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dl7cli", *arguments.split()]
    with Path("/dev/full").open("w") as full:
        failed = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT)
    expected = b"error: the output cannot be written: no space left on device\n"
    assert (failed.returncode, failed.stderr) == (1, expected)


def test_a_program_that_is_ended_leaves_nothing_half_written(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from dl7cli.cli import main, translate\n"
        "translate.load = lambda *_, **__: print(os.listdir()) or os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.argv = ['dl7', 'translate', 'A dog', '--output', 'out']; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, env=ENVIRONMENT)
    assert (ended.returncode, ended.stderr) == (143, b"")
    assert b".out." in ended.stdout
    assert os.listdir(tmp_path) == []


# What is printed


def test_control_characters_are_shown_and_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    console.write("\x1b]0;title\x07 [red]ß\u2028日本\t.")
    console.row("a\tb\n", 1)
    console.error(UserError("\x1b[2J", hint="two\nlines"))
    printed = capsys.readouterr()
    assert printed.out == "\\x1b]0;title\\x07 [red]ß\\u2028日本\t.\na\\tb\\n\t1\n"
    assert printed.err == "error: \\x1b[2J\nhint: two\n  lines\n"


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


def test_errors_are_coloured_on_a_terminal_unless_unwanted(tmp_path: Path) -> None:
    coloured = dl7("recipes", "show", "x", cwd=tmp_path, terminal=True, TERM="xterm", NO_COLOR="")
    assert coloured.err.startswith("\x1b[31m\x1b[1merror:\x1b[0m there is no recipe `x`\n")
    plain = dl7("recipes", "show", "x", cwd=tmp_path, terminal=True, TERM="xterm", NO_COLOR="1")
    assert plain.err.startswith("error: there is no recipe `x`\n")


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


def test_a_recipe_is_shown_for_which_the_built_in_set_could_not_stand_in(tmp_path: Path) -> None:
    changes = ("--set", "model.attention=dot", "--set", "model.decoder_width=512")
    outcome = succeed("recipes", "show", "seq2seq", *changes, "--json", cwd=tmp_path)
    assert outcome.document["recipe"]["model"]["decoder_width"] == 512
    assert outcome.document["fallback"] is None
    assert outcome.err.startswith("note: recipe `seq2seq` with its keys for `builtin:phrases` has one mistake:")


def test_recipes_show_explains_every_key_in_a_file_that_means_the_same(tmp_path: Path) -> None:
    plain = succeed("recipes", "show", "resnet", cwd=tmp_path).out
    shown = succeed("recipes", "show", "resnet", "--explain", cwd=tmp_path).out
    assert tomllib.loads(shown) == tomllib.loads(plain)
    lines = shown.splitlines()
    flip = lines.index('flip = "random"')
    assert " ".join(line.removeprefix("# ") for line in lines[flip - 2 : flip]) == (
        "How training images are mirrored; `alternating`: half of them in one epoch, the other half in the next. "
        "[none | random | alternating]"
    )
    assert max(map(len, lines)) <= 120
    assert "# data.image: Name of the image column; found by its type where it is not given." in lines
    keys = succeed("recipes", "show", "resnet", "--explain", "--json", cwd=tmp_path).document["keys"]
    assert keys["model.depth"].startswith("Layers with weights")


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


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_leads_nowhere(closed: str, tmp_path: Path) -> None:
    """And not into a file that is opened in its place, here or in a process that is started."""

    def code(command: str) -> int:
        shell = ["sh", "-c", f'exec "$0" {command} {closed}', sys.executable]
        return subprocess.run(shell, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, timeout=60).returncode

    assert code("-m dl7cli recipes copy resnet mine.toml") == 0
    shipped = (recipe.folder() / "resnet.toml").read_text(encoding="utf-8")
    assert (tmp_path / "mine.toml").read_text(encoding="utf-8") == shipped
    assert code("-m dl7cli recipes show none-of-that-name") == 1
    (tmp_path / "inherited.py").write_text(
        "import os, subprocess, sys\n"
        "from dl7cli.cli import _open_closed_streams\n"
        "_open_closed_streams()\n"
        "looks = 'import os; [os.fstat(number) for number in range(3)]'\n"
        "sys.exit(subprocess.run([sys.executable, '-c', looks]).returncode)\n",
        encoding="utf-8",
    )
    assert code("inherited.py") == 0
