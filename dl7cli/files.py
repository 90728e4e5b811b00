"""Files that are swapped in when they are whole."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write that takes the place of `path` at the end, or goes away where anything goes wrong.

    So `path` is at any moment what it was or what it is to be. Where it is a link, the file it leads to is replaced; a
    pipe or a device, which nothing can replace, is written to. Raises OSError.
    """
    path = path.resolve()
    in_place = path.exists() and not path.is_file()
    new = path if in_place else path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with new.open("wb") as file:
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
