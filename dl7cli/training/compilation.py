"""Whether a classifier's training is compiled, and compiling it.

A resumed run must end in the bits of the run never stopped, and compiled arithmetic rounds in another order. So whether
it is compiled is decided once, from all that the run will do and not from where it stands; the caller keeps the answer.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from dl7cli.recipe import ResNetModel
from dl7cli.tasks import Task
from dl7cli.tasks.classification import Classification


class Cost(NamedTuple):
    """What compiling a ResNet-20 for batches of 128 images of 32x32 takes and saves.

    Compilation and steps both take longer the deeper the network, so that the same number of images is taken to repay
    any depth.
    """

    seconds: float
    """To compile forward and backward."""
    rate: float
    """Training images per second without compilation."""
    saving: float
    """Part of a step's time that compilation saves."""


COSTS = {
    # Measured on two cores of an AMD EPYC (Zen 4), bf16: 5 to 10 % faster, of which the lower counts. 306,000 images,
    # which is 7 epochs of CIFAR-10, repay it.
    "cpu": Cost(18, 850, 0.05),
    # An estimate, not measured: steps this small wait for the launch of kernels, of which there are fewer.
    "cuda": Cost(40, 10_000, 0.2),
}


def wanted(task: Task) -> bool:
    """Whether the recipe asks for compilation, or leaves it open and the run's steps repay it."""
    if not isinstance(task, Classification):
        return False
    training = task.recipe.training
    if training.parts > 1 or meets_in_layers(task):  # each part is of another size
        return False
    if training.compile != "auto":
        return training.compile == "always"
    model = task.recipe.model
    if not isinstance(model, ResNetModel) or model.survival < 1 or model.checkpointing or training.small_size:
        # Images of two sizes would be compiled for twice. What each step leaves out, or computes again, breaks the
        # graph into pieces; and compiled by torch 2.13 for a CPU the other kind of network has gradients that are not
        # finite.
        return False
    images = task.splits()["train"]
    whole = images - images % min(images, training.batch_size)
    return repays(training.epochs * whole, task.assets["image_size"], task.runtime.device.type)


def meets_in_layers(task: Task) -> bool:
    """Whether workers meet in a classifier's layers, where one that cannot compile would leave the others waiting."""
    if not isinstance(task, Classification):
        return False
    return task.recipe.training.batch_norm == "sync" and task.runtime.workers.count > 1


def repays(images: int, image_size: int, device: str) -> bool:
    """Whether training on so many images of `image_size` pixels a side saves more time than compilation takes."""
    cost = COSTS.get(device)
    if cost is None:
        return False
    return images * (image_size / 32) ** 2 / cost.rate * cost.saving > cost.seconds


def prepare(task: Task, note: Callable[[str], None]) -> bool:
    """Compile the task's model, telling `note` when that begins and ends.

    False where it cannot be done; `note` is told why, and training goes on without: a missing compiler is no reason
    not to train.
    """
    if not isinstance(task, Classification):
        return False
    note("compiling the model …")
    begin = time.monotonic()
    try:
        task.compile()
    except Exception as problem:  # torch names no type for what may go wrong between it, a compiler and a disk
        note(f"the model cannot be compiled here, and is trained as it is: {reason(problem)}")
        return False
    note(f"compiled the model in {time.monotonic() - begin:.0f} s")
    return True


def reason(problem: Exception) -> str:
    """The first line of what torch says, which goes on with advice to its own developers."""
    lines = [line.strip() for line in str(problem).splitlines()]
    return next((line for line in lines if line), type(problem).__name__)
