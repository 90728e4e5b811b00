"""Files that are swapped in when they are whole, and what is read of any: no pipe, no device, no endless line."""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

LONGEST_LINE = 1 << 22
"""Bytes: cutting so many into subwords takes seconds and hundreds of megabytes, and no model reads a thousandth."""


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
    one that the same may read and write; a pipe or a device, which nothing can replace, is written to. Raises OSError.
    """
    in_place = path.exists() and not path.is_file()
    # Of `/dev/fd/3` and the like, what a pipe resolves to is no name that opens it.
    path = path if in_place else path.resolve()
    new = path if in_place else path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with new.open("wb") as file:
            if path.exists() and not in_place:
                shutil.copymode(path, new)
            yield file
            file.flush()
            if not in_place:
                os.fsync(file.fileno())
        if not in_place:
            new.replace(path)
    except BaseException:
        if not in_place:
            with contextlib.suppress(OSError):
                new.unlink()
        raise
