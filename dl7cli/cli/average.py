"""`dl7 average`: one checkpoint out of those of the last epochs."""

import shlex
from typing import Annotated

import typer

from dl7cli.cli import console, options


def average(
    run: options.RunArgument = None,
    last: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="How many of the last epochs to average; all that are kept if not given."
        ),
    ] = None,
    device: options.Device = "auto",
    gpus: options.Gpus = None,
    precision: options.PrecisionOfScores = "auto",
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Average the weights of the last epochs into the checkpoint average of the run.

    The recipe has to keep them: --set training.keep_last=5. The average is validated, which shows whether
    it is better than the best epoch; dl7 eval RUN/average and dl7 translate --run RUN/average use it.
    """
    from dl7cli import device as devices
    from dl7cli import runs, training

    runtime = devices.choose(device, runs.scoring_precision(precision, [run]), gpus, searches=True)
    with console.display() as display:
        result = training.average(
            run,
            last=last,
            runtime=runtime,
            offline=offline,
            progress=display.progress,
            note=lambda text: display.note(f"note: {text}"),
        )
    if as_json:
        console.document(result)
        return
    primary, best = result["primary"], result["best"]
    chosen = best["scores"].get(primary)  # an earlier dl7 may have chosen by another score
    epochs = ", ".join(map(str, result["epochs"]))
    console.table(
        ("CHECKPOINT", "EPOCHS", "VALIDATION", "DATA"),
        [
            (result["checkpoint"], epochs, console.score(primary, result["scores"][primary]), result["data"]),
            (
                best["checkpoint"],
                best["epoch"],
                console.score(primary, chosen) if chosen is not None else "-",
                result["data"],
            ),
        ],
    )
    console.note(f"next: dl7 eval {shlex.quote(result['checkpoint'])}")
