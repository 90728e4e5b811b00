"""`dl7 translate`: one line in, one line out."""

import codecs
import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TextIO, cast

import typer

from dl7cli.cli import console, options
from dl7cli.errors import UserError

if TYPE_CHECKING:
    from dl7cli.tasks.translation import TranslatedLine

BATCH = 256
CHUNK = 1 << 16


class Line(NamedTuple):
    number: int
    """From 1."""
    text: str


def translate(
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="Sentences; standard input line by line if none is given."),
    ] = None,
    run: options.RunOption = None,
    source: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="Read sentences from this file, one to a line."),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Write to this file; it appears when all is done."),
    ] = None,
    beam: options.Beam = None,
    length_penalty: options.LengthPenalty = None,
    n_best: Annotated[
        int,
        typer.Option(
            "--n-best",
            metavar="N",
            min=1,
            max=100,
            help="Above 1: print the N best translations of each line, best first, one to a line: "
            "line number, score and text with tabs between them. A blank line gives one such line.",
        ),
    ] = 1,
    device: options.Device = "auto",
    gpus: options.Gpus = None,
    precision: options.Precision = "auto",
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Translate sentences: one line in, one line out.

    A blank line stays blank. Input is UTF-8. A line longer than the model can read is cut, with a
    warning that gives its number.
    """
    if texts and source is not None:
        raise typer.BadParameter("give sentences or --input FILE, not both")
    from dl7cli import device as devices
    from dl7cli import runs, tasks
    from dl7cli.tasks.translation import Translation

    with contextlib.ExitStack() as stack:
        # Whatever can be wrong with the files is found before the model is loaded.
        if texts:
            batches = arguments(texts)
        elif source is not None:
            batches = read(stack.enter_context(open_input(source)), str(source))
        else:
            standard_input = cast(BufferedReader, sys.stdin.buffer)
            batches = read(standard_input, "standard input", prompt=sys.stdin.isatty())
        output = stack.enter_context(replacing(target)) if target is not None else None
        found, folder = runs.find(run, task="translation")
        task = tasks.load(folder, runtime=devices.choose(device, precision, gpus), offline=offline)
        assert isinstance(task, Translation)
        decoding = task.recipe.decoding.updated(beam=beam, length_penalty=length_penalty)
        if n_best > decoding.beam:
            raise UserError(
                f"`--n-best {n_best}` is more than the beam of {decoding.beam}", hint=f"add `--beam {n_best}`"
            )
        translations: list[dict[str, Any]] = []
        to_standard_output = output is None and not as_json
        for batch in batches:
            lines = task.translate([line.text for line in batch], decoding, n_best=n_best)
            for line, translated in zip(batch, lines, strict=True):
                if translated.cut:
                    limit = task.recipe.data.max_length
                    console.note(f"warning: line {line.number} is longer than {limit} subwords and was cut")
                if as_json:
                    translations.append(as_document(line, translated))
                for text in as_lines(line, translated, n_best):
                    if to_standard_output:
                        console.write(text)
                    elif output is not None:
                        output.write(console.printable(text) + "\n")
            if to_standard_output:
                sys.stdout.flush()
    if as_json:
        console.document({"run": str(found.folder), "translations": translations})


def arguments(texts: list[str]) -> Iterator[list[Line]]:
    """Yield the sentences given as arguments in one batch; a line break inside one is a space."""
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"sentence {number} is not UTF-8", hint="set the terminal to UTF-8") from None
        lines.append(Line(number, " ".join(text.splitlines())))
    yield lines


def read(stream: BufferedReader, name: str, *, prompt: bool = False) -> Iterator[list[Line]]:
    """Yield the lines of a stream in batches of at most `BATCH`, each as soon as it is there.

    Lines end with a line feed alone; one carriage return before it is dropped, and so is a byte order mark at
    the start. Raises UserError for a line that is not UTF-8.
    """
    if prompt:
        console.note("one line in, one line out; Ctrl-D ends")
    number = 0
    rest = b""
    while True:
        if prompt:
            sys.stderr.write("> ")
            sys.stderr.flush()
        # What is there is taken at once: a program that waits for each answer is not kept for a full batch.
        chunk = stream.read1(CHUNK)
        *complete, rest = (rest + chunk).split(b"\n")
        if not chunk and rest:
            complete.append(rest)
        for start in range(0, len(complete), BATCH):
            lines = []
            for data in complete[start : start + BATCH]:
                number += 1
                lines.append(Line(number, decode(data, name, number)))
            yield lines
        if not chunk:
            break
    if prompt:
        sys.stderr.write("\n")


def decode(data: bytes, name: str, number: int) -> str:
    """Return the text of one line of a file."""
    if number == 1:
        data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: line {number} is not UTF-8 (byte {error.start + 1} is 0x{data[error.start]:02x})",
            hint="convert the text first, for example with `iconv -f latin1 -t utf-8`",
        ) from None


def as_lines(line: Line, translated: "TranslatedLine", n_best: int) -> list[str]:
    """Return the lines to print for a line: its translation, or with several their number, score and text."""
    if n_best == 1:
        return [translated.text]
    alternatives = [(one.text, one.score) for one in translated.alternatives] or [(translated.text, translated.score)]
    return [f"{line.number}\t{score:.4f}\t{text}" for text, score in alternatives]


def as_document(line: Line, translated: "TranslatedLine") -> dict[str, Any]:
    """Return a translation as `--json` prints it."""
    return {
        "source": line.text,
        "text": translated.text,
        "score": translated.score,
        "alternatives": [{"text": one.text, "score": one.score} for one in translated.alternatives],
    }


def open_input(path: Path) -> BufferedReader:
    """Open a file to read; raise UserError where that cannot be done."""
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {console.reason(error)}") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Write to a file beside `path` that takes its place at the end, or goes away if something goes wrong."""
    path = path.resolve()
    in_place = path.exists() and not path.is_file()  # a pipe or a device: there is nothing to replace
    written = path if in_place else path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        stream = written.open("w", encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"`{path}` cannot be written: {console.reason(error)}") from None
    try:
        with stream:
            yield stream
        if not in_place:
            written.replace(path)
    except BaseException as error:
        if not in_place:
            written.unlink()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"`{path}` cannot be written: {console.reason(error)}") from None
        raise
