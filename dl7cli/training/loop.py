"""The training loop: a generator of reports. It knows no disk and no console; its reader saves and prints."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dl7cli.checkpoint import Progress
from dl7cli.cluster import FULL
from dl7cli.device import out_of_memory, random_state, release_memory, restore_random_state, seed_of, trim_heap
from dl7cli.distributed import Lost
from dl7cli.errors import UserError
from dl7cli.metrics import Scores
from dl7cli.recipe import Training
from dl7cli.tasks import Task
from dl7cli.training.exchange import meeting
from dl7cli.training.optimisation import (
    WeightAverage,
    build_optimiser,
    learning_rate,
    optimiser_tensors,
    restore_optimiser,
    swapped,
)

STEPS_BETWEEN_CHECKS = 50
"""On a GPU, how often the loss is looked at: each look makes the processor wait for the device."""
LEAST_SCALE = 2.0**-14
"""Of the loss in fp16, from 2^16 on: halved thirty times more often than it has grown, it mends nothing."""


_PARTS = "parts"
"""What workers remember for those in their place: how much memory there is."""


class Report(NamedTuple):
    """What one step, or the validation after an epoch, has brought."""

    progress: Progress
    loss: Tensor
    """Mean over the examples of the step, on the device."""
    gradient_norm: Tensor
    """Before clipping, on the device."""
    learning_rate: float
    examples: int
    """Images or target tokens of the step."""
    scores: Scores | None = None
    """Of validation, after an epoch."""


@dataclass
class Trainer:
    """What changes while training, besides the model itself."""

    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    skipped: Tensor
    """() int64, on the device: steps left out because they were not finite."""
    parts: int
    """In how many parts a batch is taken, more than the recipe says where the memory was too small."""

    @classmethod
    def of(cls, task: Task) -> "Trainer":
        scaler = torch.amp.GradScaler(task.runtime.device.type, enabled=task.runtime.precision == "fp16")
        decay = task.recipe.training.ema_decay
        average = WeightAverage(task.model, decay) if decay else None
        skipped = torch.zeros((), dtype=torch.int64, device=task.runtime.device)
        return cls(build_optimiser(task.model, task.recipe.optim), scaler, average, skipped, task.recipe.training.parts)

    def weights(self, task: Task) -> dict[str, Tensor]:
        """The weights to validate, to keep as best and to use: the moving average where there is one."""
        return task.model.state_dict() if self.average is None else self.average.weights

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """Everything that resuming needs besides the weights, as named tensors."""
        scale = {f"scaler.{name}": torch.tensor(float(value)) for name, value in self.scaler.state_dict().items()}
        average = {} if self.average is None else self.average.weights
        averaged = {f"average.{name}": value for name, value in average.items()}
        counts = {"skipped": self.skipped, "parts": torch.tensor(self.parts)}
        return {**optimiser_tensors(self.optimiser), **averaged, **random_state(device), **scale, **counts}

    def restore(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Put back what `tensors` gave; raises UserError for anything else."""
        try:
            restore_optimiser(self.optimiser, tensors)
            if self.scaler.is_enabled() and "scaler.scale" in tensors:
                state = self.scaler.state_dict()
                self.scaler.load_state_dict(
                    {name: type(value)(tensors[f"scaler.{name}"].item()) for name, value in state.items()}
                )
            if self.average is not None:
                for name, value in self.average.weights.items():
                    value.copy_(tensors[f"average.{name}"])
            if "parts" in tensors:
                self.parts = int(tensors["parts"])
                self.skipped.copy_(tensors["skipped"])
            restore_random_state(tensors, device)
        except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(
                f"the training state of the checkpoint does not fit its recipe: {str(error).splitlines()[0]}",
                hint="it was changed by hand or made by another version of dl7: train again",
            ) from error


def total_steps(task: Task) -> int:
    """Optimiser steps of the whole training."""
    return sum(task.steps(epoch) for epoch in range(task.recipe.training.epochs))


