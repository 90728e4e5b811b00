"""What the files of a run folder say of the run, in a line."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from dl7cli.errors import UserError
from dl7cli.recipe import Recipe, differences, resolve, shipped
from dl7cli.runs.folder import Run, all_runs, file_time, is_locked, read_recipe, usable
from dl7cli.runs.records import chosen, closed, evaluations, metrics
from dl7cli.runs.records import result as result_of


@dataclass(frozen=True)
class Summary:
    """One line of `dl7 runs list`; None where the run's files do not say."""

    name: str
    recipe: str | None
    task: str | None
    data: str | None
    changed: dict[str, list[Any]] | None
    """Keys in which its recipe differs from that of the same name in this version, with both values; not the data's
    name. None where there is no such recipe.
    """
    state: str
    """`training`; `finished`; `interrupted`: there is a checkpoint to go on from; `empty`: there is none."""
    epochs: int
    """Epochs finished."""
    primary: str | None
    """Which score the next one is, such as `accuracy` (a fraction) or `bleu` (0 to 100)."""
    best: float | None
    """Of the epoch kept, on the validation split."""
    test: float | None
    """On the test split, at the end of training."""
    test_primary: str | None
    """Which score that is: a run may be chosen by another than it is judged by."""
    evaluation: dict[str, Any] | None
    """The newest record of `append_evaluation`."""


def listing() -> list[Summary]:
    """What the files of each run under `runs/` say, the oldest run first; damaged files count as missing."""
    return [_summary(run) for run in sorted(all_runs(), key=lambda run: (file_time(run.recipe_file), run.name))]


@cache
def _shipped(name: str, built_in: bool) -> Recipe | None:
    """The shipped recipe of a name, as it is where the built-in set stands in or not; None where there is none."""
    if name not in shipped():
        return None
    resolved = resolve(name)
    return resolved.fallback() if built_in and resolved.fallback else resolved.recipe


def _changed(recipe: Recipe) -> dict[str, list[Any]] | None:
    own = _shipped(recipe.name, recipe.data.source.startswith("builtin:"))
    if own is None:
        return None
    return {key: both for key, both in differences(own, recipe).items() if key != "data.source"}


def _summary(run: Run) -> Summary:
    try:
        recipe = read_recipe(run)
    except UserError:
        recipe = None
    epochs = closed(_readable(metrics, run))
    result = result_of(run)
    best = chosen(epochs, recipe)
    tested = result if result and result.get("split") == "test" else {}
    return Summary(
        name=run.name,
        recipe=recipe.name if recipe else None,
        task=recipe.task if recipe else None,
        data=recipe.data.source if recipe else None,
        changed=_changed(recipe) if recipe else None,
        state=_state(run, finished=result is not None),
        epochs=max((record.get("epoch", 0) for record in epochs), default=0),
        primary=best["primary"] if best else (result or {}).get("primary"),
        best=best["scores"][best["primary"]] if best else None,
        test=tested.get("scores", {}).get(tested.get("primary")),
        test_primary=tested.get("primary"),
        evaluation=next(reversed(_readable(evaluations, run)), None),
    )


def _readable(read: Callable[[Run], list[dict[str, Any]]], run: Run) -> list[dict[str, Any]]:
    try:
        return read(run)
    except UserError:
        return []


def _state(run: Run, *, finished: bool) -> str:
    if is_locked(run):
        return "training"
    if finished:
        return "finished"
    return "empty" if usable(run) is None else "interrupted"
