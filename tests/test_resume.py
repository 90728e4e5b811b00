"""Stopping (by request, by a kill at any moment, by a full disk) and going on, to the result of a run never stopped."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from running import Silent
from torch import Tensor

from dl7cli import checkpoint, runs, tasks, training
from dl7cli.checkpoint import Checkpoint, Progress
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.recipe import Recipe, resolve
from dl7cli.runs import Run
from dl7cli.tasks import Task
from dl7cli.training import session
from dl7cli.training.loop import Report, Trainer, fit

KINDS = ("resnet", "seq2seq")
CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")

pytestmark = pytest.mark.usefixtures("work")


@pytest.fixture(scope="module")
def whole(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """`whole(kind)` is a run of the tiny recipe that was never stopped."""
    made: dict[str, Run] = {}

    def make(kind: str) -> Run:
        if kind not in made:
            folder = tmp_path_factory.mktemp("whole") / kind
            training.train(resolve(str(tiny[kind])).recipe, out=folder, runtime=CPU, listener=Silent())
            made[kind] = Run(folder)
        return made[kind]

    return make


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same names and the same bits."""
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing


def assert_same_run(one: Run, other: Run) -> None:
    """The same weights, optimiser, random states, scores, records and result; only times may differ."""
    for name in ("last", "best"):
        first = checkpoint.load(one.folder / name, training=True)
        second = checkpoint.load(other.folder / name, training=True)
        assert_same_tensors(first.weights, second.weights)
        assert_same_tensors(first.training, second.training)
        assert first.progress._replace(seconds=0) == second.progress._replace(seconds=0)
        assert (first.scores, first.assets, first.recipe) == (second.scores, second.assets, second.recipe)
    assert timeless(*runs.metrics(one)) == timeless(*runs.metrics(other))
    assert timeless(*runs.evaluations(one)) == timeless(*runs.evaluations(other))
    assert timeless(result(one)) == timeless(result(other))


def timeless(*records: dict[str, Any]) -> list[dict[str, Any]]:
    """Records without what depends on the clock, the machine's memory and the folder."""
    varying = ("time", "seconds", "training_seconds", "rate", "peak_memory_bytes", "run")
    return [{key: value for key, value in record.items() if key not in varying} for record in records]


def result(run: Run) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run.folder / "result.json").read_text())
    return document


def resume(run: Run) -> dict[str, Any]:
    return training.resume(str(run.folder), runtime=CPU, listener=Silent())


# The loop: stopped after any report


