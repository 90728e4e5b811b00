"""Where data come from: built-in sets, files and folders, and the dataset hub through `datasets`.

A source is a string: `builtin:shapes`, a path, or a hub id such as `uoft-cs/cifar10`. Where a hub data set or a
folder has several configurations, one is chosen after a colon: `wmt/wmt14:de-en`.
"""

import contextlib
import errno
import hashlib
import http.client
import importlib.util
import itertools
import logging
import os
import re
import shutil
import ssl
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dl7cli.data.damage import damage, emptiness
from dl7cli.data.growth import growth_told
from dl7cli.data.refusing import refuse_endless, refuse_remote
from dl7cli.errors import NoSplitError, UserError

if TYPE_CHECKING:
    import datasets

Progress = Callable[[str, int, int], None]
"""What is being done, how much of it is done, how much there is in all."""

BUILTIN = ("builtin:shapes", "builtin:phrases")
REACH_SECONDS = 5.0
_WITHOUT_THEM = "folders of images, `cifar-10-batches-bin`, parallel text, `.tsv`, `.jsonl` or the built-in sets"

_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?(:[\w.-]+)?", re.ASCII)
_TEXT_SUFFIXES = (".jsonl", ".json", ".tsv", ".csv", ".txt")
_TABLE_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".csv")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_CLIENTS = ("httpx", "httpcore", "requests", "urllib3", "aiohttp", "huggingface_hub", "hf_xet", "fsspec")
"""Whose errors are those of a connection, as versions of `datasets` let them through."""
_TRUE = ("1", "ON", "YES", "TRUE")


def silent(what: str, done: int, total: int) -> None:
    """Report no progress."""


def cache_folder() -> Path:
    """Return the folder for what is kept between runs: `$DL7_CACHE`, else the user's cache folder."""
    if folder := os.environ.get("DL7_CACHE"):
        return Path(os.path.expanduser(folder))
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(os.path.expanduser(folder)) / "dl7"
    return Path.home() / ".cache" / "dl7"


def cache_name(source: str) -> str:
    """Return the start of the names under which a source is kept in the cache: readable, and unique by a hash."""
    path, configuration = _split_configuration(source)
    identity = str(local_path(source).resolve()) if is_local(source) else path
    readable = re.sub(r"[^A-Za-z0-9]+", "-", Path(identity).name).strip("-")[:40]
    identity += f":{configuration}" if configuration else ""
    return f"{readable}-{hashlib.sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"


