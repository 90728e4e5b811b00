"""Changes to training images, each against a loop over images and pixels, and the keys of a recipe that ask for it."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from dl7cli import tasks
from dl7cli.data import augmentation
from dl7cli.device import Runtime
from dl7cli.recipe import resolve
from dl7cli.tasks.classification import Classification
from dl7cli.tasks.labelled_images import ImageBatch

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")
FILL = torch.tensor([1, 2, 3], dtype=torch.uint8)


def images(count: int, height: int = 6, width: int = 6) -> torch.Tensor:
    return torch.randint(4, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator(1))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("fill", [FILL, None])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_images_are_shifted_and_mirrored_one_by_one(padding: int, fill: torch.Tensor | None) -> None:
    plain, mirrored = images(40), torch.rand(40, generator=generator(2)) < 0.5
    changed = augmentation.shift_and_flip(plain, generator(5), padding=padding, mirrored=mirrored, fill=fill)
    draws = generator(5)
    down = torch.randint(2 * padding + 1, (40, 1), generator=draws).flatten().tolist()
    right = torch.randint(2 * padding + 1, (40, 1), generator=draws).flatten().tolist()
    for number in range(40):
        canvas = np.pad(plain[number].numpy(), ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
        if fill is not None:
            inside = canvas[padding : padding + 6, padding : padding + 6].copy()
            canvas[:] = (1, 2, 3)
            canvas[padding : padding + 6, padding : padding + 6] = inside
        cut = canvas[down[number] : down[number] + 6, right[number] : right[number] + 6]
        assert np.array_equal(changed[number].numpy(), cut[:, ::-1] if mirrored[number] else cut)
    if padding:
        assert set(down) == set(right) == set(range(2 * padding + 1)), "every shift is drawn"


@pytest.mark.parametrize("side", [1, 2, 3, 20])
def test_cutout_is_a_square_around_a_pixel(side: int) -> None:
    plain = images(300, 5, 6)
    changed = augmentation.cutout(plain, generator(5), side=side, fill=FILL)
    squares = {
        (row, column): {
            (r, c)
            for r in range(row - side // 2, row - side // 2 + side)
            for c in range(column - side // 2, column - side // 2 + side)
            if 0 <= r < 5 and 0 <= c < 6
        }
        for row in range(5)
        for column in range(6)
    }
    seen = Counter()
    for before, after in zip(plain, changed, strict=True):
        gone = {(r, c) for r in range(5) for c in range(6) if not torch.equal(before[r, c], after[r, c])}
        assert all(torch.equal(after[r, c], FILL) for r, c in gone)
        assert gone in squares.values()
        seen[frozenset(gone)] += 1
    assert len(seen) == len({frozenset(square) for square in squares.values()}), "every place is drawn"


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_random_erasing_fills_a_rectangle_of_the_papers_sizes(probability: float) -> None:
    plain = images(600, 32, 32)
    changed = augmentation.random_erasing(plain, generator(5), probability=probability)
    erased = 0
    for before, after in zip(plain, changed, strict=True):
        rows, columns = torch.where((before != after).any(dim=2))
        if not len(rows):
            continue
        erased += 1
        tall, wide = (int(axis.max() - axis.min() + 1) for axis in (rows, columns))
        # Sides are rounded to pixels, and a pixel of noise may equal what it replaces.
        assert 0.013 < tall * wide / 1024 < 0.43
        assert 0.22 < tall / wide < 4.5
        assert len(rows) > 0.95 * tall * wide
    assert abs(erased / 600 - probability) < 0.06
    assert (erased > 0) == (probability > 0)


def test_mixup_blends_with_the_other_image() -> None:
    plain, order = torch.randn(5, 3, 4, 4), torch.tensor([3, 1, 0, 4, 2])
    mixed = augmentation.mixup(plain, order, 0.7)
    for number in range(5):
        assert torch.allclose(mixed[number], 0.7 * plain[number] + 0.3 * plain[order[number]], atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.4, 0.9, 1.0])
def test_cutmix_takes_one_rectangle_from_the_other_image(weight: float) -> None:
    plain, order = torch.randn(5, 3, 8, 12), torch.tensor([3, 1, 0, 4, 2])
    kept = []
    for seed in range(100):
        mixed, own = augmentation.cutmix(plain, order, weight, generator(seed))
        foreign = (mixed != plain).any(dim=1)[0]
        rows, columns = torch.where(foreign)
        assert own == pytest.approx(1 - len(rows) / 96)
        kept.append(own)
        if len(rows):
            top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
            assert (bottom - top) * (right - left) == len(rows), "a rectangle"
            assert torch.equal(mixed[:, :, top:bottom, left:right], plain[order][:, :, top:bottom, left:right])
    tall, wide = int(8 * (1 - weight) ** 0.5), int(12 * (1 - weight) ** 0.5)
    assert min(kept) == pytest.approx(1 - tall // 2 * 2 * (wide // 2 * 2) / 96), (
        "whole where it does not reach the edge"
    )


# Recipes


def build(tiny: dict[str, Path], *overrides: str) -> Classification:
    task = tasks.build(resolve(str(tiny["resnet"]), overrides).recipe, runtime=CPU)
    assert isinstance(task, Classification)
    return task


def every(task: Classification, epoch: int) -> ImageBatch:
    batches = list(task.batches(epoch))
    images, labels = (torch.cat(parts) for parts in zip(*(batch[:2] for batch in batches), strict=True))
    return ImageBatch(images, labels, len(labels))


def orientations(task: Classification, epoch: int) -> dict[bytes, bool]:
    """By image, whether it is mirrored in an epoch; none of the tiny ones is symmetric."""
    plain = torch.from_numpy(np.array(task.images.splits["train"].images))
    normal = task.images.normalise(plain)
    found = {}
    for image in every(task, epoch).images:
        straight = [bool((image == other).all()) for other in normal]
        turned = [bool((image.flip(2) == other).all()) for other in normal]
        assert sum(straight) + sum(turned) == 1
        found[(straight if any(straight) else turned).index(True)] = any(turned)
    return found


def test_alternating_flips_show_both_sides_in_two_epochs(tiny: dict[str, Path]) -> None:
    task = build(tiny, "data.crop_padding=0", "data.flip=alternating")
    first, second, third = (orientations(task, epoch) for epoch in range(3))
    assert len(first) == len(task.images.splits["train"].labels)
    assert all(second[number] != side for number, side in first.items())
    assert first == third
    assert {True, False} == set(first.values())
    random = build(tiny, "data.crop_padding=0", "data.flip=random")
    assert len({tuple(sorted(orientations(random, epoch).items())) for epoch in range(3)}) == 3
    never = build(tiny, "data.crop_padding=0", "data.flip=none")
    assert set(orientations(never, 0).values()) == {False}


CHANGES = {
    "data.cutout=3": "images",
    "data.random_erasing=1.0": "images",
    "training.mixup=0.4": "labels",
    "training.cutmix=1.0": "labels",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_recipe_changes_training_alone_and_the_same_way_each_time(change: str, tiny: dict[str, Path]) -> None:
    plain, changing = build(tiny), build(tiny, change)
    differing = 0
    for one, two, again in zip(plain.batches(1), changing.batches(1), build(tiny, change).batches(1), strict=True):
        assert torch.equal(one.labels, two.labels)
        differing += not torch.equal(one.images, two.images)
        assert torch.equal(two.images, again.images)
        assert (two.other_labels is not None) == (CHANGES[change] == "labels")
    assert differing >= 3, "an order of the last two images may be the order they are in"
    assert torch.equal(next(changing.batches(1, 2)).images, list(changing.batches(1))[2].images)
    assert plain.evaluate("test") == changing.evaluate("test")


def test_the_loss_of_mixed_images_is_that_of_both_labels(tiny: dict[str, Path]) -> None:
    task = build(tiny, "training.mixup=1.0", "training.cutmix=1.0", "training.label_smoothing=0.1")
    task.model.eval()
    weights = []
    for epoch in range(8):
        for batch in task.batches(epoch):
            total, count = task.loss(batch)
            assert batch.other_labels is not None
            scores = task.model(batch.images)
            expected = 0.0
            for share, labels in ((batch.weight, batch.labels), (1 - batch.weight, batch.other_labels)):
                one_hot = 0.9 * functional.one_hot(labels, 3) + 0.1 / 3
                expected += share * -(one_hot * scores.log_softmax(1)).sum().item()
            assert (total.item(), count) == (pytest.approx(expected, rel=1e-4), len(batch.labels))
            weights.append(batch.weight)
    assert min(weights) < 0.3
    assert max(weights) > 0.7


def test_the_weights_of_mixing_are_beta(tiny: dict[str, Path]) -> None:
    """Of Beta(a, a) the mean is 1/2 and the variance 1/(8a+4)."""
    task = build(tiny, "training.mixup=0.4")
    batch = ImageBatch(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64), 1)
    weights = np.array([task.images._mixed(batch, generator(seed)).weight for seed in range(4000)])
    assert abs(weights.mean() - 0.5) < 0.02
    assert abs(weights.var() - 1 / 7.2) < 0.01


def test_scores_are_averaged_with_those_of_the_mirror_image(tiny: dict[str, Path]) -> None:
    plain, both = build(tiny), build(tiny, "evaluation.flip=true")
    shown = images(4, 8, 8)
    mean = (plain._scorer()(shown) + plain._scorer()(shown.flip(2))) / 2
    assert torch.allclose(both._scorer()(shown), mean, atol=1e-6)
    assert torch.allclose(both._scorer()(shown), both._scorer()(shown.flip(2)), atol=1e-6)
    assert not torch.allclose(plain._scorer()(shown), mean, atol=1e-3)


def test_an_unknown_way_to_flip_is_refused(tiny: dict[str, Path]) -> None:
    from dl7cli.errors import UserError

    with pytest.raises(UserError, match=r"data\.flip"):
        resolve(str(tiny["resnet"]), ["data.flip=sometimes"])
