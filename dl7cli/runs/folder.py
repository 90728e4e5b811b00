"""Run folders: made, locked and found.

Of the checkpoint folders, `last`, `best`, those of the last epochs and their `average`, it knows where they are and
when they were written, not what is in them. POSIX only: the lock is `flock`.
"""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dl7cli import files
from dl7cli.errors import UserError, suggestion
from dl7cli.recipe import Recipe, from_document, read, to_toml

RUNS = Path("runs")
"""Where runs lie that were given no folder of their own."""

_LOCK = "lock"
_EXAMPLE = {"classification": "dl7 train resnet", "translation": "dl7 train seq2seq"}
_SECOND = 1_000_000_000


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
        """The checkpoint of the epoch that `training.select` chooses: the best on validation, or the last."""
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
        _date(run.recipe_file, [file_time(other.recipe_file) for other in _others(run)])
    except OSError as error:
        raise cannot_write(out or RUNS, error) from error
    return run


def refuse_occupied(out: Path) -> None:
    """Raise UserError where `create` would: `out` is a file, a folder that holds anything, or no place to write to."""
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"`{out}` is a file", hint="`--out` takes a folder that is new or empty")
        occupied = out.exists() and any(out.iterdir())
    except OSError as error:
        raise cannot_write(out, error) from error
    if occupied:
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
    default = usable(run)
    return str(run.folder if default is not None and default.resolve() == checkpoint.resolve() else checkpoint)


@contextlib.contextmanager
def lock(run: Run) -> Iterator[int | None]:
    """Keep other processes from training in this run; raises UserError where one does already.

    Gives the number of the process that had the lock before and was killed, if one was. The lock goes with the process,
    however that ends. The file stays: removing it could take it from under another process that is about to lock it.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(run.folder / _LOCK, "ab+", buffering=0, opener=no_link))
            # `listing` holds it for an instant to see whether it is free: no reason to give up.
            free = _locked(file.fileno(), fcntl.LOCK_EX, attempts=50)
        except OSError as error:
            raise cannot_write(run.folder / _LOCK, error) from error
        file.seek(0)
        holder = file.read(20).decode("ascii", "replace").strip()
        if not free:
            who = f"process {holder}" if holder else "another process"
            hint = "wait until that ends, or train without `--resume` to start another run"
            raise UserError(f"run `{run.folder}` is being trained by {who}", hint)
        # Not left to closing the file: a worker forked meanwhile would keep the lock.
        stack.callback(fcntl.flock, file.fileno(), fcntl.LOCK_UN)
        try:
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
        except OSError as error:
            raise cannot_write(run.folder / _LOCK, error) from error
        stack.callback(_empty, file)
        yield int(holder) if holder.isdecimal() else None


def _empty(lock: IO[bytes]) -> None:
    """Leave no name behind, which would be that of a process that was killed."""
    with contextlib.suppress(OSError):
        lock.truncate(0)


def is_locked(run: Run) -> bool:
    """Whether a process trains in this run."""
    try:
        with open(run.folder / _LOCK, "rb", opener=no_link) as file:
            return not _locked(file.fileno(), fcntl.LOCK_SH)
    except OSError:  # there is no lock file, or no locks on this disk: nothing trains
        return False


def mark_newest(run: Run) -> None:
    """Let the checkpoint just written count as the newest of all runs, also where the clock has been set back."""
    _date(_index(run.last), [_written(other) for other in _others(run)])


def read_recipe(run: Run) -> Recipe:
    """The recipe in the run's `recipe.toml`; raises UserError where there is none that this version knows."""
    return from_document(read(run.recipe_file), origin=f"`{run.recipe_file}`")


def epochs(run: Run, *, torn: bool = False) -> dict[int, Path]:
    """The checkpoints of single epochs by their number, the oldest first; `torn`: also what a kill has left of one."""
    pattern = re.compile(r"epoch-(\d{4,})", re.ASCII)
    named = {int(match[1]): path for path in run.folder.iterdir() if (match := pattern.fullmatch(path.name))}
    return {number: path for number, path in sorted(named.items()) if torn or holds(path)}


