"""The training loop: a generator of reports. It knows no disk and no console; its reader saves and prints."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dl7cli.checkpoint import Progress
from dl7cli.device import random_state, restore_random_state
from dl7cli.errors import UserError
from dl7cli.metrics import Scores
from dl7cli.tasks import Task
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


@dataclass(frozen=True)
class Trainer:
    """What changes while training, besides the model itself."""

    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None

    @classmethod
    def of(cls, task: Task) -> "Trainer":
        scaler = torch.amp.GradScaler(task.runtime.device.type, enabled=task.runtime.precision == "fp16")
        decay = task.recipe.training.ema_decay
        average = WeightAverage(task.model, decay) if decay else None
        return cls(build_optimiser(task.model, task.recipe.optim), scaler, average)

    def weights(self, task: Task) -> dict[str, Tensor]:
        """The weights to validate, to keep as best and to use: the moving average where there is one."""
        return task.model.state_dict() if self.average is None else self.average.weights

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """Everything that resuming needs besides the weights, as named tensors."""
        scale = {f"scaler.{name}": torch.tensor(float(value)) for name, value in self.scaler.state_dict().items()}
        average = {} if self.average is None else self.average.weights
        averaged = {f"average.{name}": value for name, value in average.items()}
        return {**optimiser_tensors(self.optimiser), **averaged, **random_state(device), **scale}

    def restore(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Put back what `tensors` gave; raises UserError for anything else."""
        try:
            self._restore(tensors, device)
        except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(
                f"the training state of the checkpoint does not fit its recipe: {str(error).splitlines()[0]}",
                hint="it was changed by hand or made by another version of dl7: train again",
            ) from error

    def _restore(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        restore_optimiser(self.optimiser, tensors)
        if self.scaler.is_enabled() and "scaler.scale" in tensors:
            state = self.scaler.state_dict()
            self.scaler.load_state_dict(
                {name: type(value)(tensors[f"scaler.{name}"].item()) for name, value in state.items()}
            )
        if self.average is not None:
            for name, value in self.average.weights.items():
                value.copy_(tensors[f"average.{name}"])
        restore_random_state(tensors, device)


def total_steps(task: Task) -> int:
    """Optimiser steps of the whole training."""
    return sum(task.steps(epoch) for epoch in range(task.recipe.training.epochs))


def fit(task: Task, trainer: Trainer, *, start: Progress) -> Iterator[Report]:
    """Train from `start` to the recipe's last epoch; yields after every step and after the validation of every epoch.

    A caller may save at any report and go on later from its `progress`: the result is the same. Raises UserError where
    the loss or the gradient is not finite, before the weights are touched (on a GPU up to 50 steps later).
    """
    training, optim = task.recipe.training, task.recipe.optim
    optimiser, scaler = trainer.optimiser, trainer.scaler
    parameters = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    on_cpu = task.runtime.device.type == "cpu"
    steps = total_steps(task)
    progress = start
    loss = norm = torch.zeros(())
    # A run may be resumed between the last step of an epoch and its validation, which then reports this.
    rate = learning_rate(optim, max(progress.step - 1, 0), steps)
    for epoch in range(start.epoch, training.epochs):
        task.model.train()
        first = progress.batch
        for number, batch in enumerate(task.batches(epoch, first), start=first + 1):
            rate = learning_rate(optim, progress.step, steps)
            for group in optimiser.param_groups:
                group["lr"] = rate * group["share"]
            total, examples = task.loss(batch)  # type: ignore[arg-type]  # a task is given its own batches
            mean = total / examples
            optimiser.zero_grad(set_to_none=True)
            scaler.scale(mean).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimiser)
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            loss = mean.detach()
            if on_cpu or progress.step % STEPS_BETWEEN_CHECKS == 0:
                check_finite(loss, norm, progress.step + 1, rate, scaled=scaler.is_enabled())
            if optim.clip_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, optim.clip_norm, norm)
            scaler.step(optimiser)
            scaler.update()
            progress = progress._replace(batch=number, step=progress.step + 1)
            if trainer.average is not None:
                trainer.average.update(progress.step)
            yield Report(progress, loss, norm, rate, examples)
        check_weights(task.model, loss, norm, progress.step, rate)
        with swapped(task.model, trainer.weights(task)):
            scores = task.validate()
        progress = progress._replace(epoch=epoch + 1, batch=0)
        if progress.best is None or scores.score > progress.best:
            progress = progress._replace(best=scores.score, best_epoch=epoch + 1)
        yield Report(progress, loss, norm, rate, 0, scores)


def check_finite(loss: Tensor, norm: Tensor, step: int, rate: float, *, scaled: bool = False) -> None:
    """Raise UserError where the loss, or a gradient that no scaler will mend, is NaN or infinite."""
    if not math.isfinite(loss.item()) or not (scaled or math.isfinite(norm.item())):
        raise _diverged(f"the loss is not finite at step {step}", loss, norm, rate)


def check_weights(model: nn.Module, loss: Tensor, norm: Tensor, step: int, rate: float) -> None:
    """Raise UserError where a weight or a running statistic is NaN or infinite after step `step`, the one reported.

    The last step before a checkpoint or a validation may have made them so, and no loss has been seen since.
    """
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise _diverged(f"the weights are not finite after step {step}", loss, norm, rate)


def _diverged(what: str, loss: Tensor, norm: Tensor, rate: float) -> UserError:
    return UserError(
        f"{what}: loss {loss.item():.4g}, learning rate {rate:.4g}, gradient norm {norm.item():.4g}",
        hint="lower `--set optim.learning_rate=…` or set `--set optim.clip_norm=1.0`",
    )
