"""`dl7 bench`: what a training step costs on this machine, and which way of running it is fastest."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dl7cli.cli import console, options
from dl7cli.cli.train import choose

if TYPE_CHECKING:
    from dl7cli.training.benchmark import Measured


def bench(
    name: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A shipped recipe's name (dl7 recipes list) or a TOML file."),
    ],
    data: options.Data = None,
    overrides: options.Set = None,
    seconds: Annotated[
        float,
        typer.Option("--seconds", metavar="S", min=0.001, max=86_400, help="Time for each setting, over all rounds."),
    ] = 10.0,
    device: options.Device = "auto",
    gpus: options.Gpus = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Time a recipe's training steps and say how its training is over soonest, and after how long.

    Data, forward pass, backward pass and optimiser are timed apart, on the recipe's own batches, in each precision
    that the device has and, for classifiers, in each memory layout, compiled and not. The settings take turns; medians
    of the rounds are shown. --set training.compile=never leaves compilation out.
    """
    recipe = choose(name, overrides or [], data=data, seed=None, offline=offline, command="bench")
    from dl7cli import device as devices
    from dl7cli import tasks
    from dl7cli.training.benchmark import ROUNDS, benchmark

    runtime = devices.choose(device, gpus=gpus)
    with console.display() as display:
        task = tasks.build(recipe, runtime=runtime, offline=offline, progress=display.progress)
        found = benchmark(task, seconds=seconds, progress=display.progress)
    facts: dict[str, Any] = {
        "recipe": recipe.name,
        "task": recipe.task,
        "data": task.data_name,
        "device": runtime.device_name,
        "unit": f"{task.unit}/s",
        "rounds": ROUNDS,
        "seconds": seconds,
    }
    if as_json:
        console.document({**facts, **found.document()})
        return
    for note in found.notes:
        console.note(note)
    console.note(f"{recipe.name} on {task.data_name}, {runtime.device_name}; milliseconds of a step:")
    columns = ("PRECISION", "LAYOUT", "COMPILED", "DATA", "FORWARD", "BACKWARD", "OPTIMISER", "STEP", f"{task.unit}/S")
    console.table([column.upper() for column in columns], [_row(one) for one in found.measured])
    console.write(f"chosen: {found.chosen.setting}: {found.reason}")
    time = console.duration(found.chosen.training_seconds(found.steps))
    console.write(f"{found.steps:,} steps take {'at most' if found.at_most else 'about'} {time}, without validations")


def _row(measured: "Measured") -> list[str]:
    times = [*measured.seconds.values(), sum(measured.seconds.values())]
    setting = measured.setting
    return [
        setting.precision,
        setting.layout or "-",
        "yes" if setting.compiled else "no",
        *(f"{1000 * value:.1f}" for value in times),
        f"{measured.rate:,.0f}",
    ]