def finished(training: Training, progress: Progress) -> bool:
    """Whether a training that has come so far is over: it has had all its epochs, or its patience is at an end."""
    in_vain = 0 if progress.best_epoch is None else progress.epoch - progress.best_epoch
    return progress.epoch >= training.epochs or 0 < training.patience <= in_vain


def fit(task: Task, trainer: Trainer, *, start: Progress) -> Iterator[Report]:
    """Train from `start` until it is `finished`; yields after every step and after the validation of every epoch.

    Of several workers each calls this, and all get the same reports. Dropout and the like draw, on the first, from the
    stream that a training alone has; on any other from one that begins anew in every step, so that it need not be kept.

    A caller may save at any report and go on later from its `progress`: the result is the same. Raises UserError where
    the loss or the gradient is not finite, before the weights are touched (on a GPU up to 50 steps later), and where
    memory runs out, unless the recipe has another way with these.
    """
    training, optim = task.recipe.training, task.recipe.optim
    workers = task.runtime.workers
    loss_of: Callable[[Any], tuple[Tensor, int]] = task.loss if workers.count == 1 else meeting(task)
    trainer.parts = max(trainer.parts, workers.greatest(int(workers.recall(_PARTS) or 1)))
    parameters = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    guarded = training.on_nonfinite == "skip" or training.on_oom == "halve"
    buffers = _Buffers(task.model) if guarded else None
    steps = total_steps(task)
    progress = start
    loss = norm = torch.zeros(())
    # A run may be resumed between the last step of an epoch and its validation, which then reports this.
    rate = learning_rate(optim, max(progress.step - 1, 0), steps)
    while not finished(training, progress):
        epoch, first = progress.epoch, progress.batch
        task.model.train()
        for number, batch in enumerate(task.batches(epoch, first), start=first + 1):
            rate = learning_rate(optim, progress.step, steps)
            for group in trainer.optimiser.param_groups:
                group["lr"] = rate * group["share"]
            if not workers.first:
                torch.manual_seed(seed_of(training.seed, workers.rank, progress.step))
            if buffers is not None:
                buffers.keep()
            loss, examples = _gradient(task, trainer, batch, buffers, loss_of)
            loss = workers.add(loss)
            norm, skipped = _judged(task, trainer, loss, buffers, progress.step, rate)
            if optim.clip_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, optim.clip_norm, norm)
            _step(task, trainer)
            progress = progress._replace(batch=number, step=progress.step + 1)
            if trainer.average is not None:
                trainer.average.update(progress.step, skipped)
            yield Report(progress, loss, norm, rate, examples)
        check_weights(task.model, loss, norm, progress.step, rate)
        # Running statistics may be of the part that each has seen.
        workers.copy_first(trainer.weights(task).values())
        with swapped(task.model, trainer.weights(task)):
            scores = task.validate()
        trim_heap()
        progress = progress._replace(epoch=epoch + 1, batch=0)
        if training.select == "last" or progress.best is None or scores.score > progress.best:
            progress = progress._replace(best=scores.score, best_epoch=epoch + 1)
        yield Report(progress, loss, norm, rate, 0, scores)


