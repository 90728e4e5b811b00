"""Stopping at any moment and going on, to the result of a run never stopped."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FILES
from running import Silent, dl7
from stopping import CPU, Stopping, assert_same_run, assert_same_tensors, result, resume, timeless, until_stopped

from dl7cli import checkpoint, runs, tasks, training
from dl7cli.checkpoint import Checkpoint, Progress
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.recipe import Recipe, from_document, resolve, to_document
from dl7cli.runs import Run
from dl7cli.tasks import Task
from dl7cli.training.loop import Report, Trainer, fit

KINDS = ("resnet", "seq2seq")

pytestmark = pytest.mark.usefixtures("work")


# The loop: stopped after any report


@pytest.mark.parametrize(
    ("kind", "precision"),
    # Not every CPU has LSTMs in fp16. Nor does `choose` give it to one; here it drives the gradient scaler.
    [
        ("resnet", "fp32"),
        ("resnet", "fp16"),
        ("seq2seq", "fp32"),
        pytest.param("resnet", "bf16", marks=pytest.mark.bf16),
        pytest.param("seq2seq", "bf16", marks=pytest.mark.bf16),
    ],
)
def test_the_loop_goes_on_exactly_from_every_report(
    kind: str, precision: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    recipe = resolve(str(tiny[kind])).recipe
    runtime = Runtime(torch.device("cpu"), precision, "cpu", "as asked")
    check_every_report(recipe, runtime, tmp_path)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_network_that_leaves_out_blocks_at_random_goes_on_exactly(
    optimiser: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    """Which ones is drawn anew in each step; fused optimisers want a gradient for all of them nevertheless."""
    keys = ["depth=20", "width=4", "survival=0.2", "dropout=0.3", "activation=prelu", "checkpointing=true"]
    changes = [*(f"model.{key}" for key in keys), f"optim.name={optimiser}", "training.epochs=2", "optim.clip_norm=1.0"]
    check_every_report(resolve(str(tiny["resnet"]), changes).recipe, CPU, tmp_path)


@pytest.mark.parametrize("schedule", ["one-cycle", "step"])
def test_a_training_with_everything_that_draws_or_remembers_goes_on_exactly(
    schedule: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    changes = [
        *("data.flip=alternating", "data.cutout=3", "data.random_erasing=0.5"),
        *("training.mixup=0.4", "training.cutmix=1.0", "training.ema_decay=0.9", "training.label_smoothing=0.1"),
        *("optim.name=muon", "optim.other_learning_rate=0.1", f"optim.schedule={schedule}"),
        *("evaluation.flip=true", "evaluation.shift=1"),
    ]
    check_every_report(resolve(str(tiny["resnet"]), changes).recipe, CPU, tmp_path)


def test_a_training_that_ends_by_patience_goes_on_exactly(tiny: dict[str, Path], tmp_path: Path) -> None:
    changes = ["optim.learning_rate=1e-6", "training.epochs=50", "training.patience=2"]
    check_every_report(resolve(str(tiny["seq2seq"]), changes).recipe, CPU, tmp_path)
    assert len(list(tmp_path.iterdir())) < 100


def test_a_fast_resnet_goes_on_exactly(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Its whitening, which is of the training images, is kept; the first images are small ones."""
    text = tiny["resnet"].read_text()
    plain, fast = 'model = { kind = "resnet", depth = 8 }', 'model = { kind = "fast_resnet", widths = [8, 8] }'
    assert plain in text
    (tmp_path / "fast.toml").write_text(text.replace(plain, fast))
    changes = [
        *("data.image_size=16", "data.crop_fill=reflect", "data.flip=alternating", "evaluation.shift=1"),
        *("training.small_size=8", "training.small_part=0.4", "optim.name=muon", "optim.other_learning_rate=0.1"),
    ]
    check_every_report(resolve(str(tmp_path / "fast.toml"), changes).recipe, CPU, tmp_path)


def test_a_translator_whose_matrices_are_made_orthogonal_goes_on_exactly(tiny: dict[str, Path], tmp_path: Path) -> None:
    changes = ["optim.name=muon", "optim.momentum=0.95", "training.ema_decay=0.9", "training.r_drop=2"]
    check_every_report(resolve(str(tiny["seq2seq"]), [*changes, "training.epochs=2"]).recipe, CPU, tmp_path)


