"""Figures as files: what can be written where, names that fonts can draw, and the confusion matrix.

Only the functions that draw import matplotlib, and of it neither pyplot nor a window: figures are plain objects here.
"""

import io
import math
import os
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dl7cli import files
from dl7cli.cli import console
from dl7cli.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontEntry

SUFFIXES = (".png", ".svg")
LONGEST_NAME = 24
"""Columns of a terminal, of which a Chinese character takes two."""
MOST_CLASSES_WITH_NUMBERS = 20
_DOTS_PER_INCH = 150
_POINTS_PER_INCH = 72


class Names(NamedTuple):
    """Names as they can be drawn."""

    labels: list[str]
    families: list[str]
    """Fonts that together have all their characters, the first one first."""
    foreign: bool
    """Whether a label has characters of no installed font, which an SVG may still show where it is looked at."""
    notes: list[str]


def refuse_unwritable(path: Path) -> None:
    """Raise UserError where `save` would: for another suffix than .png and .svg, and a place that cannot be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"`{path}` ends in neither `.png` nor `.svg`", hint="the suffix says which of the two to write")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UserError(f"`{path}` cannot be written: there is no folder `{folder}`", hint="make the folder first")
    if path.is_dir():
        raise UserError(f"`{path}` cannot be written: it is a folder", hint="name a file in it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"`{path}` cannot be written: permission denied", hint="name a file in another folder")


def save(figure: "Figure", path: Path) -> None:
    """Write a figure to a .png or .svg file, which at any moment is what it was or what it is to be.

    The same figure gives the same bytes. Raises UserError where the file cannot be written.
    """
    import matplotlib

    refuse_unwritable(path)
    drawn = io.BytesIO()
    # Text stays text in an SVG: it can be searched, and whoever looks at it may have fonts that are missing here.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dl7"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        kind = path.suffix.lower().removeprefix(".")
        figure.savefig(
            drawn, format=kind, dpi=_DOTS_PER_INCH, metadata={"Date": None} if kind == "svg" else {"Software": None}
        )
    try:
        with files.replacing(path) as file:
            file.write(drawn.getvalue())
    except OSError as error:
        raise UserError(f"`{path}` cannot be written: {console.reason(error)}", hint="name another file") from None


def confusion_matrix(
    counts: Sequence[Sequence[int]], classes: Sequence[str], title: str, *, suffix: str
) -> tuple["Figure", list[str]]:
    """Draw how many images of class i (row) were taken for class j (column), for a file that ends in `suffix`.

    Colours are the share of each row, on a square-root scale: a good classifier's mistakes would be white on a
    straight one. The numbers stand in the cells of up to `MOST_CLASSES_WITH_NUMBERS` classes. Also returns what the
    user has to be told about names that cannot be drawn.
    """
    import matplotlib
    import numpy as np
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    number = len(classes)
    names = drawable(classes, suffix)
    families, missing = _fonts(_plain(title))
    heading = "".join("?" if character in missing else character for character in _plain(title))
    table = np.asarray(counts, dtype=np.float64)
    totals = table.sum(axis=1, keepdims=True)
    shares = np.divide(table, totals, out=np.zeros_like(table), where=totals > 0)

    side = min(40.0, max(4.0, 0.55 * number) if number <= MOST_CLASSES_WITH_NUMBERS else max(8.0, 0.16 * number))
    every = math.ceil(0.16 * number / side)  # beyond the largest side not every class has room for its name
    size = min(9.0, 0.65 * _POINTS_PER_INCH * every * side / number)
    longest = max(console.width(label) for label in names.labels) * 0.62 * size / _POINTS_PER_INCH
    with matplotlib.rc_context({"font.family": list(dict.fromkeys([*names.families, *families]))}):
        figure = Figure(figsize=(side + longest + 1.6, side + longest + 1.0), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
        axes.set_xticks(range(0, number, every), names.labels[::every], rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(range(0, number, every), names.labels[::every], fontsize=size, parse_math=False)
        axes.set_xlabel("class given by the model")
        axes.set_ylabel("class of the image")
        columns = int(13 * side)
        axes.set_title("\n".join(textwrap.wrap(heading, columns)), fontsize=10, loc="left", parse_math=False)
        if number <= MOST_CLASSES_WITH_NUMBERS:
            for row, column in zip(*np.nonzero(table), strict=True):
                dark = shares[row, column] > 0.4
                axes.text(
                    column,
                    row,
                    f"{int(table[row, column])}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                )
        bar = figure.colorbar(image, ax=axes, label="share of the images of the class", shrink=0.6)
        bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], labels=["0", "1 %", "5 %", "10 %", "25 %", "50 %", "100 %"])
        if names.foreign:
            # Measured by the wrong glyphs, at three fifths of what they may take.
            spare = 0.4 * longest / figure.get_figwidth()
            figure.get_layout_engine().set(rect=(spare, spare, 1 - spare, 1 - spare))  # type: ignore[union-attr,call-arg]
    return figure, names.notes


def drawable(names: Sequence[str], suffix: str) -> Names:
    """Shorten names to `LONGEST_NAME` columns and find fonts for them.

    In a PNG, a name with characters of no installed font is given by its number, from 0; in an SVG it stays.
    """
    labels = [_shortened(_plain(name)) for name in names]
    families, missing = _fonts("".join(labels))
    unreadable = [number for number, label in enumerate(labels) if missing & set(label)]
    if not unreadable or suffix.lower() == ".svg":
        return Names(labels, families, bool(unreadable), [])
    for number in unreadable:
        labels[number] = str(number)
    told = (
        f"no installed font can draw {console.count(len(unreadable), 'class name')}: numbers stand for them,"
        " from 0 in the order of the classes; install a font, such as Noto Sans CJK, or draw a .svg"
    )
    return Names(labels, families, False, [told])


def _plain(name: str) -> str:
    """A name without what would break a line or an XML file."""
    return console.printable(name, keep="").encode("utf-8", "backslashreplace").decode("utf-8")


def _shortened(name: str) -> str:
    if console.width(name) <= LONGEST_NAME:
        return name
    while console.width(name) >= LONGEST_NAME:
        name = name[:-1]
    return name + "…"


def _fonts(text: str) -> tuple[list[str], set[str]]:
    """Families that together draw a text, as few as a first fit finds, and the characters that are in none."""
    from matplotlib import font_manager

    families = ["DejaVu Sans"]  # comes with matplotlib
    missing = set(text) - _characters(font_manager.findfont(families[0]))
    if missing:
        for entry in _regular(font_manager.fontManager.ttflist):
            found = missing & _characters(entry.fname)
            if found:
                families.append(entry.name)
                missing -= found
            if not missing:
                break
    return families, missing


def _regular(fonts: Iterable["FontEntry"]) -> Iterator["FontEntry"]:
    """The upright fonts of plain weight, each family once; none of which every glyph is a stand-in."""
    seen = set()
    for entry in fonts:
        plain = entry.style == "normal" and str(entry.weight) in ("400", "normal", "regular", "book")
        if plain and entry.name not in seen and not entry.name.startswith("Last Resort"):
            seen.add(entry.name)
            yield entry


def _characters(file: str) -> set[str]:
    from matplotlib import font_manager

    try:
        return {chr(code) for code in font_manager.get_font(file).get_charmap()}
    except (OSError, RuntimeError):  # removed since the list was made, or damaged
        return set()
