"""The network for few epochs: its whitening, its shapes, its beginning as identity, and the keys made for it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dl7cli import tasks
from dl7cli.data import augmentation
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.models.fast_resnet import FastResNet, smallest_image
from dl7cli.recipe import resolve
from dl7cli.tasks.classification import Classification

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")


def test_parameters_are_those_counted_by_hand() -> None:
    model = FastResNet(10)
    stages = sum(9 * (one * two + two * two) + 2 * 2 * two for one, two in ((24, 64), (64, 256), (256, 256)))
    assert sum(value.numel() for value in model.parameters()) == 24 * 12 + 24 + stages + 10 * 256
    learned = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert learned == 24 + stages - 2 * (64 + 256 + 256) + 10 * 256, "neither whitening nor scales are learned"


def test_the_classifier_learns_as_jordan_has_it() -> None:
    """Scores W·x / C, W of unit variance, and a rate for W of 0.67 where the shifts have 0.053."""
    model = FastResNet(10, (8, 16)).double()
    assert FastResNet(1000, (8, 1000)).classifier.weight.std().item() == pytest.approx(0.281, abs=0.001)
    features: list[torch.Tensor] = []
    model.stages.register_forward_hook(lambda _, __, x: features.append(x.detach().amax(dim=(2, 3))))
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    model.eval()
    scores = model(images)
    weight = (model.classifier.weight.detach() * (0.67 / 0.053) ** 0.5).requires_grad_()
    expected = features[0] @ weight.T / 16
    assert torch.allclose(scores, expected)
    wanted = torch.randn_like(scores)
    (scores * wanted).sum().backward()
    (expected * wanted).sum().backward()
    with torch.no_grad():
        assert weight.grad is not None
        model.classifier.weight -= 0.053 * model.classifier.weight.grad
        assert torch.allclose(model(images), features[0] @ (weight - 0.67 * weight.grad).T / 16)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 24), (17, 33)])
def test_images_of_any_size_get_scores(height: int, width: int) -> None:
    assert FastResNet(7, (8, 16)).eval()(torch.randn(2, 3, height, width)).shape == (2, 7)


def test_the_first_layer_whitens() -> None:
    draws = torch.Generator().manual_seed(1)
    rough = torch.randn(300, 3, 12, 12, generator=draws)
    smooth = torch.nn.functional.avg_pool2d(rough, 3, stride=1) * torch.tensor([10.0, 20.0, 5.0])[:, None, None]
    model = FastResNet(10)
    model.whiten(smooth)
    outputs = model.whitening(smooth).detach().double().permute(1, 0, 2, 3).reshape(24, -1)
    covariance = (outputs @ outputs.T / outputs.shape[1]).numpy()
    identity = np.eye(12)
    expected = np.block([[identity, -identity], [-identity, identity]])
    assert np.abs(covariance - expected).max() < 0.02


def test_at_first_a_convolution_hands_its_channels_on() -> None:
    stage = FastResNet(10).stages[1]
    x = torch.randn(2, 64, 6, 6)
    assert torch.allclose(stage.convolution1(x)[:, :64], x, atol=1e-6)
    y = torch.randn(2, 256, 6, 6)
    assert torch.allclose(stage.convolution2(y), y, atol=1e-6)


def fast(tiny: dict[str, Path], tmp_path: Path, *overrides: str) -> Classification:
    """A small network of the kind on the tiny images."""
    text = tiny["resnet"].read_text().replace('kind = "resnet", depth = 8', 'kind = "fast_resnet", widths = [8, 8]')
    path = tmp_path / "fast.toml"
    path.write_text(text)
    task = tasks.build(resolve(str(path), overrides).recipe, runtime=CPU)
    assert isinstance(task, Classification)
    return task


def test_a_task_whitens_with_its_images(tiny: dict[str, Path], tmp_path: Path) -> None:
    task = fast(tiny, tmp_path)
    images = torch.from_numpy(np.array(task.images.splits["train"].images))
    expected = FastResNet(3, (8, 8))
    expected.whiten(task.images.normalise(images))
    assert isinstance(task.model, FastResNet)
    assert torch.allclose(task.model.whitening.weight, expected.whitening.weight, atol=1e-5)


def test_images_are_small_in_the_first_part_of_training(tiny: dict[str, Path], tmp_path: Path) -> None:
    task = fast(tiny, tmp_path, "data.image_size=16", "training.small_size=12", "training.small_part=0.5")
    sizes = [batch.images.shape[2] for epoch in range(3) for batch in task.batches(epoch)]
    half = sum(task.steps(epoch) for epoch in range(3)) / 2
    assert sizes == [12 if step < half else 16 for step in range(len(sizes))]
    whole = fast(tiny, tmp_path, "data.image_size=16")
    shrunk = augmentation.shrink(next(whole.batches(0)).images, 12)
    assert torch.equal(next(task.batches(0)).images, shrunk)


def test_a_smaller_image_is_pillows() -> None:
    images = torch.randn(2, 3, 16, 16)
    for size in (4, 12):
        planes = [Image.fromarray(plane.numpy()) for plane in images.flatten(0, 1)]
        expected = np.array([plane.resize((size, size), Image.Resampling.BILINEAR) for plane in planes])
        shrunk = augmentation.shrink(images, size).flatten(0, 1)
        torch.testing.assert_close(shrunk, torch.from_numpy(expected), atol=1e-4, rtol=0)


def test_scores_are_averaged_over_shifts(tiny: dict[str, Path], tmp_path: Path) -> None:
    shown = torch.randint(256, (4, 8, 8, 3), dtype=torch.uint8)
    task = fast(tiny, tmp_path, "evaluation.shift=2", "evaluation.flip=true")
    images = task.images.normalise(shown).numpy()
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    views = [images, padded[:, :, :8, :8], padded[:, :, 4:, 4:]]
    views += [view[..., ::-1].copy() for view in views]
    weights = [1 / 4, 1 / 8, 1 / 8] * 2
    with torch.inference_mode():
        task.model.eval()
        scores = [task.model(torch.from_numpy(view)).numpy() for view in views]
        expected = sum(weight * one for weight, one in zip(weights, scores, strict=True))
    assert np.abs(task._scorer()(shown).numpy() - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.small_size=17", "`training.small_size` is 17, and the images"),
        ("evaluation.shift=8", "`evaluation.shift` is 8, and the images"),
        ("data.crop_padding=8 data.crop_fill=reflect", "`data.crop_padding` is 8, and the images"),
        ("model.widths=[8,8,8]", "a fast_resnet cannot take images of 8 pixels"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_training(
    change: str, said: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        fast(tiny, tmp_path, *change.split())


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_smallest_image_is_just_large_enough(stages: int) -> None:
    network = FastResNet(2, (4, 4, 4)[:stages]).eval()
    size = smallest_image(stages)
    assert network(torch.zeros(1, 3, size, size)).shape == (1, 2)
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 3, size - 1, size - 1))
