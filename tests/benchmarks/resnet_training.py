"""Images per second in training, data and augmentation included: dl7's loop against two others.

One is the bare step: a batch that is already in place, a compiled model in dl7's precision and memory layout, forward,
backward, the recipe's optimiser and nothing else. dl7's loop, compiled where the recipe's steps repay it (or with
`--set training.compile=always`), should reach 0.95 of its rate.

The other is the loop as commonly written, in a process of its own: float32, NCHW, a DataLoader (tried with no worker
and with two; the faster is compared first) that crops, flips and normalises one image at a time as torchvision's
transforms do, SGD with momentum, `loss.item()` at every step.

    python tests/benchmarks/resnet_training.py --data FOLDER
"""

import copy
import sys

import numpy as np
import torch
from alternating import Loop, apart, arguments, compare, own_loop
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from dl7cli import device, tasks
from dl7cli.data.images import ImageSet, read_images
from dl7cli.models.resnet import ResNet
from dl7cli.recipe import resolve
from dl7cli.tasks.classification import Classification
from dl7cli.training import compilation
from dl7cli.training.optimisation import build_optimiser

PADDING = 4
OF_THE_BARE_STEP = 0.95
OF_THE_USUAL_LOOP = 2.7


class TransformedImages(Dataset[tuple[Tensor, int]]):
    """What torchvision's CIFAR10 gives with RandomCrop(padding=4), RandomHorizontalFlip, ToTensor and Normalize."""

    def __init__(self, images: ImageSet, mean: list[float], deviation: list[float]) -> None:
        self.images: NDArray[np.uint8] = np.array(images.images)
        self.labels: list[int] = images.labels.tolist()
        self.mean = mean
        self.deviation = deviation

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.crop(Image.fromarray(self.images[index]))
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.normalise(self.to_tensor(image)), self.labels[index]

    def crop(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        padded = ImageOps.expand(image, border=PADDING, fill=0)
        top = int(torch.randint(0, 2 * PADDING + 1, size=(1,)).item())
        left = int(torch.randint(0, 2 * PADDING + 1, size=(1,)).item())
        return padded.crop((left, top, left + width, top + height))

    def to_tensor(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
        return pixels.permute(2, 0, 1).contiguous().to(torch.get_default_dtype()).div(255)

    def normalise(self, image: Tensor) -> Tensor:
        mean = torch.as_tensor(self.mean, dtype=image.dtype).view(-1, 1, 1)
        deviation = torch.as_tensor(self.deviation, dtype=image.dtype).view(-1, 1, 1)
        return image.clone().sub_(mean).div_(deviation)


def usual_loop(
    images: TransformedImages, *, depth: int, classes: int, batch: int, workers: int, on: torch.device
) -> Loop:
    """The loop of most examples of training on CIFAR-10."""
    model = ResNet(depth, classes).to(on)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(
        images,
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=on.type == "cuda",
    )
    running_loss = 0.0
    model.train()
    while True:
        for inputs, labels in loader:
            inputs, labels = inputs.to(on), labels.to(on)
            optimiser.zero_grad()
            loss = functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimiser.step()
            running_loss += loss.item()
            yield len(labels)


def bare_loop(task: Classification) -> Loop:
    """A compiled step of the same network and optimiser on a batch already in place."""
    batch = next(task.batches(0))
    model = copy.deepcopy(task.model)
    compiled = torch.compile(model, dynamic=False)
    optimiser = build_optimiser(model, task.recipe.optim)
    for group in optimiser.param_groups:
        group["lr"] = task.recipe.optim.learning_rate * group["share"]
    model.train()
    while True:
        with task.runtime.autocast():
            scores = compiled(batch.images)
        loss = functional.cross_entropy(scores.float(), batch.labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        yield len(batch.labels)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    options = parser.parse_args()
    overrides = [f"model.depth={options.depth}", f"training.batch_size={options.batch}", *options.set]
    recipe = resolve("resnet", overrides, data=options.data).recipe
    runtime = device.choose()
    task = tasks.build(recipe, runtime=runtime)
    images = TransformedImages(read_images(options.data).splits["train"], task.assets["mean"], task.assets["deviation"])
    if not isinstance(task, Classification):
        parser.error("the recipe is not one for classification")
    compiled = compilation.wanted(task) and compilation.prepare(task, lambda text: print(text, file=sys.stderr))
    bare = "the bare compiled step"
    loops = {"dl7": own_loop(task), bare: bare_loop(task)}
    goals = {bare: OF_THE_BARE_STEP}
    for workers in (0, 2):
        name = f"the usual loop with {workers} workers"
        goals[name] = OF_THE_USUAL_LOOP
        loops[name] = apart(
            usual_loop,
            images=images,
            depth=options.depth,
            classes=len(task.assets["classes"]),
            batch=options.batch,
            workers=workers,
            on=runtime.device,
        )
    facts = {"depth": options.depth, "batch": options.batch, "compiled": compiled, "overrides": options.set}
    compare(loops, options, runtime=runtime, unit="images", goals=goals, **facts)


if __name__ == "__main__":
    main()
