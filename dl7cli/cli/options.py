"""The flags that mean the same on every command. A flag says where and how to run, never what is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]

Device = Annotated[
    str,
    typer.Option("--device", metavar="DEVICE", help="Where to run: auto, cpu, cuda, cuda:N or mps."),
]
Gpus = Annotated[
    str | None,
    typer.Option("--gpus", metavar="N", help="Which GPU to use: its number, as in --device cuda:N."),
]
GpusOfWorkers = Annotated[
    str | None,
    typer.Option("--gpus", metavar="N,N|all", help="Which GPUs to use: numbers such as 0,1, or all; a worker on each."),
]
Precision = Annotated[
    PrecisionName,
    typer.Option("--precision", help="Arithmetic; auto is bf16 where the hardware has it, else fp32."),
]
PrecisionOfSearch = Annotated[
    PrecisionName,
    typer.Option("--precision", help="Arithmetic; auto is fp32, in which near ties do not depend on the batch."),
]
PrecisionOfScores = Annotated[
    PrecisionName,
    typer.Option(
        "--precision",
        help="Arithmetic; auto is fp32 for translators and what was trained so, else bf16 where the hardware has it.",
    ),
]
Offline = Annotated[
    bool,
    typer.Option("--offline", help="Open no connection: use what is on disk."),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print exactly one JSON object on standard output."),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SOURCE",
        help="Data to use instead: a folder, a file, a hub id, builtin:shapes or builtin:phrases.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; may be given several times."),
]
DecodingSet = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change how the run searches, such as decoding.min_length=5 (dl7 recipes show seq2seq lists the keys); "
        "may be given several times.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help="Seed of weights, order, augmentation and dropout."),
]
SeedOfSample = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", min=0, max=2**31 - 1, help="Seed of --sample."),
]
RunOption = Annotated[
    str | None,
    typer.Option(
        "--run", metavar="RUN", help="A run folder or a checkpoint in it; the newest that fits, if not given."
    ),
]
RunsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--run",
        metavar="RUN",
        help="A run folder or a checkpoint in it; the newest that fits, if not given. Several: an ensemble.",
    ),
]
RunArgument = Annotated[
    str | None,
    typer.Argument(metavar="RUN", help="A run folder or a checkpoint in it; the newest if not given."),
]
Input = Annotated[
    Path | None,
    typer.Option("--input", metavar="FILE", help="Read lines from this file, not from standard input."),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", metavar="FILE", help="Write to this file; it appears when all is done."),
]
Beam = Annotated[
    int | None,
    typer.Option("--beam", metavar="N", min=1, max=100, help="Beam width; the recipe's if not given."),
]
LengthPenalty = Annotated[
    float | None,
    typer.Option(
        "--length-penalty",
        metavar="X",
        min=0,
        max=5,
        help="Length penalty: 0 is none, more gives longer output; the recipe's if not given.",
    ),
]


def together(names: Sequence[str]) -> list[list[str]]:
    """Return the names of runs in arguments such as `A1,A2,A3`, those of each that are taken together."""
    groups = [name.split(",") for name in names]
    if not all(name for group in groups for name in group):
        raise typer.BadParameter("there is a comma with no run before or after it")
    return groups
