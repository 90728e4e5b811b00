"""Checkpoints: folders of two safetensors files and one JSON file, written whole or not at all.

A folder `last` is written as `last.new` and synced; then `last` is renamed to `last.old` and `last.new` to
`last`, and `last.old` is removed. Wherever that is cut short, `last`, or else `last.old`, is whole.
`checkpoint.json` ends with a digest of itself and holds those of the other files, so that a changed byte
anywhere is found before it is used. There is no pickle in it, and no name in it is imported or evaluated.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import safetensors
import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, contiguous_format

from dl7cli import __version__, files
from dl7cli.errors import UserError
from dl7cli.recipe import Recipe, from_document, to_document

FORMAT = 1
"""Version of the layout: what is written, and the newest that is read."""

_INDEX = "checkpoint.json"
_MODEL = "model.safetensors"
_TRAINING = "training.safetensors"
_LARGEST_INDEX = 1 << 26  # bytes; two vocabularies of the most entries there can be take some three million
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OTHER = "`last` and `best` of a run do not depend on each other: name the other one, or train again"
_EXAMPLE = "a checkpoint is a folder such as `runs/resnet-1/best`"


_Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class Progress(NamedTuple):
    """How far a training has come; all zero before it starts."""

    epoch: _Count = 0
    """Epochs finished."""
    batch: _Count = 0
    """Batches done in the epoch under way."""
    step: _Count = 0
    """Optimiser steps in all."""
    seconds: Annotated[float, Field(ge=0)] = 0.0
    """Training time in all."""
    best: float | None = None
    """The validation score of the epoch kept so far, the best or the last, in the unit of the primary score."""
    best_epoch: _Count | None = None
    """Epochs finished when it was reached."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a training writes and what everything else reads: all of it plain values and tensors."""

    recipe: Recipe
    assets: dict[str, Any]
    """What is needed to use the model without its data; only what JSON can hold."""
    weights: dict[str, Tensor]
    training: dict[str, Tensor]
    """What resuming needs besides: optimiser tensors, random states. Empty where it was not asked for."""
    progress: Progress
    scores: dict[str, float]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    size: _Count
    sha256: str
    aliases: dict[str, str]
    """Names of tensors that are another tensor of the file: tied weights are stored once."""


