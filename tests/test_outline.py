"""Networks without values: the weights they tell of are those of the real ones, and torch's compiler stays away."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ENVIRONMENT
from torch import nn

from dl7cli.models.fast_resnet import FastResNet
from dl7cli.models.outline import outline
from dl7cli.models.resnet import ResNet
from dl7cli.recipe import TranslationRecipe, resolve
from dl7cli.tasks.translation import translator


def of_recipe(name: str) -> Callable[[], nn.Module]:
    recipe = resolve(name).recipe
    assert isinstance(recipe, TranslationRecipe)
    return lambda: translator(recipe.model, 40, 40)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet(8),
    "maxout": lambda: ResNet(8, preactivation=True, activation="maxout", match="parameters"),
    "fast_resnet": lambda: FastResNet(10, (8, 8)),
    **{name: of_recipe(name) for name in ("seq2seq", "seq2seq-sutskever", "convs2s", "transformer-tiny")},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_an_outline_has_the_weights_of_the_network(name: str) -> None:
    def told(network: nn.Module) -> dict[str, Any]:
        return {key: (value.shape, value.dtype) for key, value in network.state_dict().items()}

    with outline():
        empty = NETWORKS[name]()
    assert all(value.is_meta for value in empty.state_dict().values())
    before = torch.get_rng_state()
    assert told(empty) == told(NETWORKS[name]())
    assert not torch.equal(torch.get_rng_state(), before), "afterwards numbers are drawn again"


def test_an_outline_does_not_load_the_compiler() -> None:
    code = (
        "import sys, test_outline as here\n"
        "with here.outline():\n"
        "    [make() for make in here.NETWORKS.values()]\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"
