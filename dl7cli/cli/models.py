"""`dl7 models`: the published architectures and those of the shipped recipes."""

from typing import TYPE_CHECKING, Any

from dl7cli.cli import console, options

if TYPE_CHECKING:
    from dl7cli.recipe import Recipe

_CLASSES = 10
_IMAGE_SIZE = {"cifar": 32, "imagenet": 224}


def models(as_json: options.Json = False) -> None:
    """List architectures with their size: those of the shipped recipes and the published ones.

    Parameters, depth, and multiply-adds for one image, with ten classes and images of 32x32 (224x224 where
    the stem is ImageNet's), or with the vocabulary of the recipe. KEYS, of a residual network, are what
    makes it from dl7 train resnet, as --set model.KEY=VALUE; of any other, what its recipe changes.
    """
    from dl7cli import recipe as recipes
    from dl7cli.models.architectures import ARCHITECTURES

    listed = [_of_recipe(recipes.resolve(name).recipe) for name in recipes.shipped()]
    listed += [_of_options(name, keys) for name, keys in ARCHITECTURES.items()]
    if as_json:
        console.document({"models": listed})
        return
    console.table(
        ("MODEL", "RECIPE", "PARAMETERS", "DEPTH", "MULTIPLY-ADDS", "KEYS"),
        [
            (
                model["model"],
                model["recipe"] or "",
                f"{model['parameters']:,}",
                model["depth"] or "-",
                f"{model['multiply_adds']:,}" if model["multiply_adds"] else "-",
                " ".join(f"{key}={_text(value)}" for key, value in model["keys"].items()),
            )
            for model in listed
        ],
    )


def _of_recipe(recipe: "Recipe") -> dict[str, Any]:
    from torch import nn

    from dl7cli.models.architectures import multiply_adds
    from dl7cli.models.outline import outline
    from dl7cli.recipe import ClassificationRecipe, ResNetModel
    from dl7cli.tasks.classification import classifier
    from dl7cli.tasks.translation import translator

    keys = recipe.model.model_dump(exclude={"kind"}, exclude_defaults=True)
    if isinstance(recipe, ClassificationRecipe):
        if isinstance(recipe.model, ResNetModel):
            return _of_options(recipe.model.kind, {"depth": recipe.model.depth, **keys}, recipe.name)
        with outline():
            model: nn.Module = classifier(recipe.model, _CLASSES)
            operations: int | None = multiply_adds(model, _IMAGE_SIZE["cifar"])
    else:
        with outline():
            model = translator(recipe.model, recipe.data.vocabulary_size, recipe.data.vocabulary_size)
        operations = None
    return {
        "model": recipe.model.kind,
        "recipe": recipe.name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "depth": None,
        "multiply_adds": operations,
        "keys": keys,
    }


def _of_options(name: str, keys: dict[str, Any], recipe: str | None = None) -> dict[str, Any]:
    from dl7cli.models.architectures import cost

    parameters, operations = cost(keys, classes=_CLASSES, image_size=_IMAGE_SIZE[keys.get("stem", "cifar")])
    return {
        "model": name,
        "recipe": recipe,
        "parameters": parameters,
        "depth": keys["depth"],
        "multiply_adds": operations,
        "keys": keys,
    }


def _text(value: Any) -> str:
    """A key's value as `--set` reads it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
