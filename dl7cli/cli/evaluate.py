"""`dl7 eval`: the score of a finished run."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dl7cli.cli import console, figures, options

MOST_CLASSES = 20
WORST_CLASSES = 10


def evaluate(
    run: options.RunArgument = None,
    split: Annotated[
        Literal["train", "validation", "test"],
        typer.Option(help="Part of the data to read."),
    ] = "test",
    data: options.Data = None,
    beam: options.Beam = None,
    length_penalty: options.LengthPenalty = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw a classifier's confusion matrix to a .png or .svg file."),
    ] = None,
    device: options.Device = "auto",
    gpus: options.Gpus = None,
    precision: options.Precision = "auto",
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Print the accuracy or BLEU of a finished run, and how a classifier does on each class.

    Each reading is noted in the run's evaluations.jsonl; dl7 runs show counts them.
    """
    from dl7cli import device as devices
    from dl7cli import training

    if plot is not None:
        figures.refuse_unwritable(plot)
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
            note=lambda text: display.note(f"note: {text}"),
            confusion=plot is not None,
        )
    print_result(result, as_json)
    if plot is not None:
        _draw(plot, result)


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """Print the score with the split and the data it came from; BLEU with its signature, accuracy with its details."""
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
    if result["details"]:
        _print_details(result["scores"], result["details"])


def _print_details(scores: dict[str, float], details: dict[str, Any]) -> None:
    low, high = details["accuracy_interval"]
    console.write(f"95 % interval {low:.4f} to {high:.4f} (Wilson)")
    views = (2 if details["flip"] else 1) * (3 if details["shift"] else 1)
    if views > 1:
        console.write(f"scores are the mean of {views} views of each image (evaluation.flip, evaluation.shift)")
    parts = [f"top-5 accuracy {scores['top_5_accuracy']:.4f}"] if "top_5_accuracy" in scores else []
    parts.append(f"negative log-likelihood {_number(details['negative_log_likelihood'])}")
    parts.append(f"expected calibration error {_number(details['expected_calibration_error'])} (15 bins)")
    console.write(", ".join(parts))
    console.write("")
    rows = [
        (entry["class"], entry["examples"], _number(entry["accuracy"]), _taken_for(number, details))
        for number, entry in enumerate(details["classes"])
    ]
    if len(rows) > MOST_CLASSES:
        seen = [number for number, entry in enumerate(details["classes"]) if entry["examples"]]
        worst = sorted(seen, key=lambda number: float(details["classes"][number]["accuracy"]))[:WORST_CLASSES]
        console.write(f"the worst {len(worst)} of {len(rows)} classes:")
        rows = [rows[number] for number in worst]
    console.table(("CLASS", "IMAGES", "ACCURACY", "MOST OFTEN TAKEN FOR"), rows)


def _taken_for(number: int, details: dict[str, Any]) -> str:
    """Return the wrong class that most images of a class were given, with their number; empty where there is none."""
    counts = [0 if other == number else count for other, count in enumerate(details["confusion"][number])]
    most = max(counts)
    return f"{details['classes'][counts.index(most)]['class']} ({most:,})" if most else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _draw(plot: Path, result: dict[str, Any]) -> None:
    details = result["details"]
    names = [entry["class"] for entry in details["classes"]]
    accuracy = result["scores"]["accuracy"]
    title = f"{result['run']}: accuracy {accuracy:.4f} on the {result['split']} split of {result['data']}"
    figure, notes = figures.confusion_matrix(details["confusion"], names, title, suffix=plot.suffix)
    figures.save(figure, plot)
    for note in notes:
        console.note(f"note: {note}")
    console.note(f"drawn: {plot}")
