"""Checkpoints are written while the training goes on, in the right order, and no error of theirs is lost."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from running import Silent
from stopping import CPU, Stopping, assert_same_run, assert_same_tensors, resume

from dl7cli import checkpoint, runs, training
from dl7cli.checkpoint import Checkpoint, Progress
from dl7cli.distributed import Workers
from dl7cli.errors import UserError
from dl7cli.recipe import resolve
from dl7cli.runs import Run
from dl7cli.tasks import Task
from dl7cli.training.loop import Trainer, fit
from dl7cli.training.saving import Saver, saving

pytestmark = pytest.mark.usefixtures("work")


class Disk:
    """What stands for `checkpoint.save`: a disk that is held up, and may fail."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.writing = 0
        self.written: list[str] = []
        self.fails = False

    def save(self, folder: Path, one: Checkpoint) -> None:
        self.writing += 1
        assert self.writing == 1, "one at a time"
        assert self.free.wait(60)
        if self.fails:
            self.writing = 0
            raise UserError(f"cannot write checkpoint `{folder}`: no space left on device")
        real_save(folder, one)
        self.written.append(folder.name)
        self.writing = 0


real_save = checkpoint.save


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    found = Disk()
    monkeypatch.setattr(checkpoint, "save", found.save)
    return found


@pytest.fixture
def begun(build: Callable[..., Task]) -> tuple[Run, Task, Trainer]:
    task = build("resnet", "training.keep_last=2")
    return runs.create(task.recipe, "resnet", Path("run")), task, Trainer.of(task)


def test_what_is_written_is_what_was_saved_though_training_went_on(
    begun: tuple[Run, Task, Trainer], disk: Disk
) -> None:
    run, task, trainer = begun
    reports = fit(task, trainer, start=Progress())
    place = next(reports).progress
    weights = checkpoint.copied(task.model.state_dict())
    tensors = checkpoint.copied(trainer.tensors(CPU.device))
    saver = Saver(run, task)
    saver.save(trainer, place, {})
    next(reports)  # it does not wait for the disk, and changes the weights in place
    assert disk.written == []
    disk.free.set()
    saver.wait()
    saved = checkpoint.load(run.last, training=True)
    assert saved.progress == place
    assert_same_tensors(saved.weights, weights)
    assert_same_tensors(saved.training, tensors)


def test_one_save_is_written_at_a_time_and_last_comes_last(begun: tuple[Run, Task, Trainer], disk: Disk) -> None:
    run, task, trainer = begun
    saver = Saver(run, task)
    saver.save(trainer, Progress(epoch=1, step=4, best_epoch=1), {}, closed=True, best=True)
    threading.Timer(0.2, disk.free.set).start()
    saver.save(trainer, Progress(epoch=2, step=8, best_epoch=1), {}, closed=True)
    assert disk.written[:3] == ["best", "epoch-0001", "last"]
    saver.save(trainer, Progress(epoch=3, step=12, best_epoch=1), {}, closed=True)
    saver.wait()
    assert disk.written[3:] == ["epoch-0002", "last", "epoch-0003", "last"]
    assert list(runs.epochs(run)) == [2, 3]


def test_an_error_is_raised_once_by_whoever_comes_next(begun: tuple[Run, Task, Trainer], disk: Disk) -> None:
    run, task, trainer = begun
    saver = Saver(run, task)
    disk.fails = True
    disk.free.set()
    for ask in (saver.wait, saver.check, lambda: saver.save(trainer, Progress(), {})):
        saver.save(trainer, Progress(), {})
        assert saver._writing is not None
        saver._writing.join()
        with pytest.raises(UserError, match="no space left"):
            ask()
        saver.check()
        saver.wait()


def test_leaving_waits_and_raises_what_went_wrong(begun: tuple[Run, Task, Trainer], disk: Disk) -> None:
    run, task, trainer = begun
    notes: list[str] = []
    with saving(run, task, notes.append) as saver:
        saver.save(trainer, Progress(step=7), {})
        threading.Timer(0.2, disk.free.set).start()
    assert checkpoint.load(run.last).progress.step == 7
    disk.fails = True
    with pytest.raises(UserError, match="no space left"), saving(run, task, notes.append) as saver:
        saver.save(trainer, Progress(), {})
    assert notes == []

    def fail(error: BaseException) -> None:
        with saving(run, task, notes.append) as saver:
            saver.save(trainer, Progress(), {})
            raise error

    with pytest.raises(UserError, match="diverged"):
        fail(UserError("diverged"))
    assert notes == ["besides, cannot write checkpoint `run/last`: no space left on device"]
    disk.free.clear()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):  # the second signal: it does not wait long for the disk
        fail(KeyboardInterrupt())
    assert time.monotonic() - begin < 30
    disk.free.set()


