"""A training in its run folder: what is written when, signals, resuming, and the final evaluation."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dl7cli import checkpoint, runs, tasks
from dl7cli.checkpoint import Checkpoint, Progress
from dl7cli.device import Runtime, peak_memory_bytes
from dl7cli.errors import UserError
from dl7cli.metrics import Scores
from dl7cli.recipe import Recipe
from dl7cli.runs import Run
from dl7cli.tasks import Task
from dl7cli.training import compilation
from dl7cli.training.evaluation import note_reading, refuse_other_data, result_of
from dl7cli.training.loop import Report, Trainer, check_finite, check_weights, fit, total_steps

SECONDS_BETWEEN_STEP_EVENTS = 0.25
STEPS_BETWEEN_RECORDS = 50
STEPS_BEFORE_TIMING = 3


class Plan(NamedTuple):
    """What a training is about to do."""

    recipe: Recipe
    run: Path
    data: str
    splits: dict[str, int]
    notes: list[str]
    parameters: int
    device: str
    precision: str
    reason: str
    steps: int
    epochs: int
    resumed_step: int


class Step(NamedTuple):
    """How a training stands, a few times a second at most."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    rate: float
    unit: str
    remaining_seconds: float


class Epoch(NamedTuple):
    """An epoch's end."""

    epoch: int
    scores: Scores
    split: str
    best: bool
    seconds: float


