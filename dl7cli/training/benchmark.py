"""What the parts of a training step cost on this machine, one way of running it beside another.

The ways take turns, round after round, so that whatever else the machine does meets them all alike. Knows no console.
"""

import copy
import statistics
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch

from dl7cli.data.sources import Progress as ProgressCall
from dl7cli.data.sources import silent
from dl7cli.device import choose, precisions, synchronise
from dl7cli.errors import UserError
from dl7cli.tasks import Task
from dl7cli.tasks.classification import Classification
from dl7cli.training import compilation
from dl7cli.training.loop import Trainer, total_steps

PHASES = ("data", "forward", "backward", "optimiser")
LAYOUTS = {"channels-last": torch.channels_last, "nchw": torch.contiguous_format}
ROUNDS = 5
SETTLING_STEPS = 2
"""Untimed, before the first round: they take memory and choose kernels."""
BATCHES = 12
"""Of a translator, which are taken again and again, and once before the first round: code is written for each shape
when it is first met, and a training meets most shapes in its first epoch. The drawing of subwords is not timed.
"""
_LATE = 1 << 20
"""A step when a moving average of the weights is hardly moved by one more."""


class Setting(NamedTuple):
    """A way of running the training of a recipe, which changes its speed and not what is trained."""

    precision: str
    layout: str | None
    """Of images in memory; None where there are none."""
    compiled: bool

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.precision, self.layout, "compiled" if self.compiled else None)))


class Measured(NamedTuple):
    """Medians over the rounds."""

    setting: Setting
    rate: float
    """Images or target tokens per second."""
    rates: list[float]
    """The same by round."""
    seconds: dict[str, float]
    """Of a step, by phase."""
    compile_seconds: float | None

    def training_seconds(self, steps: int) -> float:
        """How long so many steps take, compilation included."""
        return (self.compile_seconds or 0) + steps * sum(self.seconds.values())


class Benchmark(NamedTuple):
    measured: list[Measured]
    chosen: Measured
    """By which the recipe's training, compilation included, is over soonest; images as `dl7 train` lays them out."""
    reason: str
    steps: int
    """Of the recipe's whole training."""
    at_most: bool
    """Whether there may be fewer of these, or some cost less than those that were timed, as images are smaller."""
    notes: list[str]
    """Settings that could not be measured, with why."""

    def document(self) -> dict[str, Any]:
        """For `--json`; times of a step in milliseconds."""
        return {
            "results": [
                {
                    **one.setting._asdict(),
                    "rate": round(one.rate, 1),
                    "rates": [round(rate, 1) for rate in one.rates],
                    "step_ms": {phase: round(1000 * value, 3) for phase, value in one.seconds.items()},
                    "compile_seconds": None if one.compile_seconds is None else round(one.compile_seconds, 1),
                    "training_seconds": round(one.training_seconds(self.steps), 1),
                }
                for one in self.measured
            ],
            "chosen": self.chosen.setting._asdict(),
            "reason": self.reason,
            "steps": self.steps,
            "notes": self.notes,
        }


def benchmark(task: Task, *, seconds: float, progress: ProgressCall = silent) -> Benchmark:
    """Time training steps of the task on its own batches, `seconds` in all for each way its device can run them.

    `training.compile` of the recipe holds here, too: `never` leaves out what is compiled, `always` all else. Raises
    UserError where nothing can be measured, as where only compilation was asked for and there is no compiler.
    """
    next(iter(task.batches(0)))  # reads and encodes the data, which the contenders share
    notes = []
    if len(precisions(task.runtime.device)) == 1:
        notes.append("bf16: not timed, as this CPU has no instructions that it needs")
    if task.recipe.training.parts > 1:
        notes.append(f"each batch is timed as a whole, and not in the {task.recipe.training.parts} parts of the recipe")
    contenders = []
    wanted = settings(task)
    for number, setting in enumerate(wanted):
        progress("preparing", number, len(wanted))
        contender = _Contender(task, setting)
        try:
            contender.settle()
        except _NotCompiledError as problem:
            notes.append(f"{setting}: cannot be compiled here: {problem}")
        else:
            contenders.append(contender)
    progress("preparing", len(wanted), len(wanted))
    if not contenders:
        raise UserError("; ".join(notes), hint="use `--set training.compile=never`")
    turns = ROUNDS * len(contenders)
    for turn in range(turns):
        progress("timing", turn, turns)
        contenders[turn % len(contenders)].turn(seconds / ROUNDS)
    progress("timing", turns, turns)
    measured = [contender.measured() for contender in contenders]
    chosen = soonest(measured, task)
    smaller = isinstance(task, Classification) and task.recipe.training.small_size is not None
    at_most = smaller or task.recipe.training.patience > 0
    return Benchmark(measured, chosen, _reason(chosen, measured, task), total_steps(task), at_most, notes)


def soonest(measured: list[Measured], task: Task) -> Measured:
    """That by which the recipe's training, compilation included, is over first, of what `dl7 train` can be told."""
    examples = task.recipe.training.epochs * task.splits()["train"]
    possible = [one for one in measured if one.setting.layout != "nchw"] or measured
    return min(possible, key=lambda one: (one.compile_seconds or 0) + examples / one.rate)


def settings(task: Task) -> list[Setting]:
    """Every way in which the task can be run on its device."""
    known = precisions(task.runtime.device)
    if not isinstance(task, Classification):
        return [Setting(precision, None, False) for precision in known]
    compiled = {"auto": (False, True), "never": (False,), "always": (True,)}[task.recipe.training.compile]
    return [Setting(precision, layout, one) for one in compiled for precision in known for layout in LAYOUTS]


