"""Tasks: a recipe with its data, model, loss and metric."""

from pathlib import Path
from typing import Any

from dl7cli import checkpoint
from dl7cli.checkpoint import Checkpoint
from dl7cli.data.sources import Progress, silent
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.recipe import ClassificationRecipe, ImageData, Recipe, TranslationRecipe
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
) -> Task:
    """The task of a recipe, with a model fresh from the recipe's seed.

    With `assets` (from a checkpoint) no data is read until it is asked for; without, they are derived from the data.
    """
    match recipe:
        case ClassificationRecipe():
            return Classification(recipe, assets, runtime=runtime, offline=offline, progress=progress)
        case TranslationRecipe():
            return Translation(recipe, assets, runtime=runtime, offline=offline, progress=progress)


def load(
    folder: Path,
    *,
    runtime: Runtime,
    offline: bool = False,
    progress: Progress = silent,
    data: str | None = None,
) -> Task:
    """The task of a checkpoint with its trained weights; `data` names another source to evaluate it on.

    Raises UserError for a damaged checkpoint.
    """
    saved = checkpoint.load(folder)
    recipe = saved.recipe
    if recipe.training.ema_decay:
        # `last` has the weights to go on from; what was validated, and is to be used, is their average.
        training = checkpoint.load(folder, training=True).training
        average = {name: value for name, value in training.items() if name.startswith("average.")}
        saved.weights.update({name.removeprefix("average."): value for name, value in average.items()})
    if data is not None:
        # The other source has columns of its own.
        other = {"source": data, **({"image": None, "label": None} if isinstance(recipe.data, ImageData) else {})}
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=other)})
    task = build(recipe, saved.assets, runtime=runtime, offline=offline, progress=progress)
    restore(task, saved)
    return task


def restore(task: Task, saved: Checkpoint) -> None:
    """Give the task's model the weights of a checkpoint. Raises UserError where they are those of another model."""
    try:
        task.model.load_state_dict(saved.weights)
    except RuntimeError as error:
        raise UserError(f"the weights of the checkpoint do not fit its recipe: {error}") from None
