"""The images of a recipe as its model sees them: splits, normalisation, and batches changed as the recipe says."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dl7cli.data import augmentation
from dl7cli.data.dividing import kept_back, part_of
from dl7cli.data.images import ImageSet, digest, read_images, statistics
from dl7cli.data.sources import Progress, is_file
from dl7cli.data.transfer import moved
from dl7cli.device import Runtime, seed_of
from dl7cli.errors import UserError
from dl7cli.recipe import ClassificationRecipe
from dl7cli.tasks.checking import ImageAssets, check_assets


class ImageBatch(NamedTuple):
    images: Tensor
    """(B, 3, H, W) float32, normalised"""
    labels: Tensor
    """(B,) int64"""
    whole: int
    """Images of the whole batch, of which other workers may have the rest"""
    other_labels: Tensor | None = None
    """(B,) int64, of the images mixed into these, if any are"""
    weight: float = 1.0
    """How far `labels` count where there are others; these count for the rest"""


class LabelledImages:
    """The data of a classification recipe. `assets` are class names, normalisation and image size.

    Without `assets` they are found in the training split; with them, no data is read until it is asked for. Batches
    are on the runtime's device; `notes` tell what was left out or carved off.
    """

    def __init__(
        self,
        recipe: ClassificationRecipe,
        assets: dict[str, Any] | None,
        *,
        runtime: Runtime,
        offline: bool,
        progress: Progress,
        for_training: bool = True,
    ) -> None:
        self.notes: list[str] = []
        self._carved = False
        self._whole: ImageSet | None = None
        """The training split, where a part of it is used."""
        self._recipe = recipe
        self._device, self._workers = runtime.device, runtime.workers
        self._offline = offline
        self._progress = progress
        self._for_training = for_training
        self._on_device: dict[str, tuple[Tensor, Tensor]] = {}
        if assets is None:
            self.splits, names = self._read(recipe.data.image_size)
            images = self.splits["train"].images
            mean, deviation = statistics(images)
            assets = {
                "classes": list(names),
                "mean": list(mean),
                # A channel that never changes would be divided by zero.
                "deviation": [max(value, 1e-3) for value in deviation],
                "image_size": int(images.shape[1]),
            }
        check_assets(assets, ImageAssets)
        self.assets = assets
        self.normalise = augmentation.Normalisation(assets["mean"], assets["deviation"], runtime.device)

    @property
    def carved(self) -> bool:
        """Whether what is there for validation is a part of the training split."""
        return "train" in self.splits and self._carved  # the first half reads the data

    @cached_property
    def splits(self) -> dict[str, ImageSet]:
        """The images and labels of each split; for training `train` and `validation` are there in any case.

        To be evaluated, images may be of some of the classes, in any order, and a single file is also the test split.
        """
        splits, classes = self._read(self._recipe.data.image_size)
        if next(iter(splits.values())).images.shape[1] != self.assets["image_size"]:
            self.notes.clear()  # they were of the other size
            splits, classes = self._read(self.assets["image_size"])
        known = self.assets["classes"]
        if list(classes) != known and not self._for_training and set(classes) <= set(known):
            numbers = np.array([known.index(name) for name in classes])
            return {name: ImageSet(split.images, numbers[split.labels]) for name, split in splits.items()}
        if list(classes) != known:
            raise UserError(
                f"`{self._recipe.data.source}` has other classes than the model was trained on",
                hint=f"the model knows {', '.join(known)}",
            )
        return splits

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        """A split's images (N, H, W, 3) uint8 and labels (N,) int64 on the device, copied there once.

        Raises UserError where the data has no such split.
        """
        if name not in self.splits:
            raise UserError(
                f"`{self._recipe.data.source}` has no split `{name}`", hint=f"it has {', '.join(self.splits)}"
            )
        if name not in self._on_device:
            data = self.splits[name]
            # What is mapped from disk is read-only, which tensors cannot be.
            images, labels = (np.require(array, requirements="W") for array in (data.images, data.labels))
            device = self._device
            self._on_device[name] = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
        return self._on_device[name]

    @cached_property
    def digest(self) -> str:
        """Of what there is to train and choose on, of which a part may be used: images and labels of both splits."""
        splits = dict(self.splits)
        if self._whole is not None:
            splits["train"] = self._whole
        return digest(*(splits[split] for split in ("train", "validation") if split in splits))

    def digest_of(self, *splits: str) -> str:
        """Of the images and labels of some splits, as far as there are such."""
        return digest(*(self.splits[split] for split in splits if split in self.splits))

    def steps(self, epoch: int) -> int:
        """Batches of an epoch, counted from 0; the last one may be smaller."""
        return -(-len(self.splits["train"].labels) // self._recipe.training.batch_size)

    def batches(self, epoch: int, start: int, memory_format: torch.memory_format) -> Iterator[ImageBatch]:
        """The training batches of an epoch from number `start` on, the same for the same seed and epoch.

        What is random is drawn for the whole batch, of which each worker gets its part.
        """
        images, labels = self.split("train")
        device = self._device
        data, training = self._recipe.data, self._recipe.training
        seed, size = training.seed, training.batch_size
        small_steps = training.small_part * self.steps(epoch) * training.epochs
        mean = torch.tensor([round(255 * value) for value in self.assets["mean"]], dtype=torch.uint8, device=device)
        fill = None if data.crop_fill == "reflect" else mean
        order = torch.randperm(len(labels), generator=_generator(seed, epoch + 1))
        coins = torch.rand(len(labels), generator=_generator(seed)) < 0.5
        for batch in range(start, self.steps(epoch)):
            chosen = order[batch * size : (batch + 1) * size]
            count = len(chosen)
            generator = _generator(seed, epoch + 1, batch + 1)
            match data.flip:
                case "none":
                    mirrored = torch.zeros(len(chosen), dtype=torch.bool)
                case "random":
                    mirrored = torch.rand(len(chosen), generator=generator) < 0.5
                case "alternating":  # Jordan 2024, arXiv 2404.00498, §3.6: both sides of an image in any two epochs
                    mirrored = coins[chosen] ^ (epoch % 2 == 1)
            chosen = moved(chosen, device)
            changed = augmentation.shift_and_flip(
                images[chosen], generator, padding=data.crop_padding, mirrored=mirrored, fill=fill
            )
            if data.cutout:
                changed = augmentation.cutout(changed, generator, side=data.cutout, fill=mean)
            if data.random_erasing:
                changed = augmentation.random_erasing(changed, generator, probability=data.random_erasing)
            part = self._workers.part(count)
            mixing = training.mixup or training.cutmix
            if not mixing:  # with images that may be of other parts
                changed, chosen = changed[part], chosen[part]
            inputs = self.normalise(changed)
            if training.small_size and epoch * self.steps(epoch) + batch < small_steps:
                inputs = augmentation.shrink(inputs, training.small_size)
            inputs = inputs.contiguous(memory_format=memory_format)
            one = ImageBatch(inputs, labels[chosen], count)
            if mixing:
                one = self._mixed(one, generator)
                assert one.other_labels is not None
                inputs = one.images[part].contiguous(memory_format=memory_format)
                one = one._replace(images=inputs, labels=one.labels[part], other_labels=one.other_labels[part])
            yield one

    @property
    def whole_batch(self) -> int:
        """This worker's images of a training batch, but for an epoch's last one, which may be smaller."""
        images = min(self._recipe.training.batch_size, len(self.splits["train"].labels))
        return len(range(images)[self._workers.part(images)])

    def _mixed(self, batch: ImageBatch, generator: torch.Generator) -> ImageBatch:
        """The whole batch, mixed with itself in another order as the recipe asks for it."""
        training = self._recipe.training
        cut = bool(training.cutmix) and not (training.mixup and torch.rand((), generator=generator) < 0.5)
        draws = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        concentration = training.cutmix if cut else training.mixup
        weight = draws.beta(concentration, concentration)
        order = moved(torch.randperm(len(batch.labels), generator=generator), batch.labels.device)
        if cut:
            images, weight = augmentation.cutmix(batch.images, order, weight, generator)
        else:
            images = augmentation.mixup(batch.images, order, weight)
        return ImageBatch(images, batch.labels, batch.whole, batch.labels[order], weight)

    def _read(self, image_size: int | None) -> tuple[dict[str, ImageSet], tuple[str, ...]]:
        """The splits, validation among them, and the class names."""
        data = self._recipe.data
        images = read_images(
            data.source,
            image=data.image,
            label=data.label,
            image_size=image_size,
            offline=self._offline,
            progress=self._progress,
            for_training=self._for_training,
            if_named=not self._for_training,
        )
        self.notes.extend(images.notes)
        splits = dict(images.splits)
        whole = splits.get("train")
        self._carved = False
        if whole is not None and "validation" not in splits and (self._for_training or len(whole.labels) > 1):
            self._carved = True
            parts = kept_back(len(whole.labels), data.validation_fraction, "images")
            splits["train"], splits["validation"] = (ImageSet(whole.images[at], whole.labels[at]) for at in parts)
            kept = len(splits["validation"].labels)
            self.notes.append(f"kept for validation: {kept:,} of {len(whole.labels):,} images of train")
        if data.train_examples is not None and self._for_training:
            self._whole = train = splits["train"]
            chosen = part_of(len(train.labels), data.train_examples)
            splits["train"] = ImageSet(train.images[chosen], train.labels[chosen])
            self.notes.append(f"trained on: {len(chosen):,} of {len(train.labels):,} images of train")
        if whole is not None and not self._for_training and is_file(data.source):
            splits["test"] = whole
            self.notes.append(f"the test split is all of {data.source}")
        return splits, images.classes


def _generator(*numbers: int) -> torch.Generator:
    """A random stream that is a pure function of the numbers."""
    return torch.Generator().manual_seed(seed_of(*numbers))
