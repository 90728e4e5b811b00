"""A training in its run folder: what is written when, resuming, and the final evaluation."""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dl7cli import checkpoint, runs, tasks
from dl7cli.checkpoint import Checkpoint, Progress
from dl7cli.device import Runtime, peak_memory_bytes, synchronise
from dl7cli.distributed import Workers
from dl7cli.errors import UserError
from dl7cli.recipe import Recipe, parse_override, resumed
from dl7cli.runs import Run
from dl7cli.tasks import Task
from dl7cli.training import compilation
from dl7cli.training.evaluation import note_reading, refuse_other_data, result_of
from dl7cli.training.initial import Given
from dl7cli.training.listener import Epoch, Listener, Plan, Step
from dl7cli.training.loop import Report, Trainer, check_finite, check_weights, finished, fit, total_steps
from dl7cli.training.saving import Saver, saving
from dl7cli.training.sharing import build, share, share_recipe
from dl7cli.training.signals import Interrupted, signals

SECONDS_BETWEEN_STEP_EVENTS = 0.25
STEPS_BETWEEN_RECORDS = 50
STEPS_BEFORE_TIMING = 3
_DETAILS_KEPT = ("sample", "negative_log_likelihood")
"""Of each validation, in `metrics.jsonl`."""
_RUN = "run"
"""What workers remember for those in their place: the folder."""


def train(
    recipe: Recipe | None,
    *,
    out: Path | None = None,
    initial: str | None = None,
    runtime: Runtime,
    offline: bool = False,
    listener: Listener,
) -> dict[str, Any]:
    """Train a recipe in a new run folder and evaluate the epoch it selects; returns what `--json` prints.

    The first weights are those of the run `initial`, or drawn by the recipe's seed where none is named. Of several
    workers each calls this, but only what the first is given counts, and only it returns anything; those that were
    started in the place of others go on with the run of these. Raises UserError for anything a user can put right,
    before the run folder is made where possible, and Interrupted after one of `stop_signals`: the run can be resumed;
    workers but the first then just return.
    """
    begin = time.monotonic()
    workers = runtime.workers
    if (done := _done_before(workers)) is not None:
        return done
    folder = workers.recall(_RUN)
    if workers.shared(folder is not None and runs.holds(Run(Path(folder)).last)):
        return resume(folder, runtime=runtime, offline=offline, listener=listener)
    if out is not None and folder is None and workers.first:
        runs.refuse_occupied(out)
    recipe = share_recipe(recipe, workers)
    given = Given.of(initial) if initial is not None and workers.first else None
    assets = None if given is None else given.assets(recipe)
    task = build(recipe, assets, runtime=runtime, offline=offline, progress=listener.progress)
    if given is not None:
        task.notes.append(given.give(task))
    if workers.shared(given is not None):
        workers.copy_first(task.model.state_dict().values())
    steps = total_steps(task)
    with runtime.repeatable():
        trainer = Trainer.of(task)
        if not workers.first:
            return _follow(task, trainer, Progress(), listener)
        run = runs.create(task.recipe, task.recipe.name, out) if folder is None else Run(Path(folder))
        workers.remember(_RUN, str(run.folder))
        with runs.lock(run):
            saver = Saver(run, task)
            saver.save(trainer, Progress(), {})
            saver.wait()
            with _stopped(run):
                return _run(run, task, trainer, _Watch(task, steps, Progress(), {}), {}, listener, begin)


def resume(
    run: str | None,
    *,
    data: str | None = None,
    overrides: Sequence[str] = (),
    runtime: Runtime,
    offline: bool = False,
    listener: Listener,
) -> dict[str, Any]:
    """Go on with an interrupted run from its last checkpoint, on any number of workers; as `train` otherwise.

    `data` is where its data lies now, if it has been moved; other training data than it began with is refused.
    `overrides` are as `recipe.resumed` takes them. Both are then noted in the run.
    """
    begin = time.monotonic()
    workers = runtime.workers
    if (done := _done_before(workers)) is not None:
        return done
    with ExitStack() as stack, runtime.repeatable():
        found, saved = None, None
        if workers.first:
            found, _ = runs.find(run)
            killed = stack.enter_context(runs.lock(found))
            if killed is not None:
                how = f"was left by process {killed}, which no longer holds it: going on from its last checkpoint"
                listener.note(f"run {found.folder} {how}")
            saved = _last(found)
        saved = share(saved, workers)
        data, overrides = workers.shared([data, list(overrides)])
        recipe = resumed(saved.recipe, overrides, data=data)
        task = build(
            recipe,
            saved.assets,
            runtime=runtime,
            offline=offline,
            progress=listener.progress,
            weights=saved.weights,
        )
        refuse_other_data(task, saved.assets, "resuming needs the same data; train anew instead")
        trainer = Trainer.of(task)
        trainer.restore(saved.training, runtime.device)
        if any(parse_override(text)[0] == ["training", "parts"] for text in overrides):
            trainer.parts = recipe.training.parts
        progress = saved.progress
        if found is not None:
            progress = _with_best(found, task, trainer, saved, listener)
        progress = Progress(*workers.shared(progress))  # by which all of them end at the same epoch
        if found is None:
            return _follow(task, trainer, progress, listener)
        workers.remember(_RUN, str(found.folder))
        if recipe != saved.recipe:
            _note_recipe(found, recipe)
        runs.trim_metrics(found, saved.progress.step, saved.progress.epoch)
        watch = _Watch(task, total_steps(task), progress, saved.training)
        with _stopped(found):
            return _run(found, task, trainer, watch, saved.scores, listener, begin)


