"""The small files that a training and its evaluations leave in a run folder."""

import errno
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Self, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dl7cli import __version__, files
from dl7cli.errors import UserError
from dl7cli.recipe import Recipe, to_toml
from dl7cli.runs.folder import Run, cannot_write, file_time, find, no_link

_RESULT = "result.json"
_ENVIRONMENT = "environment.json"
_METRICS = "metrics.jsonl"
_EVALUATIONS = "evaluations.jsonl"
_PACKAGES = ("torch", "numpy", "datasets", "sacrebleu", "sentencepiece", "safetensors", "pydantic", "typer")
_LARGEST = 1 << 28
"""Bytes of a file that is read: a record has some hundreds."""
_Count = Annotated[int, Field(ge=0, lt=1 << 63)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Record(BaseModel):
    """What is relied on in the JSON files of a run, where it is there."""

    model_config = ConfigDict(strict=True)

    step: _Count = 0
    epoch: _Count = 0
    primary: str | None = None
    scores: dict[str, _Finite] = {}
    earlier: list[Any] = []
    precision: str = "auto"
    others: list[str] = []

    @model_validator(mode="after")
    def _has_its_primary_score(self) -> Self:
        if self.primary is not None and self.primary not in self.scores:
            raise ValueError("there is no score of that name")
        return self


def append_metrics(run: Run, record: dict[str, Any]) -> None:
    """Add a line to `metrics.jsonl`: `step`, `epoch` and whatever was measured.

    A record with `primary`, the one of its `scores` that counts, closes an epoch, and its `epoch` is how many are
    finished. Raises UserError where it cannot be written and ValueError for NaN or infinity.
    """
    _append(run.folder / _METRICS, record)


def metrics(run: Run) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl` in order; lines torn by a kill are left out."""
    return _records(run.folder / _METRICS)


def closed(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the records of `metrics.jsonl` those that close an epoch."""
    return [record for record in records if record.get("primary") is not None]


def chosen(epochs: Sequence[dict[str, Any]], recipe: Recipe | None) -> dict[str, Any] | None:
    """Of `closed` epochs that kept as `best`: the best on validation, or the last."""
    if recipe is not None and recipe.training.select == "last":
        return epochs[-1] if epochs else None
    return max(epochs, key=lambda record: record["scores"][record["primary"]], default=None)


def trim_metrics(run: Run, step: int, epochs: int) -> None:
    """Drop the records after optimiser step `step` and `epochs` finished epochs, from which a run is resumed.

    They will be made again. The end of an epoch has the step of its last batch, so that the step alone does not tell.
    """
    kept = [
        record
        for record in metrics(run)
        if record.get("step", 0) <= step and not (closed([record]) and record.get("epoch", 0) > epochs)
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
            with open(path, "ab", opener=no_link):
                return
        # Not made and removed again: another process may be about to write its own reading.
        if not os.access(run.folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        hint = "each reading of a split is noted there: make it writable, or evaluate a copy of the run folder"
        raise UserError(f"cannot write `{path}`: {files.reason(error)}", hint) from error


def evaluations(run: Run) -> list[dict[str, Any]]:
    """The records of `evaluations.jsonl`, the oldest first."""
    return _records(run.folder / _EVALUATIONS)


def readings(run: Run, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of a run that are of the same examples as a result, by split and digest; where one, as of an earlier
    dl7, has no digest, by the name of the data.
    """
    same = []
    for record in evaluations(run):
        key = "digest" if "digest" in record and "digest" in result else "data"
        if (record.get("split"), record.get(key)) == (result["split"], result.get(key)):
            same.append(record)
    return same


def write_result(run: Run, record: dict[str, Any]) -> None:
    """Write `result.json`, which marks the run as finished. Raises as `append_metrics`."""
    _replace(run.folder / _RESULT, _pretty(record))


def result(run: Run) -> dict[str, Any] | None:
    """What `write_result` wrote; None where the run is not finished."""
    return _document(run.folder / _RESULT)


def rewrite_recipe(run: Run, recipe: Recipe) -> None:
    """Replace `recipe.toml`, whose time stays that of the run's beginning. Raises as `append_metrics`."""
    begun = file_time(run.recipe_file)
    _replace(run.recipe_file, to_toml(recipe).encode())
    os.utime(run.recipe_file, ns=(begun, begun))


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
    """What `write_environment` wrote last; empty where it never did. Raises UserError where that is damaged."""
    path = run.folder / _ENVIRONMENT
    found = _document(path)
    if found is None and os.path.lexists(path):
        hint = "it says what the run began with: put back a copy, or remove it and give `--precision` yourself"
        raise UserError(f"`{path}` is damaged", hint)
    return found or {}


def scoring_precision(asked: str, names: Iterable[str | None]) -> str:
    """The precision to score runs with these names in: fp32 for `auto` where one of them was trained and scored in it.

    Raises UserError where there is no such run.
    """
    if asked == "auto" and any(environment(find(name)[0]).get("precision") == "fp32" for name in names):
        return "fp32"
    return asked


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
        with open(path, "ab", opener=no_link) as file:  # appended by one call: the lines of two processes do not mix
            file.write(line)
    except OSError as error:
        raise cannot_write(path, error) from error


def _torn(path: Path) -> bool:
    """Whether the last line of a file has no end."""
    try:
        with open(path, "rb", opener=no_link) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            return file.read() not in (b"", b"\n")
    except FileNotFoundError:
        return False


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        lines = _content(path).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {files.reason(error)}") from error
    return [record for line in lines if (record := _parsed(line)) is not None]


def _document(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none."""
    try:
        return _parsed(_content(path))
    except OSError:
        return None


def _content(path: Path) -> bytes:
    if files.size(path) > _LARGEST:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return path.read_bytes()


def _parsed(content: bytes) -> dict[str, Any] | None:
    """The JSON object that was written; None for what `_line` does not write and the commands do not read."""
    try:
        document = json.loads(content)
        json.dumps(document, allow_nan=False)
        _Record.model_validate(document)
    except (ValueError, RecursionError):
        return None
    return cast(dict[str, Any], document)


def _replace(path: Path, content: bytes) -> None:
    try:
        if path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if path.exists():
            files.size(path)
        with files.replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise cannot_write(path, error) from error
