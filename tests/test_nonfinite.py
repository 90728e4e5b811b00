"""Steps that are not finite: stopped at, or left out where the recipe says so."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Silent
from stopping import CPU, Stopping, assert_same_run, differing, state, until_stopped
from torch import Tensor
from waiting import Waits

from dl7cli import runs, tasks, training
from dl7cli.checkpoint import Progress
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.recipe import resolve
from dl7cli.runs import Run
from dl7cli.tasks import Task
from dl7cli.tasks.classification import Classification
from dl7cli.tasks.translation import Translation
from dl7cli.training import loop, session
from dl7cli.training.loop import Report, Trainer, check_finite, check_weights, fit

KINDS = ("resnet", "seq2seq")
SKIP = "training.on_nonfinite=skip"

pytestmark = pytest.mark.usefixtures("work")


class Noting(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def poison(task: Task, *steps: int, where: str = "loss") -> None:
    """Make the loss, its gradient alone, or the images of these steps, counted from 1, NaN.

    With a `constant` the loss alone is infinite.
    """
    loss, calls = task.loss, iter(range(1, 10_000))

    def poisoned(batch: Any) -> tuple[Tensor, int]:
        if next(calls) not in steps:
            return loss(batch)
        if where == "images":
            return loss(batch._replace(images=batch.images * math.nan))
        total, count = loss(batch)
        if where == "loss":
            return total * math.nan, count
        if where == "constant":
            return total + math.inf, count
        weight = next(iter(task.model.parameters()))
        return total + (weight.sum() * 0).abs().sqrt(), count  # whose slope at 0 is infinite

    task.loss = poisoned  # type: ignore[method-assign]


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize(
    ("kind", "where", "overrides"),
    [
        *(("resnet", where, []) for where in ("loss", "gradient", "images")),
        *(("seq2seq", where, []) for where in ("loss", "gradient")),
        ("resnet", "images", ["optim.name=muon", "training.ema_decay=0.9", "optim.clip_norm=1.0"]),
        ("resnet", "images", ["optim.name=adamw", "training.ema_decay=0.9"]),
        ("seq2seq", "gradient", ["optim.name=muon"]),
    ],
)
def test_a_step_left_out_changes_nothing(
    kind: str, where: str, overrides: list[str], step: int, build: Callable[..., Task]
) -> None:
    task = build(kind, SKIP, *overrides)
    trainer = Trainer.of(task)
    poison(task, step, where=where)
    before, after = state(task, trainer), {}
    for report in fit(task, trainer, start=Progress()):
        after = state(task, trainer)
        # An optimiser's tensors that were not there yet are as good as zeros.
        known = {name: before.get(name, torch.zeros_like(value)) for name, value in after.items()}
        changed = {name for name in differing(known, after) if not name.startswith("random.")}
        if report.scores is not None:
            break
        if report.progress.step == step:
            assert not math.isfinite(report.loss.item() + report.gradient_norm.item())
            assert changed == {"skipped"}
        else:
            assert {name for name, _ in task.model.named_parameters()} <= changed
            assert all(value.isfinite().all() for value in after.values() if value.is_floating_point())
        before = after
    assert report.progress.step == task.steps(0) > step, "it counts as a step"
    assert trainer.skipped == 1


@pytest.mark.parametrize("optimiser", ["sgd", "muon"])
def test_the_first_step_in_fp16_may_overflow(optimiser: str, build: Callable[..., Task]) -> None:
    """What the scaler leaves out must not become the momentum; that of torch would be whatever lies in memory."""
    task = build("resnet", f"optim.name={optimiser}")
    trainer = Trainer.of(task)
    trainer.scaler = torch.amp.GradScaler("cpu")
    poison(task, 1, where="gradient")
    next(fit(task, trainer, start=Progress()))
    moments = [value for name, value in trainer.tensors(CPU.device).items() if name.endswith("momentum_buffer")]
    assert moments
    assert not any(value.any() for value in moments)


@pytest.mark.parametrize(("kind", "optimiser"), [("resnet", "sgd"), ("resnet", "muon"), ("seq2seq", "muon")])
def test_a_step_whose_loss_alone_is_not_finite_is_left_out_in_fp16(
    kind: str, optimiser: str, build: Callable[..., Task]
) -> None:
    """Its gradient is of no use, though the scaler would find nothing wrong with it."""
    task = build(kind, SKIP, f"optim.name={optimiser}")
    trainer = Trainer.of(task)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    poison(task, 2, where="constant")
    reports = fit(task, trainer, start=Progress())
    next(reports)
    before = state(task, trainer)
    next(reports)
    changed = differing(before, state(task, trainer))
    assert {name for name in changed if not name.startswith(("random.", "scaler."))} == {"skipped"}


@pytest.mark.parametrize("overrides", [[], [SKIP]])
def test_a_gradient_that_no_scaler_mends_is_told(overrides: list[str], build: Callable[..., Task]) -> None:
    """Its scale would be halved until it is 0, and the weights would stay as they are to the end."""
    task = build("resnet", *overrides)
    trainer = Trainer.of(task)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-13)
    poison(task, 1, 2, 3, where="gradient")
    reports = fit(task, trainer, start=Progress())
    for _ in range(2):
        next(reports)
    assert trainer.scaler.get_scale() == 2.0**-15
    with pytest.raises(UserError, match="no gradient has been finite for long by step 3: loss ") as stopped:
        next(reports)
    assert "--precision" in (stopped.value.hint or "")


def test_a_gradient_that_a_scaler_mends_is_no_reason_to_stop() -> None:
    loss, infinite = torch.tensor(1.5), torch.tensor(math.inf)
    check_finite(loss, infinite, 3, 0.1, scaled=True)
    with pytest.raises(UserError) as stopped:
        check_finite(loss, infinite, 3, 0.1)
    assert (
        stopped.value.message == "the gradient is not finite at step 3: loss 1.5, learning rate 0.1, gradient norm inf"
    )
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for index, value in ((0, 0.0), (1, math.nan)):
        model[index].weight.grad = torch.full((2, 2), value)
    with pytest.raises(UserError, match=r"^the gradient of `1\.weight` is not finite at step 3: loss 1.5,"):
        check_finite(loss, infinite, 3, 0.1, model=model)
    check_weights(model, loss, infinite, 3, 0.1)
    model[2].bias.data[1] = math.inf
    with pytest.raises(UserError, match=r"^the weights of `2\.bias` are not finite after step 3: loss 1.5,"):
        check_weights(model, loss, infinite, 3, 0.1)
    with pytest.raises(UserError, match="loss nan, learning rate"):
        check_finite(torch.tensor(math.nan), loss, 3, 0.1, scaled=True)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_training_stops_where_the_recipe_says_nothing(where: str, build: Callable[..., Task]) -> None:
    task = build("resnet")
    poison(task, 2, where=where)
    with pytest.raises(UserError, match=f"the {where}( of `.*`)? is not finite at step 2") as stopped:
        list(fit(task, Trainer.of(task), start=Progress()))
    assert "on_nonfinite=skip" in str(stopped.value.hint)


@pytest.fixture
def poisoned_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some batches, wherever they come, have no finite loss."""
    for owner in (Classification, Translation):
        monkeypatch.setattr(owner, "loss", bad_for_some(owner.loss))


