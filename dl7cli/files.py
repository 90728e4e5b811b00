"""Files that are swapped in when they are whole, and what is read of any: no pipe, no device, no endless line."""

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

LONGEST_LINE = 1 << 22
"""Bytes: cutting so many into subwords takes seconds and hundreds of megabytes, and no model reads a thousandth."""

_LINE_BREAK = re.compile(r"\r\n|\r|\n")
_OPEN = re.compile(r"/dev/(?:(stdout|stderr)|fd/([0-9]{1,9}))|/proc/self/fd/([0-9]{1,9})")


def on_one_line(text: str) -> str:
    """Return a text whose line breaks are spaces: what may lie in a JSON field or an argument, and not on a line."""
    return _LINE_BREAK.sub(" ", text)


def reason(problem: OSError) -> str:
    """Return why a file could not be read or written, as it stands in a `UserError`."""
    return (problem.strerror or str(problem)).lower()


def size(file: Path | int) -> int:
    """The bytes in a file, or in the one a descriptor is of.

    Raises OSError where it is none: a pipe would be waited for, a device be read without end.
    """
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a file")
    return status.st_size


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write that takes the place of `path` at the end, or goes away where anything goes wrong.

    So `path` is at any moment what it was or what it is to be. Where it is a link, the file it leads to is replaced, by
    one that the same may read and write; a pipe or a device, which nothing can replace, is written to, and so is what
    is open already, as `/dev/stdout`, whatever that is. Raises OSError.
    """
    if opened := _OPEN.fullmatch(os.path.normpath(path)):
        # By its own descriptor: what is written before and after by others stays, and in that order.
        number = {"stdout": 1, "stderr": 2}.get(opened[1]) or int(opened[2] or opened[3])
        with os.fdopen(os.dup(number), "wb") as file:
            yield file
        return
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    path = Path(os.path.realpath(path))  # unlike Path's, no error of its own where a link leads to itself
    new = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with new.open("wb") as file:
            if path.exists():
                shutil.copymode(path, new)
            yield file
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
