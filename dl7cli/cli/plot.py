"""`dl7 plot`: figures, written to files."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dl7cli.cli import figures
from dl7cli.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

app = typer.Typer(no_args_is_help=True, help="Draw figures.")

_RANGE = 5.0

Output = Annotated[
    Path,
    typer.Option("--output", metavar="FILE", help="Where to write the figure: a .png or .svg file."),
]


@app.command(epilog="Example: dl7 plot activations swish su relu --output activations.svg")
def activations(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Activations to draw, such as relu; swish and su if not given."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Draw all activations.")] = False,
    output: Output = Path("activations.png"),
) -> None:
    """Draw activation functions and their derivatives.

    Maxout and GLU are functions of several numbers: Maxout is drawn over x and -x, GLU over x and x, which
    is Swish.
    """
    if every and names:
        raise typer.BadParameter("give names or --all, not both")
    figures.refuse_unwritable(output)
    from dl7cli.models.activations import NAMES

    chosen = list(NAMES) if every else list(dict.fromkeys(names or ("swish", "su")))
    for name in chosen:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            suggestion = f" (did you mean `{near[0]}`?)" if near else ""
            raise UserError(f"there is no activation `{name}`{suggestion}", hint=f"there are {', '.join(NAMES)}")
    figures.save(_drawn(chosen), output)


def curve(name: str, x: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the values and the derivatives of an activation of one number at each of `x`."""
    import torch

    from dl7cli.models.activations import Activation

    activation = Activation(name)  # type: ignore[arg-type]
    points = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    second = -points if name == "maxout" else points
    inputs = torch.stack([points, second][: activation.inputs], dim=1)
    values = activation.module(1).double()(inputs)[:, 0]
    (slopes,) = torch.autograd.grad(values.sum(), points)
    return values.tolist(), slopes.tolist()


def _drawn(names: Sequence[str]) -> "Figure":
    """The functions side by side with their derivatives."""
    # Without pyplot, which would look for a screen and keep every figure.
    from matplotlib.figure import Figure

    # An even number of points: 0, where several functions have a kink and no derivative, is none of them.
    x = [_RANGE * (2 * point / 799 - 1) for point in range(800)]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    values, slopes = figure.subplots(1, 2)
    for number, name in enumerate(names):
        for axes, y in zip((values, slopes), curve(name, x), strict=True):
            axes.plot(x, y, figures.style(number), color=f"C{number % figures.COLOURS}", label=name)
    for axes, title in ((values, "f(x)"), (slopes, "f′(x)")):
        axes.set(title=title, xlabel="x", xlim=(-_RANGE, _RANGE))
        axes.grid(alpha=0.3)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.axvline(0, color="black", linewidth=0.6)
    # Beside the curves, so that it covers none of them.
    figure.legend(*values.get_legend_handles_labels(), loc="outside right center")
    return figure


@app.command(epilog="Example: dl7 plot curves runs/resnet-1 runs/resnet-2 --output curves.svg")
def curves(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN", help="Runs to draw, such as runs/resnet-1; the newest if not given."),
    ] = None,
    output: Output = Path("curves.png"),
) -> None:
    """Draw how runs have learnt: training loss by step, score on validation by epoch.

    Beside the training loss stands that of a classifier on validation, without label smoothing, augmentation
    and dropout. The runs must be chosen by the same score.
    """
    figures.refuse_unwritable(output)
    from dl7cli import runs

    found = list(dict.fromkeys(runs.find(name)[0] for name in names or (None,)))
    apart = len({run.name for run in found}) == len(found)
    shared = os.path.commonpath([run.folder.resolve() for run in found])
    labels = [run.name if apart else os.path.relpath(run.folder.resolve(), shared) for run in found]
    courses = [
        _course(runs.metrics(run), label, runs.read_recipe(run).data.source)
        for run, label in zip(found, labels, strict=True)
    ]
    scores = {course.score: course.name for course in courses if course.score is not None}
    if len(scores) > 1:
        (one, first), (other, second) = list(scores.items())[:2]
        raise UserError(f"`{first}` is chosen by {one} and `{second}` by {other}", hint="draw them one by one")
    figure, notes = figures.learning_curves(courses, next(iter(scores), "score"), suffix=output.suffix)
    figures.save(figure, output, notes)


def _course(records: Sequence[dict[str, Any]], name: str, data: str) -> figures.Course:
    """What the records of a run say; a loss that is missing, as of steps that were left out, is passed over."""
    closed = [record for record in records if record.get("primary") is not None]
    losses, validation = (
        [(record.get("step", 0), record[key]) for record in records if isinstance(record.get(key), int | float)]
        for key in ("loss", "negative_log_likelihood")
    )
    return figures.Course(
        name,
        data,
        losses,
        validation,
        closed[-1]["primary"] if closed else None,
        [(record.get("epoch", 0), record["scores"][record["primary"]]) for record in closed],
    )
