"""Checkpoints of the last epochs: which are kept, and their mean against one made by hand."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import Silent
from safetensors.numpy import load_file
from typer.testing import CliRunner

from dl7cli import checkpoint, device, runs, tasks, training
from dl7cli.cli import app
from dl7cli.device import Runtime, evaluation_mode
from dl7cli.errors import UserError
from dl7cli.recipe import resolve
from dl7cli.runs import Run
from dl7cli.tasks import Task
from dl7cli.tasks.classification import Classification
from dl7cli.tasks.translation import Translation
from dl7cli.training import session

KINDS = ("resnet", "seq2seq")
CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")

pytestmark = pytest.mark.usefixtures("work")


@pytest.fixture(scope="module")
def trained(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """`trained(kind, *changes)` is a run of the tiny recipe, three epochs long, that keeps the last two of them."""
    made: dict[tuple[str, ...], Run] = {}

    def make(kind: str, *changes: str) -> Run:
        if (kind, *changes) not in made:
            folder = tmp_path_factory.mktemp("trained") / kind
            recipe = resolve(str(tiny[kind]), ["training.keep_last=2", *changes]).recipe
            training.train(recipe, out=folder, runtime=CPU, listener=Silent())
            made[kind, *changes] = Run(folder)
        return made[kind, *changes]

    return make


def copied(run: Run, to: Path) -> Run:
    shutil.copytree(run.folder, to)
    return Run(to)


def folders(run: Run) -> list[str]:
    return sorted(path.name for path in run.folder.iterdir() if path.is_dir())


# What is kept


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_epochs_are_kept_and_no_other(kind: str, trained: Callable[..., Run]) -> None:
    run = trained(kind)
    assert folders(run) == ["best", "epoch-0002", "epoch-0003", "last"]
    last, newest = checkpoint.load(run.last), checkpoint.load(run.epoch(3), training=True)
    assert newest.progress == last.progress
    assert newest.scores == last.scores
    assert not newest.training, "nothing of the optimiser"
    assert newest.weights.keys() == last.weights.keys()
    assert all(torch.equal(newest.weights[name], value) for name, value in last.weights.items())
    best = checkpoint.load(run.best)
    if best.progress.epoch > 1:
        kept = checkpoint.load(run.epoch(best.progress.epoch)).weights
        assert all(torch.equal(kept[name], value) for name, value in best.weights.items())


def test_by_default_none_is_kept(tiny: dict[str, Path]) -> None:
    recipe = resolve(str(tiny["seq2seq"]), ["training.epochs=1"]).recipe
    training.train(recipe, out=Path("run"), runtime=CPU, listener=Silent())
    assert folders(Run(Path("run"))) == ["best", "last"]


def test_of_a_moving_average_the_average_is_kept(trained: Callable[..., Run]) -> None:
    run = trained("seq2seq", "training.ema_decay=0.5")
    average = checkpoint.load(run.last, training=True).training
    for name, value in checkpoint.load(run.epoch(3)).weights.items():
        assert torch.equal(value, average[f"average.{name}"])


class Stopping(Silent):
    """Asks its own process to stop at the first step it is told of, so that the next report is the last."""

    told = False

    def step(self, step: training.Step) -> None:
        if not self.told:
            self.told = True
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_again_and_again_keeps_what_one_never_stopped_keeps(
    kind: str, trained: Callable[..., Run], tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SECONDS_BETWEEN_STEP_EVENTS", -1)
    recipe = resolve(str(tiny[kind]), ["training.keep_last=2"]).recipe
    run, whole = Run(Path("run")), trained(kind)
    with pytest.raises(training.Interrupted):
        training.train(recipe, out=run.folder, runtime=CPU, listener=Stopping())
    for _ in range(100):
        try:
            training.resume("run", runtime=CPU, listener=Stopping())
        except training.Interrupted:
            continue
        break
    assert folders(run) == folders(whole)
    for name in ("epoch-0002", "epoch-0003"):
        contents = [(one.folder / name / "model.safetensors").read_bytes() for one in (run, whole)]
        assert contents[0] == contents[1]


def test_what_a_kill_left_of_an_old_epoch_goes_with_the_next(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = resolve(str(tiny["seq2seq"]), ["training.keep_last=1"]).recipe
    rmtree = shutil.rmtree

    def killed(path: Path, *rest: Any, **options: Any) -> None:
        if Path(path).name == "epoch-0001":
            raise KeyboardInterrupt  # as good as a kill: nothing is written any more
        rmtree(path, *rest, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(training.Interrupted):
        training.train(recipe, out=Path("run"), runtime=CPU, listener=Silent())
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    run = Run(Path("run"))
    assert "epoch-0001" in folders(run)
    assert list(runs.epochs(run)) == [2], "half a checkpoint is none"
    with pytest.raises(UserError, match="is not a checkpoint"):
        checkpoint.load(run.epoch(1))
    training.resume("run", runtime=CPU, listener=Silent())
    assert folders(run) == ["best", "epoch-0003", "last"]


# The average


@pytest.mark.parametrize("kind", KINDS)
def test_the_average_is_the_mean_of_the_files(kind: str, trained: Callable[..., Run]) -> None:
    run = copied(trained(kind), Path("run"))
    before = {name: (run.folder / name).stat().st_mtime_ns for name in folders(run)}
    result = training.average("run", runtime=CPU)
    files = [load_file(run.epoch(number) / "model.safetensors") for number in (2, 3)]
    averaged = load_file(run.average / "model.safetensors")
    assert averaged.keys() == files[0].keys()
    for name, value in averaged.items():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            continue  # of these, below
        mean = (files[0][name].astype(np.float64) + files[1][name].astype(np.float64)) / 2
        np.testing.assert_array_equal(value, mean.astype(np.float32), err_msg=name)
    assert result["epochs"] == [2, 3]
    assert result["checkpoint"] == "run/average"
    assert result["split"] == "validation"
    assert {name: (run.folder / name).stat().st_mtime_ns for name in before} == before, "nothing else is touched"
    saved = checkpoint.load(run.average, training=True)
    assert (saved.scores, saved.training, saved.progress.epoch) == (result["scores"], {}, 3)


def test_the_average_of_one_epoch_is_that_epoch(trained: Callable[..., Run]) -> None:
    run = copied(trained("seq2seq"), Path("run"))
    result = training.average("run", last=1, runtime=CPU)
    assert result["epochs"] == [3]
    assert result["scores"] == checkpoint.load(run.epoch(3)).scores, "it is validated as training does"
    own, newest = checkpoint.load(run.average).weights, checkpoint.load(run.epoch(3)).weights
    assert all(torch.equal(own[name], value) for name, value in newest.items())
    best = checkpoint.load(run.best)
    assert result["best"] == {"checkpoint": "run/best", "epoch": best.progress.epoch, "scores": best.scores}


def test_running_statistics_of_an_average_are_those_of_the_training_images(trained: Callable[..., Run]) -> None:
    """The first layer's, by hand: the mean over the batches of an epoch of each batch's mean and variance."""
    run = copied(trained("resnet"), Path("run"))
    training.average("run", runtime=CPU)
    task = tasks.load(run.average, runtime=CPU)
    assert isinstance(task, Classification)
    inputs: list[torch.Tensor] = []
    normalisation = next(module for module in task.model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    with torch.no_grad():
        hook = normalisation.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0].double()))
        with evaluation_mode(task.model):
            for batch in task.batches(2):
                task.model(batch.images)
        hook.remove()
    assert len(inputs) == task.steps(2)
    mean = torch.stack([one.mean(dim=(0, 2, 3)) for one in inputs]).mean(dim=0)
    variance = torch.stack([one.var(dim=(0, 2, 3), unbiased=True) for one in inputs]).mean(dim=0)
    assert normalisation.running_mean is not None
    assert normalisation.running_var is not None
    torch.testing.assert_close(normalisation.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(normalisation.running_var.double(), variance, rtol=1e-4, atol=1e-5)
    files = [load_file(run.epoch(number) / "model.safetensors") for number in (2, 3)]
    name = next(name for name in files[0] if name.endswith("running_mean"))
    plain = (files[0][name] + files[1][name]) / 2
    assert not np.allclose(plain, normalisation.running_mean.numpy(), rtol=1e-3), "not the mean of the two"


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_is_deterministic_and_never_sees_the_test_split(
    kind: str, trained: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(trained(kind), Path("run"))
    read: list[str] = []
    owner, name = (Classification, "evaluate") if kind == "resnet" else (Translation, "translations")
    method = getattr(owner, name)

    def counted(task: Task, split: str, *rest: Any) -> Any:
        read.append(split)
        return method(task, split, *rest)

    monkeypatch.setattr(owner, name, counted)
    weights = []
    for _ in range(2):
        training.average("run", runtime=CPU)
        weights.append((run.average / "model.safetensors").read_bytes())
        torch.rand(3)  # what another process may have drawn meanwhile
    assert weights[0] == weights[1]
    assert read == ["validation"] * 2
    lines = runs.evaluations(run)[1:]
    assert [(line["split"], line["checkpoint"], line["epochs"]) for line in lines] == [
        ("validation", "average", [2, 3])
    ] * 2


def test_an_average_is_evaluated_and_translates(trained: Callable[..., Run]) -> None:
    run = copied(trained("seq2seq"), Path("run"))
    training.average("run", runtime=CPU)
    assert "sample" not in runs.evaluations(run)[-1]["details"]
    result = training.evaluate("run/average", runtime=CPU)
    task = tasks.load(run.average, runtime=CPU)
    assert isinstance(task, Translation)
    assert result["scores"] == task.evaluate("test").values
    assert runs.evaluations(run)[-1]["checkpoint"] == "average"
    assert runs.find("run")[1] == run.best, "it is used where it is named"
    translated = CliRunner().invoke(app, ["translate", "--run", "run/average", "1 2 3", "--device", "cpu"])
    assert translated.exit_code == 0


def test_too_many_say_how_many_there_are(trained: Callable[..., Run], tiny: dict[str, Path]) -> None:
    run = copied(trained("seq2seq"), Path("run"))
    with pytest.raises(UserError, match=r"run `run` keeps the checkpoints of 2 epochs, not of 3") as refused:
        training.average("run", last=3, runtime=CPU)
    assert refused.value.hint is not None
    assert refused.value.hint.startswith("`--last 2` takes them all")
    assert not run.average.exists()
    assert len(runs.evaluations(run)) == 1
    for number in (2, 3):
        shutil.rmtree(run.epoch(number))
    with pytest.raises(UserError, match="keeps no checkpoints of its epochs") as refused:
        training.average("run", runtime=CPU)
    assert refused.value.hint is not None
    assert "training.keep_last=5" in refused.value.hint


def test_an_average_over_other_data_than_the_run_began_with_is_refused(
    trained: Callable[..., Run], tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(trained("seq2seq"), Path("run"))
    monkeypatch.setattr(Translation, "digest", "another")
    with pytest.raises(UserError, match="has changed since the run began") as refused:
        training.average("run", runtime=CPU)
    assert refused.value.hint == "averaging needs the same data; train anew instead"


def test_the_command_shows_the_average_beside_the_best(trained: Callable[..., Run]) -> None:
    copied(trained("seq2seq"), Path("run"))
    shown = CliRunner().invoke(app, ["average", "run", "--last", "2", "--device", "cpu"])
    assert shown.exit_code == 0
    header, own, best = shown.stdout.splitlines()
    assert header.split() == ["CHECKPOINT", "EPOCHS", "VALIDATION", "DATA"]
    assert re.fullmatch(r"run/average +2, 3 +BLEU \d+\.\d\d +/.*pairs", own)
    assert re.fullmatch(r"run/best +\d +BLEU \d+\.\d\d +/.*pairs", best)
    assert "next: dl7 eval run/average" in shown.stderr
    document = json.loads(CliRunner().invoke(app, ["average", "run", "--json", "--device", "cpu"]).stdout)
    assert tuple(document) == (*training.evaluate("run", runtime=CPU), "epochs", "best")
    assert document["primary"] in document["scores"]
    refused = CliRunner().invoke(app, ["average", "run", "--last", "0"])
    assert refused.exit_code == 2


def test_a_best_epoch_chosen_by_another_score_has_none_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    result = {
        **{"checkpoint": "run/average", "data": "d", "epochs": [2, 3], "primary": "bleu_lowercase"},
        **{"scores": {"bleu_lowercase": 39.5}, "best": {"checkpoint": "run/best", "epoch": 3, "scores": {"bleu": 8.0}}},
    }
    monkeypatch.setattr(training, "average", lambda *_, **__: result)
    shown = CliRunner().invoke(app, ["average", "run", "--device", "cpu", "--precision", "fp32"])
    assert shown.exit_code == 0
    _, own, best = shown.stdout.splitlines()
    assert own.split() == ["run/average", "2,", "3", "BLEU", "without", "case", "39.50", "d"]
    assert best.split() == ["run/best", "3", "-", "d"]


@pytest.mark.parametrize(("flags", "searched"), [((), "fp32"), (("--precision", "bf16"), "bf16")])
def test_a_translator_searches_in_the_precision_asked_for(
    flags: tuple[str, ...], searched: str, trained: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(trained("seq2seq"), Path("run"))
    seen: list[Runtime] = []

    def average(*_: Any, runtime: Runtime, **__: Any) -> None:
        seen.append(runtime)
        raise UserError("enough is known")

    monkeypatch.setattr(device, "_cpu_flags", set)  # a CPU that is taken for one with bf16
    monkeypatch.setattr(training, "average", average)
    CliRunner().invoke(app, ["average", "run", "--device", "cpu", *flags])
    assert [runtime.search_precision for runtime in seen] == [searched]