class Listener(Protocol):
    """Whoever shows a training to a person."""

    def plan(self, plan: Plan) -> None: ...
    def step(self, step: Step) -> None: ...
    def epoch(self, epoch: Epoch) -> None: ...
    def note(self, text: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...


class Interrupted(Exception):
    """A signal ended the training; its state is saved and it can be resumed."""

    def __init__(self, run: Path, signal_number: int) -> None:
        super().__init__(f"interrupted by signal {signal_number}")
        self.run = run
        self.signal = signal_number


def train(
    recipe: Recipe, *, out: Path | None = None, runtime: Runtime, offline: bool = False, listener: Listener
) -> dict[str, Any]:
    """Train a recipe in a new run folder and evaluate the best epoch; returns what `--json` prints.

    Raises UserError for anything a user can put right, before the run folder is made where possible, and Interrupted
    after a SIGINT or SIGTERM, when the run can be resumed.
    """
    begin = time.monotonic()
    if out is not None:
        runs.refuse_occupied(out)
    task = tasks.build(recipe, runtime=runtime, offline=offline, progress=listener.progress)
    steps = total_steps(task)
    run = runs.create(recipe, recipe.name, out)
    with runs.lock(run), runtime.repeatable():
        trainer = Trainer.of(task)
        _save(run.last, task, trainer.tensors(runtime.device), Progress(), {})
        return _run(run, task, trainer, _Watch(task, steps, Progress(), {}), {}, listener, begin)


def resume(run: str, *, runtime: Runtime, offline: bool = False, listener: Listener) -> dict[str, Any]:
    """Go on with an interrupted run from its last checkpoint; raises as `train`."""
    begin = time.monotonic()
    found, _ = runs.find(run)
    with runs.lock(found), runtime.repeatable():
        saved = checkpoint.load(found.last, training=True)
        if not saved.training:
            raise UserError(f"checkpoint `{found.last}` is one to use, not to go on from", hint="train anew instead")
        if saved.progress.epoch >= saved.recipe.training.epochs and (found.folder / "result.json").exists():
            raise UserError(f"run `{found.folder}` is finished", hint=f"`dl7 eval {found.folder}` evaluates it")
        task = tasks.build(saved.recipe, saved.assets, runtime=runtime, offline=offline, progress=listener.progress)
        refuse_other_data(task, saved.assets, "resuming")
        tasks.restore(task, saved)
        trainer = Trainer.of(task)
        trainer.restore(saved.training, runtime.device)
        runs.trim_metrics(found, saved.progress.step, saved.progress.epoch)
        watch = _Watch(task, total_steps(task), saved.progress, saved.training)
        return _run(found, task, trainer, watch, saved.scores, listener, begin)


def _run(
    run: Run,
    task: Task,
    trainer: Trainer,
    watch: "_Watch",
    scores: dict[str, float],
    listener: Listener,
    begin: float,
) -> dict[str, Any]:
    recipe, runtime, start = task.recipe, task.runtime, watch.start
    before = runs.environment(run)
    # As it began, so it goes on: the bits depend on it.
    compiled = before.get("compiled", False) if before else compilation.wanted(task)
    runs.write_environment(
        run,
        {
            "device": runtime.device_name,
            "precision": runtime.precision,
            "deterministic": runtime.deterministic,
            "compiled": compiled,
            "resumed_step": start.step,
        },
    )
    listener.plan(
        Plan(
            recipe=recipe,
            run=run.folder,
            data=task.data_name,
            splits=task.splits(),
            notes=task.notes,
            parameters=task.parameters,
            device=runtime.device_name,
            precision=runtime.precision,
            reason=runtime.reason,
            steps=watch.steps,
            epochs=recipe.training.epochs,
            resumed_step=start.step,
        )
    )
    if compiled and start.epoch < recipe.training.epochs and not compilation.prepare(task, listener.note):
        runs.amend_environment(run, {"compiled": False})
        if start.step:
            listener.note("the steps before were compiled: the result may differ from that of the run never stopped")
    watch.go_on()
    progress = start
    saved_at = time.monotonic()
    with signals() as received:
        for report in fit(task, trainer, start=start):
            watch.see(report)
            progress = report.progress._replace(seconds=start.seconds + watch.seconds)
            stopping = bool(received)
            due = time.monotonic() - saved_at > 60 * recipe.training.checkpoint_minutes
            recorded = report.scores is not None or progress.step % STEPS_BETWEEN_RECORDS == 0
            told = report.loss, report.gradient_norm, progress.step, report.learning_rate
            if recorded or due or stopping:
                check_finite(*told, scaled=True)
            if report.scores is not None:
                scores = report.scores.values
                best = progress.best_epoch == progress.epoch
                if best:
                    _save(run.best, task, {}, progress, scores, trainer.weights(task))
                if recipe.training.keep_last:
                    _save(run.epoch(progress.epoch), task, {}, progress, scores, trainer.weights(task))
                    for number, folder in runs.epochs(run, torn=True).items():
                        if number <= progress.epoch - recipe.training.keep_last:
                            checkpoint.remove(folder)
                runs.append_metrics(
                    run,
                    {
                        **watch.record(report),
                        "primary": report.scores.primary,
                        "scores": scores,
                        "seconds": round(progress.seconds, 3),
                    },
                )
                listener.epoch(Epoch(progress.epoch, report.scores, "validation", best, progress.seconds))
            elif recorded:
                runs.append_metrics(run, watch.record(report))
            if report.scores is not None or due or stopping:
                check_weights(task.model, *told)
                training = {**trainer.tensors(runtime.device), **watch.tensors()}
                _save(run.last, task, training, progress, scores)
                saved_at = time.monotonic()
            if stopping:
                raise Interrupted(run.folder, received[0])
            if watch.due():
                listener.step(watch.step(report))
            watch.go_on()
        if received:
            raise Interrupted(run.folder, received[0])
    tasks.restore(task, checkpoint.load(run.best))
    split = "test" if "test" in task.splits() else "validation"
    result = result_of(run, task, split, task.evaluate(split), time.monotonic() - begin)
    result |= {
        "steps": progress.step,
        "training_seconds": round(progress.seconds, 3),
        "best_epoch": progress.best_epoch,
        "parameters": task.parameters,
        "device": runtime.device_name,
        "precision": runtime.precision,
        "rate": round(watch.rate, 1),
        "peak_memory_bytes": peak_memory_bytes(runtime.device),
    }
    note_reading(run, result)
    runs.write_result(run, result)
    return result


def _save(
    folder: Path,
    task: Task,
    training: dict[str, Tensor],
    progress: Progress,
    scores: dict[str, float],
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint, of the model's own weights if no other are given; without `training`, one to use alone."""
    checkpoint.save(
        folder,
        Checkpoint(
            recipe=task.recipe,
            assets={**task.assets, "training_examples": task.splits()["train"], "data_digest": task.digest},
            weights=task.model.state_dict() if weights is None else weights,
            training=training,
            progress=progress,
            scores=scores,
        ),
    )


class _Watch:
    """Clock and sums between reports: rate, time left, mean loss. Steps are timed apart from validation.

    `saved` is what `tensors` gave when the run was saved, so that its records come out as if it had not stopped.
    """

    def __init__(self, task: Task, steps: int, start: Progress, saved: dict[str, Tensor]) -> None:
        self.start = start
        self.steps = steps
        self.seconds = 0.0
        self.rate = 0.0
        self._task = task
        self._timed_examples = 0
        self._timed_seconds = 0.0
        self._timed_steps = 0
        self._validation_seconds = 0.0
        self._losses = list(saved.get("watch.losses", torch.zeros(0)))
        self._loss, self._norm = saved.get("watch.latest", torch.zeros(2))
        self._begin = self._previous = time.monotonic()
        self._shown = 0.0

    def see(self, report: Report) -> None:
        now = time.monotonic()
        self.seconds = now - self._begin
        if report.scores is not None:
            self._validation_seconds = now - self._previous
        else:
            self._loss, self._norm = report.loss, report.gradient_norm
            self._losses.append(report.loss)
            # The first steps allocate memory and choose kernels.
            if report.progress.step - self.start.step > STEPS_BEFORE_TIMING:
                self._timed_examples += report.examples
                self._timed_seconds += now - self._previous
                self._timed_steps += 1
                self.rate = self._timed_examples / self._timed_seconds

    def go_on(self) -> None:
        """Leave what was done since `see`, such as saving, out of the next step's time."""
        self._previous = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self._shown > SECONDS_BETWEEN_STEP_EVENTS

    def record(self, report: Report) -> dict[str, Any]:
        """A line for `metrics.jsonl`, with the mean loss since the one before."""
        losses, self._losses = self._losses or [self._loss], []
        norm = self._norm.item()
        return {
            "step": report.progress.step,
            "epoch": report.progress.epoch,
            "loss": sum(loss.item() for loss in losses) / len(losses),
            "learning_rate": report.learning_rate,
            # In fp16 a gradient may overflow: that step is left out and the scale of the next ones lowered.
            "gradient_norm": norm if math.isfinite(norm) else None,
            "rate": round(self.rate, 1),
        }

    def tensors(self) -> dict[str, Tensor]:
        """What the records after this moment need of the steps before it, by name, for a checkpoint."""
        return {
            "watch.losses": torch.tensor([loss.item() for loss in self._losses]),
            "watch.latest": torch.tensor([self._loss.item(), self._norm.item()]),
        }

    def step(self, report: Report) -> Step:
        self._shown = time.monotonic()
        progress = report.progress
        epochs = self._task.recipe.training.epochs
        per_step = self._timed_seconds / self._timed_steps if self._timed_steps else 0.0
        steps_left, epochs_left = self.steps - progress.step, epochs - progress.epoch
        return Step(
            epoch=min(progress.epoch + 1, epochs),
            epochs=epochs,
            step=progress.step,
            steps=self.steps,
            loss=report.loss.item(),
            learning_rate=report.learning_rate,
            gradient_norm=report.gradient_norm.item(),
            rate=self.rate,
            unit=self._task.unit,
            remaining_seconds=steps_left * per_step + epochs_left * self._validation_seconds,
        )


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of stopping at once; a second one does stop at once."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            # Unwinds, so that the terminal is left as it was found; a checkpoint half-written does no harm.
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        received.append(number)
        # Not by print, which may be what the signal has interrupted. Ctrl-C ends what reads a pipe, such as tee, too.
        with suppress(OSError):
            os.write(2, b"\nstopping after this step; once more stops at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
