"""Training: the rate of each step, what is saved as best, what is written, and what stops it."""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from running import KEYS
from torch import Tensor

from dl7cli import checkpoint, runs, tasks, training
from dl7cli.checkpoint import Progress
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.metrics import Scores
from dl7cli.recipe import resolve, shipped
from dl7cli.runs import Run
from dl7cli.tasks.classification import Classification
from dl7cli.tasks.translation import Translation
from dl7cli.training import session
from dl7cli.training.loop import Trainer, fit
from dl7cli.training.optimisation import learning_rate

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")
KINDS = ("resnet", "seq2seq")


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.plans: list[training.Plan] = []
        self.steps: list[training.Step] = []
        self.epochs: list[training.Epoch] = []
        self.notes: list[str] = []

    def plan(self, plan: training.Plan) -> None:
        self.plans.append(plan)

    def step(self, step: training.Step) -> None:
        self.steps.append(step)

    def epoch(self, epoch: training.Epoch) -> None:
        self.epochs.append(epoch)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, what: str, done: int, total: int) -> None:
        pass


pytestmark = pytest.mark.usefixtures("work")


@pytest.fixture
def train(tiny: dict[str, Path]) -> Callable[..., tuple[Run, dict[str, Any], Heard]]:
    """`train(kind, *overrides)` trains a tiny recipe; with what `--json` prints, and what was heard of it."""

    def run(kind: str, *overrides: str) -> tuple[Run, dict[str, Any], Heard]:
        heard = Heard()
        recipe = resolve(str(tiny[kind]), overrides).recipe
        result = training.train(recipe, out=Path("run"), runtime=CPU, listener=heard)
        return Run(Path("run")), result, heard

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_has_its_rate(kind: str, tiny: dict[str, Path]) -> None:
    task = tasks.build(resolve(str(tiny[kind])).recipe, runtime=CPU)
    trainer = Trainer.of(task)
    steps = sum(task.steps(epoch) for epoch in range(3))
    seen = []
    for report in fit(task, trainer, start=Progress()):
        if report.scores is None:
            expected = learning_rate(task.recipe.optim, report.progress.step - 1, steps)
            assert report.learning_rate == expected
            assert [group["lr"] for group in trainer.optimiser.param_groups] == [expected] * 2
            seen.append(report.progress.step)
    assert seen == list(range(1, steps + 1))


@pytest.mark.parametrize(("clip", "overrides"), [(True, ["optim.clip_norm=0.01"]), (False, [])])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_rate_times_the_gradient_clipped(
    kind: str, clip: bool, overrides: list[str], tiny: dict[str, Path]
) -> None:
    plain = ["optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.schedule=constant", "optim.warmup=0"]
    rate = ["optim.learning_rate=0.5", "optim.clip_norm=0"]
    task = tasks.build(resolve(str(tiny[kind]), [*plain, *rate, *overrides]).recipe, runtime=CPU)
    before = [parameter.detach().clone() for parameter in task.model.parameters()]
    report = next(fit(task, Trainer.of(task), start=Progress()))
    moved = sum((new - old).double().pow(2).sum() for new, old in zip(task.model.parameters(), before, strict=True))
    norm = report.gradient_norm.item()
    assert norm > 0.02
    assert math.sqrt(moved.item()) == pytest.approx(0.5 * (0.01 if clip else norm), rel=1e-3)
    assert (report.progress.step, report.progress.batch, report.learning_rate) == (1, 1, 0.5)


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_builds_and_takes_a_step(name: str, tiny: dict[str, Path]) -> None:
    kind = "seq2seq" if resolve(name).recipe.task == "translation" else "resnet"
    data = resolve(str(tiny[kind])).recipe.data.source
    images = ["data.image_size=24", "training.batch_size=4", "data.crop_padding=1"]
    smaller = {"resnet": images, "seq2seq": ["training.batch_tokens=64", "data.vocabulary_size=32"]}[kind]
    task = tasks.build(resolve(name, [*smaller, "training.epochs=1"], data=data).recipe, runtime=CPU)
    before = {key: value.detach().clone() for key, value in task.model.named_parameters()}
    report = next(fit(task, Trainer.of(task), start=Progress()))
    assert math.isfinite(report.loss.item())
    trained = {key for key, value in task.model.named_parameters() if value.requires_grad}
    # A plain network of 56 layers may leave some of its parameters without any gradient.
    moved = {key for key, value in task.model.named_parameters() if not torch.equal(value, before[key])}
    assert moved <= trained
    assert len(moved) > 0.9 * len(trained)


