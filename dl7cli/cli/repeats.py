"""What `dl7 train --seeds` shows and prints."""

import shlex
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from dl7cli.cli import console
from dl7cli.errors import UserError

if TYPE_CHECKING:
    from dl7cli.cli.progress import Plain, Terminal
    from dl7cli.device import Runtime
    from dl7cli.training import Epoch, Plan, Step
    from dl7cli.training.repeats import Repeat


class Labelled:
    """Shows one of several trainings, by its label where there is one, and adds its run to `folders`.

    Without a label it is the only one at a time, and shown as if it were alone.
    """

    def __init__(self, display: "Plain | Terminal", label: str | None, folders: list[str]) -> None:
        self._display = display
        self._label = label
        self._folders = folders

    def plan(self, plan: "Plan") -> None:
        if str(plan.run) not in self._folders:
            self._folders.append(str(plan.run))
        if self._label is None:
            self._display.plan(plan)
        else:
            self.note(f"run {plan.run} on {plan.device}, {plan.precision}")

    def step(self, step: "Step") -> None:
        if self._label is None:
            self._display.step(step)
        else:
            self._display.progress(self._label, step.step, step.steps)

    def epoch(self, epoch: "Epoch") -> None:
        from dl7cli.cli.progress import summary

        self.note(summary(epoch))

    def note(self, text: str) -> None:
        self._display.note(text if self._label is None else f"{self._label}  {text}")

    def progress(self, what: str, done: int, total: int) -> None:
        self._display.progress(what if self._label is None else f"{self._label}  {what}", done, total)


def show(planned: Sequence["Repeat"], runtimes: Sequence["Runtime"], as_json: bool) -> None:
    """Train them all, print what they come to, and where that is cut short, how to go on."""
    from dl7cli import training
    from dl7cli.training import repeats

    begin = time.monotonic()
    folders = [one.begun for one in planned if one.begun is not None]
    results: dict[int, dict[str, Any]] = {}
    try:
        with console.display() as display:

            def listener(seed: int) -> Labelled:
                return Labelled(display, f"seed {seed}" if len(runtimes) > 1 else None, folders)

            for seed, result in repeats.train_all(planned, runtimes, listener):
                results[seed] = result
                display.progress(f"seed {seed}", 1, 1)
                score = console.score(result["primary"], result["scores"][result["primary"]])
                display.note(f"seed {seed}  {result['split']} {score} ({len(results)} of {len(planned)})")
    except training.Interrupted as stop:
        console.note(f"stopped; what was trained is saved\n{_go_on(planned, folders)}" if folders else "stopped")
        raise typer.Exit(128 + stop.signal) from None
    except (UserError, KeyboardInterrupt):
        if folders:
            console.note(_go_on(planned, folders))
        raise
    seeds = [one.seed for one in planned]
    summed = repeats.summary([results[seed] for seed in seeds], seeds, time.monotonic() - begin)
    print_summary(summed, as_json)
    if len(seeds) > 1:
        console.note(f"next: dl7 compare {shlex.quote(','.join(summed['runs']))} RUN,RUN,…")


def _go_on(planned: Sequence["Repeat"], folders: Sequence[str]) -> str:
    seeds, first = {one.seed for one in planned}, planned[0]
    # Not their number: one that was begun may lie beyond those that follow the first.
    count = next(number for number in range(1, len(seeds) + 1) if first.seed + number not in seeds)
    out = "" if first.out is None else f" --out {shlex.quote(str(first.out).rpartition('-')[0])}"
    return f"go on with: dl7 train --resume {shlex.quote(','.join(folders))} --seeds {count}{out}"


def print_summary(summed: dict[str, Any], as_json: bool) -> None:
    """Print each score, their mean, and how far chance goes."""
    if as_json:
        console.document(summed)
        return
    primary, runs = summed["primary"], summed["runs"]

    def shown(value: float) -> str:
        return console.score(primary, value).rpartition(" ")[2]

    console.table(
        ("SEED", "RUN", console.score(primary, 0).rpartition(" ")[0].upper()),
        [
            (seed, run, shown(result["scores"][primary]))
            for seed, run, result in zip(summed["seeds"], runs, summed["results"], strict=True)
        ],
    )
    score = console.score(primary, summed["scores"][primary])
    console.write(
        f"{score} on the {summed['split']} split of {summed['data']}: mean of {console.count(len(runs), 'run')}"
        f" ({console.extent(summed)})"
    )
    if summed["signature"] is not None:
        console.write(f"signature {summed['signature']}")
    if summed["interval"][primary] is None:
        console.write("one run does not tell how far chance goes: no deviation and no interval")
    else:
        low, high = summed["interval"][primary]
        console.write(
            f"standard deviation {shown(summed['standard_deviation'][primary])} (n - 1), 95 % interval of the mean"
            f" {shown(low)} to {shown(high)} (Student's t, n = {len(runs)})"
        )
    readings = summed["readings"]
    often = "once by each run" if set(readings) == {1} else f"{', '.join(map(str, readings))} times by these runs"
    console.write(f"the {summed['split']} split was read {often}")