@contextlib.contextmanager
def working_folder(parent: Path) -> Iterator[Path]:
    """Make a folder in one of the cache for what is not whole yet; what is left in it at the end is deleted.

    Raises UserError where the cache cannot be written or the disk is full.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
    except OSError as error:
        raise _cache_error(parent, error) from error
    for old in parent.glob(".new-*"):
        # Left by a process that was killed; another one may rename or delete its own meanwhile.
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > 86400:
                shutil.rmtree(old, ignore_errors=True)
    try:
        yield folder
    except OSError as error:
        file = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
        if error.errno in _NO_ROOM or (file and file.absolute().is_relative_to(parent.absolute())):
            raise _cache_error(parent, error) from error
        if file:
            raise unreadable(file, error) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _cache_error(parent: Path, error: OSError) -> UserError:
    return UserError(
        f"the cache folder `{parent}` cannot be written: {error.strerror or error}",
        hint="make room, or set `DL7_CACHE` to another folder",
    )


def unreadable(path: Path, error: OSError) -> UserError:
    """Say that a file or folder cannot be read, and why."""
    return UserError(f"`{path}` cannot be read: {error.strerror or error}")


def is_builtin(source: str) -> bool:
    """Tell whether the source names a data set that the program generates."""
    return source.startswith("builtin:")


def is_local(source: str) -> bool:
    """Tell whether the source is a path: one that exists, or one that cannot be a hub id."""
    if is_builtin(source):
        return False
    path, _ = _split_configuration(source)
    return (
        os.path.exists(os.path.expanduser(path))
        or _HUB_ID.fullmatch(source) is None
        or Path(source).suffix in (*_TEXT_SUFFIXES, ".parquet")
    )


def local_path(source: str) -> Path:
    """Return the path of a local source, without the name of a configuration."""
    return Path(os.path.expanduser(_split_configuration(source)[0]))  # Path's own fails for a user that is not there


def is_file(source: str) -> bool:
    """Tell whether the source is a single file, which has no splits."""
    return is_local(source) and os.path.isfile(local_path(source))


def existing_path(source: str) -> Path:
    """Return the path of a local source; raise UserError if nothing is there or it is an empty folder."""
    path = local_path(source)
    if not _split_configuration(source)[0]:  # to Path the folder that one is in
        raise UserError("the data source is empty", hint="name a folder, a file or a data set")
    if not os.path.exists(path):  # unlike Path's, False for a name that no file can have
        raise UserError(f"there is no file or folder `{source}`", hint="check the path given as the data source")
    try:
        empty = path.is_dir() and not any(path.iterdir())
        if path.is_dir() and not os.access(path, os.X_OK):  # its names may be read, and nothing else
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise unreadable(path, error) from error
    if empty:
        raise UserError(f"the folder `{path}` is empty", hint="check the path given as the data source")
    return path


def refuse_configuration(source: str) -> None:
    """Raise UserError where a local source names a configuration, of a kind of data that has none."""
    path, configuration = _split_configuration(source)
    if configuration is not None:
        raise UserError(f"`{path}` has no configurations: `:{configuration}` means nothing", hint=f"name it `{path}`")


def fingerprint(path: Path) -> str:
    """Return a hash of the names, sizes and modification times of a file or of all files below a folder.

    Raises UserError for a file that is not there any more or a link that leads nowhere.
    """
    entries = []
    for file in [path] if path.is_file() else files_below(path):
        try:
            status = file.stat()
        except OSError as error:
            raise unreadable(file, error) from error
        name = "" if file == path else file.relative_to(path).as_posix()
        entries.append(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n")
    return hashlib.sha256("".join(sorted(entries)).encode("utf-8", "surrogateescape")).hexdigest()


def split_name(name: str) -> str | None:
    """Return `train`, `validation` or `test` for the usual names of splits, None for any other name."""
    return _SPLITS.get(name.lower())


def by_split(names: Iterable[str], where: str, *, for_training: bool = True) -> dict[str, str]:
    """Map train, validation and test to the one among the names that stands for it.

    Raises UserError when two names mean the same split, and NoSplitError when there is no training split or, where it
    is not `for_training`, none at all.
    """
    names = list(names)
    found: dict[str, str] = {}
    for name in names:
        split = split_name(name)
        if split is None:
            continue
        if split in found:
            raise UserError(
                f"`{where}` has both `{found[split]}` and `{name}` for its {split} split", hint="remove one of them"
            )
        found[split] = name
    if not ("train" in found if for_training else found):
        there = listed(names) or "nothing"
        if for_training:
            raise NoSplitError(f"`{where}` has no train split: there is {there}", hint="call the training data `train`")
        raise NoSplitError(f"`{where}` has no split: there is {there}", hint="call what is to be evaluated `test`")
    return {split: found[split] for split in ("train", "validation", "test") if split in found}


def is_offline(offline: bool) -> bool:
    """Tell whether no connection may be opened: asked for, or by `HF_HUB_OFFLINE` or `HF_DATASETS_OFFLINE`."""
    return offline or any(
        os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )


def available(source: str, *, offline: bool) -> bool:
    """Tell within five seconds whether a source can be read: generated, on disk, or the hub can be reached.

    For a hub id, what is kept on disk is looked at first; offline, no connection is opened.
    """
    if is_builtin(source):
        return source in BUILTIN
    if is_local(source):
        return os.path.exists(local_path(source))
    kept = any(cache_folder().glob(f"*/{cache_name(source)}-*/meta.json"))
    return kept or _in_hub_cache(source) or (not is_offline(offline) and _reachable(source))


def load_splits(
    source: str,
    *,
    offline: bool = False,
    progress: Progress = silent,
    working: Path | None = None,
    for_training: bool = True,
) -> "dict[str, datasets.Dataset]":
    """Load a hub data set, a folder or a parquet file with `datasets`: its train, validation and test splits.

    Other splits are left out. For local data the tables that `datasets` makes go to the folder `working` (default:
    below the cache folder), and no connection is opened. Raises UserError if the source is not there, cannot be
    reached or read, or has not the splits that `by_split` wants.
    """
    if is_builtin(source):
        raise UserError(f"`{source}` is generated and not loaded", hint=f"built-in sets are {listed(BUILTIN)}")
    path, configuration = _split_configuration(source)
    arguments: dict[str, Any] = {"name": configuration}
    local = is_local(source)
    if local:
        offline = True
        folder = existing_path(source)
        place = str(folder.resolve())
        if pattern := next((one for one in "*?[" if one in place), None):
            # To `datasets` it is a pattern, of other files perhaps.
            raise UserError(f"`{place}` cannot be read with `{pattern}` in its name", hint="rename it")
        arguments["cache_dir"] = str(working or cache_folder() / "datasets")
        if folder.is_file():
            refuse_configuration(source)
            if folder.suffix != ".parquet":
                raise UserError(f"`{folder}` is not a kind of file that can be read here")
            path, arguments["data_files"] = "parquet", {"train": place}
        else:
            path = place
            if not has_tables(folder):
                by_split(sorted(entry.name for entry in folder.iterdir()), source, for_training=for_training)
                raise UserError(
                    f"`{source}` holds no data that can be read",
                    hint="a folder needs parquet or JSON lines files, or a README.md with `configs`",
                )
    else:
        forbidden = is_offline(offline)
        offline = forbidden or not _reachable(source)
        if offline and not _in_hub_cache(source):
            reason = (
                "it was not kept from the hub, which may not be asked (`--offline` or `HF_HUB_OFFLINE`)"
                if forbidden
                else f"the hub at {_endpoint()} cannot be reached"
            )
            mirror = "" if forbidden else "name a mirror of the hub by the variable HF_ENDPOINT, "
            raise UserError(
                f"`{source}` is no file or folder here, and {reason}",
                hint=f"{mirror}give the data with `--data FOLDER`, or use `--data builtin:shapes` or `builtin:phrases`",
            )
    _refuse_without_packages()
    written = [arguments["cache_dir"]] if local else [_downloaded(path), str(_prepared(path))]
    with _datasets_quiet(offline) as library, growth_told(written, source, progress):
        try:
            if local:
                if folder.is_dir():
                    refuse_remote(folder)
                # What it would read, whatever the names.
                builder = library.load_dataset_builder(path, **arguments)
                for file in itertools.chain.from_iterable((builder.config.data_files or {}).values()):
                    refuse_endless(Path(file))
                if hasattr(builder.config, "keep_default_na"):
                    # `null` and `NA` are words like any others.
                    arguments["keep_default_na"] = False
            loaded = library.load_dataset(path, **arguments)
        except UserError:
            raise
        # The data and the hub are foreign: datasets lets errors of pyarrow, yaml, httpx and its own come through.
        except Exception as error:
            raise _load_error(source, error) from error
    return {split: loaded[name] for split, name in by_split(loaded, source, for_training=for_training).items()}


def _split_configuration(source: str) -> tuple[str, str | None]:
    """Take the name of a configuration off a source, unless the whole is a path that exists."""
    if os.path.exists(os.path.expanduser(source)) or ":" not in source:
        return source, None
    path, _, configuration = source.rpartition(":")
    return (path, configuration) if re.fullmatch(r"[\w.-]+", configuration) else (source, None)


def files_below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, also through links to folders (each only once), but for what is hidden.

    Raises UserError where a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise unreadable(Path(error.filename), error) from error

    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        try:
            status = os.stat(parent)
        except OSError as error:
            raise unreadable(Path(parent), error) from error
        place = (status.st_dev, status.st_ino)
        folders[:] = [] if place in seen else sorted(name for name in folders if not name.startswith("."))
        if place not in seen:
            seen.add(place)
            yield from (Path(parent, name) for name in names if not name.startswith("."))


def has_tables(folder: Path) -> bool:
    """Tell whether `datasets` can make something of a folder: tables in it, or a README that configures it."""
    readme = folder / "README.md"
    if readme.is_file() and re.search(rb"^configs:", readme.read_bytes(), re.MULTILINE):
        return True
    return any(file.suffix in _TABLE_SUFFIXES for file in files_below(folder))


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _downloaded(identity: str) -> str:
    """The folder that the files of a hub data set are kept in."""
    from huggingface_hub import constants

    return os.path.join(constants.HF_HUB_CACHE, "--".join(["datasets", *identity.split("/")]))


def _in_hub_cache(source: str) -> bool:
    """Tell whether `datasets` has prepared this hub data set before (without importing it)."""
    identity, configuration = _split_configuration(source)
    return any(_prepared(identity).glob(f"{configuration or '*'}/*/*/dataset_info.json"))


def _prepared(identity: str) -> Path:
    """The folder that `datasets` prepares the tables of a hub data set in (without importing it)."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    folder = Path(os.path.expanduser(os.environ.get("HF_DATASETS_CACHE") or os.path.join(home, "datasets")))
    *owner, name = identity.split("/")
    # The folder's name is made as by datasets.naming.camelcase_to_snakecase.
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    name = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", name).lower()
    return folder / "___".join([*owner, name])


