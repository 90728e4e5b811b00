"""Trainings in processes of their own, with workers and without, and what is left of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE

from running import ENVIRONMENT
from torch import Tensor

from dl7cli import checkpoint, runs
from dl7cli.checkpoint import Checkpoint
from dl7cli.runs import Run

SECONDS = 240
"""In which anything here is over, however busy the machine."""
WORKERS = ("--device", "cpu", "--precision", "fp32", "--workers", "2", "--timeout", "60")
ALONE = ("--device", "cpu", "--precision", "fp32")
LONGER = ("--set", "training.epochs=12")
RARELY_SAVED = ("--set", "training.checkpoint_minutes=1000", "--out", "run")


class Ended:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@contextmanager
def started(
    *arguments: str, cwd: Path, inside: tuple[str, ...] = (), **environment: str
) -> Iterator["subprocess.Popen[str]"]:
    """`dl7` in a process of its own, which with all it has started is gone at the end; `inside` goes before it."""
    command = [*inside, sys.executable, "-m", "dl7cli", *arguments]
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


def wait_for_record(folder: Path, process: "subprocess.Popen[str]") -> None:
    """Until an epoch has ended."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if runs.metrics(Run(folder)):
            return
        time.sleep(0.02)
    raise AssertionError("no epoch")
