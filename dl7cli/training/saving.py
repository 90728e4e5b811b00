"""What a training keeps of itself: checkpoints, written in a thread of their own while the training goes on."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from dl7cli import checkpoint, runs
from dl7cli.checkpoint import Checkpoint, Progress
from dl7cli.errors import UserError
from dl7cli.runs import Run
from dl7cli.tasks import Task
from dl7cli.training.loop import Trainer

MOMENT = 2.0
"""Seconds that a second signal waits for the disk."""


class Saver:
    """Writes the checkpoints of a run. Who saves waits for the copy to main memory, not for the disk.

    At most one save is being written: the next one waits for it. A kill at any moment leaves a `last` to go on from
    and a `best` that is of `last` or of the epoch after it, which is then trained again.
    """

    def __init__(self, run: Run, task: Task) -> None:
        self._run = run
        self._task = task
        self._writing: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        trainer: Trainer,
        progress: Progress,
        scores: dict[str, float],
        *,
        watched: dict[str, Tensor] | None = None,
        closed: bool = False,
        best: bool = False,
    ) -> None:
        """Save `last`, with `watched` beside what the trainer needs; before it `best` where it is that, and where an
        epoch is `closed` and the recipe keeps the last ones, its own checkpoint.

        Raises as `wait`, of the save before.
        """
        self.wait()
        weights = checkpoint.copied(self._task.model.state_dict())
        training = checkpoint.copied({**trainer.tensors(self._task.runtime.device), **(watched or {})})
        used = weights if trainer.average is None else checkpoint.copied(trainer.average.weights)

        def write() -> None:
            to_use = self._checkpoint(used, {}, progress, scores)
            if best:
                checkpoint.save(self._run.best, to_use)
            if closed and self._task.recipe.training.keep_last:
                self._keep(to_use)
            checkpoint.save(self._run.last, self._checkpoint(weights, training, progress, scores))
            runs.mark_newest(self._run)

        self._writing = threading.Thread(target=self._run_quietly, args=(write,), name="checkpoint", daemon=True)
        self._writing.start()

    def check(self) -> None:
        """Raise as `wait` where a save has failed, without waiting for one that is being written."""
        if self._writing is not None and not self._writing.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until what was saved is on the disk. Raises UserError where it cannot be written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def abandon(self) -> None:
        """Leave what is being written to itself if it takes more than a moment."""
        if self._writing is not None:
            self._writing.join(MOMENT)

    def _keep(self, of_epoch: Checkpoint) -> None:
        """Write the checkpoint of an epoch, and remove those that are no longer among the last ones."""
        number = of_epoch.progress.epoch
        checkpoint.save(self._run.epoch(number), of_epoch)
        for other, folder in runs.epochs(self._run, torn=True).items():
            if other <= number - self._task.recipe.training.keep_last:
                checkpoint.remove(folder)

    def _checkpoint(
        self, weights: dict[str, Tensor], training: dict[str, Tensor], progress: Progress, scores: dict[str, float]
    ) -> Checkpoint:
        task = self._task
        assets = {**task.assets, "training_examples": task.splits()["train"], "data_digest": task.digest}
        return Checkpoint(task.recipe, assets, weights, training, progress, scores)

    def _run_quietly(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:  # told by `wait`
            self._error = error


@contextmanager
def saving(run: Run, task: Task, note: Callable[[str], None]) -> Iterator[Saver]:
    """A saver that has written all it was given when this is left, unless at once, by a second signal.

    That waits a moment, as the next process must not find this one writing. Where an error ends it, one in writing does
    not take its place: `note` is told of it.
    """
    saver = Saver(run, task)
    try:
        yield saver
    except Exception:
        try:
            saver.wait()
        except UserError as error:
            note(f"besides, {error.message}")
        raise
    except BaseException:
        saver.abandon()
        raise
    saver.wait()
