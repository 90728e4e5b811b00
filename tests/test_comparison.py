"""`dl7 compare`: what is tested against what, what is refused before anything is read, and what is said of it."""

import json
import os
import shutil
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Silent, dl7, succeed

from dl7cli import runs, tasks, training
from dl7cli.cli.compare import print_result, probability
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.metrics import bleu
from dl7cli.recipe import differences, resolve
from dl7cli.runs import Run
from dl7cli.significance import holm, paired_bleu, spread, welch
from dl7cli.tasks.classification import Classification
from dl7cli.tasks.translation import Translation

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")
ON_CPU = ("--device", "cpu", "--precision", "fp32")
RUNS = {
    **{f"a{seed}": ("resnet", ("training.epochs=1",), seed) for seed in (1, 2)},
    **{f"b{seed}": ("resnet", ("training.epochs=2", "model.width=8"), seed) for seed in (1, 2)},
    "t1": ("seq2seq", ("training.epochs=1",), 1),
    "t2": ("seq2seq", ("training.epochs=3", "optim.learning_rate=0.05"), 1),
    "lower": ("seq2seq", ("training.epochs=2", "data.lowercase=true"), 1),
}


@pytest.fixture(scope="module")
def trained(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    for name, (kind, changes, seed) in RUNS.items():
        recipe = resolve(str(tiny[kind]), changes, seed=seed).recipe
        training.train(recipe, out=folder / name, runtime=CPU, listener=Silent())
    return folder


@pytest.fixture
def work(trained: Path, work: Path) -> Path:
    """An empty folder to be in but for the runs."""
    shutil.copytree(trained, work, dirs_exist_ok=True)
    return work


def readings(work: Path) -> dict[str, int]:
    return {name: len(runs.evaluations(Run(work / name))) for name in RUNS}


def right(folder: Path, split: str) -> list[bool]:
    """Whether each image is classified right, one at a time."""
    task = tasks.load(folder, runtime=CPU)
    assert isinstance(task, Classification)
    images, labels = task.images.split(split)
    scores = task._scorer()
    return [int(scores(images[at : at + 1]).argmax()) == int(labels[at]) for at in range(len(labels))]


def test_classifiers_by_mcnemar_on_the_same_images(work: Path) -> None:
    for split, flags in (("test", ()), ("validation", ("--split", "validation"))):
        before = readings(work)
        document = succeed("compare", "a1", "b1", "--json", *flags, *ON_CPU, cwd=work).document
        first, second = right(Path("a1/best"), split), right(Path("b1/best"), split)
        (one,) = document["comparisons"]
        only = [sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((first, second), (second, first))]
        assert (one["only_first"], one["only_second"]) == tuple(only)
        p_value = min(1.0, 2 * sum(comb(sum(only), number) for number in range(min(only) + 1)) / 2 ** sum(only))
        assert (one["p_value"], one["adjusted_p_value"]) == (p_value, p_value)
        assert one["difference"] == pytest.approx((sum(second) - sum(first)) / len(first))
        assert (document["task"], document["test"], document["split"]) == ("classification", "mcnemar", split)
        assert (document["examples"], document["primary"], document["signature"]) == (7, "accuracy", None)
        assert [side["values"] for side in document["sides"]] == [[sum(first) / 7], [sum(second) / 7]]
        assert [side["interval"] for side in document["sides"]] == [None, None], "of one run"
        assert readings(work) == {name: count + (name in ("a1", "b1")) for name, count in before.items()}
        for name, own in (("a1", first), ("b1", second)):
            noted = runs.evaluations(Run(Path(name)))[-1]
            assert (noted["split"], noted["scores"]["accuracy"]) == (split, sum(own) / 7)
            assert (noted["run"], noted["checkpoint"]) == (name, "best")


def test_translators_by_sacrebleu_on_the_same_sentences(work: Path) -> None:
    document = succeed("compare", "t1", "t2", "--beam", "1", "--json", *ON_CPU, cwd=work).document
    texts = []
    for name, side in zip(("t1", "t2"), document["sides"], strict=True):
        task = tasks.load(Path(name, "best"), runtime=CPU)
        assert isinstance(task, Translation)
        references = [target for _, target in task.pairs.split("test")]
        texts.append(task.translations("test", task.recipe.decoding.updated(method="beam", beam=1)))
        assert side["values"] == [bleu(texts[-1], references).score]
        noted = runs.evaluations(Run(Path(name)))[-1]
        assert (noted["beam"], noted["split"], noted["scores"]["bleu"]) == (1, "test", side["mean"])
    (expected,) = paired_bleu(texts[0], [texts[1]], references)
    (one,) = document["comparisons"]
    assert (document["test"], document["primary"]) == ("approximate randomisation", "bleu")
    assert one["difference"] == expected.difference
    assert (one["p_value"], one["bootstrap_p_value"]) == (expected.randomisation, expected.bootstrap)
    assert tuple(one["signatures"].values()) == expected.signatures
    assert document["signature"].startswith("nrefs:1|case:mixed|")


def test_translators_of_which_one_knows_no_case_are_compared_without(work: Path) -> None:
    document = succeed("compare", "t2", "lower", "--json", *ON_CPU, cwd=work).document
    assert document["primary"] == "bleu_lowercase"
    assert "|case:lc|" in document["signature"]
    (one,) = document["comparisons"]
    assert all("|case:lc|" in signature for signature in one["signatures"].values())
    assert one["difference"] == pytest.approx(document["sides"][1]["mean"] - document["sides"][0]["mean"])
    for name, side in zip(("t2", "lower"), document["sides"], strict=True):
        assert runs.evaluations(Run(Path(name)))[-1]["scores"]["bleu_lowercase"] == side["mean"]


def test_several_seeds_by_their_scores(work: Path) -> None:
    document = succeed("compare", "a1,a2", "b1,b2", "--json", *ON_CPU, cwd=work).document
    values = [[sum(right(Path(name, "best"), "test")) / 7 for name in side] for side in (("a1", "a2"), ("b1", "b2"))]
    assert [side["values"] for side in document["sides"]] == values
    assert [side["seeds"] for side in document["sides"]] == [[1, 2], [1, 2]]
    assert [side["name"] for side in document["sides"]] == ["a1,a2", "b1,b2"]
    for side, own in zip(document["sides"], values, strict=True):
        mean, deviation, interval = spread(own)
        assert interval is not None
        assert (side["mean"], side["standard_deviation"], side["interval"]) == (mean, deviation, list(interval))
    expected = welch(*values)
    (one,) = document["comparisons"]
    assert (document["test"], one["p_value"]) == ("welch", expected.p_value)
    assert (one["difference"], one["interval"]) == (expected.difference, list(expected.interval))
    assert one["degrees_of_freedom"] == expected.freedom
    assert one["recipe_differences"] == {"training.epochs": [1, 2], "model.width": [16, 8]}


def test_several_against_the_first_by_holm(work: Path) -> None:
    document = succeed("compare", "a1", "b1", "b2", "a1/last", "--json", *ON_CPU, cwd=work).document
    found = document["comparisons"]
    assert [(one["first"], one["second"]) for one in found] == [("a1", "b1"), ("a1", "b2"), ("a1", "a1/last")]
    assert [one["adjusted_p_value"] for one in found] == holm([one["p_value"] for one in found])
    for one, other in zip(found[:2], ("b1", "b2"), strict=True):
        alone = succeed("compare", "a1", other, "--json", *ON_CPU, cwd=work).document["comparisons"][0]
        assert (one["p_value"], one["difference"]) == (alone["p_value"], alone["difference"])
    assert [one["recipe_differences"].get("training.seed") for one in found] == [None, [1, 2], None]
    assert found[2]["recipe_differences"] == {}
    assert runs.evaluations(Run(Path("a1")))[1]["checkpoint"] == "best"
    assert runs.evaluations(Run(Path("a1")))[2]["checkpoint"] == "last"


def test_what_cannot_be_compared_is_refused_before_anything_is_read(
    work: Path, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny["resnet"].parent / "images"
    shutil.copytree(other, "images")
    recipe = resolve(str(tiny["resnet"]), ["training.epochs=1", "data.source=images"]).recipe
    training.train(recipe, out=Path("elsewhere"), runtime=CPU, listener=Silent())
    before = readings(work)
    monkeypatch.setattr(Classification, "logits", None)
    monkeypatch.setattr(Translation, "translations", None)
    for arguments, expected in (
        (("a1", "t1"), "`a1` is for classification, `t1` for translation"),
        (("a1", "elsewhere"), f"`a1` has the data `{other}`, `elsewhere` has `images`"),
        (("a1", "a1"), "`a1` is named twice"),
        (("a1", "a1/best"), "`a1` is named twice"),
        (("a1,a2", "b1"), "some sides have one run and others several"),
        (("a1", "b1,b2"), "some sides have one run and others several"),
        (("a1,b2", "b1,a2"), "`a1` and `b2` are of different recipes"),
        (("a1,a1/last", "b1,b2"), "`a1` and `a1/last` both have the seed 1"),
        (("a1", "b1", "--beam", "2"), "run `a1` is a classifier: it has no beam"),
        (("a1", "nothing"), "there is no run `nothing`"),
        (("a1", "b1", "--data", "builtin:shapes"), "has other classes than the model was trained on"),
    ):
        failed = dl7("compare", *arguments, "--json", *ON_CPU, cwd=work)
        assert (failed.code, failed.out) == (1, ""), arguments
        assert expected in failed.err
        assert "\nhint: " in failed.err
    os.chmod("b1/evaluations.jsonl", 0o400)
    if not os.access("b1/evaluations.jsonl", os.W_OK):  # as root it may be written all the same
        failed = dl7("compare", "a1", "b1", *ON_CPU, cwd=work)
        assert "cannot write `b1/evaluations.jsonl`" in failed.err
    assert readings(work) == before
    for arguments in (("a1",), ("a1", "b1,"), ("a1", "")):
        assert dl7("compare", *arguments, *ON_CPU, cwd=work).code == 2


def test_splits_that_are_divided_in_other_ways_are_not_compared(work: Path, tiny: dict[str, Path]) -> None:
    """Where the data has no validation split, how much is kept for it is for the recipe to say."""
    source = Path("undivided")
    shutil.copytree(tiny["resnet"].parent / "images", source)
    shutil.rmtree(source / "validation")
    for name, fraction in (("tenth", 0.1), ("quarter", 0.25)):
        changes = ["training.epochs=1", f"data.validation_fraction={fraction}", f"data.source={source}"]
        training.train(resolve(str(tiny["resnet"]), changes).recipe, out=Path(name), runtime=CPU, listener=Silent())
    failed = dl7("compare", "tenth", "quarter", "--split", "validation", *ON_CPU, cwd=work)
    assert failed.code == 1
    assert "the validation split of `tenth` is not that of `quarter`" in failed.err
    done = succeed("compare", "tenth", "quarter", "--json", *ON_CPU, cwd=work)
    assert done.document["split"] == "test", "which is the same"
    assert done.err.count("kept for validation") == 2


def test_what_was_trained_differs_whatever_the_comparison_reads(work: Path, tiny: dict[str, Path]) -> None:
    """And no matter what the recipes are called."""
    source = tiny["resnet"].parent / "images"
    shutil.copytree(source, "copied")
    shutil.copy(tiny["resnet"], "other.toml")
    changes = ["training.epochs=1", "data.source=copied"]
    training.train(resolve("other.toml", changes).recipe, out=Path("c"), runtime=CPU, listener=Silent())
    document = succeed("compare", "a1", "c", "--data", str(source), "--json", *ON_CPU, cwd=work).document
    assert document["comparisons"][0]["recipe_differences"] == {"data.source": [str(source), "copied"]}


def test_keys_of_which_one_model_has_none() -> None:
    found = differences(resolve("seq2seq").recipe, resolve("transformer-tiny").recipe)
    assert found["model.kind"] == ["seq2seq", "transformer"]
    assert (found["model.width"], found["model.decoder_width"]) == ([None, 128], [256, None])
    assert "name" not in found


def test_a_split_that_is_not_there(work: Path, tiny: dict[str, Path]) -> None:
    for kind, names in (("images", ("a1", "b1")), ("pairs", ("t1", "t2"))):
        shutil.copytree(tiny["resnet"].parent / kind, kind)
        for path in Path(kind).glob("test*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        failed = dl7("compare", *names, "--data", kind, *ON_CPU, cwd=work)
        assert f"`{kind}` has no split `test`" in failed.err


# What is said


def result_of(test: str, comparisons: Sequence[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    names = [comparisons[0]["first"], *(one["second"] for one in comparisons)]
    means = changes.pop("means")
    sides = [{"name": name, "runs": name.split(","), "mean": mean} for name, mean in zip(names, means, strict=True)]
    return {
        **{"task": "classification", "data": "d", "split": "test", "examples": 1000, "primary": "accuracy"},
        **{
            "signature": None,
            "test": test,
            "sides": sides,
            "comparisons": list(comparisons),
            "seconds": 1.0,
            **changes,
        },
    }


def one_of(second: str, p_value: float, better: str | None, **changes: Any) -> dict[str, Any]:
    values = {"first": "A", "second": second, "p_value": p_value, "adjusted_p_value": p_value, "better": better}
    values["recipe_differences"] = {"optim.name": ["sgd", "adamw"]}
    return {**values, **changes}


PLACE = "on the test split of d (1,000 images, 1s)"
DIFFERING = '  their recipes differ in optim.name ("adamw" against "sgd")'


@pytest.mark.parametrize(
    ("better", "p_value", "said"),
    [
        ("B", 0.00312, "B is better than A: 92.30 % against 91.10 %, p = 0.00312"),
        ("B", 1e-9, "B is better than A: 92.30 % against 91.10 %, p < 0.001"),
        ("A", 0.0213, "B is worse than A: 92.30 % against 91.10 %, p = 0.0213"),
        (None, 0.4, "no difference shown between B and A: 92.30 % against 91.10 %, p = 0.4"),
    ],
)
def test_one_sentence(better: str | None, p_value: float, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    one = one_of("B", p_value, better, only_first=1012, only_second=34)
    print_result(result_of("mcnemar", [one], means=[0.911, 0.923]))
    basis = "  right by B alone 34, by A alone 1,012: McNemar's exact test"
    assert capsys.readouterr().out.splitlines() == [said, basis, DIFFERING, PLACE]


def test_a_sentence_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    signatures = {"signatures": {"approximate_randomisation": "ar:10000", "bootstrap": "bs:1000"}}
    one = one_of("B", 0.01, "B", adjusted_p_value=0.02, bootstrap_p_value=0.001, **signatures)
    other = one_of("C", 0.3, None, bootstrap_p_value=0.2, **signatures)
    changes = {"task": "translation", "primary": "bleu", "signature": "nrefs:1", "means": [37.204, 38.0, 37.5]}
    print_result(result_of("approximate randomisation", [one, other], **changes))
    assert capsys.readouterr().out.splitlines() == [
        "B is better than A: 38.00 BLEU against 37.20 BLEU, p = 0.02",
        "  approximate randomisation; by the paired bootstrap p = 0.001; by itself p = 0.01, raised by Holm's method",
        DIFFERING,
        "no difference shown between C and A: 37.50 BLEU against 37.20 BLEU, p = 0.3",
        "  approximate randomisation; by the paired bootstrap p = 0.2; by itself p = 0.3, raised by Holm's method",
        DIFFERING,
        "on the test split of d (1,000 sentence pairs, 1s)",
        "signature nrefs:1",
        "signature ar:10000 (approximate randomisation)",
        "signature bs:1000 (bootstrap)",
    ]


def test_without_case_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    one = one_of("B", 0.01, "B", bootstrap_p_value=0.001, signatures={"bootstrap": "bs:1000"})
    changes = {"task": "translation", "primary": "bleu_lowercase", "signature": "nrefs:1", "means": [37.2, 38.0]}
    print_result(result_of("approximate randomisation", [one], **changes))
    said = "B is better than A: 38.00 BLEU without case against 37.20 BLEU without case, p = 0.01"
    assert capsys.readouterr().out.splitlines()[0] == said


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, "their recipes are alike"),
        (
            {"model.kind": ["lstm", "ä"], "model.width": [None, 0.5]},
            'differ in model.kind ("ä" against "lstm"), model.width (0.5 against null)',
        ),
        ({"data.source": ["x", 99 * "y"]}, 'differ in data.source ("' + 58 * "y" + '… against "x")'),
        ({f"data.k{at}": [at, -at] for at in range(1, 8)}, "data.k5 (-5 against 5) and 2 more (--json has all)"),
    ],
)
def test_what_the_recipes_differ_in(keys: dict[str, list[Any]], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    one = one_of("B", 0.2, None, only_first=1, only_second=2, recipe_differences=keys)
    print_result(result_of("mcnemar", [one], means=[0.9, 0.91]))
    assert capsys.readouterr().out.splitlines()[2].endswith(told)


def test_how_many_runs_there_were(capsys: pytest.CaptureFixture[str]) -> None:
    one = one_of("B1,B2,B3", 0.2, None, interval=[-0.0012, 0.0234], degrees_of_freedom=2.5, first="A1,A2")
    print_result(result_of("welch", [one], means=[0.9, 0.91]))
    said, basis, _, _ = capsys.readouterr().out.splitlines()
    assert said == "no difference shown between B1,B2,B3 and A1,A2: 91.00 % against 90.00 %, p = 0.2"
    assert basis == "  Welch's t-test of 3 and 2 runs, by whose 95 % interval the difference is -0.12 to +2.34"


def test_the_readings_are_told(work: Path) -> None:
    done = succeed("compare", "a1,a2", "b1,b2", *ON_CPU, cwd=work)
    assert done.err == "note: the test split was read 4 times, once by each run\n"
    alone = succeed("compare", "a1", "b1", *ON_CPU, cwd=work)
    assert "note: this is of these models; of two recipes, several seeds of each tell" in alone.err
    shown = succeed("runs", "show", "b2", cwd=work).out
    assert "\ntest        read 2 times, last 20" in shown, "training and this"
    assert json.loads(succeed("runs", "show", "b2", "--json", cwd=work).out)["readings"] == {"test": 2}


def test_probabilities() -> None:
    assert [probability(value) for value in (1.0, 0.05, 0.04999, 0.001, 0.00099)] == [
        *("p = 1", "p = 0.05", "p = 0.05", "p = 0.001"),
        "p < 0.001",
    ]


def test_damage_is_named(work: Path) -> None:
    Path("b1/best/model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="b1/best"):
        training.compare([["a1"], ["b1"]], runtime=CPU)
