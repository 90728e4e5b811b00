"""Several workers: the same training as one process, and what becomes of it when one of them fails."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE

import pytest
from running import ENVIRONMENT, succeed
from torch import Tensor

from dl7cli import checkpoint, runs
from dl7cli.checkpoint import Checkpoint
from dl7cli.runs import Run

SECONDS = 240
"""In which anything here is over, however busy the machine."""
WORKERS = ("--device", "cpu", "--precision", "fp32", "--workers", "2", "--timeout", "60")
ALONE = ("--device", "cpu", "--precision", "fp32")


class Ended:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@contextmanager
def started(*arguments: str, cwd: Path, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """`dl7` in a process of its own, which with all it has started is gone at the end."""
    command = [sys.executable, "-m", "dl7cli", *arguments]
    process = subprocess.Popen(
        command, cwd=cwd, stdout=PIPE, stderr=PIPE, text=True, env={**ENVIRONMENT, **environment}
    )
    try:
        yield process
    finally:
        for child in [*workers_of(process.pid), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.communicate()


def ended(process: "subprocess.Popen[str]") -> Ended:
    out, err = process.communicate(timeout=SECONDS)
    return Ended(process.returncode, out, err)


def together(*arguments: str, cwd: Path, **environment: str) -> Ended:
    """Run `dl7` in a process of its own, to a good end."""
    with started(*arguments, cwd=cwd, **environment) as process:
        result = ended(process)
    assert result.code == 0, result.err
    return result


def workers_of(launcher: int) -> list[int]:
    """The processes that a process has started, in the order of their age."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    with suppress(OSError):
        return [int(number) for number in children.read_text().split()]
    return []


def last(folder: Path) -> Checkpoint:
    return checkpoint.load(folder / "last", training=True)


def greatest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in runs.metrics(Run(folder))]


# The same as one process


CHANGES = {
    "resnet": ("--set", "training.batch_norm=sync", "--set", "training.label_smoothing=0.1"),
    "seq2seq": ("--set", "model.dropout=0.0"),
}


@pytest.mark.parametrize("kind", ["resnet", "seq2seq"])
def test_two_workers_train_as_one_process(kind: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    arguments = ("train", str(tiny[kind]), *CHANGES[kind], "--json")
    alone = succeed(*arguments, *ALONE, "--out", "one", cwd=tmp_path).document
    both = together(*arguments, *WORKERS, "--out", "two", cwd=tmp_path)
    shared = json.loads(both.out)
    assert alone["steps"] == shared["steps"] >= 10
    one, two = last(tmp_path / "one"), last(tmp_path / "two")
    assert greatest_difference(one.weights, two.weights) < 1e-5
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
    assert shared["scores"] == pytest.approx(alone["scores"], abs=1e-12)
    assert (shared["examples"], shared["best_epoch"]) == (alone["examples"], alone["best_epoch"])
    assert runs.environment(Run(tmp_path / "two"))["workers"] == 2
    assert both.err.count("epoch 1") == 1


# Faults


LONGER = ("--set", "training.epochs=8")


@pytest.fixture(scope="module")
def undisturbed(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, trained by two workers without a fault; with dropout, of which each has its own."""
    folder = tmp_path_factory.mktemp("undisturbed")
    together("train", str(tiny["seq2seq"]), *LONGER, *WORKERS, "--out", "run", cwd=folder)
    return folder / "run"


def wait_for_step(folder: Path, step: int, process: "subprocess.Popen[str]") -> None:
    """Until the newest checkpoint is of this step or later."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        with suppress(OSError, ValueError):
            if json.loads((folder / "last" / "checkpoint.json").read_text())["progress"]["step"] >= step:
                return
        time.sleep(0.02)
    raise AssertionError(f"no step {step}")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_killed_at_any_step_costs_nothing(
    victim: int, undisturbed: Path, tiny: dict[str, Path], tmp_path: Path
) -> None:
    step = random.Random(victim).randrange(2, 40)
    arguments = ("train", str(tiny["seq2seq"]), *LONGER, *WORKERS, "--out", "run")
    with started(*arguments, cwd=tmp_path) as process:
        wait_for_step(tmp_path / "run", step, process)
        os.kill(workers_of(process.pid)[victim], signal.SIGKILL)
        result = ended(process)
    assert result.code == 0, result.err
    assert (
        f"worker {victim} was ended by SIGKILL; all start again from the last checkpoint (1 of 3 times)" in result.err
    )
    assert greatest_difference(last(tmp_path / "run").weights, last(undisturbed).weights) == 0
    assert losses(tmp_path / "run") == losses(undisturbed)