def _judged(
    task: Task, trainer: Trainer, loss: Tensor, buffers: "_Buffers | None", step: int, rate: float
) -> tuple[Tensor, Tensor | None]:
    """The norm of the gradient, which is left unscaled, and whether the step is to be left out, where some may be.

    Raises UserError where the loss or the gradient is not finite and no step may be left out, on a GPU now and then.
    """
    optimiser, scaler = trainer.optimiser, trainer.scaler
    gradients = [one.grad for one in task.model.parameters() if one.requires_grad and one.grad is not None]
    skipping = task.recipe.training.on_nonfinite == "skip"
    if skipping and scaler.is_enabled():
        # A scaler goes by the gradient, which may be finite where the loss is not.
        gradients[0].add_(0 * loss)
    scaler.unscale_(optimiser)
    norm = torch.nn.utils.get_total_norm(gradients)
    looked_at = task.runtime.device.type == "cpu" or step % STEPS_BETWEEN_CHECKS == 0
    if looked_at and scaler.is_enabled() and scaler.get_scale() < LEAST_SCALE:
        told = f"no gradient has been finite for long by step {step + 1}"
        raise _diverged(told, loss, norm, rate, ", or train with another `--precision`")
    if skipping:
        assert buffers is not None
        # Told by the device to the device: the processor does not wait for it.
        # With a scaler, which leaves out the steps of gradients that overflow, the loss alone tells.
        skipped = ~(loss if scaler.is_enabled() else torch.stack((loss, norm))).isfinite().all()
        buffers.restore(skipped)
        trainer.skipped += skipped
        optimiser.found_inf = skipped.float()  # type: ignore[attr-defined]
        return norm, skipped
    if looked_at:
        check_finite(loss, norm, step + 1, rate, scaled=scaler.is_enabled(), model=task.model)
    return norm, None


def _step(task: Task, trainer: Trainer) -> None:
    try:
        trainer.scaler.step(trainer.optimiser)
    except Exception as problem:  # the first step makes what the optimiser keeps of each weight
        if not out_of_memory(problem):
            raise
        raise UserError(
            "out of memory for what the optimiser keeps of each weight",
            hint=f"lower `--set training.{task.batch_key}=…` or the model",
        ) from problem
    trainer.scaler.update()


class _Buffers:
    """A model's running statistics as they were before a step, which a step that is not taken must leave alone."""

    def __init__(self, model: nn.Module) -> None:
        self._own = list(model.buffers())
        self._kept = [buffer.clone() for buffer in self._own]

    def keep(self) -> None:
        for kept, buffer in zip(self._kept, self._own, strict=True):
            kept.copy_(buffer)

    def restore(self, where: Tensor | None = None) -> None:
        """Put back what was kept; with `where`, (), only if it is true, which the processor does not wait to know."""
        for kept, buffer in zip(self._kept, self._own, strict=True):
            buffer.copy_(kept if where is None else torch.where(where, kept, buffer))