class _Index(BaseModel):
    """The content of `checkpoint.json` without its digest."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    dl7: str
    """Version of dl7 that wrote it."""
    format: int
    recipe: dict[str, Any]
    progress: Progress
    scores: dict[str, float]
    files: dict[str, _File]
    assets: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that `folder` is at any moment the previous one or this one, whole.

    Tensors may be on any device, have any strides and any dtype known to safetensors; equal views of one
    storage (tied weights) are stored once. Raises UserError where the disk is full or may not be written;
    the previous checkpoint is kept then. Raises ValueError for assets or scores that JSON cannot hold, such
    as NaN.
    """
    entries, contents = {}, {}
    for name, tensors in ((_MODEL, checkpoint.weights), (_TRAINING, checkpoint.training)):
        own, aliases = _untied(tensors)
        contents[name] = safetensors.torch.save(_alone(own))
        digest = hashlib.sha256(contents[name]).hexdigest()
        entries[name] = {"size": len(contents[name]), "sha256": digest, "aliases": aliases}
    contents[_INDEX] = _signed(
        {
            "dl7": __version__,
            "format": FORMAT,
            "recipe": to_document(checkpoint.recipe),
            "progress": checkpoint.progress._asdict(),
            "scores": checkpoint.scores,
            "files": entries,
            "assets": checkpoint.assets,
        }
    )
    new, old = _beside(folder, ".new"), _beside(folder, ".old")
    try:
        _clear(folder, new, old)
        new.mkdir()  # not its parents: where the run has been removed, part of it would come back
        for name, content in contents.items():
            _write(new / name, content)
        _sync_folder(new)
        _swap(folder, new, old)
    except OSError as error:
        needed = sum(map(len, contents.values()))
        shutil.rmtree(new, ignore_errors=True)
        raise _cannot_write(folder, error, needed) from error
    # The new checkpoint is in place. Whatever keeps the old one from going (a reader, over NFS) is
    # no reason to stop a training: the next save tries again.
    remove(old)


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in main memory, of which nothing changes when the tensors do; tied weights stay tied."""
    own, aliases = _untied(tensors)
    copies = {name: _copy(tensor) for name, tensor in own.items()}
    return copies | {alias: copies[name] for alias, name in aliases.items()}


def load(folder: Path, *, training: bool = False) -> Checkpoint:
    """Read a checkpoint and check every byte of it; `training` asks for the tensors that only resuming needs.

    Tensors are on the CPU; tied ones come back as one tensor under several names. Where `folder` is missing
    because a save was killed while it swapped folders, the previous checkpoint is read. Raises UserError,
    with the file and the reason, for anything that is not a whole checkpoint in a format known here.
    """
    for _ in range(5):
        before = _identity(folder)
        try:
            return _read(folder, training)
        except UserError:
            # Only where a training has put a new checkpoint in place meanwhile is it worth trying again.
            if _identity(folder) == before:
                raise
    return _read(folder, training)


def remove(folder: Path) -> None:
    """Remove a checkpoint. Killed meanwhile, it leaves the whole checkpoint or a folder that is none.

    What keeps it from going (a reader, over NFS) is no reason to stop a training: whoever asks again goes on with it.
    """
    with contextlib.suppress(OSError):
        if folder.is_symlink():  # what lies there is not of this run
            folder.unlink()
            return
        (folder / _INDEX).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _read(folder: Path, training: bool) -> Checkpoint:
    old = _beside(folder, ".old")
    if _identity(folder) is None and _identity(old) is not None:
        folder = old
    index = _read_index(folder)
    try:
        recipe = from_document(index.recipe, origin=f"the recipe in `{folder / _INDEX}`")
    except UserError as error:
        hint = f"dl7 {index.dl7} wrote it and this is {__version__}: use that version, or train again"
        raise UserError(error.message, hint) from None
    return Checkpoint(
        recipe=recipe,
        assets=index.assets,
        weights=_read_tensors(folder / _MODEL, index),
        training=_read_tensors(folder / _TRAINING, index) if training else {},
        progress=index.progress,
        scores=index.scores,
    )


def _read_index(folder: Path) -> _Index:
    path = folder / _INDEX
    try:
        content = _content(path, _LARGEST_INDEX)
    except (FileNotFoundError, NotADirectoryError):
        if _identity(folder) is None:
            hint = "`dl7 runs list` shows the runs and what they hold"
            raise UserError(f"there is no checkpoint `{folder}`", hint) from None
        raise UserError(f"`{folder}` is not a checkpoint: it has no `{_INDEX}`", _EXAMPLE) from None
    except OSError as error:
        raise _cannot_read(path, error) from error
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested without end
        raise UserError(f"`{path}` is damaged: it is not whole JSON", _OTHER) from None
    version = document.get("format") if isinstance(document, dict) and "dl7" in document else None
    if type(version) is not int or version < 1:
        raise UserError(f"`{path}` was not written by dl7", _EXAMPLE)
    if version > FORMAT:
        message = f"`{path}` was made by a newer dl7 (format {version}, this one reads up to {FORMAT})"
        raise UserError(message, hint="upgrade dl7 to read it")
    document.pop("sha256", None)
    try:
        whole = _signed(document) == content
    except (ValueError, RecursionError):  # a value that is never written, such as NaN
        whole = False
    if not whole:
        raise UserError(f"`{path}` is damaged: its content does not match its digest", _OTHER)
    try:
        return _Index.model_validate(document)
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise UserError(f"`{path}` is no checkpoint of format {version}: `{key}` is wrong", _OTHER) from None


def _read_tensors(path: Path, index: _Index) -> dict[str, Tensor]:
    """The tensors of one file; the bytes that are hashed are those that are parsed."""
    expected = index.files.get(path.name)
    if expected is None:
        raise UserError(f"`{path.with_name(_INDEX)}` names no file `{path.name}`", _OTHER)
    try:
        content = _content(path, expected.size)
    except FileNotFoundError:
        raise UserError(f"the checkpoint is not whole: `{path}` is missing", _OTHER) from None
    except OSError as error:
        raise _cannot_read(path, error) from error
    if len(content) != expected.size:
        sizes = f"{len(content)} bytes instead of {expected.size}"
        raise UserError(f"`{path}` is damaged: it has {sizes}", _OTHER)
    if hashlib.sha256(content).hexdigest() != expected.sha256:
        raise UserError(f"`{path}` is damaged: its content does not match its digest", _OTHER)
    try:
        tensors = safetensors.torch.load(content)
        return tensors | {alias: tensors[name] for alias, name in expected.aliases.items()}
    # KeyError: an unknown dtype or alias; RuntimeError: a shape with a zero and more than torch can multiply.
    except (safetensors.SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"`{path}` is not a whole safetensors file: {error}", _OTHER) from None


def _content(path: Path, most: int) -> bytes:
    """The bytes of a file, as far as it is one and has no more than these; raises OSError and UserError."""
    size = files.size(path)
    if size > most:
        raise UserError(f"`{path}` is damaged: it has {size} bytes, more than {most}", _OTHER)
    try:
        return path.read_bytes()
    except MemoryError:
        raise UserError(f"`{path}` does not fit in memory: it has {size} bytes", _OTHER) from None


def _untied(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each view of a storage once; its other names, with that one."""
    own: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        known = first.setdefault(view, name)
        if known == name:
            own[name] = tensor
        else:
            aliases[name] = known
    return own, aliases


