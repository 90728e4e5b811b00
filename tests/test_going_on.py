"""Going on with a run otherwise than it began, a batch in parts, and Ctrl-C where no step can be finished."""

from pathlib import Path
from typing import Any

import pytest
import torch
from running import Silent, dl7, succeed
from stopping import CPU

from dl7cli import checkpoint, runs, tasks, training
from dl7cli.checkpoint import Progress
from dl7cli.recipe import alike, resolve
from dl7cli.runs import Run
from dl7cli.tasks.classification import Classification
from dl7cli.training import compilation, session
from dl7cli.training.loop import Trainer, fit

KINDS = ("resnet", "seq2seq")


@pytest.mark.parametrize("parts", [2, 3, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_in_parts_has_the_gradient_of_the_whole(
    kind: str, parts: int, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where normalisation is by running statistics and nothing is dropped; no part is of a single example."""
    changes = [] if kind == "resnet" else ["model.dropout=0"]
    gradients, largest = [], []
    for count in (1, parts):
        task = tasks.build(resolve(str(tiny[kind]), [*changes, f"training.parts={count}"]).recipe, runtime=CPU)
        task.model.eval()
        monkeypatch.setattr(task.model, "train", lambda task=task: task.model)
        sizes: list[int] = []

        def loss(batch: Any, loss: Any = task.loss, sizes: list[int] = sizes) -> Any:
            sizes.append(len(batch[0]))
            return loss(batch)

        monkeypatch.setattr(task, "loss", loss)
        next(fit(task, Trainer.of(task), start=Progress()))
        gradients.append([p.grad.clone() for p in task.model.parameters() if p.grad is not None])
        largest.append(sizes)
    (whole,), in_parts = largest
    assert len(in_parts) == min(parts, whole // 2)
    assert (sum(in_parts), max(in_parts) - min(in_parts) <= 1) == (whole, True)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(one.abs().max()) + 1e-6)


def test_what_is_in_parts_is_not_compiled(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "repays", lambda *_: True)
    for parts in (1, 2):
        for compiled in ("auto", "always"):
            keys = [f"training.parts={parts}", f"training.compile={compiled}"]
            task = tasks.build(resolve(str(tiny["resnet"]), keys).recipe, runtime=CPU)
            assert compilation.wanted(task) == (parts == 1)


@pytest.fixture
def stopped(tiny: dict[str, Path], tmp_path: Path) -> Run:
    """A run that has had nearly two of its three epochs, of which the first is its best so far."""

    class Stopping(Silent):
        def epoch(self, epoch: training.Epoch) -> None:
            if epoch.epoch == 2:
                raise KeyboardInterrupt

    with pytest.raises(training.Interrupted):
        training.train(resolve(str(tiny["seq2seq"])).recipe, out=tmp_path / "run", runtime=CPU, listener=Stopping())
    assert runs.holds(Run(tmp_path / "run").best)
    return Run(tmp_path / "run")


def test_a_run_goes_on_otherwise_to_the_same_end(tiny: dict[str, Path], stopped: Run, tmp_path: Path) -> None:
    """With what does not come to be needed; its recipe says so from then on."""
    training.train(resolve(str(tiny["seq2seq"])).recipe, out=tmp_path / "whole", runtime=CPU, listener=Silent())
    changes = ("training.on_oom=halve", "training.on_nonfinite=skip", "training.checkpoint_minutes=5.0")
    flags = [flag for change in changes for flag in ("--set", change)]
    succeed("train", "--resume", "run", "--device", "cpu", *flags, cwd=tmp_path)
    first, second = (checkpoint.load(tmp_path / name / "last").weights for name in ("whole", "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    recipe = resolve(str(tiny["seq2seq"]), changes).recipe
    assert runs.read_recipe(stopped) == recipe
    assert checkpoint.load(stopped.last).recipe == checkpoint.load(stopped.best).recipe == recipe


def test_a_run_goes_on_with_its_batches_in_parts(
    stopped: Run, tmp_path: Path, every_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More and fewer of them."""

    class Stopping(Silent):
        def step(self, step: training.Step) -> None:
            raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    for parts in (3, 2):
        with pytest.raises(training.Interrupted):
            training.resume("run", overrides=[f"training.parts={parts}"], runtime=CPU, listener=Stopping())
        with pytest.raises(training.Interrupted):
            training.resume("run", runtime=CPU, listener=Stopping())
        assert checkpoint.load(stopped.last, training=True).training["parts"] == parts
    succeed("train", "--resume", "run", "--set", "training.parts=1", cwd=tmp_path)
    assert checkpoint.load(stopped.last, training=True).training["parts"] == 1


def test_what_went_on_otherwise_is_still_of_its_recipe() -> None:
    recipe = resolve("seq2seq").recipe
    for change, expected in (
        ("training.on_oom=halve", True),
        ("training.checkpoint_minutes=1.0", True),
        ("training.seed=9", True),
        ("training.parts=2", False),
        ("optim.learning_rate=1.0", False),
    ):
        assert alike(recipe, resolve("seq2seq", [change]).recipe) == expected


def test_what_was_settled_is_not_changed(stopped: Run, tmp_path: Path) -> None:
    for change, told in (
        ("optim.learning_rate=1", "`optim.learning_rate` was settled in training; only `training.parts`, `training.on"),
        ("training.epochs=9", "`training.epochs` was settled in training"),
        ("training.on_oom=stay", '`training.on_oom` is `"stay"`: '),
    ):
        failed = dl7("train", "--resume", "run", "--set", change, cwd=tmp_path)
        assert (failed.code, failed.out) == (1, "")
        assert told in failed.err
    assert dl7("train", "--resume", "a,b", "--seeds", "2", "--set", "training.parts=2", cwd=tmp_path).code == 2


@pytest.mark.parametrize("where", ["compiling", "evaluating"])
def test_ctrl_c_where_no_step_can_be_finished_tells_how_to_go_on(
    where: str, tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "compiling":
            patch.setattr(Classification, "compile", interrupted)
        else:
            patch.setattr(session, "_last_split", interrupted)
        always = ("--set", "training.compile=always") if where == "compiling" else ()
        stopped = dl7("train", str(tiny["resnet"]), *always, "--out", "run", cwd=tmp_path)
    assert stopped.code == 130
    assert stopped.err.endswith("stopped; saved in run\ngo on with: dl7 train --resume run\n")
    monkeypatch.setattr(Classification, "compile", lambda task: None)
    assert succeed("train", "--resume", "run", "--json", cwd=tmp_path).document["steps"] == 12
