"""Small trainings that cannot fail to learn where everything works, whatever the seed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dl7cli import tasks
from dl7cli.checkpoint import Progress
from dl7cli.device import Runtime, choose
from dl7cli.recipe import resolve
from dl7cli.tasks import Task
from dl7cli.tasks.translation import Translation
from dl7cli.training.loop import Trainer, fit

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")


def trained(recipe: Path, *overrides: str, runtime: Runtime = CPU) -> Task:
    task = tasks.build(resolve(str(recipe), overrides).recipe, runtime=runtime)
    for _ in fit(task, Trainer.of(task), start=Progress()):
        pass
    return task


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A recipe for 64 images of noise in four classes: there is nothing to learn but the images themselves."""
    random = np.random.default_rng(5)
    for split, count in (("train", 64), ("validation", 4)):
        for number in range(count):
            file = tmp_path / "images" / split / f"class {number % 4}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(file)
    recipe = tmp_path / "noise.toml"
    recipe.write_text(f"""
        data = {{ source = '{tmp_path / "images"}', crop_padding = 0, flip = "none" }}
        model = {{ kind = "resnet", depth = 8 }}
        training = {{ epochs = 30, batch_size = 16 }}
        optim = {{ name = "sgd", learning_rate = 0.1 }}
    """)
    return recipe


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A recipe for 64 lines of digits and the same backwards."""
    random = np.random.default_rng(6)
    (tmp_path / "pairs").mkdir()
    for split, count in (("train", 64), ("validation", 1)):
        lines = [" ".join(map(str, random.integers(0, 10, random.integers(4, 9)))) for _ in range(count)]
        (tmp_path / "pairs" / f"{split}.en").write_text("".join(f"{line}\n" for line in lines))
        (tmp_path / "pairs" / f"{split}.de").write_text("".join(f"{line[::-1]}\n" for line in lines))
    recipe = tmp_path / "backwards.toml"
    recipe.write_text(f"""
        data = {{ source = '{tmp_path / "pairs"}', vocabulary_size = 32 }}
        model = {{ kind = "seq2seq", embedding_width = 32, encoder_width = 32, decoder_width = 64, dropout = 0.0 }}
        training = {{ epochs = 60, batch_tokens = 160 }}
        optim = {{ name = "adamw", learning_rate = 0.01, clip_norm = 1.0 }}
    """)
    return recipe


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.bf16)])
def test_a_residual_network_learns_images_by_heart(images: Path, precision: str) -> None:
    task = trained(images, runtime=Runtime(CPU.device, precision, "cpu", "as asked"))
    assert task.evaluate("train").score > 0.95


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.bf16)])
def test_a_translator_learns_lines_by_heart(pairs: Path, precision: str) -> None:
    task = trained(pairs, runtime=Runtime(CPU.device, precision, "cpu", "as asked"))
    assert isinstance(task, Translation)
    known = task.pairs.splits["train"]
    found = task.translate([source for source, _ in known], task.recipe.decoding.updated(beam=3))
    right = sum(line.text == target for line, (_, target) in zip(found, known, strict=True))
    assert right / len(known) > 0.9
    assert task.evaluate("train", task.recipe.decoding.updated(beam=3)).score > 90


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("resnet", 0.95), ("seq2seq", 85.0)])
def test_the_default_recipe_learns_the_built_in_set(name: str, least: float) -> None:
    """What `make demo` trains: accuracy above 95 %, BLEU above 85, on test sentences that training has not seen."""
    fallback = resolve(name).fallback
    assert fallback is not None
    task = tasks.build(fallback(), runtime=choose())
    for _ in fit(task, Trainer.of(task), start=Progress()):
        pass
    assert task.evaluate("test").score > least
