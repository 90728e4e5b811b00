"""The clock and the sums of a training between its reports."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from stopping import CPU

from dl7cli import tasks
from dl7cli.checkpoint import Progress
from dl7cli.recipe import resolve
from dl7cli.training import session
from dl7cli.training.loop import Report


def test_a_record_of_an_overflown_gradient_is_json(tiny: dict[str, Path]) -> None:
    task = tasks.build(resolve(str(tiny["resnet"])).recipe, runtime=CPU)
    watch = session._Watch(task, 12, Progress(), {})
    for loss, norm in ((1.0, 2.0), (3.0, math.inf)):
        watch.see(Report(Progress(step=1), torch.tensor(loss), torch.tensor(norm), 0.1, 8))
    record = watch.record(Report(Progress(step=2), torch.tensor(3.0), torch.tensor(math.inf), 0.1, 8))
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["loss"], record["gradient_norm"]) == (2.0, None)


def test_a_device_has_done_its_steps_before_their_time_is_taken(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what follows would wait for it: at each record, and where progress is shown. A device is pretended."""
    waited: list[int] = []
    monkeypatch.setattr(session, "synchronise", lambda device: waited.append(step))
    monkeypatch.setattr(session, "STEPS_BETWEEN_RECORDS", 4)
    task = tasks.build(resolve(str(tiny["resnet"])).recipe, runtime=CPU)
    watch = session._Watch(task, 12, Progress(), {})
    for step in range(1, 10):
        shown = step == 6
        watch._shown = 0.0 if shown else time.monotonic()
        watch.see(Report(Progress(step=step), torch.tensor(1.0), torch.tensor(1.0), 0.1, 8))
    assert waited == [4, 6, 8]
    watch.see(Report(Progress(step=11, batch=task.steps(0)), torch.tensor(1.0), torch.tensor(1.0), 0.1, 8))
    assert waited[3:] == [step], "before a validation"
