"""A recipe trained with several seeds, one after the other or each on a GPU of its own, and what they come to.

Each is a run like any other. Knows no console.
"""

import multiprocessing
import multiprocessing.connection
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from dl7cli import runs, significance
from dl7cli.device import Runtime, out_of_memory
from dl7cli.distributed import ALONE
from dl7cli.errors import UserError
from dl7cli.recipe import Recipe, alike, with_seed
from dl7cli.runs import Run
from dl7cli.training.listener import Epoch, Listener, Plan, Step
from dl7cli.training.session import resume, train
from dl7cli.training.signals import Interrupted, signals

SECONDS_BETWEEN_LOOKS = 0.2
"""For a signal, while other processes train."""


@dataclass(frozen=True)
class Repeat:
    """One of them, to be trained or gone on with."""

    recipe: Recipe
    begun: str | None
    """The run in which it was begun."""
    out: Path | None
    offline: bool

    @property
    def seed(self) -> int:
        return self.recipe.training.seed

    def train(self, runtime: Runtime, listener: Listener) -> dict[str, Any]:
        """Train it, go on with it, or look up how it ended; returns and raises as `session.train`."""
        if self.begun is None:
            return train(self.recipe, out=self.out, runtime=runtime, offline=self.offline, listener=listener)
        run, _ = runs.find(self.begun)
        result = runs.result(run)
        if result is None:
            return resume(self.begun, runtime=runtime, offline=self.offline, listener=listener)
        return {**result, "run": str(run.folder)}  # the folder may have been moved


def plan(
    recipe: Recipe | None, count: int, *, begun: Sequence[str] = (), out: Path | None = None, offline: bool = False
) -> list[Repeat]:
    """As many as `count`, with the seed of the recipe and those that follow it.

    Without a recipe it is that of the runs `begun`, which are gone on with, and the seeds follow the least of theirs.
    With `out`, those not yet begun lie in `out-SEED`. Raises UserError, so that it is seen before hours have passed,
    where such a folder is in use, a seed is out of range, or the runs differ in more than their seeds.
    """
    found: dict[int, str] = {}
    for name in begun:
        run, _ = runs.find(name)
        earlier = runs.read_recipe(run)
        seed = earlier.training.seed
        if seed in found:
            raise UserError(f"`{found[seed]}` and `{name}` have the same seed", hint="name one of them")
        if recipe is not None and not alike(recipe, earlier):
            hint = "`--resume A,B --seeds N` goes on with runs that differ in their seeds alone"
            raise UserError(f"`{begun[0]}` and `{name}` are of different recipes", hint)
        recipe, found[seed] = earlier, str(run.folder)
    assert recipe is not None
    first = min(found, default=recipe.training.seed)
    repeats = [
        Repeat(with_seed(recipe, seed), found.get(seed), None if out is None else Path(f"{out}-{seed}"), offline)
        for seed in sorted({*range(first, first + count), *found})
    ]
    for repeat in repeats:
        if repeat.begun is None and repeat.out is not None:
            runs.refuse_occupied(repeat.out)
    return repeats