@contextmanager
def _stopped(run: Run) -> Iterator[None]:
    """Ctrl-C where no step can be finished, as while a model is compiled: what was saved before is there."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(run.folder, signal.SIGINT) from None


def _note_recipe(run: Run, recipe: Recipe) -> None:
    """Have all of a run say what it goes on with."""
    runs.rewrite_recipe(run, recipe)
    for folder in (run.last, run.best, run.average, *runs.epochs(run).values()):
        if runs.holds(folder):
            try:
                saved = checkpoint.load(folder, training=True)
            except UserError:
                continue  # it is told of where it is needed, and need not keep the run from going on
            checkpoint.save(folder, replace(saved, recipe=recipe))


def _done_before(workers: Workers) -> dict[str, Any] | None:
    """The result of the run, where one of the workers that these take the place of was lost after its end."""
    folder = workers.recall(_RUN)
    result: dict[str, Any] | None = workers.shared(None if folder is None else runs.result(Run(Path(folder))))
    return result


def _last(run: Run) -> Checkpoint:
    """What a run goes on from."""
    saved = checkpoint.load(run.last, training=True)
    if not saved.training:
        raise UserError(f"checkpoint `{run.last}` is one to use, not to go on from", hint="train anew instead")
    if finished(saved.recipe.training, saved.progress) and (run.folder / "result.json").exists():
        raise UserError(f"run `{run.folder}` is finished", hint=f"`dl7 eval {run.folder}` evaluates it")
    return saved


def _with_best(run: Run, task: Task, trainer: Trainer, saved: Checkpoint, listener: Listener) -> Progress:
    """The progress of a run's `last`, with which epoch its `best` is of.

    Where `best` is missing or damaged, as when `last` alone was copied from another machine, the best epoch is chosen
    anew, and patience counted: among those to come or, where all the recipe's epochs are done, it is the last one.
    """
    progress = saved.progress
    if progress.best is None and not runs.holds(run.best):
        return progress
    try:
        best = checkpoint.load(run.best).progress
    except UserError as problem:
        listener.note(f"{problem.message}; the best epoch is chosen anew")
        if progress.epoch < saved.recipe.training.epochs:
            return progress._replace(best=None, best_epoch=None)
        progress = progress._replace(best=None, best_epoch=progress.epoch)
        saver = Saver(run, task)
        saver.save(trainer, progress, saved.scores, best=True)
        saver.wait()
        return progress
    # Killed between the two: the epoch of `best` is trained again, and on a GPU need not be as good again.
    newer = best.epoch > progress.epoch
    return progress._replace(best=best.best, best_epoch=best.best_epoch) if newer else progress


def _follow(task: Task, trainer: Trainer, start: Progress, listener: Listener) -> dict[str, Any]:
    """What workers do besides the first: the same steps and evaluations as `_run`, and nothing that lasts."""
    workers = task.runtime.workers
    if workers.shared(None) and not finished(task.recipe.training, start):
        compilation.prepare(task, listener.note)
    with signals(workers) as stopping:
        for report in fit(task, trainer, start=start):
            if stopping(late=_is_amid(report, task)):
                return {}
        if stopping():
            return {}
    workers.copy_first(task.model.state_dict().values())
    task.evaluate(_last_split(task))
    return {}


def _last_split(task: Task) -> str:
    """What is evaluated when all is trained."""
    wanted = task.recipe.training.final_split
    return wanted if wanted in task.splits() else "validation"


def _begin(run: Run, task: Task, trainer: Trainer, watch: "_Watch", listener: Listener) -> None:
    """Write down and tell what is about to be trained, and compile the model where that is wanted."""
    recipe, runtime, start = task.recipe, task.runtime, watch.start
    workers = runtime.workers
    before = runs.environment(run)
    # As it began, so it goes on: the bits depend on it.
    compiled = before.get("compiled", False) if before else compilation.wanted(task)
    apart = trainer.parts > 1 or compilation.meets_in_layers(task)
    if compiled and apart and start.step:
        why = "of a batch in parts" if trainer.parts > 1 else "of workers that normalise together"
        listener.note(f"the steps before were compiled, those {why} are not: the result may differ")
    compiled = workers.shared(compiled and not apart)
    runs.write_environment(
        run,
        {
            "device": runtime.device_name,
            "workers": workers.count,
            "precision": runtime.precision,
            "deterministic": runtime.deterministic,
            "compiled": compiled,
            "resumed_step": start.step,
        },
    )
    if changed := _changed(before, runs.environment(run)):
        listener.note(f"{changed}: the result may differ from that of the run never stopped")
    listener.plan(
        Plan(
            recipe=recipe,
            run=run.folder,
            data=task.data_name,
            splits=task.splits(),
            notes=task.notes,
            parameters=task.parameters,
            device=runtime.device_name,
            workers=runtime.workers.count,
            precision=runtime.precision,
            reason=runtime.reason,
            steps=watch.steps,
            epochs=recipe.training.epochs,
            resumed_step=start.step,
        )
    )
    if compiled and not finished(recipe.training, start) and not compilation.prepare(task, listener.note):
        runs.amend_environment(run, {"compiled": False})
        if start.step:
            listener.note("the steps before were compiled: the result may differ from that of the run never stopped")


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What the bits of the result depend on and is otherwise than until now; empty where nothing is."""

    def facts(one: dict[str, Any]) -> tuple[str | None, ...]:
        packages, workers = one.get("packages"), one.get("workers")
        version = f"torch {packages.get('torch')}" if isinstance(packages, dict) else None
        count = None if workers is None else "1 worker" if workers == 1 else f"{workers} workers"
        return one.get("device"), one.get("precision"), count, version

    differing = [(old, new) for old, new in zip(facts(before), facts(now), strict=True) if old not in (None, new)]
    if not differing:
        return ""
    old, new = (", ".join(part) for part in zip(*differing, strict=True))
    return f"the run was trained with {old} until now, and goes on with {new}"


