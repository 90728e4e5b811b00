"""Timing the parts of a step: in which settings, on what, and with what left out."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dl7cli import tasks
from dl7cli.device import Runtime, precisions
from dl7cli.errors import UserError
from dl7cli.recipe import resolve
from dl7cli.tasks.classification import Classification
from dl7cli.training.benchmark import LAYOUTS, benchmark

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")


def build(tiny: dict[str, Path], *overrides: str) -> Classification:
    task = tasks.build(resolve(str(tiny["resnet"]), overrides).recipe, runtime=CPU)
    assert isinstance(task, Classification)
    return task


def test_each_setting_is_run_as_it_says_and_the_tasks_own_model_stays(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    own_loss = Classification.loss

    def loss(self: Classification, batch: Any) -> tuple[Tensor, int]:
        order = torch.channels_last if self._memory_format is torch.channels_last else torch.contiguous_format
        tensors = [batch.images, *(weight for weight in self.model.parameters() if weight.ndim == 4)]
        assert all(one.is_contiguous(memory_format=order) for one in tensors)
        seen.add((self.runtime.precision, order, self._compiled is not None))
        assert self.model is not task.model
        return own_loss(self, batch)

    def compiled(model: nn.Module, **settings: Any) -> nn.Module:
        return nn.Sequential(model)

    monkeypatch.setattr(Classification, "loss", loss)
    monkeypatch.setattr(torch, "compile", compiled)
    task = build(tiny)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    found = benchmark(task, seconds=0.001)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    everything = {(p, layout, c) for p in ("fp32", "bf16") for layout in LAYOUTS.values() for c in (False, True)}
    assert seen == everything
    assert len(found.measured) == len(everything)
    assert all((one.compile_seconds is not None) is one.setting.compiled for one in found.measured)
    assert all(math.isfinite(one.rate) for one in found.measured)


def test_what_cannot_be_compiled_is_left_out_and_said(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(model: nn.Module, **settings: Any) -> nn.Module:
        raise RuntimeError("no compiler\nand much advice")

    monkeypatch.setattr(torch, "compile", compiled)
    found = benchmark(build(tiny), seconds=0.001)
    assert [one.setting.compiled for one in found.measured] == [False] * 4
    assert found.notes[0] == "fp32, channels-last, compiled: cannot be compiled here: no compiler"
    assert len(found.notes) == 4
    with pytest.raises(UserError, match="cannot be compiled here: no compiler") as refused:
        benchmark(build(tiny, "training.compile=always"), seconds=0.001)
    assert refused.value.hint == "use `--set training.compile=never`"


def test_every_precision_of_a_device_can_be_chosen() -> None:
    assert precisions(torch.device("cpu")) == ["fp32", "bf16"]
