"""Steps that the memory is too small for, and steps that are not finite: stopped at, or survived as the recipe says."""

import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ENVIRONMENT, Silent, dl7
from stopping import CPU, Stopping, assert_same_run, until_stopped
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dl7cli import checkpoint, runs, tasks, training
from dl7cli.checkpoint import Progress
from dl7cli.device import Runtime
from dl7cli.distributed import Lost, Workers
from dl7cli.errors import UserError
from dl7cli.recipe import resolve
from dl7cli.runs import Run
from dl7cli.tasks import Task
from dl7cli.tasks.classification import Classification
from dl7cli.tasks.translation import Translation
from dl7cli.training import loop, session
from dl7cli.training.loop import Report, Trainer, fit

KINDS = ("resnet", "seq2seq")
HALVE = "training.on_oom=halve"
SKIP = "training.on_nonfinite=skip"

pytestmark = pytest.mark.usefixtures("work")


class Noting(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def state(task: Task, trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all that a training changes: weights, running statistics, optimiser, average, random streams."""
    everything = {**task.model.state_dict(), **trainer.tensors(task.runtime.device)}
    return {name: value.detach().clone() for name, value in everything.items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


# Memory

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
    # Memory that is freed goes back at once, so that the limit is on what is in use.
    environment = {**ENVIRONMENT, "MALLOC_MMAP_THRESHOLD_": "131072"}
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
    task, other = build(kind, HALVE), build(kind, HALVE)
    narrow(task, 2)
    trainer, expected = Trainer.of(task), Trainer.of(other)
    torch.manual_seed(1)
    next(fit(task, trainer, start=Progress()))
    assert trainer.parts > 2
    expected.parts = trainer.parts
    torch.manual_seed(1)
    next(fit(other, expected, start=Progress()))
    assert not differing(state(task, trainer), state(other, expected))


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
    assert not differing(state(task, trainer), state(other, follower))


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


# What is not finite


def poison(task: Task, *steps: int, where: str = "loss") -> None:
    """Make the loss, its gradient alone, or the images of these steps, counted from 1, NaN.

    With a `constant` the loss alone is infinite.
    """
    loss, calls = task.loss, iter(range(1, 10_000))

    def poisoned(batch: Any) -> tuple[Tensor, int]:
        if next(calls) not in steps:
            return loss(batch)
        if where == "images":
            return loss(batch._replace(images=batch.images * math.nan))
        total, count = loss(batch)
        if where == "loss":
            return total * math.nan, count
        if where == "constant":
            return total + math.inf, count
        weight = next(iter(task.model.parameters()))
        return total + (weight.sum() * 0).abs().sqrt(), count  # whose slope at 0 is infinite

    task.loss = poisoned  # type: ignore[method-assign]


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize(
    ("kind", "where", "overrides"),
    [
        *(("resnet", where, []) for where in ("loss", "gradient", "images")),
        *(("seq2seq", where, []) for where in ("loss", "gradient")),
        ("resnet", "images", ["optim.name=muon", "training.ema_decay=0.9", "optim.clip_norm=1.0"]),
        ("resnet", "images", ["optim.name=adamw", "training.ema_decay=0.9"]),
        ("seq2seq", "gradient", ["optim.name=muon"]),
    ],
)
def test_a_step_left_out_changes_nothing(
    kind: str, where: str, overrides: list[str], step: int, build: Callable[..., Task]
) -> None:
    task = build(kind, SKIP, *overrides)
    trainer = Trainer.of(task)
    poison(task, step, where=where)
    before, after = state(task, trainer), {}
    for report in fit(task, trainer, start=Progress()):
        after = state(task, trainer)
        # An optimiser's tensors that were not there yet are as good as zeros.
        known = {name: before.get(name, torch.zeros_like(value)) for name, value in after.items()}
        changed = {name for name in differing(known, after) if not name.startswith("random.")}
        if report.scores is not None:
            break
        if report.progress.step == step:
            assert not math.isfinite(report.loss.item() + report.gradient_norm.item())
            assert changed == {"skipped"}
        else:
            assert {name for name, _ in task.model.named_parameters()} <= changed
            assert all(value.isfinite().all() for value in after.values() if value.is_floating_point())
        before = after
    assert report.progress.step == task.steps(0) > step, "it counts as a step"
    assert trainer.skipped == 1


@pytest.mark.parametrize("optimiser", ["sgd", "muon"])
def test_the_first_step_in_fp16_may_overflow(optimiser: str, build: Callable[..., Task]) -> None:
    """What the scaler leaves out must not become the momentum; that of torch would be whatever lies in memory."""
    task = build("resnet", f"optim.name={optimiser}")
    trainer = Trainer.of(task)
    trainer.scaler = torch.amp.GradScaler("cpu")
    poison(task, 1, where="gradient")
    next(fit(task, trainer, start=Progress()))
    moments = [value for name, value in trainer.tensors(CPU.device).items() if name.endswith("momentum_buffer")]
    assert moments
    assert not any(value.any() for value in moments)


@pytest.mark.parametrize(("kind", "optimiser"), [("resnet", "sgd"), ("resnet", "muon"), ("seq2seq", "muon")])
def test_a_step_whose_loss_alone_is_not_finite_is_left_out_in_fp16(
    kind: str, optimiser: str, build: Callable[..., Task]
) -> None:
    """Its gradient is of no use, though the scaler would find nothing wrong with it."""
    task = build(kind, SKIP, f"optim.name={optimiser}")
    trainer = Trainer.of(task)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    poison(task, 2, where="constant")
    reports = fit(task, trainer, start=Progress())
    next(reports)
    before = state(task, trainer)
    next(reports)
    changed = differing(before, state(task, trainer))
    assert {name for name in changed if not name.startswith(("random.", "scaler."))} == {"skipped"}


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_training_stops_where_the_recipe_says_nothing(where: str, build: Callable[..., Task]) -> None:
    task = build("resnet")
    poison(task, 2, where=where)
    with pytest.raises(UserError, match="the loss is not finite at step 2") as stopped:
        list(fit(task, Trainer.of(task), start=Progress()))
    assert "on_nonfinite=skip" in str(stopped.value.hint)


@pytest.fixture
def poisoned_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some batches, wherever they come, have no finite loss."""
    for owner in (Classification, Translation):
        monkeypatch.setattr(owner, "loss", bad_for_some(owner.loss))


def bad_for_some(loss: Callable[..., Any]) -> Callable[..., Any]:
    def patched(task: Task, batch: Any) -> tuple[Tensor, int]:
        total, count = loss(task, batch)
        content = batch[0].double().sum().item() if isinstance(task, Translation) else batch.labels.sum().item()
        return total * (math.nan if content % 3 == 0 else 1), count

    return patched


@pytest.mark.parametrize("kind", KINDS)
def test_steps_left_out_are_counted_told_and_resumed(
    kind: str, tiny: dict[str, Path], poisoned_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SECONDS_BETWEEN_STEP_EVENTS", -1)
    recipe = resolve(str(tiny[kind]), [SKIP]).recipe
    heard = Noting()
    whole = training.train(recipe, out=Path("whole"), runtime=CPU, listener=heard)
    skipped, steps = whole["skipped_steps"], whole["steps"]
    assert 0 < skipped < steps
    assert heard.notes[-1].startswith(f"{skipped} of ")
    assert len(heard.notes) == skipped, "it is saved, and so looked at, after every step"
    records = runs.metrics(Run(Path("whole")))
    assert [record["skipped_steps"] for record in records] == sorted(record["skipped_steps"] for record in records)
    assert records[-1]["skipped_steps"] == skipped
    assert json.loads(Path("whole/result.json").read_text())["skipped_steps"] == skipped

    with pytest.raises(training.Interrupted):
        training.train(recipe, out=Path("run"), runtime=CPU, listener=Stopping())
    stops = 1
    while until_stopped(lambda: training.resume("run", runtime=CPU, listener=Stopping())):
        stops += 1
    assert stops > 4
    assert_same_run(Run(Path("run")), Run(Path("whole")))


def test_a_record_of_steps_that_were_all_left_out_is_json(build: Callable[..., Task]) -> None:
    watch = session._Watch(build("resnet"), 12, Progress(), {})
    nan = torch.tensor(math.nan)
    watch.see(Report(Progress(step=1), nan, nan, 0.1, 8))
    record = watch.record(Report(Progress(step=1), nan, nan, 0.1, 8))
    assert json.loads(json.dumps(record, allow_nan=False))["loss"] is None


class Waits(TorchDispatchMode):
    """Counts what would have a processor wait for a device: asking for a number, or for how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("overrides", [(), (SKIP,)], ids=["stop", "skip"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("resnet", ("training.mixup=0.4", "training.cutmix=1.0", "training.ema_decay=0.9", "optim.clip_norm=1.0")),
        ("resnet", ("optim.name=adamw",)),
        ("resnet", ("optim.name=muon", "optim.other_learning_rate=0.1")),
        ("seq2seq", ("model.attention=additive", "training.ema_decay=0.9")),
        ("seq2seq", ("optim.name=muon",)),
        ("seq2seq", ("model.decoder=luong", "model.input_feeding=true")),
    ],
)
def test_no_number_is_asked_for_in_a_step_but_to_see_whether_it_is_finite(
    kind: str,
    changes: tuple[str, ...],
    overrides: tuple[str, ...],
    tiny: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which on a GPU is looked at every 50 steps. Batches are made beforehand, on the processor."""
    task = tasks.build(resolve(str(tiny[kind]), [*changes, *overrides]).recipe, runtime=CPU)
    batches = list(task.batches(0))
    monkeypatch.setattr(task, "batches", lambda epoch, start=0: iter(batches[start:]))
    monkeypatch.setattr(loop, "check_finite", lambda *arguments, **more: None)
    reports = fit(task, Trainer.of(task), start=Progress())
    next(reports)
    with Waits() as waits:
        loss = next(reports).loss
        # With Muon it is asked whether the step is to be left out, as the docstring of `Together` says.
        asked = int("optim.name=muon" in changes and SKIP in overrides)
        assert len(waits.seen) == asked
        loss.item()
        assert len(waits.seen) == asked + 1, "it does count"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_is_not_waited_for_to_leave_a_step_out(kind: str, tiny: dict[str, Path]) -> None:
    runtime = Runtime(torch.device("cuda", 0), "fp32", "gpu", "as asked")
    task = tasks.build(resolve(str(tiny[kind]), [SKIP]).recipe, runtime=runtime)
    trainer = Trainer.of(task)
    poison(task, 2)
    reports = fit(task, trainer, start=Progress())
    next(reports)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(reports)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.skipped == 1