def test_the_reported_loss_is_a_mean_over_examples(tiny: dict[str, Path]) -> None:
    task = tasks.build(resolve(str(tiny["seq2seq"]), ["model.dropout=0"]).recipe, runtime=CPU)
    total, words = task.loss(next(task.batches(0)))
    report = next(fit(task, Trainer.of(task), start=Progress()))
    assert report.loss.item() == pytest.approx(total.item() / words)
    assert report.examples == words
    vocabulary = task.pairs.source_vocabulary
    assert report.loss.item() == pytest.approx(math.log(len(vocabulary)), rel=0.2), "nothing is learnt yet"


# What is best


@pytest.mark.parametrize(
    ("scores", "best"), [([0.2, 0.9, 0.5], 2), ([0.3, 0.2, 0.1], 1), ([0.1, 0.2, 0.3], 3), ([0.0, 0.7, 0.7], 2)]
)
def test_the_best_epoch_is_that_of_validation(
    scores: list[float], best: int, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[dict[str, Tensor]] = []
    evaluated: list[str] = []
    evaluate = Classification.evaluate

    def validate(task: Classification) -> Scores:
        weights.append({name: value.clone() for name, value in task.model.state_dict().items()})
        return Scores("accuracy", {"accuracy": scores[len(weights) - 1]}, 7)

    def counted(task: Classification, split: str) -> Scores:
        evaluated.append(split)
        return evaluate(task, split)

    monkeypatch.setattr(Classification, "validate", validate)
    monkeypatch.setattr(Classification, "evaluate", counted)
    run, result, heard = train("resnet")
    assert evaluated == ["test"], "the test split is read once, and not to choose by"
    assert result["best_epoch"] == best
    kept = checkpoint.load(run.best)
    assert (kept.progress.epoch, kept.progress.best, kept.scores) == (best, max(scores), {"accuracy": max(scores)})
    assert all(torch.equal(kept.weights[name], value) for name, value in weights[best - 1].items())
    last = checkpoint.load(run.last).weights
    assert all(torch.equal(last[name], value) for name, value in weights[-1].items())
    firsts = [scores[number] > max(scores[:number], default=-1) for number in range(3)]
    assert [epoch.best for epoch in heard.epochs] == firsts
    task = tasks.load(run.best, runtime=CPU)
    assert result["scores"] == evaluate(task, "test").values, "what is evaluated is the best epoch"


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_epoch_is_kept_where_the_recipe_says_so(
    kind: str, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter([0.5, 0.7, 0.3])
    task = {"resnet": Classification, "seq2seq": Translation}[kind]
    monkeypatch.setattr(task, "validate", lambda task: Scores("accuracy", {"accuracy": next(given)}, 7))
    run, result, heard = train(kind, "training.select=last")
    assert result["best_epoch"] == 3
    best, last = checkpoint.load(run.best), checkpoint.load(run.last)
    assert all(torch.equal(value, last.weights[name]) for name, value in best.weights.items())
    assert best.scores == {"accuracy": 0.3}
    assert not any(epoch.best for epoch in heard.epochs), "none is called so"
    assert result["scores"] == tasks.load(run.last, runtime=CPU).evaluate("test").values
    monkeypatch.setattr(runs.folder, "RUNS", Path())
    assert [summary.best for summary in runs.listing()] == [0.3]


@pytest.mark.parametrize("kind", KINDS)
def test_the_test_split_stays_unread_where_the_recipe_says_so(
    kind: str, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, result, _ = train(kind, "training.final_split=validation", "training.epochs=1")
    assert [line["split"] for line in runs.evaluations(run)] == ["validation"] == [result["split"]]
    assert result["scores"] == tasks.load(run.best, runtime=CPU).evaluate("validation").values
    monkeypatch.setattr(runs.folder, "RUNS", Path())
    assert [summary.test for summary in runs.listing()] == [None]
    assert training.evaluate(str(run.folder), runtime=CPU)["split"] == "test"


@pytest.mark.parametrize(
    ("patience", "scores", "ended", "best"),
    [
        (1, [0.2, 0.3, 0.3, 0.9], 3, 2),
        (2, [0.4, 0.3, 0.35, 0.9], 3, 1),
        (2, [0.1, 0.0, 0.2, 0.1, 0.3, 0.3], 6, 5),
        (9, [0.5, 0.4, 0.4], 3, 1),
        (0, [0.5, 0.4, 0.4], 3, 1),
    ],
)
def test_a_training_ends_where_it_no_longer_gets_better(
    patience: int,
    scores: list[float],
    ended: int,
    best: int,
    train: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = iter(scores)
    monkeypatch.setattr(Classification, "validate", lambda task: Scores("accuracy", {"accuracy": next(given)}, 7))
    epochs = len(scores)
    run, result, heard = train("resnet", f"training.epochs={epochs}", f"training.patience={patience}")
    assert [epoch.scores.score for epoch in heard.epochs] == scores[:ended]
    assert (result["best_epoch"], checkpoint.load(run.last).progress.epoch) == (best, ended)
    told = f"no epoch was better than epoch {best}: training ended after {ended} of {epochs} (training.patience)"
    assert heard.notes[-1:] == ([told] if ended < epochs else [])
    with pytest.raises(UserError, match="is finished"):
        training.resume("run", runtime=CPU, listener=Heard())
    # Killed before its result was written, it is evaluated and not trained on.
    (run.folder / "result.json").unlink()
    again = training.resume("run", runtime=CPU, listener=Heard())
    assert (again["scores"], again["best_epoch"], again["steps"]) == (result["scores"], best, result["steps"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_test_split_is_read_once(kind: str, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = (Classification, "evaluate") if kind == "resnet" else (Translation, "translations")
    evaluated: list[str] = []
    evaluate = getattr(owner, name)

    def counted(task: Any, split: str, *settings: Any) -> Any:
        evaluated.append(split)
        return evaluate(task, split, *settings)

    monkeypatch.setattr(owner, name, counted)
    run, result, _ = train(kind)
    assert evaluated == ["validation"] * 3 + ["test"]
    lines = runs.evaluations(run)
    assert len(lines) == 1
    tables = ("classes", "confusion", "source_lengths")
    small = {name: value for name, value in result["details"].items() if name not in tables}
    assert result.pop("readings") == 1
    assert {key: lines[0][key] for key in result} == {**result, "details": small}
    assert len(small) == {"resnet": 5, "seq2seq": 9}[kind]
    assert lines[0]["split"] == "test"


def test_without_a_test_split_the_score_is_of_validation(tiny: dict[str, Path], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.tsv"
    sources = (tiny["seq2seq"].parent / "pairs" / "train.en").read_text().splitlines()
    pairs.write_text("".join(f"{source}\t{source[::-1]}\n" for source in sources))
    recipe = resolve(str(tiny["seq2seq"]), data=str(pairs)).recipe
    heard = Heard()
    result = training.train(recipe, out=Path("run"), runtime=CPU, listener=heard)
    assert (result["split"], result["examples"]) == ("validation", 2)
    assert heard.plans[0].splits == {"train": 38, "validation": 2}
    assert "kept for validation: 2 of 40 pairs of train" in heard.plans[0].notes


# What diverges

SELDOM = "training.checkpoint_minutes=1000"


@pytest.mark.parametrize("overrides", [[], ["training.batch_size=100"], ["training.batch_size=100", SELDOM]])
@pytest.mark.parametrize("rate", ["1e30", "1e39"])
def test_an_image_training_that_diverges_stops(rate: str, overrides: list[str], train: Callable[..., Any]) -> None:
    check_diverged(lambda: train("resnet", f"optim.learning_rate={rate}", "optim.warmup=0", *overrides))


@pytest.mark.parametrize("overrides", [[], ["training.batch_tokens=10000"], ["training.batch_tokens=10000", SELDOM]])
@pytest.mark.parametrize("rate", ["1e30", "1e39"])
def test_a_translation_training_that_diverges_stops(rate: str, overrides: list[str], train: Callable[..., Any]) -> None:
    check_diverged(lambda: train("seq2seq", f"optim.learning_rate={rate}", "optim.warmup=0", *overrides))


def check_diverged(action: Callable[[], Any]) -> None:
    """It ends with what a user needs to know, and what was saved last can be gone on with."""
    with pytest.raises(UserError) as stopped:
        action()
    if stopped.value.message != "the model's output is not a number":
        wanted = r"not finite (at|after) step [1-9]\d*: loss \S+, learning rate \S+e\+\d\d, gradient norm \S+"
        assert re.search(wanted, stopped.value.message)
    assert stopped.value.hint is not None
    assert "optim.learning_rate" in stopped.value.hint
    for folder in (Path("run/last"), Path("run/best")):
        if folder.exists():
            saved = checkpoint.load(folder, training=True)
            assert all(value.isfinite().all() for value in saved.weights.values())


# What is written


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_folder_tells_all(kind: str, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "SECONDS_BETWEEN_STEP_EVENTS", -1)
    monkeypatch.setattr(session, "STEPS_BETWEEN_RECORDS", 5)
    run, result, heard = train(kind)
    task = tasks.load(run.best, runtime=CPU)
    steps = sum(task.steps(epoch) for epoch in range(3))

    assert set(result) == {
        *KEYS,
        *("steps", "training_seconds", "best_epoch", "parameters", "device", "precision", "rate", "peak_memory_bytes"),
    }
    assert (result["run"], result["recipe"], result["split"]) == ("run", kind, "test")
    assert (result["task"], result["primary"]) == (
        ("classification", "accuracy") if kind == "resnet" else ("translation", "bleu")
    )
    assert result["data"] == task.data_name
    assert result["examples"] == task.splits()["test"]
    assert result["parameters"] == sum(parameter.numel() for parameter in task.model.parameters())
    assert (result["steps"], result["device"], result["precision"]) == (steps, "cpu", "fp32")
    assert 0 < result["training_seconds"] < result["seconds"]
    assert result["rate"] > 0
    assert (result["signature"] is None) == (kind == "resnet")
    assert (result["scores"], result["details"]) == (task.evaluate("test").values, task.evaluate("test").details)
    assert json.loads((run.folder / "result.json").read_text()) == result

    assert resolve(str(run.recipe_file)).recipe == task.recipe == heard.plans[0].recipe
    environment = json.loads((run.folder / "environment.json").read_text())
    for key in ("started", "command", "dl7", "python", "packages", "platform", "cpu", "cores", "device", "precision"):
        assert environment[key]
    assert environment["resumed_step"] == 0
    assert "earlier" not in environment

    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    between = [record["step"] for record in records if "scores" not in record]
    assert between == list(range(5, steps + 1, 5))
    closing = [record for record in records if "scores" in record]
    per_epoch = [task.steps(epoch) for epoch in range(3)]
    assert [record["epoch"] for record in closing] == [1, 2, 3]
    assert [record["step"] for record in closing] == np.cumsum(per_epoch).tolist()
    order = [(record["step"], "scores" in record) for record in records]
    assert order == sorted(order)
    for record in records:
        assert record["loss"] > 0
        assert record["gradient_norm"] > 0
        expected = learning_rate(task.recipe.optim, record["step"] - 1, steps)
        assert record["learning_rate"] == expected
    assert [record["scores"] for record in closing] == [epoch.scores.values for epoch in heard.epochs]

    assert len(heard.plans) == 1
    plan = heard.plans[0]
    assert (plan.run, plan.steps, plan.epochs, plan.resumed_step) == (Path("run"), steps, 3, 0)
    assert (plan.parameters, plan.splits, plan.data) == (result["parameters"], task.splits(), task.data_name)
    assert [step.step for step in heard.steps if step.step] == sorted(step.step for step in heard.steps)
    assert {step.step for step in heard.steps} == set(range(1, steps + 1))
    assert heard.steps[-1].remaining_seconds == 0
    assert all(math.isfinite(step.loss) and step.remaining_seconds >= 0 for step in heard.steps)
    assert {step.unit for step in heard.steps} == {"images" if kind == "resnet" else "target tokens"}


def test_the_loss_recorded_is_the_mean_since_the_record_before(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SECONDS_BETWEEN_STEP_EVENTS", -1)
    run, _, heard = train("resnet")
    losses = {step.step: step.loss for step in heard.steps}
    for record in runs.metrics(run):
        since = [losses[step] for step in range(record["step"] - 3, record["step"] + 1)]
        assert record["loss"] == pytest.approx(sum(since) / 4)


def test_runs_without_a_folder_are_numbered_and_mistakes_make_none(tiny: dict[str, Path]) -> None:
    recipe = resolve(str(tiny["resnet"]), ["training.epochs=1"]).recipe
    result = training.train(recipe, runtime=CPU, listener=Heard())
    assert result["run"] == "runs/resnet-1"
    missing = resolve(str(tiny["resnet"]), data="nowhere/at/all").recipe
    with pytest.raises(UserError, match="there is no file or folder"):
        training.train(missing, runtime=CPU, listener=Heard())
    assert [path.name for path in Path("runs").iterdir()] == ["resnet-1"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_trainings_with_one_seed_are_the_same_and_with_two_differ(kind: str, tiny: dict[str, Path]) -> None:
    weights = []
    for number, seed in enumerate((1, 1, 2)):
        recipe = resolve(str(tiny[kind]), ["training.epochs=1"], seed=seed).recipe
        torch.rand(number)
        training.train(recipe, out=Path(str(number)), runtime=CPU, listener=Heard())
        weights.append(checkpoint.load(Path(str(number), "last")).weights)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


# Evaluating


def test_each_evaluation_is_a_line(train: Callable[..., Any], tiny: dict[str, Path]) -> None:
    run, result, _ = train("seq2seq")
    again = training.evaluate("run", runtime=CPU)
    assert tuple(again) == KEYS
    assert {**again, "seconds": 0, "readings": 1} == {key: result[key] for key in KEYS} | {"seconds": 0}
    assert again["readings"] == 2
    other = training.evaluate("run/last", split="validation", beams=[1], length_penalty=0.5, runtime=CPU)
    assert (other["split"], other["examples"]) == ("validation", 5)
    elsewhere = training.evaluate("run", data=str(tiny["seq2seq"].parent / "pairs"), split="train", runtime=CPU)
    assert elsewhere["examples"] == 40
    lines = runs.evaluations(run)
    assert [line["split"] for line in lines] == ["test", "test", "validation", "train"]
    assert (lines[2]["beam"], lines[2]["length_penalty"], lines[2]["checkpoint"]) == (1, 0.5, "last")
    assert lines[1]["checkpoint"] == "best"
    assert all(line["time"] for line in lines)


def test_a_classifier_has_no_beam_and_a_missing_split_is_named(train: Callable[..., Any]) -> None:
    run, result, _ = train("resnet", "training.epochs=1")
    with pytest.raises(UserError, match="is a classifier: it has no beam"):
        training.evaluate("run", beams=[5], runtime=CPU)
    with pytest.raises(UserError, match="has no split `dev`"):
        training.evaluate("run", split="dev", runtime=CPU)
    assert len(runs.evaluations(run)) == 1, "what failed is no reading"
    assert training.evaluate("run", runtime=CPU)["scores"] == result["scores"]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_scored_that_could_not_be_noted(
    kind: str, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _, _ = train(kind, "training.epochs=1")
    scored: list[str] = []
    owner, name = (Classification, "evaluate") if kind == "resnet" else (Translation, "translations")
    monkeypatch.setattr(owner, name, scored.append)
    log = run.folder / "evaluations.jsonl"
    log.unlink()
    log.mkdir()
    with pytest.raises(UserError, match=r"cannot write `run/evaluations.jsonl`: is a directory") as caught:
        training.evaluate("run", runtime=CPU)
    assert caught.value.hint is not None
    log.rmdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever may write anywhere, as root, is never refused
    with pytest.raises(UserError, match=r"cannot write `run/evaluations.jsonl`: permission denied"):
        training.evaluate("run", runtime=CPU)
    assert scored == []


def test_what_was_done_to_the_data_is_told_before_scoring(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train("resnet", "training.epochs=1")
    other = tmp_path / "other"
    for split, count in (("train", 20), ("test", 2)):
        for number, label in enumerate(("red", "green", "blue") * count):
            file = other / split / label / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (12, 10), label).save(file)
    told: list[str] = []
    evaluate = Classification.evaluate

    def checked(task: Classification, split: str) -> Scores:
        assert told
        return evaluate(task, split)

    monkeypatch.setattr(Classification, "evaluate", checked)
    training.evaluate("run", data=str(other), runtime=CPU, note=told.append)
    assert told == ["images of 12x10 resized and cropped to 8x8", "kept for validation: 6 of 60 images of train"]


def test_a_translator_has_no_confusion_matrix(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run, _, _ = train("seq2seq", "training.epochs=1")
    monkeypatch.setattr(Translation, "translations", None)
    with pytest.raises(UserError, match="is a translator: it has no confusion matrix"):
        training.evaluate("run", confusion=True, runtime=CPU)
    assert len(runs.evaluations(run)) == 1