def _gradient(
    task: Task, trainer: Trainer, batch: Any, buffers: _Buffers | None, loss_of: Callable[[Any], tuple[Tensor, int]]
) -> tuple[Tensor, int]:
    """Leave the gradient of a batch's mean loss in the parameters; returns that loss, and of how many examples it is.

    Of several workers each returns its share of the loss, by `loss_of`, and is left with the gradient of the whole.

    Where memory runs out and the recipe says `halve`, the batch is taken in twice as many parts, now and from now on,
    as if the attempt had not been. Raises UserError where that is not wanted or does no good any more, and Lost where
    several workers have to start again for it.
    """
    training, workers = task.recipe.training, task.runtime.workers
    halving = training.on_oom == "halve"
    before = random_state(task.runtime.device) if halving else {}
    older = torch.zeros((), requires_grad=True) * 1
    # Batch normalisation needs more than one example.
    most = max(1, len(batch[0]) // 2)
    if trainer.parts > 1:
        most = -workers.greatest(-most)
    while True:
        parts = min(trainer.parts, most)
        try:
            return _summed(task, trainer, batch, parts, loss_of), batch.whole
        except Exception as problem:
            if not out_of_memory(problem):
                raise
            forgetful = workers.count > 1 and workers.memory is None
            if not halving or parts == most or forgetful:
                raise _too_large(task, parts, forgetful) from problem
            if workers.count > 1:  # the others wait for this one's gradient
                halved = min(2 * parts, most)
                workers.remember(_PARTS, str(halved))
                raise Lost(f"{FULL}: a batch is taken in {halved} parts from now on") from problem
        # Out of reach of the exception, which holds on to all that was made on the way. So does torch, on a CPU, to
        # what a backward pass that failed had still to do, until it comes to a node that is older.
        older.backward()  # type: ignore[no-untyped-call]
        older = torch.zeros((), requires_grad=True) * 1
        release_memory(task.runtime.device)
        assert buffers is not None
        buffers.restore()
        restore_random_state(before, task.runtime.device)
        trainer.parts = 2 * parts


def _summed(
    task: Task, trainer: Trainer, batch: Any, parts: int, loss_of: Callable[[Any], tuple[Tensor, int]]
) -> Tensor:
    """Sum the gradient of a batch's mean loss over its parts; returns that loss, or this worker's share of it."""
    trainer.optimiser.zero_grad(set_to_none=True)
    losses = []
    for index in range(parts):
        part: Any = batch if parts == 1 else task.part(batch, index, parts)
        total, _ = loss_of(part)
        mean = total / batch.whole
        # What comes back is the mean of the workers' gradients, of which there is to be the sum.
        trainer.scaler.scale(mean * task.runtime.workers.count).backward()
        losses.append(mean.detach())
    return losses[0] if parts == 1 else torch.stack(losses).sum()


def _too_large(task: Task, parts: int, forgetful: bool) -> UserError:
    size = getattr(task.recipe.training, task.batch_key)
    what = f"out of memory in a training step: `training.{task.batch_key}` is {size:,}"
    lower = f"lower `--set training.{task.batch_key}=…`"
    if task.recipe.training.on_oom == "stop":
        return UserError(what, hint=f"{lower}, or keep it in parts that fit: `--set training.on_oom=halve`")
    if forgetful:
        what = f"{what}, and workers of another launcher cannot start again with a batch in parts"
        return UserError(what, hint=f"{lower}, or let dl7 start them: `--gpus all`, or `--workers N` on a CPU")
    return UserError(f"{what}, and taking a batch in {parts} parts is not enough", hint=f"{lower} or the model")


def check_finite(
    loss: Tensor, norm: Tensor, step: int, rate: float, *, scaled: bool = False, model: nn.Module | None = None
) -> None:
    """Raise UserError where the loss, or a gradient that no scaler will mend, is NaN or infinite; with a model that
    still has that gradient, by the name of the weight that is the first of those where it is.
    """
    finite = math.isfinite(loss.item())
    if not finite or not (scaled or math.isfinite(norm.item())):
        other = ", or leave such steps out: `--set training.on_nonfinite=skip`"
        gradients = {} if model is None else {name: weight.grad for name, weight in model.named_parameters()}
        name = _first_not_finite(gradients) if finite else None
        what = "loss" if not finite else "gradient" if name is None else f"gradient of `{name}`"
        raise _diverged(f"the {what} is not finite at step {step}", loss, norm, rate, other)


def check_weights(model: nn.Module, loss: Tensor, norm: Tensor, step: int, rate: float) -> None:
    """Raise UserError where a weight or a running statistic is NaN or infinite after step `step`, the one reported.

    The last step before a checkpoint or a validation may have made them so, and no loss has been seen since.
    """
    if name := _first_not_finite(model.state_dict()):
        raise _diverged(f"the weights of `{name}` are not finite after step {step}", loss, norm, rate)


def _first_not_finite(tensors: Mapping[str, Tensor | None]) -> str | None:
    """The name of the first of these that has a NaN or an infinity; None where none has."""
    return next((name for name, one in tensors.items() if one is not None and not one.isfinite().all()), None)


def _diverged(what: str, loss: Tensor, norm: Tensor, rate: float, other: str = "") -> UserError:
    return UserError(
        f"{what}: loss {loss.item():.4g}, learning rate {rate:.4g}, gradient norm {norm.item():.4g}",
        hint=f"lower `--set optim.learning_rate=…` or set `--set optim.clip_norm=1.0`{other}",
    )
