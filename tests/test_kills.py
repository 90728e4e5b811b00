"""Processes that are killed, told to stop, or run out of room: nothing that was saved is lost."""

import json
import os
import re
import resource
import shlex
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

import pytest
from running import ENVIRONMENT, Silent, start
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
        if attempt(steps, draw.uniform(0, 0.05)) != -signal.SIGKILL:
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


def test_a_training_that_nobody_looks_at_any_more_goes_on(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Whoever read what it says, such as `tee` or a terminal, has gone."""
    with start("train", str(tiny["resnet"]), "--out", "run", "--device", "cpu", "--json", cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stderr.close()
        document = json.loads(process.stdout.read())
    assert (process.returncode, document["run"]) == (0, "run")


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


def test_a_run_left_by_a_process_that_was_killed_is_taken_over_with_a_line(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    with trained(tiny["resnet"], run) as process:
        process.kill()
        process.wait()
    with start("train", "--resume", str(run.folder), "--device", "cpu", cwd=tmp_path) as resumed:
        assert resumed.stderr is not None
        told = f"run {run.folder} was left by process {process.pid}, which no longer holds it"
        assert any(line.startswith(told) for line in resumed.stderr)
        resumed.kill()


SLOW = """
    import os, sys, threading, time
    from dl7cli.cli import main, progress

    where = sys.argv.pop(1)
    fsync = os.fsync

    def sleep():
        print("sleeping", flush=True)
        time.sleep(900)

    def slow_disk(descriptor):
        fsync(descriptor)
        if threading.current_thread().name == "checkpoint":
            slow_disk.calls += 1
            if slow_disk.calls == 20:
                sleep()

    class Sleeping(progress.Plain):
        def epoch(self, epoch):
            sleep()

    if where == "disk":
        slow_disk.calls = 0
        os.fsync = slow_disk
    else:
        progress.Plain = Sleeping
    main()
"""


@pytest.mark.parametrize(("where", "number", "code"), [("loop", signal.SIGINT, 130), ("disk", signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once(where: str, number: int, code: int, tiny: dict[str, Path]) -> None:
    """Also while a checkpoint is being written, on a disk that does not answer."""
    flags = ["--out", "run", "--device", "cpu"]
    command = [sys.executable, "-c", textwrap.dedent(SLOW), where, "train", str(tiny["resnet"]), *flags]
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=ENVIRONMENT, start_new_session=True) as one:
        try:
            assert one.stdout is not None
            assert one.stdout.readline() == "sleeping\n"
            one.send_signal(number)
            with pytest.raises(subprocess.TimeoutExpired):
                one.wait(timeout=1)
            one.send_signal(number)
            assert "once more stops at once" in assert_ended(one, code)
        finally:
            one.kill()
    assert checkpoint.load(Path("run/last"), training=True).progress.step >= 1


@pytest.mark.parametrize("to", ["elsewhere", None])
def test_a_folder_moved_or_removed_under_its_training_is_one_error(
    to: str | None, tiny: dict[str, Path], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    with trained(tiny["resnet"], run) as process:
        gone = tmp_path / (to or "gone")
        run.folder.rename(gone)
        if to is None:
            shutil.rmtree(gone)
        text = assert_ended(process, 1)
    assert text.count("error: ") == 1
    assert re.search(f"error: cannot write (checkpoint )?`{run.folder}/.*`: no such file or directory\nhint: ", text)
    assert not run.folder.exists(), "nothing of it comes back"
    if to is not None:
        saved = checkpoint.load(gone / "last", training=True).progress.step
        with pytest.raises(training.Interrupted):
            training.resume(str(gone), runtime=CPU, listener=Stopping())
        assert checkpoint.load(gone / "last").progress.step > saved


DISK = """
    import json, os, signal, subprocess, sys, time
    from pathlib import Path
    from dl7cli import checkpoint
    from dl7cli.errors import UserError

    what, recipe = sys.argv[1:]

    def dl7(*arguments):
        command = [sys.executable, "-m", "dl7cli", "train", *arguments, "--device", "cpu"]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def step():
        try:
            return checkpoint.load(Path("disk/run/last"), training=True).progress.step
        except UserError:
            return -1

    def wait_for(wanted, process):
        while step() < wanted and process.poll() is None:
            time.sleep(0.02)

    first = dl7(recipe, "--out", "disk/run", "--set", "training.epochs=100000")
    wait_for(2, first)
    if what == "full":
        with open("disk/filler", "wb", buffering=0) as filler:
            while first.poll() is None:
                try:
                    filler.write(bytes(4096))
                except OSError:
                    time.sleep(0.01)
    else:
        subprocess.run(["mount", "--bind", "disk", "disk"], check=True)
        # Refused while a file is open for writing, as one is at most moments.
        for _ in range(1000):
            if subprocess.run(["mount", "-o", "remount,bind,ro", "disk"], capture_output=True).returncode == 0:
                break
            time.sleep(0.01)
        else:
            first.kill()
    text = first.communicate()[1]
    saved = step()
    if what == "full":
        os.unlink("disk/filler")
    else:
        subprocess.run(["umount", "disk"], check=True)
    second = dl7("--resume", "disk/run")
    wait_for(saved + 2, second)
    second.send_signal(signal.SIGINT)
    second.communicate()
    print(json.dumps([first.returncode, text, saved, second.returncode, step()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("what", "reason"), [("full", "no space left on device"), ("ro", "read-only file system")])
def test_a_disk_that_takes_no_more_is_one_error_and_no_loss(what: str, reason: str, tiny: dict[str, Path]) -> None:
    Path("disk").mkdir()
    Path("script.py").write_text(textwrap.dedent(DISK))
    called = shlex.join([sys.executable, "script.py", what, str(tiny["resnet"])])
    inside = f"mount -t tmpfs -o size=4m none disk || exit 99; exec {called}"
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs `unshare` for a disk of its own")
    command = [unshare, "--map-root-user", "--mount", "sh", "-c", inside]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)
    if done.returncode == 99 or "unshare failed" in done.stderr:
        pytest.skip("this machine lends no process a disk of its own")
    assert done.returncode == 0, done.stderr
    code, text, saved, second_code, step = json.loads(done.stdout)
    assert (code, second_code) == (1, 130)
    assert text.count("error: cannot write ") == text.count("error: ") == 1
    assert reason in text
    assert "Traceback" not in text
    assert saved >= 2
    assert step > saved