def train_all(
    repeats: Sequence[Repeat], runtimes: Sequence[Runtime], listener: Callable[[int], Listener]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Train them, yielding the seed and the result of each when it is there; `listener` is asked for one for each seed.

    With several `runtimes` each repeat has a process of its own, of which there is one on each device at any time.
    Raises as `session.train`: Interrupted is then of the run begun last, and the others have been saved, too.
    """
    if len(runtimes) == 1:
        for repeat in repeats:
            torch.compiler.reset()  # a module's code is compiled for a few models only, then no more
            yield repeat.seed, repeat.train(runtimes[0], listener(repeat.seed))
    else:
        yield from _side_by_side(repeats, runtimes, listener)


def summary(results: Sequence[dict[str, Any]], seeds: Sequence[int], seconds: float) -> dict[str, Any]:
    """What `--json` prints of results in the order of their seeds.

    `scores` are the means of those that all have; of each, `standard_deviation` (n - 1) and `interval` (Student's, of
    95 %) are null for a single run. `readings` are how often each run has read the split, evaluations after its
    training included.
    """
    first = results[0]
    # A run that an earlier dl7 has finished may have other scores.
    shared = [name for name in first["scores"] if all(name in result["scores"] for result in results)]
    spreads = {name: significance.spread([result["scores"][name] for result in results]) for name in shared}
    folders = [str(result["run"]) for result in results]
    return {
        "runs": folders,
        "seeds": list(seeds),
        **{name: first[name] for name in ("task", "recipe", "data", "split", "examples", "primary")},
        "scores": {name: one.mean for name, one in spreads.items()},
        "standard_deviation": {name: one.deviation for name, one in spreads.items()},
        "interval": {name: one.interval for name, one in spreads.items()},
        "readings": [
            len(runs.readings(Run(Path(folder)), result)) for folder, result in zip(folders, results, strict=True)
        ],
        "signature": first["signature"],
        "seconds": round(seconds, 3),
        "results": list(results),
    }


def _side_by_side(
    repeats: Sequence[Repeat], runtimes: Sequence[Runtime], listener: Callable[[int], Listener]
) -> Iterator[tuple[int, dict[str, Any]]]:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    waiting, free = list(repeats), list(runtimes)
    going: dict[Connection, tuple[Repeat, Runtime, SpawnProcess]] = {}
    problem: UserError | None = None
    latest = Path()
    told, stopping = 0, False  # the signal
    with signals(ALONE) as told_to_stop:
        try:
            while going or (waiting and not stopping):
                while waiting and free and not stopping:
                    repeat, runtime = waiting.pop(0), free.pop(0)
                    here, there = context.Pipe(duplex=False)
                    process = context.Process(target=_work, args=(there, repeat, runtime))
                    process.start()
                    there.close()
                    going[here] = repeat, runtime, process
                multiprocessing.connection.wait(list(going), timeout=SECONDS_BETWEEN_LOOKS)
                for here, (repeat, runtime, process) in list(going.items()):
                    if not here.poll():
                        continue
                    kind, content = _heard(here, repeat)
                    if kind == "plan":
                        latest = content[0].run
                    if kind not in ("result", "interrupted", "error", "ended"):
                        getattr(listener(repeat.seed), kind)(*content)
                        continue
                    del going[here]
                    here.close()
                    process.join()
                    free.append(runtime)
                    match kind:
                        case "result":
                            yield repeat.seed, content
                        case "interrupted":
                            told = told or content
                            waiting.append(repeat)
                        case "error":
                            problem = problem or UserError(*content)
                        case "ended":
                            # One that is to stop before it has anything to save does so.
                            problem = problem or (None if stopping else UserError(*content))
                            waiting.append(repeat)
                told = told or told_to_stop()
                if (told or problem) and not stopping:
                    stopping = True
                    for _, _, process in going.values():
                        process.terminate()  # it saves and ends
        finally:
            for here, (_, _, process) in going.items():
                process.terminate()
                here.close()
                process.join()
    if problem is not None:
        raise problem
    if waiting:
        raise Interrupted(latest, told)


def _heard(connection: Connection, repeat: Repeat) -> tuple[str, Any]:
    """What a process says next, or that it will say no more."""
    try:
        kind, content = connection.recv()
    except (EOFError, OSError):  # the latter in the middle of something
        return "ended", (f"the training with seed {repeat.seed} has ended without a word",)
    return kind, content


class _Sender:
    """Tells the parent process what a training tells its listener."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def plan(self, plan: Plan) -> None:
        self._connection.send(("plan", (plan,)))

    def step(self, step: Step) -> None:
        self._connection.send(("step", (step,)))

    def epoch(self, epoch: Epoch) -> None:
        self._connection.send(("epoch", (epoch,)))

    def note(self, text: str) -> None:
        self._connection.send(("note", (text,)))

    def progress(self, what: str, done: int, total: int) -> None:
        self._connection.send(("progress", (what, done, total)))


def _work(connection: Connection, repeat: Repeat, runtime: Runtime) -> None:
    """What a process of its own does: train one, and send what comes of it."""
    os.setpgid(0, 0)  # Ctrl-C is for the parent, which passes it on
    with suppress(BrokenPipeError):  # the parent is no more: what was saved is there
        try:
            connection.send(("result", repeat.train(runtime, _Sender(connection))))
        except Interrupted as stop:
            connection.send(("interrupted", stop.signal))
        except UserError as error:
            connection.send(("error", (error.message, error.hint)))
        except Exception as error:
            if not out_of_memory(error):
                raise
            connection.send(("error", (f"out of memory in the training with seed {repeat.seed}", None)))