class _NotCompiledError(Exception):
    """The model cannot be compiled on this machine."""


class _Contender:
    """A copy of the task's model that trains in one setting, and what its steps have cost."""

    def __init__(self, task: Task, setting: Setting) -> None:
        self.setting = setting
        self.compile_seconds: float | None = None
        self._task = _variant(task, setting)
        self._trainer = Trainer.of(self._task)
        # So that the weights stay what they are at the start of a training, however long this takes.
        for group in self._trainer.optimiser.param_groups:
            group["lr"] = 0.0
        self._batches = _endless(self._task)
        self._rates: list[float] = []
        self._seconds: list[list[float]] = []

    def settle(self) -> None:
        """Do what only the first steps do. Raises _NotCompiledError where that fails."""
        if self.setting.compiled:
            assert isinstance(self._task, Classification)
            begin = time.perf_counter()
            import torch._dynamo  # a part of what compiling takes

            try:
                # Of one function so many ways are compiled, and then no more: the others would be timed as they are.
                with torch._dynamo.config.patch(cache_size_limit=64):
                    self._task.compile()
            except Exception as problem:  # torch names no type for what may go wrong
                raise _NotCompiledError(compilation.reason(problem)) from None
            self.compile_seconds = time.perf_counter() - begin
        self._task.model.train()
        for _ in range(SETTLING_STEPS if isinstance(self._task, Classification) else BATCHES):
            self._step()

    def turn(self, seconds: float) -> None:
        """Train for so many seconds, and one step at least."""
        sums = [0.0] * len(PHASES)
        examples = steps = 0
        while not steps or sum(sums) < seconds:
            times, count = self._step()
            sums = [total + time for total, time in zip(sums, times, strict=True)]
            examples += count
            steps += 1
        self._rates.append(examples / sum(sums))
        self._seconds.append([total / steps for total in sums])

    def measured(self) -> Measured:
        medians = map(statistics.median, zip(*self._seconds, strict=True))
        return Measured(
            self.setting,
            statistics.median(self._rates),
            self._rates,
            dict(zip(PHASES, medians, strict=True)),
            self.compile_seconds,
        )

    def _step(self) -> tuple[list[float], int]:
        """Seconds of each phase of one step as the training loop takes it, and its examples."""
        optimiser, scaler, average = self._trainer.optimiser, self._trainer.scaler, self._trainer.average
        parameters = list(self._task.model.parameters())
        clip_norm = self._task.recipe.optim.clip_norm
        clock = [self._now()]
        batch = next(self._batches)
        clock.append(self._now())
        total, examples = self._task.loss(batch)
        mean = total / examples
        clock.append(self._now())
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(mean).backward()  # type: ignore[no-untyped-call]
        clock.append(self._now())
        scaler.unscale_(optimiser)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        scaler.step(optimiser)
        scaler.update()
        if average is not None:
            average.update(_LATE)
        clock.append(self._now())
        return [after - before for before, after in pairwise(clock)], examples

    def _now(self) -> float:
        """The time at which the device has done all it was given."""
        synchronise(self._task.runtime.device)
        return time.perf_counter()


def _variant(task: Task, setting: Setting) -> Task:
    """The task with the same data and first weights, and a model of its own."""
    other = copy.copy(task)
    other.runtime = choose(str(task.runtime.device), setting.precision)
    # A copy of recurrent layers is not what a GPU's kernels want until it is moved there.
    other.model = copy.deepcopy(task.model).to(task.runtime.device)
    if isinstance(other, Classification):
        other.lay_out(LAYOUTS[setting.layout or "channels-last"])
    return other


def _endless(task: Task) -> Iterator[Any]:
    """Training batches of the last epoch, again and again: in the first, images may be smaller."""
    last = task.recipe.training.epochs - 1
    if isinstance(task, Classification):
        while True:
            yield from task.batches(last)
    kept = list(islice(task.batches(last), BATCHES))
    while True:
        yield from (task.part(batch, 0, 1) for batch in kept)


def _reason(chosen: Measured, measured: list[Measured], task: Task) -> str:
    """Why this one: how much faster it is than the next, or why not that, and what compilation costs."""
    text = f"{chosen.rate:,.0f} {task.unit}/s"
    others = sorted((one for one in measured if one is not chosen), key=lambda one: -one.rate)
    if others and others[0].rate > chosen.rate:
        text += f"; {others[0].setting} is {others[0].rate / chosen.rate - 1:.1%} faster"
        waits = others[0].setting.layout == chosen.setting.layout
        text += ", and its compilation is not repaid" if waits else ", and is not what training uses"
    elif others:
        after = others[0]
        won = sum(own > other for own, other in zip(chosen.rates, after.rates, strict=True))
        text += f", {chosen.rate / after.rate - 1:.1%} more than {after.setting}"
        text += f" (faster in {won} of {len(chosen.rates)} rounds)"
    pair = [chosen.setting._replace(compiled=compiled) for compiled in (False, True)]
    eager, compiled = (next((one for one in measured if one.setting == setting), None) for setting in pair)
    if eager is not None and compiled is not None and compiled.compile_seconds is not None:
        saved = sum(eager.seconds.values()) - sum(compiled.seconds.values())
        if saved > 0:
            needed = compiled.compile_seconds / saved
            text += f"; compiling took {compiled.compile_seconds:.1f} s, repaid after {needed:,.0f} steps"
            text += f" of the recipe's {total_steps(task):,}"
    return text
