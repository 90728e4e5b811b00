"""Figures as files: what can be written where, names that fonts can draw, learning curves, heat maps of confusion and
attention, and the tree of a beam search.

Only the functions that draw import matplotlib, and of it neither pyplot nor a window: figures are plain objects here.
"""

import io
import itertools
import math
import os
import textwrap
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dl7cli import files
from dl7cli.cli import console
from dl7cli.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontEntry

    from dl7cli.tasks.translation import Branch

SUFFIXES = (".png", ".svg")
COLOURS = 10
"""Of matplotlib's cycle."""
LONGEST_NAME = 24
"""Columns of a terminal, of which a Chinese character takes two."""
MOST_CLASSES_WITH_NUMBERS = 20
_DOTS_PER_INCH = 150
_POINTS_PER_INCH = 72
MOST_STEPS = 100
"""Of a search that is drawn as a tree: some 25,000 pixels."""
_LONGEST_SIDE = 40.0
_GAP = 0.5
"""Inches between hypotheses and those that go on from them."""
_LETTER, _LINE = 0.078, 0.24
"""Inches that a character of a hypothesis takes, and a hypothesis."""
_WORD = "▁"
"""What sentencepiece begins a word with."""


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
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):  # which raises nothing, whatever is wrong with the name
        raise UserError(f"`{path}` cannot be written: there is no folder `{folder}`", hint="make the folder first")
    if os.path.isdir(path):
        raise UserError(f"`{path}` cannot be written: it is a folder", hint="name a file in it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"`{path}` cannot be written: permission denied", hint="name a file in another folder")


def save(figure: "Figure", path: Path, notes: Sequence[str] = ()) -> None:
    """Write a figure to a .png or .svg file, which at any moment is what it was or what it is to be, and say so.

    The same figure gives the same bytes; `notes` are told of it. Raises UserError where the file cannot be written.
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
        raise UserError(f"`{path}` cannot be written: {files.reason(error)}", hint="name another file") from None
    for note in notes:
        console.note(f"note: {note}")
    console.note(f"drawn: {path}")


def confusion_matrix(
    counts: Sequence[Sequence[int]], classes: Sequence[str], title: str, *, suffix: str
) -> tuple["Figure", list[str]]:
    """Draw how many images of class i (row) were taken for class j (column), for a file that ends in `suffix`.

    Colours are the share of each row, on a square-root scale: a good classifier's mistakes would be white on a
    straight one. The numbers stand in the cells of up to `MOST_CLASSES_WITH_NUMBERS` classes. Also returns what the
    user has to be told about names that cannot be drawn.
    """
    import numpy as np

    number = len(classes)
    names = drawable(classes, suffix, "class name")
    table = np.asarray(counts, dtype=np.float64)
    totals = table.sum(axis=1, keepdims=True)
    shares = np.divide(table, totals, out=np.zeros_like(table), where=totals > 0)
    cell = max(4.0 / number, 0.55) if number <= MOST_CLASSES_WITH_NUMBERS else max(8.0 / number, 0.16)
    figure, axes, bar = _heat_map(shares, names, names, title, cell=cell, power=0.5, above=False)
    axes.set_xlabel("class given by the model")
    axes.set_ylabel("class of the image")
    bar.set_label("share of the images of the class")
    bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], labels=["0", "1 %", "5 %", "10 %", "25 %", "50 %", "100 %"])
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
    return figure, names.notes


def attention_map(
    weights: "np.ndarray", source: Sequence[str], target: Sequence[str], title: str, *, suffix: str
) -> tuple["Figure", list[str]]:
    """Draw how much each target token (row) looked at each source token (column), for a file that ends in `suffix`.

    weights (target, source), from 0 to 1. As in figure 3 of Bahdanau et al. 2015 the source stands above. Also returns
    what the user has to be told about tokens that cannot be drawn.
    """
    columns = drawable(readable(source), suffix, "source token")
    rows = drawable(readable(target), suffix, "target token")
    cell = max(0.3, 2.5 / max(len(source), len(target)))
    figure, axes, bar = _heat_map(weights, rows, columns, title, cell=cell, power=1.0, above=True)
    axes.set_xlabel("source")
    axes.set_ylabel("translation")
    bar.set_label("attention weight")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        figure.draw_without_rendering()  # what stands above the axes finds its place only in a second layout
    return figure, [*columns.notes, *rows.notes]


def search_tree(branches: Sequence["Branch"], title: str, *, suffix: str) -> tuple["Figure", list[str]]:
    """Draw the hypotheses that a beam has considered, a column for each step, for a file that ends in `suffix`.

    At least one has ended. In a column the most probable stands above. What was dropped is grey, the path to the ending
    that scores best blue. Also returns what the user has to be told about tokens that cannot be drawn. Raises UserError
    where there are more than `MOST_STEPS`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    steps = branches[-1].step
    if steps > MOST_STEPS:
        raise UserError(f"a tree of {steps} steps is too wide to be drawn", hint="give a shorter sentence")
    # None is the first of a text, which would hide that it goes on with a word.
    names = drawable(readable(["", *(branch.token for branch in branches)])[1:], suffix, "target token")
    ended = [number for number, one in enumerate(branches) if one.score is not None]
    chosen = [max(ended, key=lambda number: branches[number].score or 0.0)]
    while (parent := branches[chosen[-1]].parent) is not None:
        chosen.append(parent)
    labels = [
        f"{name}  {one.log_probability:.2f}" + ("" if one.score is None else f" → {one.score:.2f}")
        for name, one in zip(names.labels, branches, strict=True)
    ]
    lengths = [_LETTER * console.width(label) for label in labels]
    # Where each label begins and, in the middle of its line, how far down it is.
    places: list[tuple[float, float]] = []
    width = height = 0.0
    for _, step in itertools.groupby(zip(branches, lengths, strict=True), key=lambda pair: pair[0].step):
        there = [length for _, length in step]
        places += [(width + _GAP, _LINE * (row + 0.5)) for row in range(len(there))]
        width, height = width + _GAP + max(there), max(height, _LINE * len(there))
    families, lines = _heading(title, int(13 * (width + 0.3)))
    best = set(chosen)
    with matplotlib.rc_context({"font.family": list(dict.fromkeys([*names.families, *families]))}):
        figure = Figure(figsize=(width + 0.4, height + 0.3 + 0.2 * len(lines)), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        axes.set_title("\n".join(lines), fontsize=10, loc="left", parse_math=False)
        for number, (one, label, (x, y)) in enumerate(zip(branches, labels, places, strict=True)):
            colour = "C0" if number in best else "black" if one.lives or one.score is not None else "0.6"
            weight = "bold" if number in best else "normal"
            axes.text(x, y, label, fontsize=8, color=colour, va="center", weight=weight, parse_math=False)
            left, middle = 0.0, height / 2
            if one.parent is not None:
                left, middle = places[one.parent][0] + lengths[one.parent], places[one.parent][1]
            axes.plot((left, x - 0.05), (middle, y), color=colour, linewidth=1.8 if number in best else 0.6)
    return figure, names.notes


Curve = list[tuple[int, list[float]]]
"""A step or an epoch, and what each of some runs has there."""


class Course(NamedTuple):
    """How a run has learnt, or several together."""

    name: str
    data: str
    losses: Curve
    """By step the mean training loss since the one before."""
    validation: Curve
    """By step the negative log-likelihood on validation, where it is recorded: of classifiers."""
    score: str | None
    """What the best epoch is chosen by."""
    scores: Curve
    """By epoch that score on validation."""


def learning_curves(courses: Sequence[Course], score: str, *, suffix: str) -> tuple["Figure", list[str]]:
    """Draw training losses beside scores on validation, for a file that ends in `suffix`.

    Of several runs together it is their mean, and a band from the least to the greatest.

    The title of the scores names their data or, where the courses have several, the legend does. Also returns what the
    user has to be told about names that cannot be drawn.
    """
    import matplotlib
    from matplotlib.figure import Figure

    names = drawable([course.name for course in courses], suffix, "run", ends=True)
    sources = list(dict.fromkeys(course.data for course in courses))
    data = drawable(sources, suffix, "data source", ends=True)
    labels, title = names.labels, f"{score.replace('_', ' ')} on validation"
    if len(sources) > 1:
        shown = dict(zip(sources, data.labels, strict=True))
        labels = [f"{name} on {shown[course.data]}" for name, course in zip(labels, courses, strict=True)]
    else:
        title += f" of {data.labels[0]}"
    # Matplotlib leaves out what begins with an underscore.
    labels = [f" {label}" if label.startswith("_") else label for label in labels]
    with matplotlib.rc_context({"font.family": list(dict.fromkeys([*names.families, *data.families]))}):
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        losses, scores = figure.subplots(1, 2)
        for number, (course, label) in enumerate(zip(courses, labels, strict=True)):
            colour = f"C{number % COLOURS}"
            _draw(losses, course.losses, style(number), color=colour, label=label)
            _draw(scores, course.scores, style(number), color=colour, label=label)
            if course.validation:
                _draw(losses, course.validation, ":", color=colour)
        dotted = "; dotted: on validation" if any(course.validation for course in courses) else ""
        losses.set(title=f"training loss{dotted}", xlabel="step")
        scores.set(xlabel="epoch")
        scores.set_title(title, parse_math=False)
        scores.xaxis.get_major_locator().set_params(integer=True)
        for axes in (losses, scores):
            axes.grid(alpha=0.3)
        legend = figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure, [*names.notes, *data.notes]


def _draw(axes: "Axes", curve: Curve, line: str, *, color: str, label: str | None = None) -> None:
    places = [place for place, _ in curve]
    single = len(places) == 1  # of which a line or a band shows nothing
    means = [sum(values) / len(values) for _, values in curve]
    axes.plot(places, means, line, color=color, label=label, marker="o" if single else None)
    if any(len(values) > 1 for _, values in curve):
        least, greatest = ([end(values) for _, values in curve] for end in (min, max))
        if single:
            axes.vlines(places, least, greatest, color=color, alpha=0.2, linewidth=8)
        else:
            axes.fill_between(places, least, greatest, color=color, alpha=0.2, linewidth=0)


def style(number: int) -> str:
    """The line of the curve of this number: dashed where its colour has been there before."""
    return "-" if number < COLOURS else "--"


def _heat_map(
    values: "np.ndarray", rows: Names, columns: Names, title: str, *, cell: float, power: float, above: bool
) -> tuple["Figure", "Axes", "Colorbar"]:
    """Draw numbers from 0 to 1 as colours in cells of this side in inches, or less where there are very many.

    The colour is that of the number to this power. The names of the columns stand above or below.
    """
    import matplotlib
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    cell = min(cell, _LONGEST_SIDE / max(values.shape))
    every = math.ceil(0.16 / cell)  # in very small ones not every name has room
    size = min(9.0, 0.65 * _POINTS_PER_INCH * every * cell)
    height, width = (count * cell for count in values.shape)
    families, lines = _heading(title, int(13 * (width + 1)))
    longest_row, longest_column = (
        max(console.width(label) for label in names.labels) * 0.62 * size / _POINTS_PER_INCH
        for names in (rows, columns)
    )
    with matplotlib.rc_context({"font.family": list(dict.fromkeys([*rows.families, *columns.families, *families]))}):
        figure = Figure(
            figsize=(width + longest_row + 1.6, height + longest_column + 0.8 + 0.2 * len(lines)), layout="constrained"
        )
        axes = figure.add_subplot()
        image = axes.imshow(values, cmap="Blues", norm=PowerNorm(power, vmin=0, vmax=1), interpolation="nearest")
        for axis, names in ((axes.xaxis, columns), (axes.yaxis, rows)):
            places = range(0, len(names.labels), every)
            axis.set_ticks(places, names.labels[::every], fontsize=size, parse_math=False)
        axes.tick_params("x", rotation=90)
        axes.set_title("\n".join(lines), fontsize=10, loc="left", parse_math=False)
        bar = figure.colorbar(image, ax=axes, shrink=0.6)
        if above:
            axes.xaxis.tick_top()
            axes.xaxis.set_label_position("top")
        if rows.foreign or columns.foreign:
            # Measured by the wrong glyphs, at three fifths of what they may take.
            left, along = 0.4 * longest_row / figure.get_figwidth(), 0.4 * longest_column / figure.get_figheight()
            free = (left, 0 if above else along, 1 - left, 1 - along)
            figure.get_layout_engine().set(rect=free)  # type: ignore[union-attr,call-arg]
    return figure, axes, bar


def _heading(title: str, longest: int) -> tuple[list[str], list[str]]:
    """The fonts that a title takes, and its lines of at most so many characters."""
    families, missing = _fonts(_plain(title))
    return families, textwrap.wrap("".join("?" if one in missing else one for one in _plain(title)), longest)


def readable(tokens: Sequence[str]) -> list[str]:
    """Tokens as a reader wants them: the first of a word without its marker, other letters after a dot."""
    marked = any(token.startswith(_WORD) and token != _WORD for token in tokens)
    shown = []
    for number, token in enumerate(tokens):
        if token == "</s>":
            shown.append("(end)")
        elif token.startswith(_WORD):
            shown.append(token.replace(_WORD, " ").strip() or "␣")
        else:
            shown.append(f"·{token}" if marked and number and token[:1].isalnum() else token)
    return [unicodedata.normalize("NFC", token) for token in shown]


def drawable(names: Sequence[str], suffix: str, what: str, *, ends: bool = False) -> Names:
    """Shorten names to `LONGEST_NAME` columns and find fonts for them; `what` is what one of them is.

    Of long ones the beginnings stay or, as of paths and of runs these say most, the `ends`.

    In a PNG, a name with characters of no installed font is given by its number, from 0; in an SVG it stays.
    """
    labels = [_shortened(_plain(name), ends) for name in names]
    families, missing = _fonts("".join(labels))
    unreadable = [number for number, label in enumerate(labels) if missing & set(label)]
    if not unreadable or suffix.lower() == ".svg":
        return Names(labels, families, bool(unreadable), [])
    for number in unreadable:
        labels[number] = str(number)
    told = (
        f"no installed font can draw {console.count(len(unreadable), what)}: numbers stand for them,"
        " from 0 in their order; install a font, such as Noto Sans CJK, or draw a .svg"
    )
    return Names(labels, families, False, [told])


def _plain(name: str) -> str:
    """A name without what would break a line or an XML file."""
    return console.printable(name, keep="")


def _shortened(name: str, end: bool) -> str:
    if console.width(name) <= LONGEST_NAME:
        return name
    while console.width(name) >= LONGEST_NAME:
        name = name[1:] if end else name[:-1]
    return f"…{name}" if end else f"{name}…"


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
    """The upright fonts, those of plain weight first, each family once; none of which every glyph is a stand-in."""
    upright = [one for one in fonts if one.style == "normal" and not one.name.startswith("Last Resort")]
    seen = set()
    for entry in sorted(upright, key=lambda one: str(one.weight) not in ("400", "normal", "regular", "book")):
        if entry.name not in seen:
            seen.add(entry.name)
            yield entry


def _characters(file: str) -> set[str]:
    from matplotlib import font_manager

    try:
        return {chr(code) for code in font_manager.get_font(file).get_charmap()}
    except (OSError, RuntimeError):  # removed since the list was made, or damaged
        return set()
