"""The task of classification: batches, losses, scores and classes against slow answers, one image at a time."""

import copy
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dl7cli import checkpoint, tasks
from dl7cli.checkpoint import Checkpoint, Progress
from dl7cli.data import augmentation
from dl7cli.data.images import read_images
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.recipe import resolve
from dl7cli.tasks import classification
from dl7cli.tasks.classification import Classification

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")


def test_every_image_is_used_once_an_epoch(build: Callable[..., Any], tiny: dict[str, Path]) -> None:
    task = build("resnet", "data.crop_padding=0", "data.flip=none")
    mean, deviation = np.array(task.assets["mean"]), np.array(task.assets["deviation"])
    files = (tiny["resnet"].parent / "images" / "train").rglob("*.png")
    wanted = Counter(
        (np.asarray(Image.open(file)).tobytes(), task.assets["classes"].index(file.parent.name)) for file in files
    )
    for epoch in (0, 1):
        seen: Counter[Any] = Counter()
        for batch in task.batches(epoch):
            assert len(batch.images) <= 8
            pixels = (batch.images.permute(0, 2, 3, 1).numpy() * deviation + mean) * 255
            assert np.abs(pixels - pixels.round()).max() < 1e-3
            for image, label in zip(pixels.round().astype(np.uint8), batch.labels.tolist(), strict=True):
                seen[image.tobytes(), label] += 1
        assert seen == wanted


# Changing images


def test_training_batches_are_changed_and_evaluation_is_not(build: Callable[..., Any]) -> None:
    plain = build("resnet", "data.crop_padding=0", "data.flip=none")
    changing = build("resnet")
    pairs = list(zip(plain.batches(0), changing.batches(0), strict=True))
    assert all(torch.equal(one.labels, two.labels) for one, two in pairs)
    assert not any(torch.equal(one.images, two.images) for one, two in pairs)
    assert plain.evaluate("test") == changing.evaluate("test")


def test_images_are_normalised() -> None:
    images = torch.randint(256, (5, 4, 3, 3), dtype=torch.uint8)
    mean, deviation = (0.2, 0.5, 0.7), (0.3, 0.1, 0.25)
    found = augmentation.Normalisation(mean, deviation, torch.device("cpu"))(images)
    expected = (images.numpy().astype(np.float64) / 255 - mean) / deviation
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert np.abs(found.permute(0, 2, 3, 1).numpy() - expected).max() < 1e-5


