"""A training that begins with the weights of a run: which it takes, and which it cannot."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from launching import WORKERS, together
from running import Silent, dl7, succeed

from dl7cli import checkpoint, tasks, training
from dl7cli.device import Runtime
from dl7cli.recipe import resolve

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")
STILL = ("--set", "optim.learning_rate=1e-30", "--set", "optim.weight_decay=0", "--set", "training.epochs=1")
"""Nothing is learnt that a weight in fp32 could hold."""


@pytest.fixture
def runs(small_runs: Path, tmp_path: Path) -> Path:
    """A folder with the runs `resnet` and `seq2seq`."""
    shutil.copytree(small_runs, tmp_path / "work")
    return tmp_path / "work"


@pytest.mark.parametrize("kind", ["resnet", "seq2seq"])
def test_the_first_weights_are_those_of_the_run(kind: str, runs: Path, tiny: dict[str, Path]) -> None:
    shown = succeed("train", str(tiny[kind]), *STILL, "--seed", "7", "--init", kind, "--out", "next", cwd=runs)
    assert f"  note       the first weights are those of {kind}\n" in shown.err
    given, taken = (checkpoint.load(runs / name / "best") for name in (kind, "next"))
    parameters = dict(tasks.load(runs / kind / "best", runtime=CPU).model.named_parameters())
    for name in parameters:  # the statistics of normalisation go on
        assert torch.equal(taken.weights[name], given.weights[name]), name
    assert taken.assets.get("vocabulary") == given.assets.get("vocabulary")
    other = succeed("train", str(tiny[kind]), *STILL, "--seed", "7", "--out", "other", cwd=runs)
    assert "first weights" not in other.err
    drawn = checkpoint.load(runs / "other" / "best").weights
    assert any(not torch.equal(drawn[name], given.weights[name]) for name in parameters)


def test_the_average_is_what_is_given(tiny: dict[str, Path], tmp_path: Path) -> None:
    averaged = ("--set", "training.ema_decay=0.9", "--set", "training.epochs=1")
    succeed("train", str(tiny["seq2seq"]), *averaged, "--out", "run", cwd=tmp_path)
    best, last = (checkpoint.load(tmp_path / "run" / name).weights for name in ("best", "last"))
    assert not all(torch.equal(best[name], last[name]) for name in best)
    succeed("train", str(tiny["seq2seq"]), *STILL, "--init", "run/last", "--out", "next", cwd=tmp_path)
    taken = checkpoint.load(tmp_path / "next" / "best").weights
    assert all(torch.equal(taken[name], best[name]) for name in best)


def test_a_translator_goes_on_with_its_vocabulary_on_other_sentences(runs: Path, tiny: dict[str, Path]) -> None:
    """Their own would be another one: they have other characters."""
    (runs / "letters").mkdir()
    lines = ["".join(letters) for letters in itertools.permutations("12ab", 4)]
    for split, language in itertools.product(("train", "validation", "test"), ("en", "de")):
        (runs / "letters" / f"{split}.{language}").write_text("".join(f"{line}\n" for line in lines))
    learnt = ("--data", "letters", "--set", "training.epochs=1")
    succeed("train", str(tiny["seq2seq"]), *learnt, "--init", "seq2seq", "--out", "next", cwd=runs)
    succeed("train", str(tiny["seq2seq"]), *learnt, "--out", "other", cwd=runs)
    given, taken, own = (checkpoint.load(runs / name / "best").assets for name in ("seq2seq", "next", "other"))
    assert taken["vocabulary"] == given["vocabulary"] != own["vocabulary"]
    assert taken["data_digest"] == own["data_digest"] != given["data_digest"]
    succeed("translate", "1 2", "--run", "next", cwd=runs)


def test_a_classifier_for_other_classes_has_a_last_layer_of_its_own(runs: Path, tiny: dict[str, Path]) -> None:
    shutil.copytree(tiny["resnet"].parent / "images", runs / "images")
    for split in ("train", "validation", "test"):
        (runs / "images" / split / "red").rename(runs / "images" / split / "pink")
        shutil.rmtree(runs / "images" / split / "blue")
    shown = succeed(
        "train", str(tiny["resnet"]), *STILL, "--data", "images", "--init", "resnet", "--out", "next", cwd=runs
    )
    assert "the first weights are those of resnet, but for the last layer: other classes\n" in shown.err
    given, taken = (checkpoint.load(runs / name / "best").weights for name in ("resnet", "next"))
    assert taken["classifier.weight"].shape[0] == 2
    kept = {name for name in given if name.endswith("weight") and name != "classifier.weight"}
    assert len(kept) > 8
    assert all(torch.equal(taken[name], given[name]) for name in kept)


@pytest.mark.parametrize("kind", ["resnet", "seq2seq"])
def test_it_is_told_where_they_have_learnt_from_what_is_kept_for_validation(
    kind: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    data = tiny[kind].parent / {"resnet": "images", "seq2seq": "pairs"}[kind]
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("validation*"))
    recipe = (str(tiny[kind]), "--data", "data", *STILL)
    succeed("train", *recipe, "--out", "run", cwd=tmp_path)
    told = "kept for validation now, perhaps\n"
    assert told not in succeed("train", *recipe, "--init", "run", "--out", "same", cwd=tmp_path).err
    other = succeed("train", *recipe, "--set", "data.validation_fraction=0.3", "--init", "run", cwd=tmp_path)
    assert told in other.err


def test_what_does_not_fit_is_refused(runs: Path, tiny: dict[str, Path]) -> None:
    images, pairs = map(str, tiny.values())
    hint = "hint: `dl7 train {0}/recipe.toml --init {0}` has the same model and vocabulary"
    for recipe, initial, changes, told in (
        (images, "seq2seq", (), "`seq2seq` is for translation, and recipe `resnet` for classification"),
        (images, "resnet", ("model.depth=14",), "the model of `resnet` is another one than the recipe's: see `"),
        (pairs, "seq2seq", ("model.decoder_width=9",), "the model of `seq2seq` is another one than the recipe's: see"),
        (pairs, "seq2seq", ("data.lowercase=true",), "`data.lowercase` of `seq2seq` is `False`, and of the recipe `T"),
        (pairs, "nothing", (), "there is no run `nothing`"),
    ):
        flags = [flag for change in changes for flag in ("--set", change)]
        failed = dl7("train", recipe, *flags, "--init", initial, "--out", "next", cwd=runs)
        assert (failed.code, failed.out) == (1, "")
        assert f"error: {told}" in failed.err
        assert initial == "nothing" or hint.format(initial) in failed.err
        assert not (runs / "next").exists()
    succeed("train", "seq2seq/recipe.toml", "--init", "seq2seq", "--set", "training.epochs=1", cwd=runs)
    for flags in (("--resume", "seq2seq"), (images, "--seeds", "2")):
        assert dl7("train", *flags, "--init", "seq2seq", cwd=runs).code == 2


def test_all_workers_begin_with_them(runs: Path, tiny: dict[str, Path]) -> None:
    flags = ("--init", "seq2seq", "--seed", "7", "--set", "training.epochs=1", "--set", "model.dropout=0")
    together("train", str(tiny["seq2seq"]), *flags, *WORKERS, "--out", "two", cwd=runs)
    recipe = resolve(str(tiny["seq2seq"]), ["training.epochs=1", "model.dropout=0"], seed=7).recipe
    initial = str(runs / "seq2seq")
    training.train(recipe, out=runs / "one", initial=initial, runtime=CPU, listener=Silent())
    one, two = (checkpoint.load(runs / name / "last").weights for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