def all_runs() -> list[Run]:
    try:
        return [Run(path) for path in RUNS.iterdir() if _is_run(path)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"`{RUNS}` cannot be read: {files.reason(error)}") from error


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
    resume = f"`dl7 train --resume {run.folder}` goes on with it, or " if holds(run.last) else ""
    return UserError(f"folder `{run.folder}` is not empty", hint=f"{resume}name a new folder with `--out`")


def _newest(task: str | None) -> tuple[Run, Path]:
    # A run that has just begun has only untrained weights.
    for run in sorted(all_runs(), key=lambda run: (holds(run.best), _written(run)), reverse=True):
        checkpoint = usable(run)
        if checkpoint is not None and task in (None, _task(run)):
            return run, checkpoint
    what = "run" if task is None else f"{task} run"
    hint = f"`{_EXAMPLE.get(task or 'classification')}` makes one; a run elsewhere has to be named"
    raise UserError(f"there is no {what} with a checkpoint under `{RUNS}`", hint)


def _named(name: str, task: str | None) -> tuple[Run, Path]:
    path = next((place for place in (Path(name), RUNS / name) if _is_run(place) or holds(place)), None)
    if path is None:
        raise _unknown(name)
    if holds(path):
        # A checkpoint that was copied out of its run is a run by itself: what is appended goes beside it.
        above = Run(path.parent if path.name.strip(".") else path.resolve().parent)
        run, checkpoint = above if _is_run(above.folder) else Run(path), path
    else:
        run = Run(path)
        found = usable(run)
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
    names = [run.name for run in all_runs()]
    told = f"there is no run `{name}`{suggestion(Path(name).name, names)}"
    return UserError(told, hint="`dl7 runs list` shows those under `runs`")


def _others(run: Run) -> list[Run]:
    """The runs beside this one, where it lies with those that were given no folder of their own."""
    beside = run.folder.resolve().parent == RUNS.resolve()
    return [other for other in all_runs() if other.name != run.name] if beside else []


def _date(path: Path, others: list[int]) -> None:
    """Date a file after others if it is not. What keeps it from that is no reason to stop."""
    newest = max(others, default=0)
    if file_time(path) <= newest:
        with contextlib.suppress(OSError):
            os.utime(path, ns=(newest + _SECOND, newest + _SECOND))


def _is_run(folder: Path) -> bool:
    return os.path.isfile(Run(folder).recipe_file)  # unlike Path's, False where it may not be looked at


def _index(checkpoint: Path) -> Path:
    """Its `checkpoint.json`, or that of the previous one where a save was killed while it swapped the two."""
    beside = checkpoint.parent / (checkpoint.name + ".old")
    return (checkpoint if os.path.lexists(checkpoint) else beside) / "checkpoint.json"


def holds(checkpoint: Path) -> bool:
    """Whether there is a checkpoint, whole or not."""
    return os.path.isfile(_index(checkpoint))


def usable(run: Run) -> Path | None:
    """The checkpoint to use: the best one, or else the last; None where there is neither."""
    return next((folder for folder in (run.best, run.last) if holds(folder)), None)


def _written(run: Run) -> int:
    """When the newest checkpoint of a run was written, in nanoseconds; 0: never."""
    return max(file_time(_index(folder)) for folder in (run.best, run.last))


def file_time(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _task(run: Run) -> str | None:
    try:
        return read_recipe(run).task
    except UserError:
        return None


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


def no_link(path: str, flags: int) -> int:
    """Open a file of a run; OSError for a link, which in a run that came from elsewhere may lead to any file.

    And for a pipe, which would be waited for.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        files.size(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def cannot_write(path: Path, error: OSError) -> UserError:
    hint = "make room, or choose a folder that can be written to with `--out`"
    return UserError(f"cannot write `{path}`: {files.reason(error)}", hint)
