"""Bad input of every kind: always exit 0, 1 or 2, never a traceback, never half a file, nothing sent to the terminal.

The cases are drawn by hypothesis from a fixed seed: the first of each kind here, all of them behind `slow`.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fuzzing
import hypothesis
import pytest
import safetensors.torch
from hypothesis import strategies as st
from running import Outcome, dl7

from dl7cli import checkpoint

CASES = {
    "recipes": 400,
    "settings": 300,
    "decoding": 150,
    "translated": 250,
    "scored": 150,
    "json lines": 200,
    "pairs": 200,
    "images": 300,
    "checkpoints": 350,
    "weights": 100,
    "runs": 200,
    "trainings": 120,
}
SHARE = 12
"""One of so many cases is drawn without `slow`."""
_SENT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class Place(NamedTuple):
    """A folder to run in, and what lies there that no command may change."""

    folder: Path
    untouched: dict[str, tuple[int, int]]

    def put(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def run(self, *arguments: str, stdin: bytes = b"", data: bool = False, writes: tuple[str, ...] = ()) -> Outcome:
        """Run a command and hold it to what is promised; `data`: standard output may be anything."""
        outcome = dl7(*arguments, cwd=self.folder, stdin=stdin)
        assert outcome.code in (0, 1, 2), outcome
        assert "Traceback" not in outcome.err
        if outcome.code == 1:
            assert outcome.err.startswith("error: ") or "\nerror: " in outcome.err, outcome.err
        assert not _SENT.search(outcome.err), outcome.err
        if "--json" in arguments and outcome.code == 0:
            json.loads(outcome.out)
        elif not data:
            assert not _SENT.search(outcome.out), outcome.out
        self.check(writes)
        return outcome

    def check(self, writes: tuple[str, ...] = ()) -> None:
        seen = {name: mark for name, mark in marks(self.folder).items() if not name.startswith(writes or ("\0",))}
        assert seen == {name: mark for name, mark in self.untouched.items() if not name.startswith(writes or ("\0",))}


def marks(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns if path.is_file() else 0)
        for path in folder.rglob("*")
        if not path.relative_to(folder).parts[0].startswith("case")
    }


@pytest.fixture
def place(small_runs: Path, tmp_path: Path) -> Place:
    shutil.copytree(small_runs, tmp_path / "work")
    return Place(tmp_path / "work", marks(tmp_path / "work"))


every_kind_and_share = pytest.mark.parametrize(
    "share", [pytest.param(SHARE, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]
)


def draw(kind: str, share: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Check that many cases of a kind, the same ones every time."""

    @hypothesis.settings(
        max_examples=CASES[kind] // share,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def case(value: Any) -> None:
        check(value)

    case()


@every_kind_and_share
def test_recipes(share: int, place: Place) -> None:
    def check(case: tuple[bytes, bool]) -> None:
        content, as_json = case
        file = place.put("case.toml", content)
        place.run("recipes", "show", str(file), *["--json"] * as_json)

    draw("recipes", share, st.tuples(fuzzing.recipe_files(), st.booleans()), check)


@every_kind_and_share
def test_settings(share: int, place: Place) -> None:
    def check(case: tuple[str, list[str], str | None, bool]) -> None:
        name, settings, data, as_json = case
        flags = [text for setting in settings for text in ("--set", setting)]
        flags += ["--data", data] if data is not None else []
        place.run("recipes", "show", name, *flags, *["--json"] * as_json)

    names = st.sampled_from([*fuzzing.SHIPPED, "../resnet", "\x1b[31m", "x.toml", ""])
    settings = st.lists(fuzzing.settings(), min_size=1, max_size=3)
    draw("settings", share, st.tuples(names, settings, st.none() | fuzzing.arguments(9), st.booleans()), check)


@every_kind_and_share
def test_trainings(share: int, place: Place, tiny: dict[str, Path]) -> None:
    """Whatever is set, a training ends well or with an error, and what it leaves can be gone on with."""
    larger = ("data", "data.source", "training.epochs")  # than the rest of the test has time for
    changes = st.builds("{}={}".format, st.sampled_from(sorted({*fuzzing.KEYS} - {*larger})), fuzzing.SMALL_VALUES)

    def check(case: tuple[str, list[str], bool]) -> None:
        kind, settings, as_json = case
        flags = [text for setting in (*settings, "training.epochs=1") for text in ("--set", setting)]
        place.run("train", str(tiny[kind]), *flags, "--device", "cpu", "--out", "case/run", *["--json"] * as_json)
        folder = place.folder / "case" / "run"
        if folder.exists():
            assert checkpoint.load(folder / "last", training=True).training
            shutil.rmtree(folder)

    kinds, settings = st.sampled_from(["resnet", "seq2seq"]), st.lists(changes, min_size=1, max_size=3)
    draw("trainings", share, st.tuples(kinds, settings, st.booleans()), check)


@every_kind_and_share
def test_keys_of_decoding(share: int, place: Place) -> None:
    keys = [key for key in fuzzing.KEYS if key.startswith("decoding.")]

    def check(case: tuple[list[str], list[str]]) -> None:
        flags = [text for setting in case[0] for text in ("--set", setting)]
        place.run("translate", "--run", "seq2seq", *flags, *case[1], "0 1 2", data=True)

    more = st.sampled_from([[], ["--json"], ["--n-best", "3"], ["--sample"], ["--prefix", "1\x1b[31m"]])
    draw("decoding", share, st.tuples(st.lists(fuzzing.settings(keys), min_size=1, max_size=3), more), check)


@every_kind_and_share
def test_text_to_translate(share: int, place: Place) -> None:
    def check(case: tuple[bytes, list[str]]) -> None:
        content, flags = case
        outcome = place.run("translate", "--run", "seq2seq", "--beam", "1", *flags, stdin=content, data=True)
        if outcome.code == 0 and not flags:
            assert outcome.out.count("\n") == content.count(b"\n") + (not content.endswith(b"\n") and content != b"")
        written = place.folder / "case.out"
        assert written.exists() == ("--output" in flags and outcome.code == 0)
        written.unlink(missing_ok=True)

    flags = st.sampled_from([[], [], ["--json"], ["--output", "case.out"]])
    draw("translated", share, st.tuples(fuzzing.LINES, flags), check)


@every_kind_and_share
def test_pairs_to_score(share: int, place: Place) -> None:
    def check(case: tuple[bytes, list[str]]) -> None:
        file = place.put("case.tsv", case[0])
        outcome = place.run("score", "--run", "seq2seq", "--input", str(file), *case[1])
        written = place.folder / "case.out"
        assert written.exists() == ("--output" in case[1] and outcome.code == 0)
        written.unlink(missing_ok=True)

    flags = st.sampled_from([[], ["--json"], ["--output", "case.out"]])
    draw("scored", share, st.tuples(fuzzing.LINES, flags), check)


@every_kind_and_share
def test_json_lines_to_translate(share: int, place: Place) -> None:
    def check(content: bytes) -> None:
        file = place.put("case.jsonl", content)
        place.run("translate", "--run", "seq2seq", "--beam", "1", "--input", str(file), "--output", "case.out")

    draw("json lines", share, fuzzing.json_lines(("en", "source", "text", "translation", "score")), check)


@every_kind_and_share
def test_data_of_pairs(share: int, place: Place) -> None:
    def check(case: tuple[bytes, str, bool]) -> None:
        content, suffix, as_json = case
        file = place.put(f"case{suffix}", content)
        place.run("data", "info", str(file), *["--task", "translation"] * as_json, *["--json"] * as_json)

    content = fuzzing.json_lines(("en", "de", "translation"))
    files = st.tuples(content, st.just(".jsonl")) | st.tuples(fuzzing.LINES, st.sampled_from([".tsv", ".jsonl", ".en"]))
    draw("pairs", share, st.tuples(files, st.booleans()).map(lambda case: (*case[0], case[1])), check)


@every_kind_and_share
def test_images(share: int, place: Place) -> None:
    def check(case: tuple[bytes, str, bool]) -> None:
        content, name, as_json = case
        place.put(name, content)
        place.run("classify", "--run", "resnet", name, "resnet", *["--json"] * as_json)
        place.run("classify", "--run", "resnet", name, *["--json"] * as_json)
        os.remove(place.folder / name)

    names = st.sampled_from(["case.png", "case[bold].jpg", "case\x1b[31m\n.gif"])
    draw("images", share, st.tuples(fuzzing.image_files(), names, st.booleans()), check)


def copied(run: Path, to: Path) -> Path:
    """A copy of a run, made of links, in which single files can be replaced."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run, to)
    return to


COMMANDS = {
    "resnet": (["classify", "--run", "case", "image.png"], ["eval", "case"], ["eval", "case", "--json"]),
    "seq2seq": (["translate", "--run", "case", "0 1 2"], ["score", "--run", "case", "--json"], ["eval", "case"]),
}
RESUMED = (["train", "--resume", "case"], ["average", "case"], ["runs", "show", "case", "--json"])


@every_kind_and_share
def test_metadata_of_checkpoints(share: int, place: Place) -> None:
    originals = {
        (kind, which): json.loads((place.folder / kind / which / "checkpoint.json").read_bytes())
        for kind in COMMANDS
        for which in ("best", "last")
    }
    for (_, which), document in originals.items():
        if which == "last":
            document["progress"]["epoch"] = 0

    def check(case: tuple[str, str, dict[str, Any], list[str]]) -> None:
        kind, which, document, command = case
        copied(place.folder / kind, place.folder / "case")
        (place.folder / "case" / "result.json").unlink()
        (place.folder / "case" / which / "checkpoint.json").write_bytes(fuzzing.signed(document))
        if which == "best":
            place.run(*command, stdin=b"0 1\t1 0\n", data=True)
        else:
            place.run(*command, data=True)

    image = fuzzing.IMAGES[0]
    place.put("image.png", image)
    place = Place(place.folder, marks(place.folder))

    def cases(key: tuple[str, str]) -> st.SearchStrategy[Any]:
        kind, which = key
        commands = st.sampled_from(COMMANDS[kind] if which == "best" else RESUMED)
        return st.tuples(st.just(kind), st.just(which), fuzzing.changed(originals[key]), commands)

    draw("checkpoints", share, st.sampled_from(sorted(originals)).flatmap(cases), check)


@every_kind_and_share
def test_tensors_of_checkpoints(share: int, place: Place) -> None:
    place.put("image.png", fuzzing.IMAGES[0])
    place = Place(place.folder, marks(place.folder))
    files = {
        (kind, which, name): safetensors.torch.load((place.folder / kind / which / name).read_bytes())
        for kind in COMMANDS
        for which, name in (
            ("best", "model.safetensors"),
            ("last", "model.safetensors"),
            ("last", "training.safetensors"),
        )
    }

    def check(case: tuple[tuple[str, str, str], bytes, list[str]]) -> None:
        (kind, which, name), data, command = case
        copied(place.folder / kind, place.folder / "case")
        (place.folder / "case" / "result.json").unlink()
        checkpoint = place.folder / "case" / which
        document = json.loads((checkpoint / "checkpoint.json").read_bytes())
        document["files"][name] |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if which == "last":
            document["progress"] |= {"epoch": 0, "batch": 1, "step": 1}
        (checkpoint / "checkpoint.json").write_bytes(fuzzing.signed(document))
        (checkpoint / name).write_bytes(data)
        place.run(*command, stdin=b"0 1\t1 0\n", data=True)

    def cases(key: tuple[str, str, str]) -> st.SearchStrategy[Any]:
        commands = st.sampled_from(COMMANDS[key[0]] if key[1] == "best" else RESUMED[:1])
        return st.tuples(st.just(key), fuzzing.tensors(files[key]), commands)

    draw("weights", share, st.sampled_from(sorted(files)).flatmap(cases), check)


@every_kind_and_share
def test_files_of_runs(share: int, place: Place) -> None:
    names = ("metrics.jsonl", "evaluations.jsonl", "result.json", "environment.json", "recipe.toml")
    lines = {
        name: [json.loads(line) for line in (place.folder / "seq2seq" / name).read_text().splitlines()]
        for name in names[:2]
    }
    lines |= {name: [json.loads((place.folder / "seq2seq" / name).read_bytes())] for name in names[2:4]}

    @st.composite
    def content(draw: st.DrawFn, name: str) -> bytes:
        if name == "recipe.toml":
            return draw(fuzzing.recipe_files())
        written = [json.dumps(draw(fuzzing.changed(document))) for document in lines[name]]
        if draw(st.integers(0, 3)) == 0:
            written.append('{"scores": {"bleu": ' + draw(fuzzing.JSON_TEXT) + '}, "primary": "bleu"}')
        return "\n".join(written).encode()

    def check(case: tuple[str, bytes, list[str]]) -> None:
        name, data, command = case
        copied(place.folder / "seq2seq", place.folder / "case" / "runs" / "one")
        (place.folder / "case" / "runs" / "one" / name).write_bytes(data)
        Place(place.folder / "case", {}).run(*command, writes=("runs",))
        place.check()

    commands = st.sampled_from(
        [["runs", "list"], ["runs", "list", "--json"], ["runs", "show"], ["runs", "show", "--json"]]
    )
    cases = st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), content(name), commands))
    draw("runs", share, cases, check)