def _reachable(source: str) -> bool:
    """Ask the hub for a sign of life; any answer below 500 is one. Takes at most `REACH_SECONDS`.

    urllib is used since it goes through the same proxies as the hub's client. It runs in a thread of its own because
    no time limit of a socket covers looking up the name.
    """
    answers: list[bool] = []

    def ask() -> None:
        url = f"{_endpoint().rstrip('/')}/api/datasets/{_split_configuration(source)[0]}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=REACH_SECONDS - 0.5):
                answers.append(True)
        except urllib.error.HTTPError as error:
            answers.append(error.code < 500)
            error.close()
        except urllib.error.URLError as error:
            # Somebody answered; whether the certificate is good is for the hub's client and its own list to say.
            answers.append(isinstance(error.reason, ssl.SSLCertVerificationError))
        except (OSError, ValueError, http.client.HTTPException):
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return answers == [True]


def _refuse_without_packages() -> None:
    for name in ("datasets", "huggingface_hub"):
        if importlib.util.find_spec(name) is None:
            hint = f"`pip install datasets huggingface-hub`, or use {_WITHOUT_THEM}"
            raise UserError(f"the package `{name}`, which tables and the hub need, is not installed", hint)


@contextlib.contextmanager
def _datasets_quiet(offline: bool) -> Iterator[Any]:
    """Import `datasets` and keep it from printing and, offline, from connecting; counting downloads stays off."""
    import datasets
    import huggingface_hub

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else it tells another host what is loaded
    settings = [
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_DATASETS_OFFLINE"),
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
    ]
    with warnings.catch_warnings(), contextlib.ExitStack() as before:
        warnings.simplefilter("ignore")
        for module, name in settings:
            before.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, offline)
        for library in (datasets, huggingface_hub.utils):
            before.callback(library.logging.set_verbosity, library.logging.get_verbosity())
            library.logging.set_verbosity(logging.CRITICAL)
            if not library.are_progress_bars_disabled():
                before.callback(library.enable_progress_bars)
                library.disable_progress_bars()
        yield datasets


