"""Lines of text: where they are read from, JSON lines among them, and the file that answers are written to."""

import codecs
import contextlib
import errno
import io
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TextIO, cast

from dl7cli import files
from dl7cli.cli import console
from dl7cli.errors import UserError

if TYPE_CHECKING:
    from dl7cli.cli.progress import Nothing, Plain, Terminal

BATCH = 1024
CHUNK = 1 << 18
_GZIP = b"\x1f\x8b"


class Line(NamedTuple):
    number: int
    """From 1."""
    text: str


@contextlib.contextmanager
def opened(path: Path | None) -> Iterator[tuple[str, Iterator[list[Line]]]]:
    """Give the lines of a file, or else of standard input, after the name that mistakes in them are told by."""
    if path is None:
        name = "standard input"
        with contextlib.suppress(OSError, ValueError):  # what stands in for it may have no number
            os.set_blocking(sys.stdin.fileno(), True)  # else what has not come yet would be its end
        yield name, typed() if sys.stdin.isatty() else read(cast(BufferedReader, sys.stdin.buffer), name)
        return
    try:
        stream = path.open("rb")
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {files.reason(error)}") from None
    with stream:
        yield str(path), read(stream, str(path))


def display(path: Path | None, *, is_silent: bool) -> "Plain | Terminal | Nothing":
    """Return what shows how far `path`, or standard input, has been read, where no answer is seen meanwhile: where that
    `is_silent`, or into a file.
    """
    typed = path is None and sys.stdin.isatty()
    with contextlib.suppress(OSError, ValueError):  # what stands in for standard output may have no number
        is_silent = is_silent or stat.S_ISREG(os.fstat(sys.stdout.fileno()).st_mode)
    return console.display() if is_silent and not typed else console.nothing()


def arguments(texts: Sequence[str]) -> Iterator[list[Line]]:
    """Yield the sentences given as arguments in one batch."""
    yield [Line(number, argument(text, f"sentence {number}")) for number, text in enumerate(texts, start=1)]


def argument(text: str, name: str) -> str:
    """Return a text given as an argument, which `name` tells the user of; a line break inside it is a space."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{name} is not UTF-8", hint="set the terminal to UTF-8") from None
    return files.on_one_line(text)


def read(stream: BufferedReader, name: str) -> Iterator[list[Line]]:
    """Yield the lines of a stream in batches of at most `BATCH`, each as soon as it is there.

    Lines end with a line feed alone; one carriage return before it is dropped, and so is a byte order mark at
    the start. Raises UserError for a line that is not UTF-8 or endless.
    """
    number = 0
    rest = b""
    while True:
        # What is there is taken at once: a program that waits for each answer is not kept for a full batch.
        chunk = stream.read1(CHUNK)
        *complete, rest = (rest + chunk).split(b"\n")
        if not chunk and rest:
            complete.append(rest)
        if len(rest) > files.LONGEST_LINE:
            raise _endless(name, number + len(complete) + 1)
        for start in range(0, len(complete), BATCH):
            lines = []
            for data in complete[start : start + BATCH]:
                number += 1
                lines.append(Line(number, decode(data, name, number)))
            yield lines
        if not chunk:
            break


def decode(data: bytes, name: str, number: int) -> str:
    """Return the text of one line of a file."""
    if len(data) > files.LONGEST_LINE:
        raise _endless(name, number)
    if number == 1:
        data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        hint = "convert the text first, for example with `iconv -f latin1 -t utf-8`"
        if number == 1 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            hint = "convert the text first, with `iconv -f utf-16 -t utf-8`"
        elif number == 1 and data.startswith(_GZIP):
            hint = "it is compressed: unpack it first, with `gunzip`"
        raise UserError(
            f"{name}: line {number} is not UTF-8 (byte {error.start + 1} is 0x{data[error.start]:02x})", hint
        ) from None


def _endless(name: str, number: int) -> UserError:
    message = f"{name}: line {number} is longer than {files.LONGEST_LINE:,} bytes"
    return UserError(message, hint="put one sentence on a line")


def typed() -> Iterator[list[Line]]:
    """Yield lines typed at a prompt on standard error, one by one; they can be edited and called back.

    What was typed is forgotten when the program ends.
    """
    with contextlib.suppress(ImportError):  # it is not everywhere
        import readline  # noqa: F401 - by itself it gives `input` editing and a history
    console.note("one line in, one line out; Ctrl-D ends")
    number = 0
    while True:
        try:
            with _prompting():
                text = input("> ")
            text.encode("utf-8")
        except EOFError:
            break
        except UnicodeError:
            raise UserError(f"line {number + 1} is not UTF-8", hint="set the terminal to UTF-8") from None
        number += 1
        yield [Line(number, text)]
    console.note("")


@contextlib.contextmanager
def _prompting() -> Iterator[None]:
    """Let `input` write to standard error what it would write to standard output, where only answers belong."""
    if not (os.isatty(0) and os.isatty(2)):
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    # `input` edits lines only between the terminal and the real standard output.
    sys.stdout.flush()
    answers = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(answers, 1)
        os.close(answers)


def field(line: Line, names: Sequence[str], added: Sequence[str], name: str) -> str:
    """Return the text in the first of the fields `names` that a JSON object has; a line break inside it is a space.

    Raises UserError where the line is no object with text in such a field, or has one of those to be `added` already.
    Of a blank line it is empty.
    """
    place = f"{name}: line {line.number}"
    if not line.text.strip():
        return ""
    try:
        record = json.loads(line.text, parse_int=_unread, parse_float=_unread, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON: {error.msg.lower()} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{place} is not a JSON object", hint='write one to a line, as `{"source": "A dog runs."}`')
    found = next((key for key in names if key in record), None)
    if found is None:
        fields = f"`{'`, `'.join(names[:-1])}` or `{names[-1]}`"
        raise UserError(f"{place} has no text to translate", hint=f"put it in a field {fields}")
    for key in added:
        if key in record:
            raise UserError(f"{place} has a field `{key}` already", hint="give it another name before")
    text = record[found]
    if not isinstance(text, str):
        raise UserError(f"{place}: the field `{found}` is not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # such as `\ud83d`
        raise UserError(f"{place}: the field `{found}` holds half a character") from None
    return files.on_one_line(text)


def _unread(text: str) -> None:
    """Take the place of a number, so that none is too large."""


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number there")


def note_unknown(lines: Sequence[int]) -> None:
    """Say in which lines, by their numbers, there is what a vocabulary has not."""
    if lines:
        first = f"line {lines[0]}"
        told = f"{first} has" if len(lines) == 1 else f"{console.count(len(lines), 'line')}, the first {first}, have"
        console.note(f"note: {told} characters or words that the vocabulary has not")


def warn_of_cut(line: Line, cut: int | None) -> None:
    """Tell the user where a line was cut to so many subwords."""
    if cut is not None:
        console.note(f"warning: line {line.number} is longer than {cut} subwords and was cut")


def extended(record: str, additions: Mapping[str, Any]) -> str:
    """Return a JSON object that is not empty with fields added at its end; to the letter, the others stay."""
    body = record.rstrip().removesuffix("}").rstrip()
    return f"{body}, {json.dumps(additions, ensure_ascii=False, allow_nan=False)[1:]}"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Write to a text file that takes the place of `path` at the end, or goes away if something goes wrong."""
    inside = False
    try:
        with files.replacing(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="\n")
            inside = True
            yield text
            inside = False
            text.flush()
    except OSError as error:
        # What else goes wrong meanwhile is another matter.
        if inside and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f"`{path}` cannot be written: {files.reason(error)}") from None