def _run(
    run: Run,
    task: Task,
    trainer: Trainer,
    watch: "_Watch",
    scores: dict[str, float],
    listener: Listener,
    begin: float,
) -> dict[str, Any]:
    """Train from where `watch` begins, writing down what there is to keep, and evaluate; returns as `train`."""
    recipe, start = task.recipe, watch.start
    workers, skipping = task.runtime.workers, recipe.training.on_nonfinite == "skip"
    _begin(run, task, trainer, watch, listener)
    watch.go_on()
    progress = start
    saved_at = time.monotonic()
    parts, skipped = trainer.parts, int(trainer.skipped)
    with saving(run, task, listener.note) as saver, signals(workers) as stopping:
        for report in fit(task, trainer, start=start):
            watch.see(report)
            progress = report.progress._replace(seconds=start.seconds + watch.seconds)
            closed, amid = report.scores is not None, _is_amid(report, task)
            stop = stopping(late=amid)
            # Nothing is saved in a validation: it is to be as long as the one before.
            ahead = 0.0 if closed or amid else watch.validation_seconds
            due = time.monotonic() + ahead - saved_at > 60 * recipe.training.checkpoint_minutes
            recorded = closed or progress.step % STEPS_BETWEEN_RECORDS == 0
            told = report.loss, report.gradient_norm, progress.step, report.learning_rate
            if trainer.parts > parts:
                parts = trainer.parts
                listener.note(f"out of memory at step {progress.step:,}: a batch is now taken in {parts} parts")
            if recorded or due or stop:
                if not skipping:
                    check_finite(*told, scaled=True)
                elif trainer.skipped > skipped:
                    skipped = int(trainer.skipped)
                    listener.note(f"{skipped:,} of {progress.step:,} steps left out: not finite")
            if recorded:
                record = watch.record(report)
                if skipping:
                    record["skipped_steps"] = skipped
                if report.scores is not None:
                    scores = report.scores.values
                    record |= {"primary": report.scores.primary, "scores": scores}
                    kept = {name: report.scores.details.get(name) for name in _DETAILS_KEPT}
                    record |= {name: value for name, value in kept.items() if value is not None}
                    record["seconds"] = round(progress.seconds, 3)
                runs.append_metrics(run, record)
            best = False
            if report.scores is not None:
                best = (progress.best, progress.best_epoch) == (report.scores.score, progress.epoch)
                shown = best and recipe.training.select != "last"
                listener.epoch(Epoch(progress.epoch, report.scores, shown))
            if closed or due or stop:
                if not closed:  # of an epoch's end `fit` has checked them, before the validation
                    check_weights(task.model, *told)
                saver.save(trainer, progress, scores, watched=watch.tensors(), closed=closed, best=best)
                saved_at = time.monotonic()
            saver.check()
            if stop:
                saver.wait()
                raise Interrupted(run.folder, stop)
            if watch.due():
                listener.step(watch.step(report))
            watch.go_on()
        saver.wait()
        stop = stopping()
        if stop:
            raise Interrupted(run.folder, stop)
    return _finish(run, task, watch, progress, skipped if skipping else None, listener, begin)