def _load_error(source: str, error: Exception) -> UserError:
    """Say in one line why `datasets` could not load a source, naming the file where it can be found out."""
    reason = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    lines = str(reason).strip().splitlines() or [type(reason).__name__]
    if ("Config name is missing" in lines[0] or "BuilderConfig" in lines[0]) and "[" in str(reason):
        path, configuration = _split_configuration(source)
        names = listed(re.findall(r"'([\w.-]+)'", str(reason).partition("[")[2].partition("]")[0])[:20])
        seen = f"has no configuration `{configuration}`" if configuration else "has several configurations"
        return UserError(f"`{path}` {seen}: there is {names}", hint=f"choose one after a colon: `{path}:NAME`")
    if type(error).__name__ == "DatasetNotFoundError":
        return UserError(f"the hub has no data set `{source}` that is open to you", hint="check its name")
    if is_local(source):
        place = local_path(source)
        files = sorted([place] if place.is_file() else files_below(place))
        tables = [file for file in files if file.suffix in (*_TABLE_SUFFIXES, ".tsv")]
        for find in (damage, emptiness):
            for file in tables:
                if found := find(file):
                    return UserError(f"`{file}` cannot be read: {found}", hint="fetch or write the file again")
        meant = [file for file in (place / "README.md", *tables) if file.is_file()]
        more = " and others" if len(meant) > 10 else ""
        hint = f"look into {listed(map(str, meant[:10]))}{more}" if meant else None
        return UserError(f"`{source}` cannot be loaded: {lines[0]}", hint=hint)
    hint = "give the data with `--data FOLDER`"
    if "scripts are no longer supported" in lines[0]:
        hint = "it is a program, and none is run from there: look for the same data as parquet files"
    elif isinstance(reason, OSError) and reason.errno in _NO_ROOM:
        hint = "make room, or set `HF_HOME` to another folder"
    elif isinstance(reason, ConnectionError | TimeoutError) or (
        type(reason).__module__.startswith(_CLIENTS) and not re.search("Auth|NotFound|Gated", type(reason).__name__)
    ):
        hint = f"try again: what has come so far is kept; or {hint}"
    return UserError(f"`{source}` cannot be loaded: {lines[0]}", hint)


def values(column: Any, where: str) -> list[Any]:
    """What an Arrow column or batch holds. Raises UserError where text is not UTF-8, which Parquet does not look at."""
    try:
        found: list[Any] = column.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} has text that is not UTF-8: byte 0x{error.object[error.start]:02x}") from error
    return found


def listed(names: Iterable[str]) -> str:
    """The first twenty names as they stand in a message."""
    return ", ".join(f"`{name}`" for name in list(names)[:20])
