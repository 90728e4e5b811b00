"""`dl7 train`: train a recipe, or go on with a run."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dl7cli.cli import console, options
from dl7cli.cli.evaluate import print_result
from dl7cli.cli.repeats import train_repeats

if TYPE_CHECKING:
    from dl7cli.recipe import Recipe


def train(
    name: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A shipped recipe's name (dl7 recipes list) or a TOML file."),
    ] = None,
    data: options.Data = None,
    overrides: options.Set = None,
    seed: options.Seed = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=1000,
            help="Train N times, with the seed and those that follow it, and print mean, deviation and interval.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Folder of the run; runs/RECIPE-NUMBER if not given. With --seeds: RUN-SEED."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Go on with this run, as if it had never stopped. With --seeds: runs with commas between them.",
        ),
    ] = None,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="On a GPU, too, give the same bits each time, or say which operation cannot; slower.",
        ),
    ] = False,
    device: options.Device = "auto",
    gpus: options.Gpus = None,
    precision: options.Precision = "auto",
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Train a recipe, keep the best model, and evaluate it.

    What is trained stands in the recipe; --set changes a key of it. Ctrl-C finishes the step, saves, stops.

    With --seeds each seed is a run of its own; they follow one another, or share the devices of --gpus, one on each.
    --json then prints runs, seeds and results, and of every score the mean in scores, the standard_deviation
    and the 95 % interval.
    """
    given: dict[str, object] = {"RECIPE": name, "--data": data, "--set": overrides, "--seed": seed}
    if seeds is None:  # else it says where those lie that have not begun
        given["--out"] = out
    if resume is None and name is None:
        raise typer.BadParameter("give a RECIPE to train, or --resume RUN to go on with a run")
    if resume is not None and (refused := [flag for flag, value in given.items() if value not in (None, [])]):
        raise typer.BadParameter(
            f"--resume goes on with the run as it was started; {', '.join(refused)} cannot be given with it"
        )
    recipe = None
    if name is not None:
        recipe = choose(name, overrides or [], data=data, seed=seed, offline=offline)
    if seeds is not None:
        begun = [] if resume is None else resume.split(",")
        if begun:
            precision, deterministic = as_it_began(begun[0], precision, deterministic)
        train_repeats(
            recipe,
            seeds,
            begun=begun,
            out=out,
            device=device,
            gpus=gpus,
            precision=precision,
            deterministic=deterministic,
            offline=offline,
            as_json=as_json,
        )
        return
    from dl7cli import device as devices
    from dl7cli import training

    if resume is not None:
        precision, deterministic = as_it_began(resume, precision, deterministic)
    runtime = devices.choose(device, precision, gpus, deterministic=deterministic)
    try:
        with console.display() as display:
            if recipe is not None:
                result = training.train(recipe, out=out, runtime=runtime, offline=offline, listener=display)
            else:
                assert resume is not None
                result = training.resume(resume, runtime=runtime, offline=offline, listener=display)
    except training.Interrupted as stop:
        console.note(f"stopped; saved in {stop.run}\ngo on with: dl7 train --resume {shlex.quote(str(stop.run))}")
        raise typer.Exit(128 + stop.signal) from None
    print_result(result, as_json)
    console.note(_next_commands(result))


def as_it_began(run: str, precision: options.PrecisionName, deterministic: bool) -> tuple[options.PrecisionName, bool]:
    """Return how to go on with a run, since otherwise it would be another one."""
    from dl7cli import runs

    before = runs.environment(runs.find(run)[0])
    return (
        before.get("precision", precision) if precision == "auto" else precision,
        deterministic or before.get("deterministic", False),
    )


def choose(
    name: str, overrides: list[str], *, data: str | None, seed: int | None, offline: bool, command: str = "train"
) -> "Recipe":
    """Resolve a recipe for a command; the built-in set stands in for data that cannot be had and was not asked for."""
    from dl7cli import recipe as recipes

    resolved = recipes.resolve(name, overrides, data=data, seed=seed)
    if resolved.fallback is None:
        return resolved.recipe
    from dl7cli.data import sources

    source = resolved.recipe.data.source
    if sources.available(source, offline=offline):
        return resolved.recipe
    doing, wanted = ("training", "scores") if command == "train" else ("timing steps", "times")
    console.note(
        f"the data {source} is neither on disk nor {'looked for, being offline' if offline else 'reachable'}:"
        f" {doing} on the built-in set {resolved.fallback.data.source} instead\n"
        f"  for {wanted} on the real data: dl7 {command} {name} --data FOLDER"
    )
    return resolved.fallback


def _next_commands(result: dict[str, Any]) -> str:
    run = shlex.quote(str(result["run"]))
    use = (
        f"dl7 classify --run {run} IMAGE"
        if result["task"] == "classification"
        else f'dl7 translate --run {run} --beam 5 "…"'
    )
    split = "" if result["split"] == "test" else f" --split {result['split']}"
    return f"next: dl7 eval {run}{split}\n      {use}"
