"""The images and labels of a source before decoding, and how they are found in tables."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dl7cli.data.sources import listed as _listed
from dl7cli.data.sources import values as _values
from dl7cli.errors import UserError

if TYPE_CHECKING:
    import datasets

_LABEL_NAMES = ("label", "labels", "class", "target")
_MOST_CLASSES = 1 << 16
# Each may be a photograph of many megabytes.
_ROWS_AT_ONCE = 16

Encoded = bytes | str | Path | npt.NDArray[np.uint8]
"""An image as the content of a file, the path of one, or pixels (H, W, 3)."""

Rows = Iterator[tuple[str, Encoded]]
"""Images in order, each with where it is, for messages."""


@dataclass(frozen=True)
class Split:
    """One split before decoding: the labels, and the images in the same order."""

    labels: list[int]
    encoded: Callable[[], Rows]


@dataclass(frozen=True)
class Content:
    """All splits of a source before decoding, the classes in the order of the labels, and notes for the user."""

    splits: dict[str, Split]
    classes: tuple[str, ...]
    notes: list[str] = field(default_factory=list)


def read(source: str, loaded: "dict[str, datasets.Dataset]", image: str | None, label: str | None) -> Content:
    """Find the image and label columns of loaded tables, by type or by the names given, and read and check the labels.

    Columns are those of the first split, classes those of `train` or, without it, of all splits. Raises UserError if a
    column cannot be found or a row has no label or one that is not among the classes.
    """
    import datasets

    first = next(iter(loaded))
    features = loaded[first].features
    listed = ", ".join(f"`{name}` ({kind(feature)})" for name, feature in features.items())
    notes: list[str] = []
    for wanted in (image, label):
        if wanted is not None and wanted not in features:
            raise UserError(f"`{source}` has no column `{wanted}`: there is {listed}")

    candidates = [name for name, feature in features.items() if kind(feature) == "image"]
    if image is None:
        if not candidates:
            raise UserError(f"no image column in `{source}`: there is {listed}", hint="name it: `--set data.image=…`")
        image = next((name for name in ("image", "img") if name in candidates), candidates[0])
        if len(candidates) > 1:
            notes.append(f"images from column `{image}` of {_listed(candidates)}")
    elif not holds_images(features[image]):
        raise UserError(f"column `{image}` of `{source}` holds no images: there is {listed}")

    if label is None:
        label = _label_column(source, {name: feature for name, feature in features.items() if name != image}, notes)
    feature = features[label]
    if not holds_labels(feature):
        raise UserError(f"column `{label}` of `{source}` holds no labels: there is {listed}")

    values: dict[str, list[Any]] = {}
    for split, table in loaded.items():
        if missing := [name for name in (image, label) if name not in table.features]:
            raise UserError(f"split `{split}` of `{source}` has no column `{missing[0]}`, which `{first}` has")
        column = table.with_format("arrow").select_columns([label])[:].column(label)
        values[split] = _values(column, f"split `{split}` of `{source}`")
        for row, value in enumerate(values[split], 1):
            if value is None:
                raise UserError(f"row {row} of split `{split}` of `{source}` has no label (column `{label}`)")
    decisive = values["train"] if "train" in values else [value for some in values.values() for value in some]
    if isinstance(feature, datasets.ClassLabel):
        classes = tuple(feature.names)
        numbers = {number: number for number in range(len(classes))}
        for split, table in loaded.items():
            if (other := getattr(table.features[label], "names", None)) != feature.names:
                raise UserError(f"split `{split}` of `{source}` has other classes than `{first}`: {other}")
    elif kind(feature) == "string":
        classes = tuple(sorted(set(decisive)))
        numbers = {name: number for number, name in enumerate(classes)}
    else:
        highest = max(decisive, default=0)
        classes = tuple(str(number) for number in range(min(highest + 1, _MOST_CLASSES)))
        numbers = {number: number for number in range(len(classes))}

    splits = {}
    for split, table in loaded.items():
        for row, value in enumerate(values[split], 1):
            if value not in numbers:
                raise UserError(
                    f"row {row} of split `{split}` of `{source}` has the label `{value}`, which is not one of the "
                    f"{len(classes)} classes ({_listed(classes)})"
                )
        splits[split] = Split([numbers[value] for value in values[split]], _rows(source, split, table, image))
    return Content(splits, classes, notes)


def _label_column(source: str, features: dict[str, Any], notes: list[str]) -> str:
    """Choose the label column: by type, then by its name, then by the number of classes."""
    import datasets

    classes = {name: len(it.names) for name, it in features.items() if isinstance(it, datasets.ClassLabel)}
    if classes:
        chosen = "label" if "label" in classes else max(classes, key=lambda name: classes[name])
        if len(classes) > 1:
            notes.append(f"labels from column `{chosen}` ({classes[chosen]} classes) of {_listed(classes)}")
        return chosen
    plain = [name for name, feature in features.items() if _plain(feature)]
    named = [name for name in _LABEL_NAMES if name in plain] or plain
    if len(named) == 1 or (named and named[0] in _LABEL_NAMES):
        return named[0]
    listed = ", ".join(f"`{name}` ({kind(feature)})" for name, feature in features.items()) or "no other column"
    found = "no label column" if not named else "more than one column that could be the label"
    raise UserError(f"{found} in `{source}`: there is {listed}", hint="name it: `--set data.label=…`")


def kind(feature: Any) -> str:
    """Name the type of a column for messages and choices: `image`, `class label`, `string`, `int64`, …."""
    import datasets

    if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"}):
        return "image"
    if isinstance(feature, datasets.ClassLabel):
        return f"class label of {feature.num_classes}"
    if isinstance(feature, datasets.Value):
        return str(feature.dtype).removeprefix("large_").removesuffix("_view")
    return type(feature).__name__.lower()


def holds_images(feature: Any) -> bool:
    """Tell whether a column, where it is named, can be read as images."""
    return kind(feature) in ("image", "binary")


def holds_labels(feature: Any) -> bool:
    """Tell whether a column, where it is named, can be read as labels."""
    import datasets

    return isinstance(feature, datasets.ClassLabel) or _plain(feature)


def _plain(feature: Any) -> bool:
    """Tell whether a column that is not a ClassLabel can serve as one."""
    return kind(feature) in ("string", "bool") or kind(feature).startswith(("int", "uint"))


def _rows(source: str, split: str, table: "datasets.Dataset", image: str) -> Callable[[], Rows]:
    def encoded() -> Rows:
        row = 0
        for batch in table.with_format("arrow").select_columns([image]).iter(batch_size=_ROWS_AT_ONCE):
            for value in _values(batch.column(image), f"split `{split}` of `{source}`"):
                row += 1
                where = f"the image in row {row} of split `{split}` of `{source}`"
                content = value if not isinstance(value, dict) else value["bytes"] or value["path"]
                if not content:
                    raise UserError(f"{where} is missing")
                yield where, content

    return encoded
