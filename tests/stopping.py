"""Trainings that stop themselves, what they change, and whether two runs are the same."""

import json
import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from running import Silent
from torch import Tensor

from dl7cli import checkpoint, runs, training
from dl7cli.device import Runtime
from dl7cli.runs import Run
from dl7cli.tasks import Task
from dl7cli.training.loop import Trainer

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")


class Stopping(Silent):
    """Asks its own process to stop at the `call`-th step it is told of, so that the next report is the last."""

    def __init__(self, number: int = signal.SIGTERM, call: int = 1) -> None:
        self.number = number
        self.calls_left = call

    def step(self, step: training.Step) -> None:
        self.calls_left -= 1
        if self.calls_left == 0:
            os.kill(os.getpid(), self.number)


def until_stopped(action: Callable[[], Any]) -> bool:
    """Whether a signal stopped the training."""
    try:
        action()
    except training.Interrupted:
        return True
    return False


def state(task: Task, trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all that a training changes: weights, running statistics, optimiser, average, random streams."""
    everything = {**task.model.state_dict(), **trainer.tensors(task.runtime.device)}
    return {name: value.detach().clone() for name, value in everything.items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Which of the same names have other bits."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same names and the same bits."""
    assert not differing(one, other)


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
    """Records without what depends on the clock, the machine's memory and the folder, and on when it was killed: one in
    its last evaluation reads the split again.
    """
    varying = ("time", "seconds", "training_seconds", "rate", "peak_memory_bytes", "run", "readings")
    return [{key: value for key, value in record.items() if key not in varying} for record in records]


def result(run: Run) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run.folder / "result.json").read_text())
    return document


def resume(run: Run) -> dict[str, Any]:
    return training.resume(str(run.folder), runtime=CPU, listener=Silent())
