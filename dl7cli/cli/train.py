"""`dl7 train`: train a recipe, or go on with a run; on several devices by one worker each."""

import json
import os
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from dl7cli import cluster
from dl7cli.cli import console, options, repeats
from dl7cli.cli.evaluate import print_result
from dl7cli.errors import UserError

if TYPE_CHECKING:
    from dl7cli.cluster import Nodes
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
    initial: Annotated[
        str | None,
        typer.Option(
            "--init",
            metavar="RUN",
            help="Begin with the weights of this run, and a translator with its vocabulary. For other classes the last"
            " layer is new.",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Go on with this run, as if it had never stopped; with --data where its data lies now, with --set"
            " training.parts, on_oom, on_nonfinite or checkpoint_minutes otherwise. With --seeds: runs with commas"
            " between them.",
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
    gpus: options.GpusOfWorkers = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=1024, help="How many workers share the CPU."),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(metavar="N", help="How many machines train together; the same command is run on each."),
    ] = None,
    node_rank: Annotated[
        int | None,
        typer.Option(metavar="R", help="Which of them this is, from 0; the first has the run folder."),
    ] = None,
    rendezvous: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where they meet: a free port of the first."),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=1,
            max=31 * 86_400,
            help="How long workers and machines wait for one that does not answer. It is given up, or started again, in"
            " at most twice that and a minute.",
        ),
    ] = 600,
    precision: options.Precision = "auto",
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Train a recipe, keep the best epoch, or the last where the recipe says so, and evaluate it.

    What is trained stands in the recipe; --set changes a key of it. Ctrl-C finishes the step, saves, stops.

    With --seeds each seed is a run of its own; they follow one another, or share the devices of --gpus, one on each.
    --json then prints runs, seeds and results, and of every score the mean in scores, the standard_deviation
    and the 95 % interval.
    """
    given: dict[str, object] = {"RECIPE": name, "--seed": seed, "--init": initial}
    # --out says where those of several seeds lie that have not begun, --data where that of a single run lies now.
    given |= {"--out": out} if seeds is None else {"--data": data, "--set": overrides}
    if resume is None and name is None:
        raise typer.BadParameter("give a RECIPE to train, or --resume RUN to go on with a run")
    if resume is not None and (refused := [flag for flag, value in given.items() if value not in (None, [])]):
        raise typer.BadParameter(
            f"--resume goes on with the run as it was started; {', '.join(refused)} cannot be given with it"
        )
    if seeds is not None:
        shared = {"--workers": workers, "--nodes": nodes, "--node-rank": node_rank, "--rendezvous": rendezvous}
        if refused := [flag for flag, value in shared.items() if value is not None]:
            raise typer.BadParameter(f"--seeds trains each seed on one device; {', '.join(refused)} cannot be given")
        if initial is not None:
            raise typer.BadParameter("--seeds is for what chance does to first weights; --init cannot be given")
        cluster.refuse_other_tasks()
        place = cluster.place()
        if (place is not None and place.count > 1) or cluster.nodes(None, None, None).count > 1:
            raise UserError(
                "`--seeds` trains each seed on one device, and a launcher has started several processes for it",
                hint="start it once, on one machine: `dl7 train RECIPE --seeds N`, with `--gpus all` one on each GPU",
            )
        begun = [] if resume is None else resume.split(",")
        if begun:
            precision, deterministic = as_it_began(begun[0], precision, deterministic)
        recipe = None if name is None else choose(name, overrides or [], data=data, seed=seed, offline=offline)
        from dl7cli import device as devices
        from dl7cli.training.repeats import plan

        apart = devices.for_workers(device, gpus)
        runtimes = [devices.choose(one, precision, deterministic=deterministic) for one in apart]
        repeats.show(plan(recipe, seeds, begun=begun, out=out, offline=offline), runtimes, as_json)
        return
    place = cluster.place()
    if place is None:
        together = cluster.nodes(nodes, node_rank, rendezvous)
        if together.count > 1 or workers not in (None, 1) or (gpus is not None and not gpus.isdecimal()):
            cluster.refuse_other_tasks()
            if together.rank == 0:
                _refuse_mistakes(name, overrides or [], data, seed, resume)
            _launch(device, gpus, workers, together, timeout)
    elif place.memory is None and place.attempt != "0" and resume is None:
        raise UserError(
            "the launcher has started the workers again, which know of no run and would begin another",
            hint="`dl7 train --resume RUN` goes on from its last checkpoint, as workers of dl7 do by themselves",
        )
    recipe = None
    if name is not None and (place is None or place.rank == 0):
        recipe = choose(name, overrides or [], data=data, seed=seed, offline=offline)
    from dl7cli import device as devices
    from dl7cli import distributed, training

    named = devices.for_workers(device, gpus, workers)
    where = named[0] if place is None else devices.of_worker(named, place.local_rank)
    try:
        with distributed.joined(devices.choose(where, precision).device, timeout) as group:
            if resume is not None and group.first:
                precision, deterministic = as_it_began(resume, precision, deterministic)
            # Not on each by itself: they may be of different kinds.
            chosen = devices.choose(where, precision).precision
            other, deterministic = group.shared([chosen, deterministic])
            precision = precision if group.first else other
            runtime = devices.choose(where, precision, workers=group, deterministic=deterministic)
            with console.display() if group.first else console.nothing() as display:
                if resume is not None:
                    result = training.resume(
                        resume, data=data, overrides=overrides or (), runtime=runtime, offline=offline, listener=display
                    )
                else:
                    result = training.train(
                        recipe, out=out, initial=initial, runtime=runtime, offline=offline, listener=display
                    )
    except training.Interrupted as stop:
        console.note(f"stopped; saved in {stop.run}\ngo on with: dl7 train --resume {shlex.quote(str(stop.run))}")
        if place is not None:
            _leave(128 + stop.signal)
        raise typer.Exit(128 + stop.signal) from None
    except distributed.Lost as problem:
        _tell_launcher(problem)
        _leave(cluster.LOST)
    except Exception as problem:
        if place is None:
            raise
        if isinstance(problem, UserError):
            console.error(problem)
        elif devices.out_of_memory(problem):
            console.error(console.NO_MEMORY)
        else:
            traceback.print_exc()
        _leave(1)
    if not group.first:
        return
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


def _refuse_mistakes(
    name: str | None, overrides: list[str], data: str | None, seed: int | None, resume: str | None
) -> None:
    """Raise what each of several workers would raise."""
    if name is not None:
        from dl7cli import recipe as recipes

        recipes.resolve(name, overrides, data=data, seed=seed)
    if resume is not None:
        from dl7cli import runs

        runs.find(resume)


def _launch(device: str, gpus: str | None, workers: int | None, nodes: "Nodes", timeout: float) -> None:
    """Run this command in several workers and exit as they do; returns where it is one on one machine after all."""
    # Read when torch is imported. It warns of how gradients are added up, which is meant, and of each lost connection.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from dl7cli import device as devices
    from dl7cli.training.workers import launch

    named = devices.for_workers(device, gpus, workers)
    if len(named) > 1 or nodes.count > 1:
        code = launch(sys.argv[1:], len(named), nodes=nodes, timeout=timeout, note=console.note)
        raise typer.Exit(code)


def _tell_launcher(problem: Exception) -> None:
    """Let the launcher say what keeps this worker from going on: it may be the end of another that it knows more of."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        console.note(f"this worker {problem}")
    else:
        Path(file).write_text(json.dumps({"message": str(problem), "timestamp": int(time.time())}), encoding="utf-8")


