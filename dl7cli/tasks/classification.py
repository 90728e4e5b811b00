"""Image classification: where a recipe meets images, a residual network, cross-entropy and accuracy."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dl7cli import metrics
from dl7cli.data import augmentation
from dl7cli.data.images import read_image_file
from dl7cli.data.sources import Progress, silent
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.metrics import Scores
from dl7cli.models.fast_resnet import FastResNet, smallest_image
from dl7cli.models.folding import folded
from dl7cli.models.normalisation import share_statistics
from dl7cli.models.resnet import ResNet
from dl7cli.recipe import ClassificationRecipe, FastResNetModel, ResNetModel
from dl7cli.tasks.checking import built
from dl7cli.tasks.labelled_images import ImageBatch, LabelledImages

EVALUATION_BATCH = {"cpu": 100, "cuda": 500, "mps": 500}
"""Images scored at once, by device: on a CPU so few that what a layer of ResNet-20 gives stays in the cache."""
EVALUATION_PIXELS = 1 << 21
"""Pixels scored at once, unless one image has more: so many as 500 images of 64 by 64 have, or 41 of 224 by 224."""
WHITENING_IMAGES = 5000
_STEM_SIZE = 64
"""Smallest side of an image that the `imagenet` stem, which makes it a quarter, is for."""


class Classification:
    """A classifier with its data; `assets` are class names, normalisation and image size, all that using it needs."""

    unit = "images"
    batch_key = "batch_size"
    """Of `training`: what bounds a batch."""

    def __init__(
        self,
        recipe: ClassificationRecipe,
        assets: dict[str, Any] | None = None,
        *,
        runtime: Runtime,
        offline: bool = False,
        progress: Progress = silent,
        weights: Mapping[str, Tensor] | None = None,
        for_training: bool = True,
    ) -> None:
        fresh = assets is None
        self.recipe = recipe
        self.runtime = runtime
        self.images = LabelledImages(
            recipe, assets, runtime=runtime, offline=offline, progress=progress, for_training=for_training
        )
        self._progress = progress
        self.assets = assets = self.images.assets
        self.notes = self.images.notes
        # Beside the model and not in its place: names of weights and evaluation are those of the plain module.
        self._compiled: Callable[[Tensor], Tensor] | None = None
        section = recipe.model
        _refuse_size(recipe, assets["image_size"])
        classes = len(assets["classes"])
        model = built(lambda: classifier(recipe.model, classes), recipe.training.seed, weights)
        if fresh and isinstance(model, FastResNet):
            images = self.images.splits["train"].images
            # From all over the set, which may be in the order of its classes.
            spread = np.linspace(0, len(images) - 1, min(len(images), WHITENING_IMAGES)).astype(int)
            some = torch.from_numpy(np.array(images[spread]))
            model.whiten(self.images.normalise(some.to(runtime.device)).cpu())
        workers = runtime.workers
        if recipe.training.batch_size < workers.count:  # the first one's running statistics would be of nothing
            raise UserError(
                f"`training.batch_size` is {recipe.training.batch_size}, less than the {workers.count} workers",
                hint="start fewer of them: each takes a part of every batch",
            )
        if recipe.training.batch_norm == "sync" and workers.count > 1:
            if isinstance(section, ResNetModel) and section.survival < 1:
                raise UserError(
                    f"`training.batch_norm` is `sync`, and with `model.survival` below 1 the {workers.count} workers "
                    "do not all come to the same blocks",
                    hint="`--set training.batch_norm=local`",
                )
            share_statistics(model, workers)
        self.model = model.to(runtime.device)
        # This is how both oneDNN and cuDNN run these convolutions fastest.
        self.lay_out(torch.channels_last)

    @property
    def data_name(self) -> str:
        return self.recipe.data.source

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def splits(self) -> dict[str, int]:
        """Images in each split."""
        return {name: len(split.labels) for name, split in self.images.splits.items()}

    @property
    def digest(self) -> str:
        """Of what is trained and chosen on."""
        return self.images.digest

    @property
    def carved(self) -> bool:
        """Whether what is there for validation is a part of the training split; reads the data."""
        return self.images.carved

    def digest_of(self, split: str) -> str:
        """Of what is evaluated, where the data has that split."""
        return self.images.digest_of(split)

    def lay_out(self, memory_format: torch.memory_format) -> None:
        """Keep weights and training images in this order in memory, before anything is compiled."""
        self.model = self.model.to(memory_format=memory_format)  # type: ignore[call-overload]
        self._memory_format = memory_format

    def steps(self, epoch: int) -> int:
        """Batches of an epoch, counted from 0; the last one may be smaller."""
        return self.images.steps(epoch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[ImageBatch]:
        """The training batches of an epoch from number `start` on, the same for the same seed and epoch."""
        return self.images.batches(epoch, start, self._memory_format)

    def part(self, batch: ImageBatch, index: int, parts: int) -> ImageBatch:
        """One of `parts` parts of a batch, its images number `index`, `index + parts` and so on, as they are in it.

        The sum of `loss` over the parts is that of the batch, but for what dropout draws and for
        batch normalisation, which in training sees each part alone.
        """
        own = slice(index, None, parts)
        images = batch.images[own].contiguous(memory_format=self._memory_format)
        others = None if batch.other_labels is None else batch.other_labels[own]
        return ImageBatch(images, batch.labels[own], len(batch.labels[own]), others, batch.weight)

    def compile(self) -> None:
        """Compile the model for training on whole batches; the model and the random streams stay as they are.

        Whatever else than a whole batch comes goes through the plain module, as does evaluation: another shape would
        have to be compiled for anew. Raises what torch raises where there is no compiler or it fails.
        """
        kept = {name: value.clone() for name, value in self.model.named_buffers()}
        self.model.train()
        try:
            with warnings.catch_warnings(), torch.random.fork_rng():
                warnings.simplefilter("ignore")  # torch's, about itself
                self._compiled = torch.compile(self.model, dynamic=False)
                # Nothing is compiled before the first batch, whose statistics must not count, and the backward pass
                # not before its gradient.
                for batch in self._sizes():
                    total, count = self.loss(batch)
                    (total / count).backward()  # type: ignore[no-untyped-call]
                    gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
                    if not torch.nn.utils.get_total_norm(gradients).isfinite():
                        raise RuntimeError("its gradient is not finite when compiled")
        except BaseException:
            self._compiled = None
            raise
        finally:
            self.model.zero_grad(set_to_none=True)
            for name, value in self.model.named_buffers():
                value.copy_(kept[name])

    def _sizes(self) -> Iterator[ImageBatch]:
        """A whole batch of images of each size that the training has."""
        yield next(self.batches(0))
        if self.recipe.training.small_size:
            last = self.recipe.training.epochs - 1
            yield next(self.batches(last, max(0, self.steps(last) - 2)))  # the very last may be a smaller batch

    def loss(self, batch: ImageBatch) -> tuple[Tensor, int]:
        """Cross-entropy summed over this worker's part of a batch, and how many images the whole has.

        Raises UserError where a part is too small to be normalised.
        """
        forward: Callable[[Tensor], Tensor] = self.model
        if self._compiled is not None and len(batch.labels) == self.images.whole_batch:
            forward = self._compiled
        try:
            with self.runtime.autocast():
                scores = forward(batch.images)
        except ValueError as problem:
            if "more than 1 value per channel" not in str(problem):
                raise
            raise UserError(
                "one image, which a batch or a worker's part of it has, leaves one value a channel in the last stage, "
                "and that cannot be normalised",
                hint="choose a `training.batch_size` that leaves more to the last batch of an epoch, or larger images",
            ) from problem
        total = self._cross_entropy(scores, batch.labels)
        if batch.other_labels is not None:
            total = batch.weight * total + (1 - batch.weight) * self._cross_entropy(scores, batch.other_labels)
        return total, batch.whole

    def _cross_entropy(self, scores: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.recipe.training.label_smoothing
        return functional.cross_entropy(scores.float(), labels, reduction="sum", label_smoothing=smoothing)

    def validate(self) -> Scores:
        """The scores by which the best epoch is chosen."""
        return self.evaluate("validation")

    def evaluate(self, split: str) -> Scores:
        """Accuracy on a split of the data, with the details of `metrics.classification`.

        Two more of them are `flip` and `shift`, as the recipe has them: a score that is the mean of several readings
        has to say so. Raises UserError where the data has no such split.
        """
        return self.judge(split, self.logits(split))

    def logits(self, split: str, *, others: Sequence["Classification"] = ()) -> Tensor:
        """Of every image of a split, in the order of the data: (N, classes) float32. Raises as `evaluate`.

        Of an ensemble with `others` they are the logarithms of the means of all probabilities.
        """
        images, labels = self.images.split(split)
        workers = self.runtime.workers
        logits = torch.zeros(len(labels), len(self.assets["classes"]), device=images.device)
        scorers = [one._scorer() for one in (self, *others)]
        height, width = images.shape[1:3]
        size = max(1, min(EVALUATION_BATCH[images.device.type], EVALUATION_PIXELS // (height * width)))
        for at in range(size * workers.rank, len(labels), size * workers.count):
            self._progress("scoring images", at, len(labels))
            answers = [scores(images[at : at + size]) for scores in scorers]
            if others:
                several = torch.stack([one.log_softmax(dim=1) for one in answers])
                logits[at : at + size] = several.logsumexp(dim=0) - math.log(len(answers))
            else:
                logits[at : at + size] = answers[0]
        self._progress("scoring images", len(labels), len(labels))
        # Each row is one worker's, and zero on all others.
        return workers.add(logits)

    def judge(self, split: str, logits: Tensor, *, alone: bool = True) -> Scores:
        """What `evaluate` says of the logits of a split, without `flip` and `shift` where they are not of one alone."""
        scores = metrics.classification(logits, self.labels(split), self.assets["classes"])
        views = self.recipe.evaluation.model_dump() if alone else {}
        return replace(scores, details={**views, **scores.details})

    def answers(self, split: str, logits: Tensor) -> list[tuple[str, str, float]]:
        """Of every image of a split its class, the one that its logits are greatest for, and the latter's probability.

        Among equal ones the first, as for the accuracy; an image whose row holds a NaN was taken for nothing, which is
        an empty name. The probability is NaN where a row has no softmax.
        """
        classes = self.assets["classes"]
        logits = logits.cpu().double()
        predicted = torch.where(logits.isnan().any(dim=1), len(classes), logits.argmax(dim=1))
        probability = logits.softmax(dim=1).amax(dim=1)
        rows = zip(self.labels(split).tolist(), predicted.tolist(), probability.tolist(), strict=True)
        return [(classes[label], [*classes, ""][at], own) for label, at, own in rows]

    def labels(self, split: str) -> Tensor:
        """Of every image of a split, (N,) int64 on the device. Raises as `evaluate`."""
        return self.images.split(split)[1]

    def classify(self, paths: Sequence[Path], top: int) -> list[list[tuple[str, float]]]:
        """For each image file the `top` most probable classes with their probabilities, best first.

        All files are read before any is scored. Raises UserError for those that cannot be, naming every one.
        """
        images, refused = [], []
        for path in paths:
            try:
                images.append(torch.from_numpy(np.array(read_image_file(path, self.assets["image_size"]))[None]))
            except UserError as error:
                refused.append(error)
        if len(refused) == 1:
            raise refused[0]
        if refused:
            raise UserError(
                "\n  ".join([f"{len(refused)} of {len(paths)} files cannot be classified:", *map(str, refused)]),
                hint=next((error.hint for error in refused if error.hint is not None), None),
            )
        answers = []
        scores = self._scorer()
        for image in images:
            probabilities = scores(image.to(self.runtime.device))[0].softmax(dim=0)
            best = probabilities.topk(min(top, len(probabilities)))
            answers.append(
                [
                    (self.assets["classes"][index], value)
                    for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                ]
            )
        return answers

    def _scorer(self) -> Callable[[Tensor], Tensor]:
        """Gives, by the weights as they are now, of images (N, H, W, 3) uint8 the logits (N, classes) float32, averaged
        over the views that `evaluation` says, with its weights.
        """
        model, evaluation = folded(self.model), self.recipe.evaluation

        def with_mirror_image(view: Tensor) -> Tensor:
            logits: Tensor = model(view).float()
            return (logits + model(view.flip(3)).float()) / 2 if evaluation.flip else logits

        def scores(images: Tensor) -> Tensor:
            with torch.inference_mode(), self.runtime.autocast():
                image = self.images.normalise(images)
                if not evaluation.shift:
                    return with_mirror_image(image)
                one, other = map(with_mirror_image, augmentation.shifted(image, evaluation.shift))
                return with_mirror_image(image) / 2 + (one + other) / 4

        return scores


def refuse_other_classes(names: Sequence[str], members: Sequence[Classification]) -> None:
    """Raise UserError where classifiers that go by these names do not answer the same question of the same images."""
    for name, other in zip(names[1:], members[1:], strict=True):
        for key in ("classes", "image_size"):
            if members[0].assets[key] != other.assets[key]:
                raise UserError(
                    f"`{names[0]}` and `{name}` differ in {key.replace('_', ' ')}",
                    hint="train the runs of an ensemble on the same data",
                )


def _refuse_size(recipe: ClassificationRecipe, size: int) -> None:
    """Raise UserError where images of `size` pixels are too small for what the recipe does with them."""
    section = recipe.model
    if isinstance(section, ResNetModel) and section.stem == "imagenet" and size < _STEM_SIZE:
        raise UserError(
            f"`model.stem` is `imagenet`, for images of {_STEM_SIZE} pixels and more; "
            f"those of `{recipe.data.source}` have {size}",
            hint="`--set model.stem=cifar`, or `--set data.image_size=64`",
        )
    reflected = recipe.data.crop_padding if recipe.data.crop_fill == "reflect" else 0
    for key, value, limit in (
        ("training.small_size", recipe.training.small_size or 0, size),
        ("evaluation.shift", recipe.evaluation.shift, size - 1),
        ("data.crop_padding", reflected, size - 1),
    ):
        if value > limit:
            raise UserError(
                f"`{key}` is {value}, and the images of `{recipe.data.source}` have {size} pixels",
                hint=f"`--set {key}={limit}` is the most there can be",
            )
    smallest = min(size, recipe.training.small_size or size)
    if isinstance(section, FastResNetModel) and smallest < smallest_image(len(section.widths)):
        raise UserError(
            f"a fast_resnet cannot take images of {smallest} pixels",
            hint=f"`data.image_size` and `training.small_size` from {smallest_image(len(section.widths))} on fit",
        )


def classifier(section: ResNetModel | FastResNetModel, classes: int) -> ResNet | FastResNet:
    """The network that a recipe's `[model]` describes."""
    match section:
        case ResNetModel():
            return ResNet(classes=classes, **section.model_dump(exclude={"kind"}))
        case FastResNetModel():
            return FastResNet(classes, section.widths)