def test_a_training_stops_soon_after_a_save_has_failed(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolve(str(tiny["resnet"]), ["training.checkpoint_minutes=1000"]).recipe
    seen: list[int] = []

    def save(folder: Path, one: Checkpoint) -> None:
        if one.progress.epoch == 1:
            raise UserError(f"cannot write checkpoint `{folder}`: no space left on device")
        real_save(folder, one)

    class Slow(Silent):
        def step(self, step: training.Step) -> None:
            seen.append(step.step)
            time.sleep(0.05)

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(training.session, "SECONDS_BETWEEN_STEP_EVENTS", -1)
    with pytest.raises(UserError, match="no space left"):
        training.train(recipe, out=Path("run"), runtime=CPU, listener=Slow())
    assert max(seen) < 8, "before the next epoch's end"
    assert checkpoint.load(Path("run/last")).progress.epoch == 0


@pytest.mark.parametrize("kind", ["resnet", "seq2seq"])
def test_a_kill_between_best_and_last_costs_nothing(
    kind: str, tiny: dict[str, Path], whole: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def save(folder: Path, one: Checkpoint) -> None:
        if folder.name == "last" and one.progress.epoch == 1 and one.progress.batch == 0:
            raise KilledError
        real_save(folder, one)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(KilledError):
        training.train(resolve(str(tiny[kind])).recipe, out=Path("run"), runtime=CPU, listener=Silent())
    run = Run(Path("run"))
    assert (checkpoint.load(run.best).progress.epoch, checkpoint.load(run.last).progress.epoch) == (1, 0)
    monkeypatch.setattr(checkpoint, "save", real_save)
    resume(run)
    assert_same_run(run, whole(kind))


def test_workers_ended_before_the_first_checkpoint_begin_again_in_their_folder(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = resolve(str(tiny["resnet"]), ["training.epochs=1"]).recipe
    memory = tmp_path / "memory"
    memory.mkdir()
    runtime = replace(CPU, workers=Workers(memory=memory))

    def ended(folder: Path, one: Checkpoint) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", ended)
        with pytest.raises(SystemExit):
            training.train(recipe, out=Path("run"), runtime=runtime, listener=Silent())
    training.train(recipe, out=Path("run"), runtime=runtime, listener=Silent())
    training.train(recipe, out=Path("other"), runtime=CPU, listener=Silent())
    assert_same_run(Run(Path("run")), Run(Path("other")))


def test_a_best_of_an_epoch_that_comes_out_worse_again_is_kept(tiny: dict[str, Path]) -> None:
    """As on a GPU, where it may: what is evaluated is `best`, and the result says which epoch that is."""
    recipe = resolve(str(tiny["resnet"])).recipe
    training.train(recipe, out=Path("run"), runtime=CPU, listener=Silent())
    run = Run(Path("run"))
    last, best = checkpoint.load(run.last, training=True), checkpoint.load(run.best)
    better = best.progress._replace(epoch=3, best=1.5, best_epoch=3)
    checkpoint.save(run.best, Checkpoint(best.recipe, best.assets, best.weights, {}, better, {"accuracy": 1.5}))
    place = last.progress._replace(epoch=2, batch=last.progress.step // 3, best=0.1, best_epoch=1)
    checkpoint.save(run.last, Checkpoint(last.recipe, last.assets, last.weights, last.training, place, {}))
    (run.folder / "result.json").unlink()
    assert resume(run)["best_epoch"] == 3
    assert checkpoint.load(run.best).scores == {"accuracy": 1.5}


# Where a run is, and what the clock says


@pytest.mark.parametrize("stamp", [0, 2_000_000_000, 4_000_000_000])
def test_a_run_moved_elsewhere_with_any_file_times_goes_on(
    stamp: int, tiny: dict[str, Path], whole: Callable[..., Run], tmp_path: Path, every_step: None
) -> None:
    recipe = resolve(str(tiny["resnet"])).recipe
    with pytest.raises(training.Interrupted):
        training.train(recipe, out=Path("first/run"), runtime=CPU, listener=Stopping(signal.SIGTERM, 3))
    shutil.copytree("first/run", tmp_path / "second" / "place")
    shutil.rmtree("first")
    run = Run(tmp_path / "second" / "place")
    for path in [run.folder, *run.folder.rglob("*")]:
        os.utime(path, (stamp, stamp))
    result = resume(run)
    assert result["run"] == str(run.folder)
    assert_same_run(run, whole("resnet"))
    assert training.evaluate(str(run.folder), runtime=CPU)["scores"] == result["scores"]


# What a crash can lose


def test_a_crash_loses_no_more_than_the_minutes_of_the_recipe(
    build: Callable[..., Task], tiny: dict[str, Path]
) -> None:
    """Measured: at any moment `last` on the disk is younger than the interval, a step and a write together."""
    seconds = 0.3
    recipe = resolve(str(tiny["resnet"]), ["training.epochs=8", f"training.checkpoint_minutes={seconds / 60}"]).recipe
    run, end = Run(Path("run")), threading.Event()
    ages: list[float] = []
    done: dict[int, float] = {}

    class Clock(Silent):
        def step(self, step: training.Step) -> None:
            done[step.step] = time.monotonic()
            time.sleep(0.03)

    def look() -> None:
        while not end.wait(0.02):
            if runs.holds(run.last):
                saved, now = checkpoint.load(run.last).progress.step, time.monotonic()
                lost = [when for step, when in list(done.items()) if step > saved]
                ages.append(now - min(lost, default=now))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.session, "SECONDS_BETWEEN_STEP_EVENTS", -1)
        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            training.train(recipe, out=run.folder, runtime=CPU, listener=Clock())
        finally:
            end.set()
            watcher.join()
    times = sorted(done.values())
    longest = max(after - before for before, after in pairwise(times))
    assert len(ages) > 10
    assert max(ages) > longest, "not every step was saved"
    assert max(ages) < seconds + 2 * longest + 1
