"""Small checkpoints, and whether two are the same."""

import torch

from dl7cli.checkpoint import Checkpoint, Progress
from dl7cli.recipe import resolve

FILES = ("checkpoint.json", "model.safetensors", "training.safetensors")


def example(fill: int = 1) -> Checkpoint:
    """A small checkpoint that `fill` tells from others in every part."""
    generator = torch.Generator().manual_seed(fill)
    return Checkpoint(
        recipe=resolve("resnet").recipe,
        assets={"classes": ["Käfer", "ship"], "mean": [0.5, fill], "nested": {"none": None, "yes": True}},
        weights={"weight": torch.full((3, 4), float(fill)), "bias": torch.rand(5, generator=generator)},
        training={"momentum": torch.full((7,), float(-fill)), "random": generator.get_state()},
        progress=Progress(epoch=2, batch=fill, step=70, seconds=1.5, best=0.25, best_epoch=1),
        scores={"accuracy": fill / 1000},
    )


def assert_same(actual: Checkpoint, expected: Checkpoint) -> None:
    assert actual.recipe == expected.recipe
    assert (actual.assets, actual.scores) == (expected.assets, expected.scores)
    assert actual.progress == expected.progress
    for ours, theirs in ((actual.weights, expected.weights), (actual.training, expected.training)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            assert torch.equal(ours[name], theirs[name]), name
