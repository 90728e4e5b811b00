"""What comes out of a checkpoint, checked before it is used: it may have been made to do harm, or by another dl7."""

import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from dl7cli.errors import UserError
from dl7cli.models.outline import outline

_HINT = "it was changed by hand or made by another version of dl7: train again"
Network = TypeVar("Network", bound=nn.Module)


class _Assets(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    training_examples: Annotated[int, Field(ge=0)] = 0
    data_digest: str = ""


class ImageAssets(_Assets):
    """What a classifier needs besides its weights."""

    classes: Annotated[list[str], Field(min_length=1, max_length=1 << 16)]
    mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    deviation: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
    image_size: Annotated[int, Field(ge=1, le=512)]


class PairAssets(_Assets):
    """What a translator needs besides its weights; the vocabularies check themselves."""

    vocabulary: dict[str, Any]
    target_vocabulary: dict[str, Any] = {}
    source_language: str
    target_language: str


def check_assets(assets: dict[str, Any], schema: type[_Assets]) -> None:
    """Raise UserError, with the first mistake, where the assets are not those of a checkpoint of that kind."""
    try:
        schema.model_validate(assets)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        reason = first["msg"][:1].lower() + first["msg"][1:]
        raise UserError(f"`{key}` of the checkpoint's assets is wrong: {reason}", _HINT) from None


def built(make: Callable[[], Network], seed: int, weights: Mapping[str, Tensor] | None) -> Network:
    """Make a network with these weights or, without any, fresh from a seed; first one without values, to see its size.

    Raises UserError where the `weights` are of another network, or, without any, where the machine has not the memory.
    """
    with outline():
        empty = make().state_dict()
    if weights is None:
        _refuse_larger_than_memory(empty)
    else:
        refuse_other_weights(empty, weights)
    torch.manual_seed(seed)
    network = make()
    if weights is not None:
        network.load_state_dict(weights)
    return network


def refuse_other_weights(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raise UserError where names, shapes or types of the weights are not the expected ones, or one is not finite."""
    if missing := expected.keys() - weights.keys():
        raise _misfit(f"`{min(missing)}` is missing")
    if unknown := weights.keys() - expected.keys():
        raise _misfit(f"`{min(unknown)}` is in no such model")
    for name, value in expected.items():
        seen = weights[name]
        if (seen.shape, seen.dtype) != (value.shape, value.dtype):
            raise _misfit(f"`{name}` is {_kind(seen)} and not {_kind(value)}")
        if not seen.isfinite().all():
            raise UserError(f"the weights of the checkpoint are not all numbers: `{name}` is not finite", _HINT)


def _refuse_larger_than_memory(model: Mapping[str, Tensor]) -> None:
    size = sum(value.numel() * value.element_size() for value in model.values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise UserError(
            f"the weights of this model would take {size / 1e9:,.1f} GB, and this machine has {memory / 1e9:,.1f} GB",
            hint="lower the widths or the depth of `model`",
        )


def _misfit(what: str) -> UserError:
    return UserError(f"the weights of the checkpoint do not fit its recipe: {what}", _HINT)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape)) or 'number'}"