def bad_for_some(loss: Callable[..., Any]) -> Callable[..., Any]:
    def patched(task: Task, batch: Any) -> tuple[Tensor, int]:
        total, count = loss(task, batch)
        content = batch[0].double().sum().item() if isinstance(task, Translation) else batch.labels.sum().item()
        return total * (math.nan if content % 3 == 0 else 1), count

    return patched


@pytest.mark.parametrize("kind", KINDS)
def test_steps_left_out_are_counted_told_and_resumed(
    kind: str, tiny: dict[str, Path], poisoned_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SECONDS_BETWEEN_STEP_EVENTS", -1)
    recipe = resolve(str(tiny[kind]), [SKIP]).recipe
    heard = Noting()
    whole = training.train(recipe, out=Path("whole"), runtime=CPU, listener=heard)
    skipped, steps = whole["skipped_steps"], whole["steps"]
    assert 0 < skipped < steps
    assert heard.notes[-1].startswith(f"{skipped} of ")
    assert len(heard.notes) == skipped, "it is saved, and so looked at, after every step"
    records = runs.metrics(Run(Path("whole")))
    assert [record["skipped_steps"] for record in records] == sorted(record["skipped_steps"] for record in records)
    assert records[-1]["skipped_steps"] == skipped
    assert json.loads(Path("whole/result.json").read_text())["skipped_steps"] == skipped

    with pytest.raises(training.Interrupted):
        training.train(recipe, out=Path("run"), runtime=CPU, listener=Stopping())
    stops = 1
    while until_stopped(lambda: training.resume("run", runtime=CPU, listener=Stopping())):
        stops += 1
    assert stops > 4
    assert_same_run(Run(Path("run")), Run(Path("whole")))


def test_a_record_of_steps_that_were_all_left_out_is_json(build: Callable[..., Task]) -> None:
    watch = session._Watch(build("resnet"), 12, Progress(), {})
    nan = torch.tensor(math.nan)
    watch.see(Report(Progress(step=1), nan, nan, 0.1, 8))
    record = watch.record(Report(Progress(step=1), nan, nan, 0.1, 8))
    assert json.loads(json.dumps(record, allow_nan=False))["loss"] is None


@pytest.mark.parametrize("overrides", [(), (SKIP,)], ids=["stop", "skip"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("resnet", ("training.mixup=0.4", "training.cutmix=1.0", "training.ema_decay=0.9", "optim.clip_norm=1.0")),
        ("resnet", ("optim.name=adamw",)),
        ("resnet", ("optim.name=muon", "optim.other_learning_rate=0.1")),
        ("seq2seq", ("model.attention=additive", "training.ema_decay=0.9")),
        ("seq2seq", ("optim.name=muon",)),
        ("seq2seq", ("model.decoder=luong", "model.input_feeding=true")),
    ],
)
def test_no_number_is_asked_for_in_a_step_but_to_see_whether_it_is_finite(
    kind: str,
    changes: tuple[str, ...],
    overrides: tuple[str, ...],
    tiny: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which on a GPU is looked at every 50 steps. Batches are made beforehand, on the processor."""
    task = tasks.build(resolve(str(tiny[kind]), [*changes, *overrides]).recipe, runtime=CPU)
    batches = list(task.batches(0))
    monkeypatch.setattr(task, "batches", lambda epoch, start=0: iter(batches[start:]))
    monkeypatch.setattr(loop, "check_finite", lambda *arguments, **more: None)
    reports = fit(task, Trainer.of(task), start=Progress())
    next(reports)
    with Waits() as waits:
        loss = next(reports).loss
        # With Muon it is asked whether the step is to be left out, as the docstring of `Together` says.
        asked = int("optim.name=muon" in changes and SKIP in overrides)
        assert len(waits.seen) == asked
        loss.item()
        assert len(waits.seen) == asked + 1, "it does count"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_is_not_waited_for_to_leave_a_step_out(kind: str, tiny: dict[str, Path]) -> None:
    runtime = Runtime(torch.device("cuda", 0), "fp32", "gpu", "as asked")
    task = tasks.build(resolve(str(tiny[kind]), [SKIP]).recipe, runtime=runtime)
    trainer = Trainer.of(task)
    poison(task, 2)
    reports = fit(task, trainer, start=Progress())
    next(reports)
    try:
        torch.cuda.set_sync_debug_mode("error")
        next(reports)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.skipped == 1
