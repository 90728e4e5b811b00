"""`dl7 models`: the architectures of the shipped recipes."""

from typing import TYPE_CHECKING, Any

from dl7cli.cli import console, options

if TYPE_CHECKING:
    from dl7cli.recipe import Recipe

_CLASSES = 10
_IMAGE_SIZE = 32


def models(as_json: options.Json = False) -> None:
    """List the architectures of the shipped recipes with their size.

    Parameters, depth, and multiply-adds for one image, with ten classes and images of 32x32, or with the
    vocabulary of the recipe.
    """
    from dl7cli import recipe as recipes

    listed = [_measured(recipes.resolve(name).recipe) for name in recipes.shipped()]
    if as_json:
        console.document({"models": listed})
        return
    console.table(
        ("RECIPE", "MODEL", "PARAMETERS", "DEPTH", "MULTIPLY-ADDS"),
        [
            (
                model["recipe"],
                model["model"],
                f"{model['parameters']:,}",
                model["depth"] or "-",
                f"{model['multiply_adds']:,}" if model["multiply_adds"] else "-",
            )
            for model in listed
        ],
    )


def _measured(recipe: "Recipe") -> dict[str, Any]:
    from torch import nn

    from dl7cli.models.fast_resnet import FastResNet
    from dl7cli.models.resnet import ResNet, multiply_adds
    from dl7cli.models.seq2seq import Seq2Seq
    from dl7cli.recipe import ClassificationRecipe, ResNetModel

    model: nn.Module
    depth = operations = None
    if isinstance(recipe, ClassificationRecipe):
        if isinstance(recipe.model, ResNetModel):
            depth = recipe.model.depth
            model = ResNet(depth, classes=_CLASSES)
        else:
            model = FastResNet(_CLASSES, recipe.model.widths)
        operations = multiply_adds(model, _IMAGE_SIZE)
    else:
        sizes = recipe.model.model_dump(exclude={"kind"})
        model = Seq2Seq(recipe.data.vocabulary_size, pad=0, **sizes)
    return {
        "recipe": recipe.name,
        "model": recipe.model.kind,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "depth": depth,
        "multiply_adds": operations,
    }
