"""`dl7 classify`: what image files show."""

from pathlib import Path
from typing import Annotated

import typer

from dl7cli.cli import console, options


def classify(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files.")],
    run: options.RunOption = None,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Classes to print for each image.")] = 3,
    device: options.Device = "auto",
    gpus: options.Gpus = None,
    precision: options.PrecisionOfScores = "auto",
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Print the likeliest classes of image files.

    One line for each class, best first: file, class and probability with tabs between them.
    """
    from dl7cli import device as devices
    from dl7cli import runs, tasks
    from dl7cli.tasks.classification import Classification

    found, folder = runs.find(run, task="classification")
    runtime = devices.choose(device, runs.scoring_precision(precision, [str(found.folder)]), gpus)
    task = tasks.load(folder, runtime=runtime, offline=offline, task="classification")
    assert isinstance(task, Classification)
    answers = task.classify(images, top)
    if as_json:
        listed = [
            {"file": str(image), "classes": [{"class": name, "probability": p} for name, p in classes]}
            for image, classes in zip(images, answers, strict=True)
        ]
        console.document({"run": str(found.folder), "images": listed})
        return
    if run is None:
        console.note(f"by {runs.called(found, folder)}")
    for image, classes in zip(images, answers, strict=True):
        for name, probability in classes:
            console.row(image, name, f"{probability:.4f}")
