"""Progress on standard error: live on a terminal, else a plain line every few seconds."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from dl7cli.cli import console
from dl7cli.recipe import ResNetModel

if TYPE_CHECKING:
    import rich.progress

    from dl7cli.training import Epoch, Plan, Step

FIRST_SECONDS = 2.0
EVERY_SECONDS = 5.0
_SPLITS = ("train", "validation", "test")
_SHOWN = 100
"""Characters of a sentence."""


class Nothing:
    """Shows nothing. What shows something tells plans and epochs as notes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def plan(self, plan: "Plan") -> None:
        self.note(describe(plan))

    def epoch(self, epoch: "Epoch") -> None:
        self.note(summary(epoch))

    def step(self, step: "Step") -> None: ...
    def note(self, text: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...


class Plain(Nothing):
    """Lines for a log file: the first after two seconds, then one every five, and one for every epoch."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._activity = ""
        self._due = 0.0

    def step(self, step: "Step") -> None:
        if self._is_due("training"):
            console.note(f"epoch {step.epoch}/{step.epochs}  step {step.step}/{step.steps}  {'  '.join(details(step))}")

    def note(self, text: str) -> None:
        console.note(text)

    def progress(self, what: str, done: int, total: int) -> None:
        if total and done >= total:
            self._activity = ""
        elif self._is_due(what):
            console.note(f"{what}  {done:,}/{total:,}" if total else f"{what}  {done:,}")

    def _is_due(self, activity: str) -> bool:
        now = self._clock()
        if activity != self._activity:
            self._activity = activity
            self._due = now + FIRST_SECONDS
        if now < self._due:
            return False
        self._due = now + EVERY_SECONDS
        return True


class Terminal(Nothing):
    """A bar for what is going on below the lines that stay: plan, epochs and notes."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        # Standard output is for data and stays where it is pointed to.
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
        )
        self._tasks: dict[str, rich.progress.TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def step(self, step: "Step") -> None:
        self._show("training", f"epoch {step.epoch}/{step.epochs}", step.step, step.steps, "  ".join(details(step)))

    def note(self, text: str) -> None:
        from rich.text import Text

        self._bars.console.print(Text(console.printable(text, keep="\n")), soft_wrap=True)

    def progress(self, what: str, done: int, total: int) -> None:
        if total and done >= total:
            if what in self._tasks:
                self._bars.remove_task(self._tasks.pop(what))
        else:
            self._show(what, what, done, total, f"{done:,}/{total:,}" if total else f"{done:,}")

    def _show(self, key: str, description: str, done: int, total: int, detail: str) -> None:
        description = console.printable(description)
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(description, total=total or None, detail=detail)
        self._bars.update(self._tasks[key], description=description, completed=done, detail=detail)


def describe(plan: "Plan") -> str:
    """Say what a training will do, in lines."""
    recipe = plan.recipe
    model = recipe.model.model_dump(exclude={"kind"}, exclude_defaults=True)
    if isinstance(recipe.model, ResNetModel):
        model = {"depth": recipe.model.depth, **model}
    details = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in model.items()) or "as it is by default"
    splits = ", ".join(f"{plan.splits[split]:,} {split}" for split in _SPLITS if split in plan.splits)
    workers = f"{plan.workers} workers, this one on " if plan.workers > 1 else ""
    lines = [
        f"training recipe {recipe.name}",
        f"  data       {plan.data}: {splits}",
        f"  model      {recipe.model.kind} with {plan.parameters:,} parameters ({details})",
        f"  device     {workers}{plan.device}, {plan.precision} ({plan.reason})",
        f"  steps      {plan.steps:,} in {console.count(plan.epochs, 'epoch')}, seed {recipe.training.seed}",
        f"  run        {plan.run}",
    ]
    if plan.resumed_step:
        lines.append(f"  resumed    after step {plan.resumed_step:,}")
    return "\n".join(map(console.printable, [*lines, *(f"  note       {note}" for note in plan.notes)]))


def details(step: "Step") -> list[str]:
    """Say how a training is getting on: loss, rate and, once steps have been timed, the time left."""
    parts = [f"loss {step.loss:.4f}"]
    if step.rate > 0:
        parts.append(f"{step.rate:,.0f} {step.unit}/s")
        parts.append(f"{console.duration(step.remaining_seconds)} left")
    return parts


def summary(epoch: "Epoch") -> str:
    """Say how an epoch ended: the score and, of a translator, the sample that validation gave."""
    score = console.score(epoch.scores.primary, epoch.scores.values[epoch.scores.primary])
    sample = epoch.scores.details.get("sample")
    lines = [f"epoch {epoch.epoch}  validation {score}{', greedy' if sample else ''}{'  (best)' if epoch.best else ''}"]
    if sample:
        source, translation = (console.shortened(sample[name], _SHOWN) for name in ("source", "translation"))
        lines.append(f"  {source} → {translation}")
    return "\n".join(map(console.printable, lines))
