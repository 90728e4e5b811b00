"""Run folders: made, locked and found, and the small files that a training and its evaluations leave in them.

Of the checkpoint folders, `last`, `best`, those of the last epochs and their `average`, it knows where they are and
when they were written, not what is in them. POSIX only: the lock is `flock`.
"""

import contextlib
import difflib
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dl7cli import __version__, files
from dl7cli.errors import UserError
from dl7cli.recipe import Recipe, from_document, to_toml

RUNS = Path("runs")
"""Where runs lie that were given no folder of their own."""

_ENVIRONMENT = "environment.json"
_METRICS = "metrics.jsonl"
_EVALUATIONS = "evaluations.jsonl"
_RESULT = "result.json"
_LOCK = "lock"
_PACKAGES = ("torch", "numpy", "datasets", "sacrebleu", "sentencepiece", "safetensors", "pydantic", "typer")
_EXAMPLE = {"classification": "dl7 train resnet", "translation": "dl7 train seq2seq"}


@dataclass(frozen=True)
class Run:
    """A run folder and the places of what others read and write in it, whether there yet or not."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.absolute().name

    @property
    def last(self) -> Path:
        """The newest checkpoint: what resuming goes on from."""
        return self.folder / "last"

    @property
    def best(self) -> Path:
        """The checkpoint with the best validation score."""
        return self.folder / "best"

    @property
    def average(self) -> Path:
        """The mean of the checkpoints of several epochs."""
        return self.folder / "average"

    def epoch(self, number: int) -> Path:
        """The checkpoint of an epoch, counted from 1, where those of the last ones are kept."""
        return self.folder / f"epoch-{number:04d}"

    @property
    def recipe_file(self) -> Path:
        return self.folder / "recipe.toml"


@dataclass(frozen=True)
class Summary:
    """One line of `dl7 runs list`; None where the run's files do not say."""

    name: str
    recipe: str | None
    task: str | None
    data: str | None
    state: str
    """`training`; `finished`; `interrupted`: there is a checkpoint to go on from; `empty`: there is none."""
    epochs: int
    """Epochs finished."""
    primary: str | None
    """Which score the next one is, such as `accuracy` (a fraction) or `bleu` (0 to 100)."""
    best: float | None
    """The best on the validation split."""
    test: float | None
    """On the test split, at the end of training."""
    test_primary: str | None
    """Which score that is: a run may be chosen by another than it is judged by."""
    evaluation: dict[str, Any] | None
    """The newest record of `append_evaluation`."""


def create(recipe: Recipe, name: str, out: Path | None) -> Run:
    """Make a run folder with its `recipe.toml`: `out`, or else the next free `runs/<name>-<number>`.

    Two processes at once get different folders. Raises UserError where `out` holds anything or
    cannot be made.
    """
    try:
        run = Run(_numbered(name) if out is None else _claimed(out))
        try:
            with run.recipe_file.open("x", encoding="utf-8") as file:
                file.write(to_toml(recipe))
        except FileExistsError:  # of two processes that found the same `out` empty, this is the second
            raise _occupied(run) from None
        except OSError:
            run.recipe_file.unlink(missing_ok=True)
            run.folder.rmdir()
            raise
    except OSError as error:
        raise _cannot_write(out or RUNS, error) from error
    return run


def refuse_occupied(out: Path) -> None:
    """Raise UserError where `create` would: `out` is a file or a folder that holds anything."""
    if out.exists() and not out.is_dir():
        raise UserError(f"`{out}` is a file", hint="`--out` takes a folder that is new or empty")
    if out.exists() and any(out.iterdir()):
        raise _occupied(Run(out))


def find(run: str | None, *, task: str | None = None) -> tuple[Run, Path]:
    """The run that a RUN argument means, and the checkpoint in it to read: the best one, or else the last.

    `run` is a run folder, a checkpoint folder in one, the name of either under `runs/`, or None for the run
    under `runs/` whose checkpoint is the newest. `task` (`classification` or `translation`) is what the run
    must be for. Raises UserError where there is no such run, or no checkpoint in it.
    """
    return _newest(task) if run is None else _named(run, task)


def called(run: Run, checkpoint: Path) -> str:
    """What tells a checkpoint from others of its run: the run where that alone means it, or else its own folder."""
    default = _checkpoint(run)
    return str(run.folder if default is not None and default.resolve() == checkpoint.resolve() else checkpoint)