def _leave(code: int) -> NoReturn:
    """End this worker at once: the others, which fail with it, must not be the first to be seen."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def choose(
    name: str, overrides: list[str], *, data: str | None, seed: int | None, offline: bool, command: str = "train"
) -> "Recipe":
    """Resolve a recipe for a command; the built-in set stands in for data that cannot be had and was not asked for.

    A file or folder was asked for, also in a recipe of one's own.
    """
    from dl7cli import recipe as recipes

    resolved = recipes.resolve(name, overrides, data=data, seed=seed)
    if resolved.fallback is None:
        return resolved.recipe
    from dl7cli.data import sources

    source = resolved.recipe.data.source
    if sources.is_local(source) or sources.available(source, offline=offline):
        return resolved.recipe
    fallback = resolved.fallback()
    doing, wanted = ("training", "scores") if command == "train" else ("timing steps", "times")
    console.note(
        f"the data {source} is neither on disk nor {'looked for, being offline' if offline else 'reachable'}:"
        f" {doing} on the built-in set {fallback.data.source} instead\n"
        f"  for {wanted} on the real data: dl7 {command} {name} --data FOLDER"
    )
    return fallback


def _next_commands(result: dict[str, Any]) -> str:
    run = shlex.quote(str(result["run"]))
    use = (
        f"dl7 classify --run {run} IMAGE"
        if result["task"] == "classification"
        else f'dl7 translate --run {run} --beam 5 "…"'
    )
    return f"next: dl7 plot curves {run}\n      {use}"
