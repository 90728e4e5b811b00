"""Tasks: a recipe with its data, model, loss and metric."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dl7cli import checkpoint
from dl7cli.checkpoint import Checkpoint
from dl7cli.data.sources import Progress, silent
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.recipe import ClassificationRecipe, Recipe, TranslationRecipe
from dl7cli.tasks.checking import refuse_other_weights
from dl7cli.tasks.classification import Classification
from dl7cli.tasks.translation import Translation

Task = Classification | Translation


def build(
    recipe: Recipe,
    assets: dict[str, Any] | None = None,
    *,
    runtime: Runtime,
    offline: bool = False,
    progress: Progress = silent,
    weights: Mapping[str, Tensor] | None = None,
    for_training: bool = True,
) -> Task:
    """The task of a recipe, with a model of these `weights` or, without any, fresh from the recipe's seed.

    With `assets` (from a checkpoint) no data is read until it is asked for; without, they are derived from the data,
    which has a train split unless it is not `for_training`.
    Raises UserError, before the model is made, for assets of another kind of task, for `weights` of another model, and,
    where none are given, for a model larger than the memory.
    """
    options: dict[str, Any] = {
        "runtime": runtime,
        "offline": offline,
        "progress": progress,
        "weights": weights,
        "for_training": for_training,
    }
    match recipe:
        case ClassificationRecipe():
            return Classification(recipe, assets, **options)
        case TranslationRecipe():
            return Translation(recipe, assets, **options)


def load(
    folder: Path,
    *,
    runtime: Runtime,
    offline: bool = False,
    progress: Progress = silent,
    data: str | None = None,
    task: str | None = None,
) -> Task:
    """The task of a checkpoint with its trained weights; `data` names another source to evaluate it on, of any splits.

    Raises UserError for a damaged checkpoint, and for one that is not for `task`, `classification` or `translation`,
    where that is given: a checkpoint alone, out of its run, tells only when it is read.
    """
    saved = trained(folder)
    recipe = saved.recipe
    if task not in (None, recipe.task):
        raise UserError(f"checkpoint `{folder}` is for {recipe.task}, not for {task}")
    if data is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": data})})
    return build(
        recipe,
        saved.assets,
        runtime=runtime,
        offline=offline,
        progress=progress,
        weights=saved.weights,
        for_training=data is None,
    )


def trained(folder: Path) -> Checkpoint:
    """A checkpoint with the weights that are to be used. Raises UserError as `checkpoint.load`."""
    saved = checkpoint.load(folder)
    if saved.recipe.training.ema_decay:
        # `last` has the weights to go on from; what was validated, and is to be used, is their average.
        training = checkpoint.load(folder, training=True).training
        average = {name: value for name, value in training.items() if name.startswith("average.")}
        saved.weights.update({name.removeprefix("average."): value for name, value in average.items()})
    return saved


def restore(task: Task, saved: Checkpoint) -> None:
    """Give the task's model the weights of a checkpoint. Raises UserError where they are those of another model."""
    refuse_other_weights(task.model.state_dict(), saved.weights)
    task.model.load_state_dict(saved.weights)
