"""What the commands print: data on standard output, everything meant for eyes on standard error.

Names and texts come from files that others made, so nothing is read as markup, and control characters are
shown and not sent: whatever is printed goes through one of these functions.
"""

import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

import typer

from dl7cli.errors import UserError

if TYPE_CHECKING:
    from dl7cli.cli.progress import Nothing, Plain, Terminal

_OBEYED = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, ends of lines and paragraphs, what turns the direction of writing round, and half characters."""

NO_MEMORY = UserError("out of memory", hint="use a smaller model, shorter texts or smaller images, or more memory")
"""Where it is not known what for."""


def printable(text: str, keep: str = "\t") -> str:
    r"""Return the text with what a terminal would obey and not show, but for those in `keep`, written as `\x1b`."""
    return _OBEYED.sub(
        lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode("ascii"), text
    )


def shortened(text: str, most: int) -> str:
    """Return the text, or its beginning where it has more characters than `most`."""
    return text if len(text) <= most else text[: most - 1] + "…"


def write(text: str) -> None:
    """Print one line on standard output."""
    sys.stdout.write(printable(text) + "\n")


def pass_on(text: str, stream: TextIO) -> None:
    """Print one line of data to be used elsewhere, such as a translation: as it is, unless a terminal would obey it.

    A line feed in it, which would make it two lines, is a space.
    """
    stream.write((printable(text) if stream.isatty() else text.replace("\n", " ")) + "\n")


def row(*cells: object) -> None:
    """Print one line of cells with tabs between them on standard output."""
    sys.stdout.write("\t".join(printable(str(cell), keep="") for cell in cells) + "\n")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows in aligned columns on standard output; numbers to the right."""
    cells = [[printable(str(cell), keep="") for cell in line] for line in rows]
    widths = [max(map(width, column)) for column in zip(header, *cells, strict=True)]
    numeric = [
        bool(cells) and all(line[column][:1].isdigit() or line[column] in ("", "-") for line in cells)
        for column in range(len(header))
    ]
    for line in [list(header), *cells]:
        padded = (
            " " * (wide - width(cell)) + cell if right else cell + " " * (wide - width(cell))
            for cell, wide, right in zip(line, widths, numeric, strict=True)
        )
        write("  ".join(padded).rstrip())


def width(text: str) -> int:
    """Return how many columns of a terminal a text takes: two for each Chinese, Japanese or Korean character."""
    return sum(
        0 if unicodedata.combining(character) else 1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
    )


def document(value: Mapping[str, Any]) -> None:
    """Print one JSON object on standard output."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2)
    # Among them are lone surrogates, of a file name that is not UTF-8: as \udcXX they are JSON, as bytes they are not.
    sys.stdout.write(_OBEYED.sub(lambda found: "\n" if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text) + "\n")


def number(value: float) -> float | None:
    """Return a number as JSON can hold it: None for one that is not finite."""
    return value if math.isfinite(value) else None


class Patient:
    """A stream for the user's eyes: that nobody looks any more, or its disk is full, is no reason to stop a training.

    Else one whose terminal or whose `tee` has gone would end before it has saved.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def note(text: str) -> None:
    """Print lines for the user's eyes on standard error."""
    sys.stderr.write(printable(text, keep="\t\n") + "\n")
    sys.stderr.flush()


def error(problem: UserError) -> None:
    """Print `error: …` and, where there is one, `hint: …` on standard error."""
    _labelled("error:", typer.colors.RED, problem.message)
    if problem.hint is not None:
        _labelled("hint:", typer.colors.CYAN, problem.hint)


def _labelled(label: str, colour: str, text: str) -> None:
    coloured = is_terminal() and not os.environ.get("NO_COLOR")
    sys.stderr.write(typer.style(label, fg=colour, bold=True) if coloured else label)
    # A name with a line feed in it must not look like a message of the program's own.
    note(" " + re.sub(r"\n(?!\s)", "\n  ", text))


def is_terminal() -> bool:
    """Tell whether standard error is a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def display() -> "Plain | Terminal":
    """Return what shows progress on standard error; as a context, it leaves the terminal tidy."""
    from dl7cli.cli.progress import Plain, Terminal

    return Terminal() if is_terminal() else Plain()


def nothing() -> "Nothing":
    """Return what stands in for `display` where another process shows the same."""
    from dl7cli.cli.progress import Nothing

    return Nothing()


def count(number: int, noun: str) -> str:
    """Return `1 image`, `2,000 images`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def extent(result: Mapping[str, Any]) -> str:
    """Return how much was read for a result, and how long it took: `1,000 sentence pairs, 3m`."""
    noun = "image" if result["task"] == "classification" else "sentence pair"
    return f"{count(result['examples'], noun)}, {duration(result['seconds'])}"


def duration(seconds: float) -> str:
    """Return a time to about two digits: `45s`, `18m`, `2h 05m`."""
    if seconds < 90:
        return f"{seconds:.0f}s"
    minutes = round(seconds / 60)
    return f"{minutes}m" if minutes < 90 else f"{minutes // 60}h {minutes % 60:02d}m"


def score(primary: str, value: float) -> str:
    """Return a score with its name: `accuracy 0.9151`, `BLEU 38.31`, `log-likelihood -1.4022`."""
    name = {
        "bleu": "BLEU",
        "bleu_lowercase": "BLEU without case",
        "chrf": "chrF",
        "chrf_lowercase": "chrF without case",
    }.get(primary)
    return f"{primary.replace('_', '-')} {value:.4f}" if name is None else f"{name} {value:.2f}"
