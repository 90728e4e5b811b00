"""Processes that are killed, told to stop, or run out of room: nothing that was saved is lost."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE

import pytest
from running import ENVIRONMENT, Silent
from stopping import CPU, Stopping, assert_same_run, resume

from dl7cli import checkpoint, runs, training
from dl7cli.errors import UserError
from dl7cli.recipe import resolve
from dl7cli.runs import Run

KINDS = ("resnet", "seq2seq")

pytestmark = pytest.mark.usefixtures("work")

KILLED = """
    import json, os, random, shutil, signal, sys, time
    from pathlib import Path
    import torch
    from dl7cli import checkpoint, training
    from dl7cli.device import Runtime
    from dl7cli.recipe import resolve
    from dl7cli.training import session

    session.SECONDS_BETWEEN_STEP_EVENTS = -1
    file, run, kills, overrides = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    draw = random.Random(f"{Path(file).name} {kills}")

    class Listener:
        "Writes a byte to its parent when training begins, and one for every step."
        def __init__(self, pipe):
            self.pipe = pipe
        def plan(self, plan):
            os.write(self.pipe, b"!")
        def step(self, step):
            os.write(self.pipe, b".")
        def epoch(self, epoch): pass
        def note(self, text): pass
        def progress(self, what, done, total): pass

    def train(listener):
        runtime = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")
        if any((run / name / "checkpoint.json").exists() for name in ("last", "last.old")):
            training.resume(str(run), runtime=runtime, listener=listener)
        else:
            shutil.rmtree(run, ignore_errors=True)
            training.train(resolve(file, overrides).recipe, out=run, runtime=runtime, listener=listener)

    def attempt(steps, seconds):
        "In a child that is killed some seconds after it has told of so many steps; not at all with None."
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            status = 1
            try:
                train(Listener(writer))
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(writer)
        if steps is not None:
            for _ in range(steps):
                os.read(reader, 1)
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(reader)
        writing = sorted(path.name for path in run.glob("*.new")) + sorted(path.name for path in run.glob("*.old"))
        try:
            step = checkpoint.load(run / "last").progress.step
        except checkpoint.UserError:
            step = None
        print(json.dumps({"status": status, "step": step, "writing": writing}), flush=True)
        return status

    for _ in range(kills):
        # Before it trains, too; and anywhere between two steps, which includes the saving.
        steps = draw.choice([0, 1, 2, 3])
        if attempt(steps, draw.uniform(0, 0.5 if steps == 0 else 0.05)) != -signal.SIGKILL:
            sys.exit("it was not killed")
    sys.exit(attempt(None, 0))
"""

STEPS = 4
"""Of an epoch of each of the tiny recipes, or some more."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_comes_to_the_same_bits(
    kind: str, kills: int, tiny: dict[str, Path], whole: Callable[..., Run]
) -> None:
    epochs = f"training.epochs={2 + kills * 3 // STEPS}"  # more steps than all attempts before the last can make
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tiny[kind]), "run", str(kills), epochs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    attempts = [json.loads(line) for line in done.stdout.splitlines()]
    assert [attempt["status"] for attempt in attempts] == [-signal.SIGKILL] * kills + [0]
    steps = [attempt["step"] for attempt in attempts if attempt["step"] is not None]
    assert steps == sorted(steps), "nothing that was saved is lost"
    if kills >= 20:
        assert sum(bool(attempt["writing"]) for attempt in attempts) >= 3, "some while it was saving"
    assert_same_run(Run(Path("run")), whole(kind, epochs))


@contextmanager
def trained(recipe: Path, run: Run) -> Iterator[subprocess.Popen[str]]:
    """`dl7 train` without end as a process in a group of its own, which has begun to train and saved two steps."""
    flags = ["--device", "cpu", "--precision", "fp32", "--set", "training.epochs=100000"]
    command = [sys.executable, "-m", "dl7cli", "train", str(recipe), "--out", str(run.folder), *flags]
    with subprocess.Popen(
        command, stdout=PIPE, stderr=PIPE, text=True, env=ENVIRONMENT, start_new_session=True
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
    with subprocess.Popen(command, stdout=PIPE, text=True, env=ENVIRONMENT) as process:
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
