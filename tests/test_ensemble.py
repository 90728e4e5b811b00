"""Classifiers that answer together, against the mean of what each says of every image."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import dl7, succeed
from stopping import CPU

from dl7cli import runs, tasks
from dl7cli.runs import Run

ON_CPU = ("--device", "cpu", "--precision", "fp32")


@pytest.fixture
def three(whole: Callable[..., Run], tmp_path: Path) -> Path:
    """A folder with `1`, `2` and `3`, classifiers of one recipe by their seeds, the last with mirrored views."""
    for seed, more in ((1, ()), (2, ()), (3, ("evaluation.flip=true",))):
        shutil.copytree(whole("resnet", f"training.seed={seed}", *more).folder, tmp_path / str(seed))
    return tmp_path


def test_an_ensemble_says_the_mean_of_what_its_members_say(three: Path) -> None:
    flags = ("--with", "2", "--with", "3", "--output", "table.tsv", "--json")
    document = succeed("eval", "1", *flags, *ON_CPU, cwd=three).document
    members = [tasks.load(three / name / "best", runtime=CPU) for name in "123"]
    probabilities = sum(one.logits("test").double().softmax(dim=1) for one in members) / 3
    labels = members[0].labels("test")
    assert document["scores"]["accuracy"] == (probabilities.argmax(dim=1) == labels).double().mean().item()
    likelihood = -probabilities.gather(1, labels[:, None]).log().mean().item()
    assert document["details"]["negative_log_likelihood"] == pytest.approx(likelihood, rel=1e-5)
    alone = members[0].logits("test").double().softmax(dim=1)
    assert likelihood != pytest.approx(-alone.gather(1, labels[:, None]).log().mean().item(), rel=1e-3)
    rows = [line.split("\t") for line in (three / "table.tsv").read_text().splitlines()[1:]]
    torch.testing.assert_close(
        torch.tensor([float(row[3]) for row in rows]), probabilities.amax(dim=1).float(), rtol=0, atol=1e-5
    )
    for name, rest in (("1", ["2", "3"]), ("2", ["1", "3"]), ("3", ["1", "2"])):
        noted: dict[str, Any] = runs.evaluations(Run(three / name))[-1]
        assert (noted["run"], noted["others"], noted["scores"]) == (name, rest, document["scores"])
    assert document["others"] == ["2", "3"]
    assert not {"flip", "shift"} & document["details"].keys(), "each has views of its own"
    shown = succeed("eval", "1", "--with", "2", *ON_CPU, cwd=three).out
    assert shown.splitlines()[0].endswith("by 1 and 2 together")


def test_classifiers_of_other_classes_or_sizes_are_no_ensemble(three: Path, tiny: dict[str, Path]) -> None:
    images = three / "images"
    shutil.copytree(tiny["resnet"].parent / "images", images)
    for split in ("train", "validation", "test"):
        (images / split / "red").rename(images / split / "pink")
    short = ("--set", "training.epochs=1")
    succeed("train", str(tiny["resnet"]), *short, "--data", str(images), "--out", "pink", cwd=three)
    succeed("train", str(tiny["resnet"]), *short, "--set", "data.image_size=16", "--out", "large", cwd=three)
    for other, told in (
        ("pink", "`1` and `pink` differ in classes"),
        ("large", "`1` and `large` differ in image size"),
    ):
        failed = dl7("eval", "1", "--with", other, cwd=three)
        assert (failed.code, failed.out) == (1, "")
        assert f"error: {told}\nhint: train the runs of an ensemble on the same data" in failed.err
        assert len(runs.evaluations(Run(three / other))) == 1


def test_no_member_was_trained_on_what_another_has_kept(tiny: dict[str, Path], tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(tiny["resnet"].parent / "images", images, ignore=shutil.ignore_patterns("validation"))
    for name, kept in (("1", "0.5"), ("2", "0.2")):
        keys = ("--set", "training.epochs=1", "--set", f"data.validation_fraction={kept}")
        succeed("train", str(tiny["resnet"]), "--data", str(images), *keys, "--out", name, cwd=tmp_path)
    failed = dl7("eval", "1", "--with", "2", "--split", "validation", cwd=tmp_path)
    assert (failed.code, failed.out) == (1, "")
    assert f"`2` was trained on another part of `{images}` than is kept here for validation" in failed.err
    succeed("eval", "1", "--with", "2", cwd=tmp_path)
    part = ("--set", "data.validation_fraction=0.5", "--set", "data.train_examples=5", "--set", "training.epochs=1")
    succeed("train", str(tiny["resnet"]), "--data", str(images), *part, "--out", "part", cwd=tmp_path)
    succeed("eval", "1", "--with", "part", "--split", "validation", cwd=tmp_path)
