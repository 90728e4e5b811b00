"""Training loops that take turns, so that whatever else the machine does meets them all alike."""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any

import torch

from dl7cli.checkpoint import Progress
from dl7cli.device import Runtime
from dl7cli.tasks import Task
from dl7cli.training.loop import Trainer, fit

Loop = Iterator[int]
"""Trains one step per `next` and gives its examples; 0 is something else, such as validation, which is not timed."""

SETTLING_STEPS = 5
"""Untimed, at the start of each turn: they use up what the workers of a DataLoader have prepared since the last one."""


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark of training has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", required=True, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=30, help="length of one loop's turn (default 30)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each loop (default 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object; rounds go to standard error")
    return parser


def own_loop(task: Task) -> Loop:
    """dl7's loop, as `dl7 train` runs it, begun again where the recipe's epochs are over."""
    while True:
        for report in fit(task, Trainer.of(task), start=Progress()):
            yield report.examples


def apart(loop: Callable[..., Loop], **arguments: Any) -> Loop:
    """A loop in a process of its own, which keeps and gives back memory as Python and torch do by themselves."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_take_steps, args=(there, loop, arguments))
    process.start()
    there.close()
    try:
        while True:
            here.send(None)
            yield here.recv()
    finally:
        here.close()
        process.join()


def _take_steps(asked: Connection, loop: Callable[..., Loop], arguments: Mapping[str, Any]) -> None:
    steps = loop(**arguments)
    with suppress(EOFError):
        while True:
            asked.recv()  # before the step, which is not to be made in the turn of another
            asked.send(next(steps))


def compare(
    loops: dict[str, Loop],
    options: argparse.Namespace,
    *,
    runtime: Runtime,
    unit: str,
    goals: Mapping[str, float] = MappingProxyType({}),
    **facts: Any,
) -> None:
    """Let the loops take turns; print each round, the medians, and how often faster the first is than each other.

    `goals`, by name of the other loop, say how often it should be.
    """
    rounds_to = sys.stderr if options.json else sys.stdout
    first, *others = loops
    device = {"device": runtime.device_name, "precision": runtime.precision, "torch": torch.__version__}
    facts = {**device, "seconds": options.seconds, **facts}
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()), file=rounds_to)
    for loop in loops.values():  # the first steps choose kernels and take memory
        rate(loop, options.seconds / 4)
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(1, options.rounds + 1):
        for name, loop in loops.items():
            rates[name].append(rate(loop, options.seconds))
        seen = ", ".join(f"{name} {of[-1]:,.0f}" for name, of in rates.items())
        print(f"round {number}: {seen} {unit}/s", file=rounds_to, flush=True)
    medians = {name: statistics.median(of) for name, of in rates.items()}
    ratios = {
        other: [own / usual for own, usual in zip(rates[first], rates[other], strict=True)]
        for other in sorted(others, key=lambda name: -medians[name])
    }
    if options.json:
        result = {**facts, "unit": f"{unit}/s", "rates": rates, "medians": medians, "ratios": ratios}
        result["median_ratios"] = {name: statistics.median(of) for name, of in ratios.items()}
        result["goals"] = dict(goals)
        print(json.dumps(result))
        return
    print("median:  " + ", ".join(f"{name} {median:,.0f}" for name, median in medians.items()) + f" {unit}/s")
    for other, pairs in ratios.items():
        listed = ", ".join(f"{ratio:.2f}" for ratio in pairs)
        goal = f"goal {goals[other]:.2f}; " if other in goals else ""
        print(f"{first} is {statistics.median(pairs):.2f} times as fast as {other} ({goal}by round: {listed})")


def rate(loop: Loop, seconds: float) -> float:
    """Examples per second over a turn of at least so many seconds."""
    for _ in range(SETTLING_STEPS):
        next(loop)
    synchronise()
    examples, left_out = 0, 0.0
    begin = now = time.perf_counter()
    while now - begin - left_out < seconds:
        before, done = now, next(loop)
        now = time.perf_counter()
        examples += done
        if done == 0:
            left_out += now - before
    synchronise()
    return examples / (time.perf_counter() - begin - left_out)


def synchronise() -> None:
    """Wait until the GPU, where there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