SMALL: dict[str, dict[str, Any]] = {
    "transformer": {"width": 8, "heads": 2, "feedforward_width": 12, "encoder_layers": 1, "decoder_layers": 2},
    "convs2s": {"embedding_width": 6, "width": 8, "encoder_layers": 1, "decoder_layers": 2},
    "seq2seq": {
        **{"embedding_width": 6, "encoder_width": 5, "decoder_width": 7, "cell": "gru", "attention": "additive"},
        **{"decoder": "bahdanau", "coverage": True, "copying": True, "readout": "maxout"},
    },
}


@pytest.mark.parametrize("kind", SMALL)
def test_translators_of_every_family_go_on_exactly(kind: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    document = to_document(resolve(str(tiny["seq2seq"]), ["training.epochs=2", "training.ema_decay=0.9"]).recipe)
    document["model"] = {"kind": kind, **SMALL[kind], "dropout": 0.2, "tied": "all"}
    check_every_report(from_document(document, origin="test"), CPU, tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_training_on_subwords_drawn_at_random_goes_on_exactly(
    kind: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    changes = [f"data.vocabulary={kind}", "data.subword_sampling=0.3", "data.joint=false", "model.tied=output"]
    check_every_report(resolve(str(tiny["seq2seq"]), [*changes, "training.epochs=2"]).recipe, CPU, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("overrides", [[], ["optim.name=muon"]])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_goes_on_from_a_report_on_a_gpu(
    kind: str, overrides: list[str], precision: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    recipe = resolve(str(tiny[kind]), overrides).recipe
    check_every_report(recipe, Runtime(torch.device("cuda", 0), precision, "gpu", "as asked"), tmp_path, exact=False)


def check_every_report(recipe: Recipe, runtime: Runtime, folder: Path, exact: bool = True) -> None:
    """Save at every report, go on from each, and compare all that follows with the training never stopped."""
    task = tasks.build(recipe, runtime=runtime)
    trainer = Trainer.of(task)
    saved = [save(folder / "0", task, trainer, Progress())]
    reports = []
    for report in fit(task, trainer, start=Progress()):
        reports.append(told(report))
        saved.append(save(folder / str(len(saved)), task, trainer, report.progress))
    assert len(reports) > 8
    assert not list(fit(task, trainer, start=saved[-1].progress))

    end = saved[-1]
    for number, place in enumerate(saved):
        stopped = checkpoint.load(folder / str(number), training=True)
        again = tasks.build(stopped.recipe, stopped.assets, runtime=runtime)
        tasks.restore(again, stopped)
        torch.manual_seed(number)  # what another process may have drawn meanwhile
        follower = Trainer.of(again)
        follower.restore(stopped.training, runtime.device)
        rest = [told(report) for report in fit(again, follower, start=place.progress)]
        between = rest[:1] and place.progress.batch == again.steps(place.progress.epoch)
        if between:  # the last step and its loss lie before the stop
            rest[0] |= {key: reports[number][key] for key in ("loss", "norm")}
        if exact:
            assert rest == reports[number:], f"resumed at report {number}"
            weights = {name: value.clone() for name, value in again.model.state_dict().items()}
            assert_same_tensors(weights, end.weights)
            assert_same_tensors(follower.tensors(runtime.device), end.training)
        else:
            assert [one["progress"].step for one in rest] == [one["progress"].step for one in reports[number:]]
            assert [one["loss"] for one in rest] == pytest.approx([one["loss"] for one in reports[number:]], rel=0.05)


def told(report: Report) -> dict[str, Any]:
    return {
        **{"progress": report.progress, "rate": report.learning_rate, "examples": report.examples},
        **{"scores": report.scores, "loss": report.loss.item(), "norm": report.gradient_norm.item()},
    }


def save(folder: Path, task: Task, trainer: Trainer, progress: Progress) -> Checkpoint:
    """Write a checkpoint and return it with copies of the tensors, as training goes on in place."""
    tensors = trainer.tensors(task.runtime.device)
    whole = Checkpoint(task.recipe, task.assets, task.model.state_dict(), tensors, progress, {})
    checkpoint.save(folder, whole)
    weights = {name: value.clone() for name, value in whole.weights.items()}
    training = {name: value.clone() for name, value in tensors.items()}
    return Checkpoint(task.recipe, task.assets, weights, training, progress, {})


# The session: stopped by signals in this process


@pytest.mark.parametrize(("first", "changes"), [(1, ()), (2, ("training.select=last",))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_at_every_other_report_is_the_run_never_stopped(
    kind: str,
    first: int,
    changes: tuple[str, ...],
    tiny: dict[str, Path],
    whole: Callable[..., Run],
    tmp_path: Path,
    every_step: None,
) -> None:
    recipe = resolve(str(tiny[kind]), changes).recipe
    run = Run(tmp_path / "run")

    def start() -> None:
        training.train(recipe, out=run.folder, runtime=CPU, listener=Stopping(call=first))

    def go_on() -> None:
        training.resume(str(run.folder), runtime=CPU, listener=Stopping())

    assert until_stopped(start)
    places = [checkpoint.load(run.last).progress]
    while until_stopped(go_on):
        places.append(checkpoint.load(run.last).progress)
    assert [place.step for place in places] == sorted(place.step for place in places)
    assert len(places) >= 7
    assert_same_run(run, whole(kind, *changes))
    environment = json.loads((run.folder / "environment.json").read_text())
    steps = [one["resumed_step"] for one in (*environment["earlier"], environment)]
    assert steps == [0, *(place.step for place in places)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_names_itself_and_the_handlers_come_back(
    number: int, tiny: dict[str, Path], tmp_path: Path, every_step: None
) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    recipe = resolve(str(tiny["resnet"])).recipe
    with pytest.raises(training.Interrupted) as stop:
        training.train(recipe, out=tmp_path / "run", runtime=CPU, listener=Stopping(number))
    assert (stop.value.signal, stop.value.run) == (number, tmp_path / "run")
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    assert checkpoint.load(tmp_path / "run" / "last").progress.step == 2


def test_a_signal_saves_where_nobody_reads_what_is_said(
    tiny: dict[str, Path], tmp_path: Path, every_step: None
) -> None:
    recipe = resolve(str(tiny["resnet"]), ["training.checkpoint_minutes=1000"]).recipe
    reader, writer = os.pipe()
    os.close(reader)
    before = os.dup(2)
    os.dup2(writer, 2)
    try:
        with pytest.raises(training.Interrupted):
            training.train(recipe, out=tmp_path / "run", runtime=CPU, listener=Stopping())
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(writer)
    assert checkpoint.load(tmp_path / "run" / "last").progress.step == 2


def test_a_finished_run_is_not_resumed_and_one_killed_in_its_last_evaluation_is(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    first = training.train(resolve(str(tiny["seq2seq"])).recipe, out=run.folder, runtime=CPU, listener=Silent())
    with pytest.raises(UserError, match="is finished") as refused:
        resume(run)
    assert refused.value.hint == f"`dl7 eval {run.folder}` evaluates it"
    (run.folder / "result.json").unlink()
    again = resume(run)
    assert timeless(first) == timeless(again) == timeless(result(run))
    assert len(runs.evaluations(run)) == 2, "the test split has been read twice"


@pytest.mark.parametrize("last_batch", [False, True])
def test_what_was_recorded_and_not_saved_is_recorded_once(
    last_batch: bool, tiny: dict[str, Path], whole: Callable[[str], Run], tmp_path: Path, every_step: None
) -> None:
    recipe = resolve(str(tiny["resnet"])).recipe
    run = Run(tmp_path / "run")
    step = tasks.build(recipe, runtime=CPU).steps(0) if last_batch else 2
    with pytest.raises(training.Interrupted):
        training.train(recipe, out=run.folder, runtime=CPU, listener=Stopping(call=step - 1))
    before = checkpoint.load(run.last, training=True)
    assert before.progress[:2] == (0, step)
    with pytest.raises(training.Interrupted):
        training.resume(str(run.folder), runtime=CPU, listener=Stopping(call=1 if last_batch else 3))
    assert [record["epoch"] for record in runs.metrics(run)] == [1]
    checkpoint.save(run.last, before)  # as if the kill had come before the epoch was saved
    resume(run)
    assert_same_run(run, whole("resnet"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + "1 2 3 4 5\n", "now has 41 training examples; the run began with 40"),
        (lambda text: "0" + text[1:] if text[0] != "0" else "1" + text[1:], "has changed since the run began"),
    ],
)
def test_other_data_than_the_run_began_with_is_refused(
    change: Callable[[str], str], message: str, tiny: dict[str, Path], tmp_path: Path, every_step: None
) -> None:
    folder = copied(tiny["seq2seq"].parent / "pairs", tmp_path / "pairs")
    recipe = resolve(str(tiny["seq2seq"]), data=str(folder)).recipe
    with pytest.raises(training.Interrupted):
        training.train(recipe, out=tmp_path / "run", runtime=CPU, listener=Stopping())
    for language in ("en", "de"):
        file = folder / f"train.{language}"
        file.write_text(change(file.read_text()))
    with pytest.raises(UserError, match=message):
        resume(Run(tmp_path / "run"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_where_its_data_has_been_moved(
    kind: str, tiny: dict[str, Path], whole: Callable[..., Run], tmp_path: Path, every_step: None
) -> None:
    source = {"resnet": "images", "seq2seq": "pairs"}[kind]
    folder = copied(tiny[kind].parent / source, tmp_path / "before")
    recipe = resolve(str(tiny[kind]), data=str(folder)).recipe
    with pytest.raises(training.Interrupted):
        training.train(recipe, out=tmp_path / "run", runtime=CPU, listener=Stopping())
    folder.rename(tmp_path / "after")
    run = Run(tmp_path / "run")
    shutil.copytree(run.last, run.average)
    with pytest.raises(UserError, match="before"):
        resume(run)
    training.resume(str(run.folder), data=str(tmp_path / "after"), runtime=CPU, listener=Silent())
    assert_same_tensors(checkpoint.load(run.last).weights, checkpoint.load(whole(kind).last).weights)
    assert result(run)["data"] == str(tmp_path / "after")
    assert result(run)["scores"] == result(whole(kind))["scores"]
    for recipe in (runs.read_recipe(run), *(checkpoint.load(one).recipe for one in (run.best, run.last, run.average))):
        assert recipe.data.source == str(tmp_path / "after")
    (run.folder / "result.json").unlink()
    other = copied(tmp_path / "after", tmp_path / "other")
    one, another, *_ = sorted((other / "train").rglob("*.png")) or sorted(other.glob("train.*"))
    another.write_bytes(one.read_bytes())
    with pytest.raises(UserError, match="has changed since the run began"):
        training.resume(str(run.folder), data=str(other), runtime=CPU, listener=Silent())


def test_a_damaged_best_does_not_keep_a_run_from_going_on_where_its_data_has_been_moved(
    tiny: dict[str, Path], tmp_path: Path, every_step: None
) -> None:
    folder = copied(tiny["resnet"].parent / "images", tmp_path / "before")
    recipe = resolve(str(tiny["resnet"]), data=str(folder)).recipe
    run = Run(tmp_path / "run")
    steps = tasks.build(recipe, runtime=CPU).steps(0)
    with pytest.raises(training.Interrupted):
        training.train(recipe, out=run.folder, runtime=CPU, listener=Stopping(call=steps + 1))
    (run.best / "model.safetensors").write_bytes(b"?")
    folder.rename(tmp_path / "after")
    heard = Heard()
    training.resume(str(run.folder), data=str(tmp_path / "after"), runtime=CPU, listener=heard)
    assert "the best epoch is chosen anew" in heard.notes[0]
    assert checkpoint.load(run.best).recipe.data.source == str(tmp_path / "after")


def test_other_images_than_the_run_began_with_are_refused(
    tiny: dict[str, Path], tmp_path: Path, every_step: None
) -> None:
    folder = copied(tiny["resnet"].parent / "images", tmp_path / "images")
    recipe = resolve(str(tiny["resnet"]), data=str(folder)).recipe
    with pytest.raises(training.Interrupted):
        training.train(recipe, out=tmp_path / "run", runtime=CPU, listener=Stopping())
    images = folder / "train" / "red"
    (images / "3.png").write_bytes((images / "0.png").read_bytes())
    with pytest.raises(UserError, match="has changed since the run began"):
        resume(Run(tmp_path / "run"))
    os.rename(folder / "train" / "red", folder / "train" / "rose")
    shutil.rmtree(folder / "validation")
    shutil.rmtree(folder / "test")
    with pytest.raises(UserError, match="has other classes than the model was trained on"):
        resume(Run(tmp_path / "run"))


@pytest.mark.parametrize("damage", ["removed", "damaged"])
def test_a_run_whose_best_is_lost_goes_on_from_its_last(
    damage: str, tiny: dict[str, Path], whole: Callable[..., Run], tmp_path: Path, every_step: None
) -> None:
    """Its weights are those of the run never stopped; the best epoch is the best of those that come."""
    run = Run(tmp_path / "run")
    recipe = resolve(str(tiny["resnet"])).recipe
    steps = tasks.build(recipe, runtime=CPU).steps(0)

    def lose(run: Run) -> None:
        if damage == "removed":
            shutil.rmtree(run.best)
        else:
            (run.best / "model.safetensors").write_bytes(b"?")

    with pytest.raises(training.Interrupted):
        training.train(recipe, out=run.folder, runtime=CPU, listener=Stopping(call=steps + 1))
    assert checkpoint.load(run.last).progress.best_epoch == 1
    lose(run)
    heard = Heard()
    training.resume(str(run.folder), runtime=CPU, listener=heard)
    assert "the best epoch is chosen anew" in heard.notes[0]
    assert_same_tensors(checkpoint.load(run.last).weights, checkpoint.load(whole("resnet").last).weights)
    best = checkpoint.load(run.best)
    assert best.progress.best_epoch == result(run)["best_epoch"] in (2, 3)
    # Where no epoch is to come, it is the last one.
    (run.folder / "result.json").unlink()
    lose(run)
    resume(run)
    assert result(run)["best_epoch"] == 3
    assert_same_tensors(checkpoint.load(run.best).weights, checkpoint.load(run.last).weights)
    assert result(run)["rate"] > 0, "of the steps that were timed before"


@pytest.mark.parametrize(
    ("runtime", "began", "now"),
    [
        ({"device_name": "cpu, 9 threads"}, "cpu", "cpu, 9 threads"),
        pytest.param(
            {"precision": "bf16", "device_name": "cpu, 9 threads"},
            "cpu, fp32",
            "cpu, 9 threads, bf16",
            marks=pytest.mark.bf16,
        ),
        ({}, None, None),
    ],
)
def test_going_on_otherwise_is_said(
    runtime: dict[str, str], began: str | None, now: str | None, tiny: dict[str, Path], tmp_path: Path, every_step: None
) -> None:
    recipe = resolve(str(tiny["resnet"])).recipe
    with pytest.raises(training.Interrupted):
        training.train(recipe, out=tmp_path / "run", runtime=CPU, listener=Stopping())
    heard = Heard()
    training.resume(str(tmp_path / "run"), runtime=replace(CPU, **runtime), listener=heard)  # type: ignore[arg-type]
    told = f"the run was trained with {began} until now, and goes on with {now}: the result may differ from that of the"
    assert heard.notes == ([f"{told} run never stopped"] if began else [])


def test_going_on_with_another_torch_is_said(tiny: dict[str, Path], tmp_path: Path, every_step: None) -> None:
    recipe = resolve(str(tiny["resnet"])).recipe
    with pytest.raises(training.Interrupted):
        training.train(recipe, out=tmp_path / "run", runtime=CPU, listener=Stopping())
    file = tmp_path / "run" / "environment.json"
    environment = json.loads(file.read_text())
    environment["packages"]["torch"] = "1.2.3"
    file.write_text(json.dumps(environment))
    heard = Heard()
    training.resume(str(tmp_path / "run"), runtime=CPU, listener=heard)
    assert [note.split(" until")[0] for note in heard.notes] == ["the run was trained with torch 1.2.3"]


class Heard(Silent):
    """A listener that remembers notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_one_error_of_every_command(
    name: str, whole: Callable[..., Run], tmp_path: Path
) -> None:
    run = copied(whole("resnet").folder, tmp_path / "run")
    (run / "result.json").unlink()
    commands = [("last", ("train", "--resume"))]
    if name != "training.safetensors":  # which only resuming reads
        commands.append(("best", ("eval",)))
    for folder, command in commands:
        file = run / folder / name
        content = file.read_bytes()
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
        outcome = dl7(*command, str(run), "--device", "cpu", cwd=tmp_path)
        assert outcome.code == 1
        assert f"error: `{file}` is damaged" in outcome.err
        assert "Traceback" not in outcome.err
        file.write_bytes(content)