@pytest.mark.parametrize(
    ("kind", "precision"),
    # Not every CPU has LSTMs in fp16. Nor does `choose` give it to one; here it drives the gradient scaler.
    [("resnet", "fp32"), ("resnet", "bf16"), ("resnet", "fp16"), ("seq2seq", "fp32"), ("seq2seq", "bf16")],
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


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_training_on_subwords_drawn_at_random_goes_on_exactly(
    kind: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    changes = [f"data.vocabulary={kind}", "data.subword_sampling=0.3", "data.joint=false", "model.tied=output"]
    check_every_report(resolve(str(tiny["seq2seq"]), [*changes, "training.epochs=2"]).recipe, CPU, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_goes_on_from_a_report_on_a_gpu(
    kind: str, precision: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    recipe = resolve(str(tiny[kind])).recipe
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


class Stopping(Silent):
    """Asks its own process to stop at the `call`-th step it is told of, so that the next report is the last."""

    def __init__(self, number: int = signal.SIGTERM, call: int = 1) -> None:
        self.number = number
        self.calls_left = call

    def step(self, step: training.Step) -> None:
        self.calls_left -= 1
        if self.calls_left == 0:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listeners are told of every step."""
    monkeypatch.setattr(session, "SECONDS_BETWEEN_STEP_EVENTS", -1)


def until_stopped(action: Callable[[], Any]) -> bool:
    """Whether a signal stopped the training."""
    try:
        action()
    except training.Interrupted:
        return True
    return False


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_at_every_other_report_is_the_run_never_stopped(
    kind: str, first: int, tiny: dict[str, Path], whole: Callable[[str], Run], tmp_path: Path, every_step: None
) -> None:
    recipe = resolve(str(tiny[kind])).recipe
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
    assert_same_run(run, whole(kind))
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


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


# Processes that are killed, told to stop, or run out of room

KILLED = """
    import json, os, random, shutil, signal, sys, time
    from pathlib import Path
    import torch
    from dl7cli import checkpoint, training
    from dl7cli.device import Runtime
    from dl7cli.recipe import resolve
    from dl7cli.training import session

    session.SECONDS_BETWEEN_STEP_EVENTS = -1
    file, run, first = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    random.seed(first)

    class Listener:
        def __init__(self, deadly, started):
            self.deadly, self.started = deadly, started
        def plan(self, plan):
            os.write(self.started, b"!")
        def step(self, step):
            if step.step == self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
        def epoch(self, epoch): pass
        def note(self, text): pass
        def progress(self, what, done, total): pass

    def train(listener):
        runtime = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")
        if any((run / name / "checkpoint.json").exists() for name in ("last", "last.old")):
            training.resume(str(run), runtime=runtime, listener=listener)
        else:
            shutil.rmtree(run, ignore_errors=True)
            training.train(resolve(file).recipe, out=run, runtime=runtime, listener=listener)

    def attempt(deadly, seconds):
        # In a child that is killed: by itself at a step, or some time after it began to train.
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            status = 1
            try:
                train(Listener(deadly, writer))
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([status, *checkpoint.load(run / "last").progress[:3]]), flush=True)
        return status

    status = attempt(first, None)
    for _ in range(5):
        if status == -signal.SIGKILL:
            status = attempt(None, random.uniform(0, 0.2))
    if status == -signal.SIGKILL:
        status = attempt(None, None)
    sys.exit(status)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_to_the_same_bits(
    kind: str, tiny: dict[str, Path], whole: Callable[[str], Run], tmp_path: Path
) -> None:
    step = random.Random(kind).choice([2, 3, 6, 7])
    run = Run(tmp_path / "run")
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tiny[kind]), str(run.folder), str(step)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment())
    assert done.returncode == 0, done.stderr
    attempts = [json.loads(line) for line in done.stdout.splitlines()]
    status, epoch, batch, saved_step = attempts[0]
    assert status == -signal.SIGKILL
    assert saved_step in (step - 1, step), "of a save after every step, one at most is lost"
    assert 0 < batch < tasks.build(resolve(str(tiny[kind])).recipe, runtime=CPU).steps(epoch), "killed in an epoch"
    assert_same_run(run, whole(kind))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


@contextmanager
def trained(recipe: Path, run: Run) -> Iterator[subprocess.Popen[str]]:
    """`dl7 train` without end as a process in a group of its own, which has begun to train and saved two steps."""
    flags = ["--device", "cpu", "--precision", "fp32", "--set", "training.epochs=100000"]
    command = [sys.executable, "-m", "dl7cli", "train", str(recipe), "--out", str(run.folder), *flags]
    with subprocess.Popen(
        command, stdout=PIPE, stderr=PIPE, text=True, env=environment(), start_new_session=True
    ) as process:
        try:
            wait_for(lambda: step_of(run) >= 2 or process.poll() is not None)
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def step_of(run: Run) -> int:
    try:
        return checkpoint.load(run.last).progress.step
    except UserError:
        return -1


def assert_ended(process: subprocess.Popen[str], code: int) -> str:
    """The process ends with this code and leaves no other behind; returns what it wrote for eyes."""
    output, text = process.communicate(timeout=300)
    assert process.returncode == code, text
    assert output == ""
    assert "Traceback" not in text
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_ends_and_says_how_to_go_on(
    number: int, code: int, tiny: dict[str, Path], tmp_path: Path, every_step: None
) -> None:
    run = Run(tmp_path / "run")
    with trained(tiny["resnet"], run) as process:
        process.send_signal(number)
        text = assert_ended(process, code)
    assert f"go on with: dl7 train --resume {run.folder}" in text
    saved = checkpoint.load(run.last, training=True).progress.step
    assert saved >= 2
    with pytest.raises(training.Interrupted):
        training.resume(str(run.folder), runtime=CPU, listener=Stopping())
    assert checkpoint.load(run.last).progress.step in (saved + 1, saved + 2)  # an epoch's end is a report, too
    epochs = [record["epoch"] for record in runs.metrics(run) if "scores" in record]
    assert epochs == list(range(1, len(epochs) + 1)), "none twice and none left out"


def test_a_second_training_in_a_folder_is_refused_and_a_full_disk_keeps_the_checkpoint(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    with trained(tiny["resnet"], run) as process:
        with pytest.raises(UserError, match=f"is being trained by process {process.pid}"):
            resume(run)
        with pytest.raises(UserError, match="is not empty"):
            training.train(resolve(str(tiny["resnet"])).recipe, out=run.folder, runtime=CPU, listener=Silent())
        assert process.poll() is None, "the first one is not disturbed"

        # Files may be no longer now than a tenth of the weights: what a full disk does, to one process.
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (40_000, 40_000))
        text = assert_ended(process, 1)
    assert f"error: cannot write checkpoint `{run.folder}/" in text
    assert "file too large" in text
    assert "hint: it needs" in text
    saved = checkpoint.load(run.last, training=True)
    assert saved.progress.step >= 2
    assert saved.training


SLEEPING = """
    import sys, time
    from dl7cli.cli import main, progress

    class Sleeping(progress.Plain):
        def epoch(self, epoch):
            print("sleeping", flush=True)
            time.sleep(900)

    progress.Plain = Sleeping
    main()
"""


def test_a_second_interrupt_ends_at_once(tiny: dict[str, Path], tmp_path: Path) -> None:
    flags = ["--out", str(tmp_path / "run"), "--device", "cpu"]
    command = [sys.executable, "-c", textwrap.dedent(SLEEPING), "train", str(tiny["resnet"]), *flags]
    with subprocess.Popen(command, stdout=PIPE, text=True, env=environment()) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "sleeping\n"
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=1)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=300) == 130
        finally:
            process.kill()
    assert checkpoint.load(tmp_path / "run" / "last", training=True).progress.step >= 1
