"""A training that begins with the weights of another one, as to go on with other data or for more epochs."""

from typing import Any, NamedTuple

from dl7cli import runs, tasks
from dl7cli.checkpoint import Checkpoint
from dl7cli.errors import UserError
from dl7cli.recipe import Recipe, TranslationRecipe
from dl7cli.tasks import Task
from dl7cli.tasks.checking import refuse_other_weights

_READ_ALIKE = ("vocabulary", "vocabulary_size", "joint", "lowercase", "source_order")
"""Keys of `data` by which a translator reads text as ids."""
_LAST_LAYER = "classifier."
"""Of a classifier: one row of weights for each class."""


class Given(NamedTuple):
    """What a run gives to another that begins with its weights."""

    name: str
    folder: str
    saved: Checkpoint

    @classmethod
    def of(cls, run: str) -> "Given":
        """By the epoch that a run kept as `best`, or the checkpoint named. Raises UserError where there is no such."""
        found, folder = runs.find(run)
        return cls(runs.called(found, folder), str(found.folder), tasks.trained(folder))

    def assets(self, recipe: Recipe) -> dict[str, Any] | None:
        """What a task of the recipe has to take over, as its weights are of these: a translator's vocabularies.

        Raises UserError where the recipe is for another task or reads text in another way.
        """
        own = self.saved.recipe
        if own.task != recipe.task:
            raise UserError(
                f"`{self.name}` is for {own.task}, and recipe `{recipe.name}` for {recipe.task}", self._hint()
            )
        if not isinstance(recipe, TranslationRecipe):
            return None
        for key in _READ_ALIKE:
            before, now = getattr(own.data, key), getattr(recipe.data, key)
            if before != now:
                raise UserError(f"`data.{key}` of `{self.name}` is `{before}`, and of the recipe `{now}`", self._hint())
        words = {
            name: value for name, value in self.saved.assets.items() if name in ("vocabulary", "target_vocabulary")
        }
        languages = {name: getattr(recipe.data, name) for name in ("source_language", "target_language")}
        return {**words, **languages}

    def give(self, task: Task) -> str:
        """Give the task's model the weights; tells what was done.

        A classifier for other classes keeps its own last layer, as drawn by the seed. Raises UserError where the model
        is another one.
        """
        own, weights = task.model.state_dict(), dict(self.saved.weights)
        fresh = task.assets.get("classes") != self.saved.assets.get("classes")
        if fresh:
            weights |= {name: value for name, value in own.items() if name.startswith(_LAST_LAYER)}
        for name in sorted({*own, *weights}):
            if name not in own or name not in weights or own[name].shape != weights[name].shape:
                raise UserError(
                    f"the model of `{self.name}` is another one than the recipe's: see `{name}`", self._hint()
                )
        refuse_other_weights(own, weights)
        task.model.load_state_dict(weights)
        told = f"the first weights are those of {self.name}"
        if fresh:
            told += ", but for the last layer: other classes"
        same = task.data_name == self.saved.recipe.data.source
        if same and task.carved and task.digest != self.saved.assets.get("data_digest"):
            told += "; they have learnt from a part of what is kept for validation now, perhaps"
        return told

    def _hint(self) -> str:
        return f"`dl7 train {self.folder}/recipe.toml --init {self.name}` has the same model and vocabulary"
