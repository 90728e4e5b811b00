"""CIFAR-10 and CIFAR-100 in the binary files of their authors (Krizhevsky 2009, cs.toronto.edu/~kriz/cifar.html)."""

import functools
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dl7cli.data.columns import Content, Rows, Split
from dl7cli.errors import UserError

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


class _Layout(NamedTuple):
    names: str
    """The file with the name of a class on each line."""
    splits: dict[str, tuple[str, ...]]
    classes: int
    label_bytes: int
    """Before the pixels of an image; the last of them is the class."""

    def is_of(self, folder: Path) -> bool:
        files = (name for names in self.splits.values() for name in names)
        return (folder / self.names).is_file() and any((folder / name).is_file() for name in files)


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_LAYOUTS = (
    _Layout(
        "batches.meta.txt", {"train": tuple(f"{name}.bin" for name in _BATCHES), "test": ("test_batch.bin",)}, 10, 1
    ),
    _Layout("fine_label_names.txt", {"train": ("train.bin",), "test": ("test.bin",)}, 100, 2),
)
_PICKLES = ((*_BATCHES, "test_batch", "batches.meta"), ("train", "test", "meta"))


def is_cifar(folder: Path) -> bool:
    """Tell by the names of its files whether a folder is in the binary layout.

    Raises UserError for the layout for Python, which is of pickles.
    """
    if any(layout.is_of(folder) for layout in _LAYOUTS):
        return True
    if any(all((folder / name).is_file() for name in names) for names in _PICKLES):
        raise UserError(
            f"`{folder}` holds CIFAR as Python pickles, which may run any program when they are read",
            hint="give the folder of the binary version, `cifar-10-batches-bin` or `cifar-100-binary`",
        )
    return False


def read_cifar(folder: Path) -> Content:
    """Read a folder in the binary layout, of CIFAR-100 the fine labels.

    Raises UserError where a file is missing or damaged, and OSError where one cannot be read.
    """
    layout = next(layout for layout in _LAYOUTS if layout.is_of(folder))
    text = (folder / layout.names).read_text(encoding="utf-8", errors="replace")
    classes = tuple(filter(None, map(str.strip, text.splitlines())))
    if len(classes) != layout.classes:
        raise UserError(f"`{folder / layout.names}` is damaged: it names {len(classes)} classes of {layout.classes}")
    return Content({split: _split(folder, files, layout) for split, files in layout.splits.items()}, classes)


def _split(folder: Path, names: tuple[str, ...], layout: _Layout) -> Split:
    parts = [(folder / name, _records(folder / name, layout)) for name in names]
    labels = [label for _, records in parts for label in records[:, layout.label_bytes - 1].tolist()]
    return Split(labels, functools.partial(_images, parts, layout))


def _records(path: Path, layout: _Layout) -> npt.NDArray[np.uint8]:
    """The images of a file, mapped from disk, with their labels before them: (N, label bytes and pixels)."""
    if not path.is_file():
        raise UserError(f"there is no file `{path}`, which is a part of CIFAR", hint="unpack the whole archive again")
    width = layout.label_bytes + _PIXELS
    size = os.path.getsize(path)
    if size == 0 or size % width:
        raise UserError(f"`{path}` is damaged: {size:,} bytes are not images of {width:,} bytes each")
    records = np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, width)
    if (greatest := int(records[:, layout.label_bytes - 1].max())) >= layout.classes:
        raise UserError(f"`{path}` is damaged: it has label {greatest}, and there are {layout.classes} classes")
    return records


def _images(parts: list[tuple[Path, npt.NDArray[np.uint8]]], layout: _Layout) -> Rows:
    """Each image, whose colours follow one another, with where it is."""
    for path, records in parts:
        for number, record in enumerate(records):
            colours = record[layout.label_bytes :].reshape(3, _SIDE, _SIDE)
            yield f"image {number} of `{path}`", np.ascontiguousarray(colours.transpose(1, 2, 0))