def _finish(
    run: Run, task: Task, watch: "_Watch", progress: Progress, skipped: int | None, listener: Listener, begin: float
) -> dict[str, Any]:
    """Evaluate the epoch that is to be used; returns what `--json` prints, with how many steps were left out if any."""
    recipe, runtime = task.recipe, task.runtime
    if progress.epoch < recipe.training.epochs:
        when = f"training ended after {progress.epoch} of {recipe.training.epochs}"
        listener.note(f"no epoch was better than epoch {progress.best_epoch}: {when} (training.patience)")
    tasks.restore(task, checkpoint.load(run.best))
    runtime.workers.copy_first(task.model.state_dict().values())
    split = _last_split(task)
    result = result_of(run, task, split, task.evaluate(split), time.monotonic() - begin, run.best.name)
    result |= {
        "steps": progress.step,
        "training_seconds": round(progress.seconds, 3),
        "best_epoch": progress.best_epoch,
        "parameters": task.parameters,
        "device": runtime.device_name,
        "precision": runtime.precision,
        # Resumed for its last steps alone, it has timed none.
        "rate": round(watch.rate, 1) or next((r["rate"] for r in reversed(runs.metrics(run)) if r.get("rate")), 0.0),
        "peak_memory_bytes": peak_memory_bytes(runtime.device),
    }
    if skipped is not None:
        result["skipped_steps"] = skipped
    note_reading(run, result)
    result["readings"] = len(runs.readings(run, result))
    runs.write_result(run, result)
    return result


def _is_amid(report: Report, task: Task) -> bool:
    """Whether the next report comes after one more step, and not after a validation or a new epoch's preparations."""
    return report.scores is None and report.progress.batch < task.steps(report.progress.epoch)


class _Watch:
    """Clock and sums between reports: rate, time left, mean loss. Steps are timed apart from validation.

    `saved` is what `tensors` gave when the run was saved, so that its records come out as if it had not stopped.
    """

    def __init__(self, task: Task, steps: int, start: Progress, saved: dict[str, Tensor]) -> None:
        self.start = start
        self.steps = steps
        self.seconds = 0.0
        self.rate = 0.0
        self.validation_seconds = 0.0
        self._task = task
        self._timed_examples = 0
        self._timed_seconds = 0.0
        self._timed_steps = 0
        self._losses = list(saved.get("watch.losses", torch.zeros(0)).float().flatten())
        self._loss, self._norm = torch.cat(
            [saved.get("watch.latest", torch.zeros(2)).float().flatten(), torch.zeros(2)]
        )[:2]
        self._begin = self._previous = time.monotonic()
        self._shown = 0.0

    def see(self, report: Report) -> None:
        if report.progress.step % STEPS_BETWEEN_RECORDS == 0 or not _is_amid(report, self._task) or self.due():
            # What follows waits for the device, and that is the time of the steps until here.
            synchronise(self._task.runtime.device)
        now = time.monotonic()
        self.seconds = now - self._begin
        if report.scores is not None:
            self.validation_seconds = now - self._previous
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
        losses = [value for loss in self._losses or [self._loss] if math.isfinite(value := loss.item())]
        self._losses = []
        norm = self._norm.item()
        return {
            "step": report.progress.step,
            "epoch": report.progress.epoch,
            # Of steps that were not left out; there may be none.
            "loss": sum(losses) / len(losses) if losses else None,
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
            rate=self.rate,
            unit=self._task.unit,
            remaining_seconds=steps_left * per_step + epochs_left * self.validation_seconds,
        )
