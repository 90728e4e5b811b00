"""`dl7 eval`: the score of a finished run."""

from typing import Annotated, Any, Literal

import typer

from dl7cli.cli import console, options


def evaluate(
    run: options.RunArgument = None,
    split: Annotated[
        Literal["train", "validation", "test"],
        typer.Option(help="Part of the data to read."),
    ] = "test",
    data: options.Data = None,
    beam: options.Beam = None,
    length_penalty: options.LengthPenalty = None,
    device: options.Device = "auto",
    gpus: options.Gpus = None,
    precision: options.Precision = "auto",
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Print the accuracy or BLEU of a finished run.

    Each reading is noted in the run's evaluations.jsonl; dl7 runs show counts them.
    """
    from dl7cli import device as devices
    from dl7cli import training

    runtime = devices.choose(device, precision, gpus)
    with console.display() as display:
        result = training.evaluate(
            run,
            split=split,
            data=data,
            beam=beam,
            length_penalty=length_penalty,
            runtime=runtime,
            offline=offline,
            progress=display.progress,
        )
    print_result(result, as_json)


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """Print the score with the split and the data it came from; BLEU with its signature."""
    if as_json:
        console.document(result)
        return
    score = console.score(result["primary"], result["scores"][result["primary"]])
    noun = "image" if result["task"] == "classification" else "sentence pair"
    console.write(
        f"{score} on the {result['split']} split of {result['data']}"
        f" ({console.count(result['examples'], noun)}, {console.duration(result['seconds'])})"
    )
    if result["signature"] is not None:
        console.write(f"signature {result['signature']}")
