"""Running `dl7` as its users do, in this process or in one of its own."""

import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dl7cli import training
from dl7cli.cli import main

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}

KEYS = (
    *("run", "checkpoint", "task", "recipe", "data", "split", "digest", "examples", "primary", "scores", "signature"),
    *("details", "seconds", "readings"),
)
"""Of what every evaluation prints with `--json`."""

TINY_SEQ2SEQ = (
    *("--set", "model.embedding_width=32", "--set", "model.encoder_width=32", "--set", "model.decoder_width=32"),
    *("--set", "data.vocabulary_size=48", "--set", "data.max_length=20", "--set", "training.batch_tokens=128"),
    *("--set", "model.dropout=0.0", "--set", "optim.learning_rate=0.02"),
)


class TerminalText(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON object on standard output; `json.loads` refuses anything before or after it."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


class Silent:
    """A listener to a training that shows nothing."""

    def plan(self, plan: training.Plan) -> None: ...
    def step(self, step: training.Step) -> None: ...
    def epoch(self, epoch: training.Epoch) -> None: ...
    def note(self, text: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...


def dl7(*arguments: str, cwd: Path, stdin: bytes = b"", terminal: bool = False, **environment: str) -> Outcome:
    """Run `dl7` in this process, in the folder `cwd`; `terminal` is for all but standard output."""
    out = io.TextIOWrapper(io.BytesIO())
    err = (TerminalText if terminal else io.TextIOWrapper)(io.BytesIO())
    code: Any = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["dl7", *arguments])
        patch.setattr(sys, "stdin", (TerminalText if terminal else io.TextIOWrapper)(io.BytesIO(stdin)))
        for name, value in environment.items():
            patch.setenv(name, value)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                code = stop.code
    printed = []
    for stream in (out, err):
        stream.flush()
        printed.append(stream.buffer.getvalue().decode("utf-8"))  # type: ignore[attr-defined]
    return Outcome(code or 0, *printed)


def succeed(*arguments: str, cwd: Path, stdin: bytes = b"", terminal: bool = False, **environment: str) -> Outcome:
    outcome = dl7(*arguments, cwd=cwd, stdin=stdin, terminal=terminal, **environment)
    assert outcome.code == 0, outcome.err
    return outcome


def start(*arguments: str, cwd: Path) -> "subprocess.Popen[str]":
    """Start `dl7` in a process of its own."""
    command = [sys.executable, "-m", "dl7cli", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT)


def start_python(code: str, *arguments: str) -> "subprocess.Popen[str]":
    """Another Python process, to be used in a `with` that waits for it."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stdin=pipe, text=True, env=ENVIRONMENT)


@contextlib.contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """Writes over this size come up short, as on a full disk: Python ignores SIGXFSZ."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
