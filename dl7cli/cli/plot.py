"""`dl7 plot`: figures, written to files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dl7cli.cli import figures, options
from dl7cli.errors import UserError, suggestion

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
            told = f"there is no activation `{name}`{suggestion(name, NAMES)}"
            raise UserError(told, hint=f"there are {', '.join(NAMES)}")
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


@app.command(epilog="Example: dl7 plot curves runs/resnet-1,runs/resnet-2 runs/resnet-3")
def curves(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="Runs to draw, such as runs/resnet-1; the newest if not given. Of several of one recipe with commas "
            "between them the mean is drawn, and a band from the least to the greatest, where all have come to.",
        ),
    ] = None,
    output: Output = Path("curves.png"),
) -> None:
    """Draw how runs have learnt: training loss by step, score on validation by epoch.

    Beside the training loss stands that of a classifier on validation, without label smoothing, augmentation
    and dropout. The runs must be chosen by the same score.
    """
    figures.refuse_unwritable(output)
    from dl7cli import recipe as recipes
    from dl7cli import runs

    groups = options.together(names) if names else [[None]]
    found = list(dict.fromkeys(tuple(dict.fromkeys(runs.find(name)[0] for name in group)) for group in groups))
    every = list(dict.fromkeys(run for group in found for run in group))
    apart = len({run.name for run in every}) == len(every)
    shared = os.path.commonpath([run.folder.resolve() for run in every])
    labels = {run: run.name if apart else os.path.relpath(run.folder.resolve(), shared) for run in every}
    records = {run: runs.metrics(run) for run in every}
    scores: dict[str, str] = {}
    for run in every:
        if (score := _score(records[run])) is not None:
            scores.setdefault(score, labels[run])
    if len(scores) > 1:
        (one, first), (other, second) = list(scores.items())[:2]
        raise UserError(f"`{first}` is chosen by {one} and `{second}` by {other}", hint="draw them one by one")
    courses = []
    for group in found:
        trained, *others = (runs.read_recipe(run) for run in group)
        for run, own in zip(group[1:], others, strict=True):
            if not recipes.alike(trained, own):
                told = f"`{labels[group[0]]}` and `{labels[run]}` differ in more than their seeds"
                raise UserError(told, hint="draw them apart: with a space for the comma")
        name = labels[group[0]] + (f" … ({len(group)} runs)" if others else "")
        courses.append(_course([records[run] for run in group], name, trained.data.source))
    figure, notes = figures.learning_curves(courses, next(iter(scores), "score"), suffix=output.suffix)
    figures.save(figure, output, notes)


def _score(records: Sequence[dict[str, Any]]) -> str | None:
    """What the best epoch of a run is chosen by."""
    from dl7cli import runs

    closed = runs.closed(records)
    return closed[-1]["primary"] if closed else None


def _course(members: Sequence[Sequence[dict[str, Any]]], name: str, data: str) -> figures.Course:
    """What the records of runs say together; a loss that is missing, as of steps that were left out, is passed over."""

    def losses(key: str) -> figures.Curve:
        found: list[dict[int, float]] = [{} for _ in members]
        for records, points in zip(members, found, strict=True):
            for one in records:
                if isinstance(one.get(key), int | float):
                    # Of two at one step the first is the mean since the record before.
                    points.setdefault(one.get("step", 0), one[key])
        return _together(found)

    from dl7cli import runs

    closed = [runs.closed(records) for records in members]
    return figures.Course(
        name,
        data,
        losses("loss"),
        losses("negative_log_likelihood"),
        next((score for score in map(_score, members) if score is not None), None),
        _together([{one.get("epoch", 0): one["scores"][one["primary"]] for one in records} for records in closed]),
    )


def _together(series: Sequence[dict[int, float]]) -> figures.Curve:
    """The values of all at the places that all have."""
    return [(place, [one[place] for one in series]) for place in series[0] if all(place in one for one in series)]