@contextlib.contextmanager
def lock(run: Run) -> Iterator[None]:
    """Keep other processes from training in this run; raises UserError where one does already.

    The lock goes with the process, however that ends. The file stays: removing it could take it from under
    another process that is about to lock it.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context((run.folder / _LOCK).open("ab+", buffering=0))
            # `listing` holds it for an instant to see whether it is free: no reason to give up.
            free = _locked(file.fileno(), fcntl.LOCK_EX, attempts=50)
        except OSError as error:
            raise _cannot_write(run.folder / _LOCK, error) from error
        if not free:
            file.seek(0)
            holder = file.read(20).decode("ascii", "replace").strip()
            who = f"process {holder}" if holder else "another process"
            hint = "wait until that ends, or train without `--resume` to start another run"
            raise UserError(f"run `{run.folder}` is being trained by {who}", hint)
        # Not left to closing the file: a worker forked meanwhile would keep the lock.
        stack.callback(fcntl.flock, file.fileno(), fcntl.LOCK_UN)
        try:
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
        except OSError as error:
            raise _cannot_write(run.folder / _LOCK, error) from error
        yield


def read_recipe(run: Run) -> Recipe:
    """The recipe in the run's `recipe.toml`; raises UserError where there is none that this version knows."""
    path = run.recipe_file
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {_reason(error)}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise UserError(f"`{path}` is not a TOML file: {error}") from None
    return from_document(document, origin=f"`{path}`")


def listing() -> list[Summary]:
    """What the files of each run under `runs/` say, the oldest run first; damaged files count as missing."""
    return [_summary(run) for run in sorted(_runs(), key=lambda run: (_time(run.recipe_file), run.name))]


def epochs(run: Run, *, torn: bool = False) -> dict[int, Path]:
    """The checkpoints of single epochs by their number, the oldest first; `torn`: also what a kill has left of one."""
    pattern = re.compile(r"epoch-(\d{4,})", re.ASCII)
    named = {int(match[1]): path for path in run.folder.iterdir() if (match := pattern.fullmatch(path.name))}
    return {number: path for number, path in sorted(named.items()) if torn or _holds(path)}


def append_metrics(run: Run, record: dict[str, Any]) -> None:
    """Add a line to `metrics.jsonl`: `step`, `epoch` and whatever was measured.

    A record with `scores` (and `primary`, the one of them that counts) closes an epoch, and its `epoch` is
    how many are finished. Raises UserError where it cannot be written and ValueError for NaN or infinity.
    """
    _append(run.folder / _METRICS, record)


