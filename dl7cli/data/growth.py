"""How far loading a data set has come, by what has been written to the disk."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

TOLD_SECONDS = 1.0
"""Between two reports of how much has been loaded."""


@contextlib.contextmanager
def growth_told(folders: Sequence[str], source: str, progress: Callable[[str, int, int], None]) -> Iterator[None]:
    """Report, from a thread, by how many megabytes the folders that a source is loaded into have grown."""
    what, over = f"loading {source}, megabytes", threading.Event()
    before = sum(map(_bytes_below, folders))

    def tell() -> None:
        pause = TOLD_SECONDS
        while not over.wait(pause):
            begin = time.monotonic()
            progress(what, max(0, sum(map(_bytes_below, folders)) - before) // 10**6, 0)
            pause = max(TOLD_SECONDS, 20 * (time.monotonic() - begin))  # looking takes long where files are many

    teller = threading.Thread(target=tell, daemon=True)
    progress(what, 0, 0)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
        progress(what, 1, 1)


def _bytes_below(folder: str) -> int:
    """The size of the files below a folder, as far as they are still there when it is asked."""
    sizes = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                sizes += os.lstat(os.path.join(place, name)).st_size
    return sizes
