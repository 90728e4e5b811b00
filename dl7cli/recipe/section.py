"""What the recipes of every task share: tables with no unknown keys, training and the optimiser."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class Section(BaseModel):
    """One table of a recipe: frozen, and any key it does not know is an error.

    What stands below a key here is what `dl7 recipes show --explain` says of it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _writable(text: str) -> str:
    if re.search("[\0\ud800-\udfff]", text):
        raise ValueError("it must be text in UTF-8, without NUL")
    return text


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("it must be one line of characters that can be seen")
    return name


Text = Annotated[str, AfterValidator(_writable)]
"""What a recipe's file can hold: other bytes come from a command line, and NUL is in no name of a file."""
Name = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_printable)]
"""What a recipe is called, and its runs after it."""
Fraction = Annotated[float, Field(ge=0, lt=1)]
Width = Annotated[int, Field(ge=1, le=1 << 20)]
"""Of a layer. The bound is only there so that no product of two overflows."""


class Training(Section):
    select: str
    """What the epoch that is kept as `best`, and evaluated, is chosen by; each task has its own."""
    epochs: Annotated[int, Field(ge=1, le=10_000_000)]
    """How many times the training examples are gone through."""
    patience: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """Training ends after so many epochs in a row without a better validation score; 0: after the last of `epochs`.

    The learning rate falls as if it went on to the last.
    """

    @field_validator("patience")
    @classmethod
    def _something_is_waited_for(cls, patience: int, info: ValidationInfo) -> int:
        if patience and info.data.get("select") == "last":
            raise ValueError("no better epoch is waited for where `training.select` is `last`")
        return patience

    final_split: Literal["test", "validation"] = "test"
    """What is scored when all is trained; `validation` leaves test unread, as where settings are still to be chosen."""
    label_smoothing: Fraction = 0.0
    """The part of the probability that all answers share evenly (Szegedy et al. 2016, §7)."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 10.0
    """A checkpoint is written after every epoch and at least this often; a crash loses that and what writing takes."""
    ema_decay: Fraction = 0.0
    """Validated and used is a moving average of the weights, this much of it the one before; 0: none."""
    keep_last: Annotated[int, Field(ge=0, le=1000)] = 0
    """How many of the last epochs keep a checkpoint for `dl7 average`, each as large on disk as `best`; 0: none."""
    parts: Annotated[int, Field(ge=1, le=1 << 20)] = 1
    """In how many parts a batch is taken, one after the other, so that less memory is needed.

    Their gradients are summed, so that each step is still one of the whole batch; only batch normalisation sees each
    part alone, and dropout draws for each. Above 1 no model is compiled, as that is for whole batches.
    """
    on_oom: Literal["stop", "halve"] = "stop"
    """What happens where the memory is too small for a batch; `halve`: from then on it is taken in twice as many parts.

    As with `parts`. Where the system ends the process instead, or oneDNN crashes, no one can tell.
    """
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What happens where a loss or its gradient is NaN or infinite; `skip`: the step is left out and counted."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """What the first weights, the order of the examples and all that is drawn in training depend on."""


class Optim(Section):
    name: Literal["sgd", "adamw", "muon"]
    """`sgd` is with Nesterov momentum; `muon` is for inner weights, with another for the rest.

    Of a classifier for the filters of all convolutions but the first, with `sgd`; of a translator for the matrices of
    linear and recurrent layers, with `adamw`, which takes those of words.
    """
    learning_rate: Annotated[float, Field(gt=0)]
    """The greatest one, reached at the end of the warm-up."""
    other_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Of `muon`: the rate of the rest; `learning_rate` where it is not given."""
    momentum: Fraction = 0.9
    """Of `sgd` and `muon`; the first beta of `adamw`, beside `muon` too."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Not applied to biases and normalisation parameters, nor by `muon` to filters, whose norm it keeps."""
    schedule: Literal["constant", "linear", "cosine", "step", "one-cycle", "inverse-sqrt"] = "cosine"
    """How the learning rate falls from its greatest value, to zero but for `constant`, `step` and `inverse-sqrt`.

    `step`: by `factor` at each of `milestones`; `one-cycle`: by half a cosine, after rising by half a cosine from a
    25th of the greatest rate, to 1/250,000 of it; `inverse-sqrt`: as one over the square root of the step.
    """
    milestones: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False)] = (0.5, 0.75)
    """Of `step`: parts of all steps, as 32,000 and 48,000 of 64,000 in He et al. 2015."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Of `step`: what the learning rate is multiplied by."""
    warmup: Fraction = 0.05
    """Part of all steps over which the learning rate rises from zero."""
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """Gradients are scaled down to this norm; 0: never."""