def metrics(run: Run) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl` in order; lines torn by a kill are left out."""
    return _records(run.folder / _METRICS)


def trim_metrics(run: Run, step: int, epochs: int) -> None:
    """Drop the records after optimiser step `step` and `epochs` finished epochs, from which a run is resumed.

    They will be made again. The end of an epoch has the step of its last batch, so that the step alone does not tell.
    """
    kept = [
        record
        for record in metrics(run)
        if record.get("step", 0) <= step and not ("scores" in record and record.get("epoch", 0) > epochs)
    ]
    if (run.folder / _METRICS).exists():
        _replace(run.folder / _METRICS, b"".join(map(_line, kept)))


def append_evaluation(run: Run, record: dict[str, Any]) -> None:
    """Add a line to `evaluations.jsonl`: the record after the time in UTC. Raises as `append_metrics`."""
    _append(run.folder / _EVALUATIONS, {"time": _now(), **record})


def refuse_unwritable(run: Run) -> None:
    """Raise UserError where `append_evaluation` would, so that no score is seen that could not be noted."""
    path = run.folder / _EVALUATIONS
    try:
        if os.path.lexists(path):
            with path.open("ab"):
                return
        # Not made and removed again: another process may be about to write its own reading.
        if not os.access(run.folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        hint = "each reading of a split is noted there: make it writable, or evaluate a copy of the run folder"
        raise UserError(f"cannot write `{path}`: {_reason(error)}", hint) from error


def evaluations(run: Run) -> list[dict[str, Any]]:
    """The records of `evaluations.jsonl`, the oldest first."""
    return _records(run.folder / _EVALUATIONS)


def write_result(run: Run, record: dict[str, Any]) -> None:
    """Write `result.json`, which marks the run as finished. Raises as `append_metrics`."""
    _replace(run.folder / _RESULT, _pretty(record))


def result(run: Run) -> dict[str, Any] | None:
    """What `write_result` wrote; None where the run is not finished."""
    return _document(run.folder / _RESULT)


def write_environment(run: Run, extra: dict[str, Any]) -> None:
    """Write `environment.json`: versions, machine and command line, and `extra` (device, precision …).

    Where the run was resumed, what was there before is kept under `earlier`, the oldest first.
    """
    document: dict[str, Any] = {
        "started": _now(),
        "command": sys.argv,
        "dl7": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        **extra,
    }
    before = _document(run.folder / _ENVIRONMENT)
    if before is not None:
        document["earlier"] = [*before.pop("earlier", []), before]
    _replace(run.folder / _ENVIRONMENT, _pretty(document))


def amend_environment(run: Run, changes: dict[str, Any]) -> None:
    """Change entries of `environment.json` that have turned out otherwise since it was written."""
    _replace(run.folder / _ENVIRONMENT, _pretty({**environment(run), **changes}))


def environment(run: Run) -> dict[str, Any]:
    """What `write_environment` wrote last; empty where nothing can be read."""
    return _document(run.folder / _ENVIRONMENT) or {}


def _numbered(name: str) -> Path:
    stem = re.sub(r"[^\w.-]+", "-", name).strip(".-") or "run"
    RUNS.mkdir(parents=True, exist_ok=True)
    pattern = re.compile(re.escape(stem) + r"-(\d+)", re.ASCII)
    taken = [int(match[1]) for path in RUNS.iterdir() if (match := pattern.fullmatch(path.name))]
    number = max(taken, default=0) + 1
    while True:
        folder = RUNS / f"{stem}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:  # by another process, since we looked
            number += 1
        else:
            return folder


def _claimed(out: Path) -> Path:
    refuse_occupied(out)
    out.mkdir(parents=True, exist_ok=True)
    return out


def _occupied(run: Run) -> UserError:
    resume = f"`dl7 train --resume {run.folder}` goes on with it, or " if _holds(run.last) else ""
    return UserError(f"folder `{run.folder}` is not empty", hint=f"{resume}name a new folder with `--out`")


def _newest(task: str | None) -> tuple[Run, Path]:
    # A run that has just begun has only untrained weights.
    for run in sorted(_runs(), key=lambda run: (_holds(run.best), _written(run)), reverse=True):
        checkpoint = _checkpoint(run)
        if checkpoint is not None and task in (None, _task(run)):
            return run, checkpoint
    what = "run" if task is None else f"{task} run"
    hint = f"`{_EXAMPLE.get(task or 'classification')}` makes one; a run elsewhere has to be named"
    raise UserError(f"there is no {what} with a checkpoint under `{RUNS}`", hint)


def _named(name: str, task: str | None) -> tuple[Run, Path]:
    path = next((place for place in (Path(name), RUNS / name) if _is_run(place) or _holds(place)), None)
    if path is None:
        raise _unknown(name)
    if _holds(path):
        # A checkpoint that was copied out of its run is a run by itself: what is appended goes beside it.
        above = Run(path.parent if path.name.strip(".") else path.resolve().parent)
        run, checkpoint = above if _is_run(above.folder) else Run(path), path
    else:
        run = Run(path)
        found = _checkpoint(run)
        if found is None:
            hint = "the first is written after an epoch; `dl7 runs list` shows the runs that have one"
            raise UserError(f"run `{run.folder}` has no checkpoint yet", hint)
        checkpoint = found
    seen = _task(run)
    if task is not None and seen is not None and seen != task:
        hint = f"`{_EXAMPLE.get(task)}` makes one for {task}; `dl7 runs list` shows what there is"
        raise UserError(f"run `{run.folder}` is for {seen}, not for {task}", hint)
    return run, checkpoint


def _unknown(name: str) -> UserError:
    if os.path.lexists(name):
        hint = "a run folder holds `recipe.toml`, a checkpoint folder `checkpoint.json`"
        return UserError(f"`{name}` is neither a run nor a checkpoint", hint)
    names = [run.name for run in _runs()]
    near = difflib.get_close_matches(Path(name).name, names, n=1)
    suggestion = f" (did you mean `{near[0]}`?)" if near else ""
    return UserError(f"there is no run `{name}`{suggestion}", hint="`dl7 runs list` shows those under `runs`")


def _runs() -> list[Run]:
    try:
        return [Run(path) for path in RUNS.iterdir() if _is_run(path)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"`{RUNS}` cannot be read: {_reason(error)}") from error


def _is_run(folder: Path) -> bool:
    return os.path.isfile(Run(folder).recipe_file)  # unlike Path's, False where it may not be looked at


def _index(checkpoint: Path) -> Path:
    """Its `checkpoint.json`, or that of the previous one where a save was killed while it swapped the two."""
    beside = checkpoint.parent / (checkpoint.name + ".old")
    return (checkpoint if os.path.lexists(checkpoint) else beside) / "checkpoint.json"


def _holds(checkpoint: Path) -> bool:
    return os.path.isfile(_index(checkpoint))


def _checkpoint(run: Run) -> Path | None:
    return next((folder for folder in (run.best, run.last) if _holds(folder)), None)


def _written(run: Run) -> int:
    """When the newest checkpoint of a run was written, in nanoseconds; 0: never."""
    return max(_time(_index(folder)) for folder in (run.best, run.last))


def _time(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _task(run: Run) -> str | None:
    try:
        return read_recipe(run).task
    except UserError:
        return None


def _summary(run: Run) -> Summary:
    try:
        recipe = read_recipe(run)
    except UserError:
        recipe = None
    closed = [record for record in metrics(run) if isinstance(record.get("scores"), dict)]
    result = _document(run.folder / _RESULT)
    named = (record.get("primary") for record in [*closed, result or {}])
    primary = next((name for name in named if isinstance(name, str)), None)
    scores = [value for record in closed if (value := _score(record, primary)) is not None]
    tested = result if result and result.get("split") == "test" else {}
    test_primary = name if isinstance(name := tested.get("primary"), str) else None
    return Summary(
        name=run.name,
        recipe=recipe.name if recipe else None,
        task=recipe.task if recipe else None,
        data=recipe.data.source if recipe else None,
        state=_state(run, finished=result is not None),
        epochs=max((epoch for record in closed if isinstance(epoch := record.get("epoch"), int)), default=0),
        primary=primary,
        best=max(scores, default=None),
        test=_score(tested, test_primary),
        test_primary=test_primary,
        evaluation=next(reversed(evaluations(run)), None),
    )


def _score(record: dict[str, Any], primary: str | None) -> float | None:
    scores = record.get("scores")
    value = scores.get(primary) if isinstance(scores, dict) else None
    return float(value) if isinstance(value, int | float) else None


def _state(run: Run, *, finished: bool) -> str:
    try:
        with (run.folder / _LOCK).open("rb") as file:
            training = not _locked(file.fileno(), fcntl.LOCK_SH)
    except OSError:  # there is no lock file, or no locks on this disk: nothing trains
        training = False
    if training:
        return "training"
    if finished:
        return "finished"
    return "empty" if _checkpoint(run) is None else "interrupted"


def _locked(descriptor: int, operation: int, attempts: int = 1) -> bool:
    """Take the lock if it is free, or comes free within as many fiftieths of a second as there are attempts."""
    for _ in range(attempts):
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        else:
            return True
    return False


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, allow_nan=False) + "\n").encode()


def _pretty(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, allow_nan=False, indent=2) + "\n").encode()


def _append(path: Path, record: dict[str, Any]) -> None:
    line = _line(record)
    try:
        if _torn(path):
            line = b"\n" + line
        with path.open("ab") as file:  # appended by one call: the lines of two processes do not mix
            file.write(line)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _torn(path: Path) -> bool:
    """Whether the last line of a file has no end."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            return file.read() not in (b"", b"\n")
    except FileNotFoundError:
        return False


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {_reason(error)}") from error
    return [record for line in lines if (record := _parsed(line)) is not None]


def _document(path: Path) -> dict[str, Any] | None:
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return None


def _parsed(content: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _replace(path: Path, content: bytes) -> None:
    try:
        with files.replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> UserError:
    hint = "make room, or choose a folder that can be written to with `--out`"
    return UserError(f"cannot write `{path}`: {_reason(error)}", hint)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
