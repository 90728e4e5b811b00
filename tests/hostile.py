"""What tests with hostile files share: a process with little memory, a folder that is watched, and a payload."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from running import ENVIRONMENT, Outcome

Run = Callable[..., Outcome]
SECONDS = 120


@contextmanager
def limited() -> Iterator[Run]:
    """`run(*arguments, cwd=folder)` runs commands, in one process with a gigabyte above what it starts with."""
    environment = {
        **ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join([ENVIRONMENT["PYTHONPATH"], str(Path(__file__).parent)]),
    }
    pipe = subprocess.PIPE
    command = [sys.executable, str(Path(__file__).with_name("limited.py"))]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(*arguments: str, cwd: Path) -> Outcome:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps([arguments, str(cwd)]) + "\n")
            process.stdin.flush()
            assert select.select([process.stdout], [], [], SECONDS)[0], f"no answer within {SECONDS} seconds"
            return Outcome(*json.loads(process.stdout.readline()))

        try:
            yield run
        finally:
            process.kill()


def confined(limited: Run, work: Path) -> Run:
    """Run commands in the folder `work`; whatever they do, nothing beside that folder changes."""
    outside = work.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("as it was")

    def run(*arguments: str) -> Outcome:
        outcome = limited(*arguments, cwd=work)
        assert outcome.code in (0, 1), outcome.err
        assert sorted(path.name for path in work.parent.iterdir()) == ["outside", "work"], "nothing was executed"
        assert (outside / "file").read_text() == "as it was"
        assert [path.name for path in outside.iterdir()] == ["file"]
        return outcome

    return run


class Payload:
    """What runs a command when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._command = f"touch '{folder.parent / 'executed'}'"

    def __reduce__(self) -> Any:
        return os.system, (self._command,)