def test_training_images_have_mean_zero_and_deviation_one(build: Callable[..., Any]) -> None:
    task = build("resnet", "data.crop_padding=0", "data.flip=none")
    images = torch.cat([batch.images for batch in task.batches(0)])
    assert images.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (images.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-4


# Loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_cross_entropy_summed(smoothing: float, build: Callable[..., Any]) -> None:
    task = build("resnet", f"training.label_smoothing={smoothing}")
    batch = next(task.batches(0))
    task.model.eval()
    total, count = task.loss(batch)
    assert count == 8
    expected = 0.0
    for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
        scores = task.model(image[None])[0].double().log_softmax(0)
        expected -= ((1 - smoothing) * scores[label] + smoothing * scores.mean()).item()
    assert total.item() == pytest.approx(expected, rel=1e-5)


# Classifying


def test_accuracy_is_the_share_of_images_whose_greatest_score_is_their_label(build: Callable[..., Any]) -> None:
    task = build("resnet")
    for _ in range(3):  # so that running statistics are not those of the start
        for batch in task.batches(0):
            task.model.train()(batch.images)
    data = task.images.splits["test"]
    task.model.eval()
    right = 0
    for image, label in zip(data.images, data.labels, strict=True):
        pixels = (torch.tensor(image) / 255 - torch.tensor(task.assets["mean"])) / torch.tensor(
            task.assets["deviation"]
        )
        right += int(task.model(pixels.permute(2, 0, 1)[None]).argmax()) == label
    task.model.train()
    scores = task.evaluate("test")
    assert (scores.primary, scores.examples, scores.signature) == ("accuracy", 7, None)
    assert scores.score == right / 7
    assert task.model.training, "the mode is what it was"


@pytest.mark.parametrize(("images", "pixels"), [(3, 1 << 20), (100, 3 * 8 * 8 + 63), (100, 1)])
def test_evaluation_does_not_depend_on_its_batches(
    images: int, pixels: int, build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = build("resnet")
    whole = task.evaluate("train")
    monkeypatch.setitem(classification.EVALUATION_BATCH, "cpu", images)
    monkeypatch.setattr(classification, "EVALUATION_PIXELS", pixels)
    sizes = set()
    scorer = task._scorer()
    monkeypatch.setattr(task, "_scorer", lambda: lambda some: sizes.add(len(some)) or scorer(some))
    parts = task.evaluate("train")
    assert max(sizes) == (1 if pixels == 1 else 3)
    assert parts.values == whole.values
    assert parts.details["confusion"] == whole.details["confusion"]
    loss = whole.details["negative_log_likelihood"]
    assert parts.details["negative_log_likelihood"] == pytest.approx(loss, rel=1e-6)


def test_scores_are_the_mean_over_an_image_and_its_mirror_image(build: Callable[..., Any]) -> None:
    plain, both = build("resnet"), build("resnet", "evaluation.flip=true")
    for task in (plain, both):
        for batch in plain.batches(0):  # so that running statistics are not those of the start
            task.model.train()(batch.images)
    images = torch.tensor(plain.images.splits["test"].images)
    found = both._scorer()(images)
    model = copy.deepcopy(plain.model).double().eval()
    for number, image in enumerate(images.numpy()):
        passes = []
        for pixels in (image, image[:, ::-1]):
            values = (pixels / 255 - plain.assets["mean"]) / plain.assets["deviation"]
            with torch.no_grad():
                passes.append(model(torch.tensor(values).permute(2, 0, 1)[None])[0])
        assert (passes[0] - passes[1]).abs().max() > 1e-3, "a mirror image has scores of its own"
        assert (found[number] - (passes[0] + passes[1]) / 2).abs().max() < 1e-5
    assert torch.equal(both._scorer()(images.flip(2)), found)
    assert [task.evaluate("test").details["flip"] for task in (plain, both)] == [False, True], "a score says so"
    assert not torch.equal(plain._scorer()(images.flip(2)), plain._scorer()(images))


def test_validation_test_and_classifying_all_see_mirror_images(
    build: Callable[..., Any], tiny: dict[str, Path]
) -> None:
    task = build("resnet", "evaluation.flip=true")
    file = next((tiny["resnet"].parent / "images" / "test").rglob("*.png"))
    seen: list[Tensor] = []
    task.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for use in (task.validate, lambda: task.evaluate("test"), lambda: task.classify([file], 3)):
        seen.clear()
        use()
        assert len(seen) == 2
        assert torch.equal(seen[0].flip(3), seen[1])
    assert resolve(str(tiny["resnet"])).recipe.evaluation.flip is False, "it is asked for"


def test_images_are_classified_without_the_data(tiny: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "images"
    shutil.copytree(tiny["resnet"].parent / "images", data)
    recipe = resolve(str(tiny["resnet"]), data=str(data)).recipe
    task = tasks.build(recipe, runtime=CPU)
    assert isinstance(task, Classification)
    folder = tmp_path / "checkpoint"
    checkpoint.save(folder, Checkpoint(task.recipe, task.assets, task.model.state_dict(), {}, Progress(), {}))
    shutil.rmtree(data)
    files = sorted((tiny["resnet"].parent / "images" / "test").rglob("*.png"))
    found = tasks.load(folder, runtime=CPU)
    assert isinstance(found, Classification)
    answers = found.classify(files, 2)
    assert len(answers) == len(files) == 7
    for answer, file in zip(answers, files, strict=True):
        image = torch.from_numpy(np.array(Image.open(file)))[None]
        task.model.eval()
        normalise = augmentation.Normalisation(task.assets["mean"], task.assets["deviation"], CPU.device)
        scores = task.model(normalise(image))[0].double().softmax(0)
        assert [value for _, value in answer] == pytest.approx(scores.sort(descending=True).values[:2].tolist())
        assert task.assets["classes"].index(answer[0][0]) == int(scores.argmax())
    assert [len(answer) for answer in found.classify(files[:1], 99)] == [3], "no more than there are"
    assert sum(value for _, value in found.classify(files[:1], 99)[0]) == pytest.approx(1)
    with pytest.raises(UserError, match="there is no file or folder"):
        found.evaluate("test")


def test_odd_files_are_classified_as_if_they_were_data(build: Callable[..., Any], tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "grey.png": Image.fromarray(pixels[:, :, 0]),
        "alpha.png": Image.fromarray(np.concatenate([pixels, pixels[:, :, :1]], axis=2)),
        "deep.png": Image.fromarray(pixels[:, :, 1].astype(np.uint16) * 256),
        "turned.jpg": Image.fromarray(pixels),
        "wide.png": Image.fromarray(random.integers(0, 256, (20, 50, 3), dtype=np.uint8)),
        "palette.gif": Image.fromarray(pixels).convert("P"),
    }
    folder = tmp_path / "data" / "train" / "a"
    folder.mkdir(parents=True)
    for name, image in files.items():
        image.save(folder / name, **({"exif": turned, "quality": 95} if name.endswith("jpg") else {}))
    task = build("resnet")
    data = read_images(str(tmp_path / "data"), image_size=8).splits["train"].images
    answers = task.classify(sorted(folder.iterdir()), 3)
    model = copy.deepcopy(task.model).double().eval()
    for image, answer in zip(data, answers, strict=True):
        values = torch.tensor((image / 255 - task.assets["mean"]) / task.assets["deviation"])
        expected = model(values.permute(2, 0, 1)[None])[0].softmax(0)
        named = dict(zip(task.assets["classes"], expected.tolist(), strict=True))
        assert dict(answer) == pytest.approx(named, abs=1e-5)
    assert len({tuple(answer) for answer in answers}) == len(files), "or the test could not tell them apart"


def test_all_files_are_read_before_any_is_scored(
    build: Callable[..., Any], tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = build("resnet")
    good = next((tiny["resnet"].parent / "images" / "test").rglob("*.png"))
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    monkeypatch.setattr(task, "_scorer", None)
    with pytest.raises(UserError, match=r"^`.*text\.png` is not an image that can be read$") as one:
        task.classify([good, tmp_path / "text.png", good], 3)
    assert one.value.hint is not None
    assert "PNG" in one.value.hint
    bad = [tmp_path / "missing.png", tmp_path / "text.png", tmp_path]
    with pytest.raises(UserError) as several:
        task.classify([good, *bad], 3)
    first, *rest = several.value.message.splitlines()
    assert first == "3 of 4 files cannot be classified:"
    assert [line.split("`")[1] for line in rest] == [str(path) for path in bad]
    assert several.value.hint == one.value.hint


def test_one_image_that_cannot_be_normalised_is_told(build: Callable[..., Any]) -> None:
    """26 images by fives leave one, of which a last stage of one pixel has one value a channel."""
    keys = ["data.image_size=8", "model.stages=4", "model.depth=18", "model.width=4"]
    task = build("resnet", *keys, "training.batch_size=5")
    *_, last = task.batches(0)
    assert len(last.labels) == 1
    with pytest.raises(
        UserError, match="one image, which a batch or a worker's part of it has, leaves one value a channel"
    ):
        task.loss(last)
    total, _ = task.loss(next(iter(task.batches(0))))
    assert torch.isfinite(total)


def test_scoring_tells_how_far_it_is(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, int, int]] = []
    recipe = resolve(str(tiny["resnet"])).recipe
    task = tasks.build(recipe, runtime=CPU, progress=lambda *said: heard.append(said))
    heard.clear()
    monkeypatch.setitem(classification.EVALUATION_BATCH, "cpu", 3)
    task.evaluate("test")
    assert heard == [("scoring images", done, 7) for done in (0, 3, 6, 7)]
