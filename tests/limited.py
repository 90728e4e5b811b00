"""A process that runs one `dl7` after the other with a gigabyte of memory above what it starts with."""

import json
import resource
import sys
import traceback
from pathlib import Path

import datasets  # noqa: F401 - what is imported later would count
import PIL.Image
import pyarrow.parquet  # noqa: F401
from running import dl7

from dl7cli import training  # noqa: F401

ROOM = 1 << 30


def main() -> None:
    PIL.Image.init()
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + ROOM, own + ROOM))
    commands, answers = sys.stdin, sys.stdout
    for line in commands:
        arguments, folder = json.loads(line)
        try:
            outcome = dl7(*arguments, cwd=Path(folder))
        except BaseException:
            outcome = (-1, "", traceback.format_exc()[-3000:])
        answers.write(json.dumps(outcome) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
