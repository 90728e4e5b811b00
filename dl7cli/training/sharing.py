"""What the first of several workers has read, on all of them: the others need neither its files nor its run folder."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from dl7cli import tasks
from dl7cli.checkpoint import Checkpoint, Progress
from dl7cli.data.sources import Progress as ProgressCall
from dl7cli.device import Runtime
from dl7cli.distributed import Workers
from dl7cli.errors import UserError
from dl7cli.recipe import Recipe, from_document, to_document
from dl7cli.tasks import Task


def share_recipe(recipe: Recipe | None, workers: Workers) -> Recipe:
    """The recipe that the first worker gives."""
    if workers.count > 1:
        document = workers.shared(to_document(recipe) if recipe is not None else None)
        return from_document(document, origin="the recipe")
    assert recipe is not None
    return recipe


def build(
    recipe: Recipe,
    assets: dict[str, Any] | None,
    *,
    runtime: Runtime,
    offline: bool,
    progress: ProgressCall,
    weights: Mapping[str, Tensor] | None = None,
) -> Task:
    """`tasks.build` on all workers, with the first one's assets. Raises UserError where they have not the same data."""
    workers = runtime.workers
    make = partial(tasks.build, runtime=runtime, offline=offline, progress=progress, weights=weights)
    task = None
    with workers.preparing("data of the first"):  # fetched, decoded, learnt from: it may take its time
        if workers.first:
            task = make(recipe, assets)
    assets = workers.shared(task.assets if task is not None else None)
    with workers.preparing("data of all"):
        if task is None:
            task = make(recipe, assets)
        own = [task.digest, task.digest_of("test")] if workers.count > 1 else None
    # Made of data that only the first has read, perhaps.
    workers.copy_first(task.model.state_dict().values())
    digests = workers.gathered(own)
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise UserError(
            f"`{task.data_name}` is not the same on workers 0 and {other}", hint="give every node a copy of the same"
        )
    return task


def share(saved: Checkpoint | None, workers: Workers) -> Checkpoint:
    """The checkpoint that the first worker has read."""
    if workers.count == 1:
        assert saved is not None
        return saved
    plain = None
    if saved is not None:
        plain = [to_document(saved.recipe), saved.assets, saved.progress, saved.scores]
    recipe, assets, progress, scores = workers.shared(plain)
    weights = workers.shared_tensors(saved.weights if saved is not None else {})
    training = workers.shared_tensors(saved.training if saved is not None else {})
    return Checkpoint(
        from_document(recipe, origin="the recipe"), assets, weights, training, Progress(*progress), scores
    )
