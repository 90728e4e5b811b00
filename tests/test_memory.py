"""Steps that the memory is too small for: stopped at, or taken in parts where the recipe says so."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ENVIRONMENT, dl7
from stopping import CPU, assert_same_tensors, state
from torch import Tensor

from dl7cli import checkpoint, runs, tasks
from dl7cli.checkpoint import Progress
from dl7cli.device import Runtime
from dl7cli.distributed import Lost, Workers
from dl7cli.errors import UserError
from dl7cli.recipe import resolve
from dl7cli.runs import Run
from dl7cli.tasks import Task
from dl7cli.tasks.classification import Classification
from dl7cli.training import loop
from dl7cli.training.loop import Trainer, fit

KINDS = ("resnet", "seq2seq")
HALVE = "training.on_oom=halve"

pytestmark = pytest.mark.usefixtures("work")


LIMITED = """
    import resource, sys
    import torch
    from dl7cli.cli import main, progress

    torch.backends.mkldnn.set_flags(False)  # oneDNN may crash where it gets no memory, which nobody can catch

    more = int(sys.argv.pop(1)) * 1_000_000

    class Limited(progress.Plain):
        "From the moment the training begins there is only so much more address space."
        def plan(self, plan):
            pages = int(open("/proc/self/statm").read().split()[0])
            most = pages * resource.getpagesize() + more
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            super().plan(plan)

    progress.Plain = Limited
    main()
"""

LARGE = ("training.batch_size=26", "data.image_size=128", "training.epochs=1")
"""The one batch of an epoch takes some hundred megabytes."""


def limited(recipe: Path, megabytes: int, *overrides: str) -> "subprocess.CompletedProcess[str]":
    changes = [f"--set={change}" for change in (*LARGE, *overrides)]
    flags = ["--device", "cpu", "--precision", "fp32", "--out", "run", *changes]
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(megabytes), "train", str(recipe), *flags]
    # Memory that is freed goes back at once, and threads share an arena, for which 64 MB of address space would be put
    # by for each: so the limit is on what is in use.
    environment = {**ENVIRONMENT, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_a_batch_too_large_for_the_memory_is_named(tiny: dict[str, Path]) -> None:
    done = limited(tiny["resnet"], 150)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "error: out of memory in a training step: `training.batch_size` is 26\n" in done.stderr
    assert "hint: lower `--set training.batch_size=…`, or keep it" in done.stderr
    assert checkpoint.load(Path("run/last"), training=True).progress == Progress()


def test_a_batch_too_large_for_the_memory_is_taken_in_parts(tiny: dict[str, Path]) -> None:
    done = limited(tiny["resnet"], 150, HALVE)
    assert done.returncode == 0, done.stderr
    parts = int(checkpoint.load(Path("run/last"), training=True).training["parts"])
    assert parts > 1
    assert done.stderr.count(f"out of memory at step 1: a batch is now taken in {parts} parts") == 1
    assert len([record for record in runs.metrics(Run(Path("run"))) if "scores" in record]) == 1


def narrow(task: Task, rows: int) -> None:
    """From now on there is memory for so many examples; the attempt with more fails after its forward pass."""
    loss = task.loss

    def narrowed(batch: Any) -> tuple[Tensor, int]:
        found = loss(batch)
        if len(batch[0]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    task.loss = narrowed  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", KINDS)
def test_the_attempt_that_failed_leaves_no_trace(kind: str, build: Callable[..., Task]) -> None:
    """Neither in the random streams nor in the running statistics."""
    keys = (HALVE,) if kind == "resnet" else (HALVE, "training.batch_tokens=100")
    task, other = build(kind, *keys), build(kind, *keys)
    narrow(task, 2)
    trainer, expected = Trainer.of(task), Trainer.of(other)
    torch.manual_seed(1)
    next(fit(task, trainer, start=Progress()))
    assert trainer.parts > 2
    expected.parts = trainer.parts
    torch.manual_seed(1)
    next(fit(other, expected, start=Progress()))
    assert_same_tensors(state(task, trainer), state(other, expected))


def test_parts_train_as_the_whole_does(build: Callable[..., Task]) -> None:
    one, two = build("seq2seq", HALVE, "model.dropout=0"), build("seq2seq", HALVE, "model.dropout=0")
    narrow(two, 3)
    trainer, other = Trainer.of(one), Trainer.of(two)
    whole, halved = list(fit(one, trainer, start=Progress())), list(fit(two, other, start=Progress()))
    assert (trainer.parts, other.parts > 1) == (1, True)
    assert [report.examples for report in halved] == [report.examples for report in whole]
    assert [report.loss.item() for report in halved] == pytest.approx([report.loss.item() for report in whole], 1e-4)
    weights = two.model.state_dict()
    assert all(torch.allclose(value, weights[name], atol=1e-4) for name, value in one.model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_in_parts_goes_on_in_parts(kind: str, build: Callable[..., Task]) -> None:
    task, other = build(kind, HALVE), build(kind, HALVE)
    narrow(task, 3)
    trainer, follower = Trainer.of(task), Trainer.of(other)
    reports = fit(task, trainer, start=Progress())
    place = [next(reports) for _ in range(3)][-1].progress
    other.model.load_state_dict(task.model.state_dict())
    saved = {name: value.clone() for name, value in trainer.tensors(CPU.device).items()}
    for _ in reports:
        pass
    follower.restore(saved, CPU.device)
    assert follower.parts > 1
    for _ in fit(other, follower, start=place):
        pass
    assert_same_tensors(state(task, trainer), state(other, follower))


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_an_end_to_halving(kind: str, build: Callable[..., Task]) -> None:
    task = build(kind, HALVE)
    narrow(task, 0)
    with pytest.raises(UserError, match=r"`training.batch_.*, and taking a batch in \d+ parts is not enough"):
        next(fit(task, Trainer.of(task), start=Progress()))


class Alike(Workers):
    """Of two workers the first, where the other one has the same to say."""

    def add(self, tensor: Tensor) -> Tensor:
        return tensor

    def greatest(self, number: int) -> int:
        return number


def test_workers_start_again_with_a_batch_in_parts(
    build: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for a gradient, and cannot be told. Where nothing is remembered, there is no use in it."""
    monkeypatch.setattr(loop, "meeting", lambda task: task.loss)
    task = build("resnet", HALVE)
    narrow(task, 2)
    task.runtime = replace(task.runtime, workers=Alike(0, 2))
    task.images._workers = task.runtime.workers
    with pytest.raises(UserError, match=r"`training\.batch_size` is 8, and workers of another launcher"):
        next(fit(task, Trainer.of(task), start=Progress()))
    task.runtime = replace(task.runtime, workers=Alike(0, 2, memory=tmp_path))
    with pytest.raises(Lost, match="is out of memory: a batch is taken in 2 parts from now on"):
        next(fit(task, Trainer.of(task), start=Progress()))
    trainer = Trainer.of(task)
    next(fit(task, trainer, start=Progress()))
    assert trainer.parts == 2