def _alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, each in a storage of its own, as safetensors wants them: those that are not, copied."""
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())

    def is_alone(tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
        return whole and tensor.device.type == "cpu" and users[storage.data_ptr()] == 1

    return {name: tensor if is_alone(tensor) else _copy(tensor) for name, tensor in tensors.items()}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=contiguous_format)


def _signed(document: dict[str, Any]) -> bytes:
    """The bytes of `checkpoint.json`: a function of its values, the last being a digest of the others."""
    body = json.dumps(document, indent=1, allow_nan=False)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return (json.dumps({**document, "sha256": digest}, indent=1, allow_nan=False) + "\n").encode()


def _beside(folder: Path, suffix: str) -> Path:
    return folder.parent / (folder.name + suffix)


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells one folder at this path from the next one."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _clear(folder: Path, new: Path, old: Path) -> None:
    """Remove what a killed save has left, except for the only whole checkpoint."""
    if old.exists() and not folder.exists():
        folder.unlink(missing_ok=True)  # a link that leads nowhere
        old.rename(folder)
    for path in (new, old):
        if path.is_symlink():  # what lies there is not of this run
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems know no sync of a folder
            raise
    finally:
        os.close(descriptor)


def _swap(folder: Path, new: Path, old: Path) -> None:
    """Put `new` in the place of `folder`, which becomes `old`; where that fails, `folder` is what it was."""
    had = os.path.lexists(folder)  # a link too, wherever it leads
    if had:
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if had:
            old.rename(folder)
        raise
    _sync_folder(folder.parent)


def _cannot_write(folder: Path, error: OSError, needed: int) -> UserError:
    message = f"cannot write checkpoint `{folder}`: {files.reason(error)}"
    if error.errno not in _FULL:
        return UserError(message, hint=f"check that `{folder.parent}` is a folder you may write to")
    place = next(path for path in folder.absolute().parents if path.exists())
    free = shutil.disk_usage(place).free
    sizes = f"it needs {needed / 1e6:.1f} MB beside the previous one and {free / 1e6:.1f} MB are free"
    return UserError(message, hint=f"{sizes}: make room, then `dl7 train --resume`")


def _cannot_read(path: Path, error: OSError) -> UserError:
    return UserError(f"`{path}` cannot be read: {files.reason(error)}", hint="check that you may read it")
