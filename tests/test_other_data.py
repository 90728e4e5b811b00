"""Evaluating on other data than a run was trained on: what may be a test, what is refused, how data is known again."""

import io
import shutil
from pathlib import Path

import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
from running import dl7, succeed

from dl7cli.data.images import read_images
from dl7cli.errors import UserError

SHORT = ("--set", "training.epochs=1")


@pytest.fixture
def runs(small_runs: Path, tmp_path: Path) -> Path:
    """A folder with the runs `resnet` and `seq2seq`."""
    shutil.copytree(small_runs, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def tested(tiny: dict[str, Path]) -> dict[str, list[str]]:
    """The lines of the sentence pairs' test split, by language."""
    folder = tiny["seq2seq"].parent / "pairs"
    return {language: (folder / f"test.{language}").read_text().splitlines() for language in ("en", "de")}


def test_a_single_file_or_a_folder_without_training_data_is_a_test_set(
    runs: Path, tested: dict[str, list[str]], tiny: dict[str, Path], tmp_path: Path
) -> None:
    """The same pairs in another form have the same scores, and the same digest."""
    own = succeed("eval", "seq2seq", "--json", cwd=runs).document
    rows = ["\t".join(pair) for pair in zip(*tested.values(), strict=True)]
    for name in ("news.tsv", "table/test.tsv", "other/test_2016.tsv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(f"{row}\n" for row in rows))
    (tmp_path / "parallel").mkdir()
    for language, lines in tested.items():
        (tmp_path / "parallel" / f"test.{language}").write_text("".join(f"{line}\n" for line in lines))
    for name in ("news.tsv", "table", "other", "parallel"):
        shown = succeed("eval", "seq2seq", "--data", str(tmp_path / name), "--json", cwd=runs)
        keys = ("split", "digest", "examples", "scores")
        assert [shown.document[key] for key in keys] == [own[key] for key in keys]
        assert (f"the test split is all of {tmp_path / name}" in shown.err) == (name == "news.tsv")
        if name != "news.tsv":
            about = succeed("data", "info", str(tmp_path / name), "--json", cwd=runs).document
            assert about["digests"] == {"test": own["digest"]}
            failed = dl7("train", str(tiny["seq2seq"]), "--data", str(tmp_path / name), cwd=runs)
            assert (failed.code, "has no train split" in failed.err) == (1, True)
    (tmp_path / "one.tsv").write_text(rows[0] + "\n")
    assert succeed("eval", "seq2seq", "--data", str(tmp_path / "one.tsv"), "--json", cwd=runs).document["examples"] == 1
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "sentences.txt").write_text("x\n")
    failed = dl7("eval", "seq2seq", "--data", str(tmp_path / "empty"), cwd=runs)
    assert (failed.code, "has no split: there is `sentences.txt`" in failed.err) == (1, True)


def test_a_folder_that_can_be_trained_on_is_read_as_for_training(
    runs: Path, tiny: dict[str, Path], tmp_path: Path
) -> None:
    """Whatever else lies in it, as what was pasted or translated."""
    own = succeed("eval", "seq2seq", "--json", cwd=runs).document
    shutil.copytree(tiny["seq2seq"].parent / "pairs", tmp_path / "pairs")
    (tmp_path / "pairs" / "test.tsv").write_text("1\t1\n")
    (tmp_path / "pairs" / "test_output.jsonl").write_text('{"en": "1", "de": "1"}\n')
    found = succeed("eval", "seq2seq", "--data", str(tmp_path / "pairs"), "--json", cwd=runs).document
    assert (found["digest"], found["scores"]) == (own["digest"], own["scores"])
    (tmp_path / "shards").mkdir()
    for number in range(2):
        (tmp_path / "shards" / f"test-0000{number}-of-00002.jsonl").write_text('{"en": "1 2", "de": "2 1"}\n' * 3)
    shards = succeed("eval", "seq2seq", "--data", str(tmp_path / "shards"), "--json", cwd=runs).document
    assert (shards["split"], shards["examples"]) == ("test", 6)
    (tmp_path / "two").mkdir()
    for year in (2016, 2017):
        (tmp_path / "two" / f"test_{year}.tsv").write_text("1\t1\n")
    failed = dl7("eval", "seq2seq", "--data", str(tmp_path / "two"), cwd=runs)
    assert (failed.code, "has no split: there is `test_2016`, `test_2017`" in failed.err) == (1, True)


def test_images_of_some_classes_are_a_test_set(runs: Path, tiny: dict[str, Path], tmp_path: Path) -> None:
    own = succeed("eval", "resnet", "--json", cwd=runs).document["details"]["classes"]
    for missing in ((), ("blue",), ("red", "green")):
        folder = tmp_path / f"without-{len(missing)}"
        shutil.copytree(tiny["resnet"].parent / "images" / "test", folder / "test")
        for name in missing:
            shutil.rmtree(folder / "test" / name)
        found = succeed("eval", "resnet", "--data", str(folder), "--json", cwd=runs).document["details"]["classes"]
        empty = {"examples": 0, "accuracy": None}
        assert found == [{**one, **empty} if one["class"] in missing else one for one in own]
        assert "has no train split" in dl7("train", "resnet", "--data", str(folder), cwd=runs).err
        with pytest.raises(UserError, match="has no train split"):
            read_images(str(folder))
        about = succeed("data", "info", str(folder), "--json", cwd=runs).document
        assert (list(about["splits"]), about["also_in_train"]) == (["test"], {})
    (tmp_path / "without-0" / "test" / "red").rename(tmp_path / "without-0" / "test" / "pink")
    failed = dl7("eval", "resnet", "--data", str(tmp_path / "without-0"), cwd=runs)
    assert (failed.code, "has other classes than the model" in failed.err) == (1, True)


def test_validation_data_of_another_name_are_no_reading_of_the_test_set(
    runs: Path, tiny: dict[str, Path], tmp_path: Path
) -> None:
    folder = tiny["seq2seq"].parent / "pairs"
    sides = [(folder / f"validation.{language}").read_text().splitlines() for language in ("en", "de")]
    (tmp_path / "new.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in zip(*sides, strict=True)))
    before = succeed("runs", "show", "seq2seq", "--json", cwd=runs).document["readings"]
    one = succeed("eval", "seq2seq", "--split", "validation", "--json", cwd=runs).document
    other = succeed("eval", "seq2seq", "--data", str(tmp_path / "new.tsv"), "--json", cwd=runs).document
    assert (other["digest"], other["split"]) == (one["digest"], "test")
    assert succeed("runs", "show", "seq2seq", "--json", cwd=runs).document["readings"] == {**before, "validation": 1}


def test_columns_that_the_recipe_names_are_those_of_other_data_too(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Where it has them: by its type, another column of labels would be taken."""
    images = read_images(str(tiny["resnet"].parent / "images"))
    for name, columns in (("own", ("image", "label", "odd")), ("other", ("image", "odd", "label"))):
        for split, them in images.splits.items():
            files = []
            for image in them.images[:20]:
                files.append(io.BytesIO())
                PIL.Image.fromarray(image).save(files[-1], "PNG")
            values = {
                "image": [{"bytes": file.getvalue(), "path": None} for file in files],
                "label": [0] * len(files),
                "odd": [number % 2 for number in range(len(files))],
            }
            (tmp_path / name).mkdir(exist_ok=True)
            table = pyarrow.table({column: values[column] for column in columns})
            pyarrow.parquet.write_table(table, tmp_path / name / f"{split}.parquet")
    recipe, named = str(tiny["resnet"]), ("--set", "data.label=odd")
    succeed("train", recipe, "--data", "own", *named, *SHORT, "--out", "run", cwd=tmp_path)
    own, other = (
        succeed("eval", "run", *flags, "--json", cwd=tmp_path).document for flags in ((), ("--data", "other"))
    )
    assert (other["digest"], other["scores"]) == (own["digest"], own["scores"])
    (tmp_path / "folder" / "test").mkdir(parents=True)
    for label in ("0", "1"):
        shutil.copytree(
            next((tiny["resnet"].parent / "images" / "test").iterdir()), tmp_path / "folder" / "test" / label
        )
    assert succeed("eval", "run", "--data", "folder", "--json", cwd=tmp_path).document["split"] == "test"
    with pytest.raises(UserError, match="has no column `colour`"):
        read_images(str(tmp_path / "other"), label="colour")
    read_images(str(tmp_path / "other"), label="colour", if_named=True)
    with pytest.raises(UserError, match="has no column `colour`"):  # and not what the other reading has kept
        read_images(str(tmp_path / "other"), label="colour")


def test_the_file_that_was_trained_on_is_no_test(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder, file = tiny["seq2seq"].parent / "pairs", tmp_path / "pairs.tsv"
    rows = zip(*((folder / f"train.{language}").read_text().splitlines() for language in ("en", "de")), strict=True)
    file.write_text("".join("\t".join(row) + "\n" for row in rows))
    for name, keys in (("run", ()), ("part", ("--set", "data.train_examples=10"))):
        succeed("train", str(tiny["seq2seq"]), "--data", str(file), *SHORT, *keys, "--out", name, cwd=tmp_path)
    for command in (("eval", "run"), ("compare", "run", "run/last"), ("eval", "part")):
        failed = dl7(*command, "--data", str(file), cwd=tmp_path)
        assert (failed.code, failed.out) == (1, "")
        told = f"`{file}` is what `{command[1]}` was trained on: it is no test\nhint: `--split validation` is"
        assert told in failed.err
        succeed(*command, "--data", str(file), "--split", "validation", cwd=tmp_path)


def test_what_is_kept_for_validation_of_data_that_has_grown_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    """It would be of other images, which the run may have been trained on."""
    images = tmp_path / "images"
    shutil.copytree(tiny["resnet"].parent / "images", images, ignore=shutil.ignore_patterns("validation"))
    succeed("train", str(tiny["resnet"]), "--data", str(images), *SHORT, "--out", "run", cwd=tmp_path)
    commands = (("eval", "run"), ("compare", "run", "run/last"))
    for command in commands:
        succeed(*command, "--split", "validation", cwd=tmp_path)
    shutil.copy(images / "train" / "red" / "0.png", images / "train" / "red" / "another.png")
    for command in commands:
        failed = dl7(*command, "--split", "validation", cwd=tmp_path)
        assert (failed.code, failed.out) == (1, "")
        assert f"error: `{images}` now has 24 training examples; the run began with 23\nhint: `--data" in failed.err
        succeed(*command, "--split", "validation", "--data", str(images), cwd=tmp_path)
        succeed(*command, cwd=tmp_path)


def test_validation_of_its_own_stays_what_it_is(tiny: dict[str, Path], tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(tiny["resnet"].parent / "images", images)
    succeed("train", str(tiny["resnet"]), "--data", str(images), *SHORT, "--out", "run", cwd=tmp_path)
    shutil.copy(images / "train" / "red" / "0.png", images / "train" / "red" / "another.png")
    succeed("eval", "run", "--split", "validation", cwd=tmp_path)


def test_data_is_known_again_by_its_digest(runs: Path, tiny: dict[str, Path], tmp_path: Path) -> None:
    for kind, name in (("resnet", "images"), ("seq2seq", "pairs")):
        source = str(tiny[kind].parent / name)
        digests = succeed("data", "info", source, "--json", cwd=runs).document["digests"]
        assert list(digests) == ["train", "validation", "test"]
        assert len({*digests.values()}) == 3
        for split in ("validation", "test"):
            assert succeed("eval", kind, "--split", split, "--json", cwd=runs).document["digest"] == digests[split]
        assert f"digests       train  {digests['train']}" in succeed("data", "info", source, cwd=runs).out