@pytest.mark.parametrize("overrides", [[], [HALVE]])
def test_other_errors_are_no_want_of_memory(overrides: list[str], build: Callable[..., Task]) -> None:
    task = build("resnet", *overrides)

    def wrong(batch: Any) -> tuple[Tensor, int]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    task.loss = wrong  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="shapes"):
        next(fit(task, Trainer.of(task), start=Progress()))


@pytest.mark.parametrize("overrides", [[], [HALVE]])
def test_want_of_memory_for_the_optimiser_is_not_blamed_on_the_parts(
    overrides: list[str], build: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = build("resnet", *overrides)
    trainer = Trainer.of(task)

    def step(*_: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to …")

    monkeypatch.setattr(trainer.optimiser, "step", step)
    with pytest.raises(UserError, match="for what the optimiser keeps"):
        next(fit(task, trainer, start=Progress()))


def test_want_of_memory_elsewhere_is_said_too(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def validate(task: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to …")

    monkeypatch.setattr(Classification, "validate", validate)
    outcome = dl7("train", str(tiny["resnet"]), "--out", "run", "--device", "cpu", cwd=Path())
    assert outcome.code == 1
    assert "error: out of memory\nhint: use a smaller model" in outcome.err
    assert "Traceback" not in outcome.err


def test_want_of_memory_elsewhere_is_said_of_a_worker_too(tiny: dict[str, Path]) -> None:
    code = """
        from dl7cli.cli import main
        from dl7cli.tasks.classification import Classification

        def validate(task):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")

        Classification.validate = validate
        main()
    """
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, "-c", textwrap.dedent(code), "train", str(tiny["resnet"]), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**ENVIRONMENT, **place})
    assert done.returncode == 1
    assert "error: out of memory\nhint: use a smaller model" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.gpu
def test_a_batch_too_large_for_a_gpu_is_taken_in_parts(tiny: dict[str, Path]) -> None:
    runtime = Runtime(torch.device("cuda", 0), "fp32", "gpu", "as asked")
    recipe = resolve(str(tiny["resnet"]), [*LARGE, HALVE]).recipe
    task = tasks.build(recipe, runtime=runtime)
    trainer = Trainer.of(task)
    torch.cuda.reset_peak_memory_stats()
    next(fit(task, trainer, start=Progress()))  # what the optimiser takes is there
    whole = torch.cuda.max_memory_allocated()
    now = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((now + (whole - now) / 2) / total)
    try:
        next(fit(task, trainer, start=Progress()))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert trainer.parts > 1
