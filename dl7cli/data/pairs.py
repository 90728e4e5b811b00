"""Sentence pairs from any source: JSON lines, tab-separated and parallel text, tables, the hub, built-in phrases.

Text files are read here and not by `datasets`, so that a mistake is named with its file and line, and a line ends
at `\\n` and nowhere else (`str.splitlines` would also split at U+2028, U+0085, form feed and others, and so put the
two sides of parallel files out of step).
"""

import contextlib
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dl7cli.data import sources
from dl7cli.data.sources import Progress, silent
from dl7cli.errors import UserError
from dl7cli.files import LONGEST_LINE

if TYPE_CHECKING:
    import datasets

_FORMAT = 1
_NESTED = "translation"
_EVERY = 1000
_SPLITS = ("train", "validation", "test")
_WANTED = (
    "give a `.jsonl`, `.tsv` or `.parquet` file, or a folder with `train.jsonl`, `train.tsv`, or one file per language "
    "such as `train.en` and `train.de`"
)
_OTHER_TEST = re.compile(r"test[\W_\d]")
_CODE = re.compile(r"[a-z]{2,3}([-_][A-Za-z]+)?")

Rows = Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Pairs:
    """The splits of a source, of `train`, `validation` and `test` those that it has, as (source, target).

    The sentences are stripped and none is empty. `notes` say what was left out, for the user to read.
    """

    splits: dict[str, list[tuple[str, str]]]
    source_language: str
    target_language: str
    notes: tuple[str, ...]


def read_pairs(
    source: str,
    *,
    source_language: str,
    target_language: str,
    offline: bool = False,
    progress: Progress = silent,
    for_training: bool = True,
) -> Pairs:
    """Read sentence pairs from a hub id, a folder, a file or `builtin:phrases`.

    The languages are keys (JSON lines), columns (tables), keys of the column `translation` (as on the hub), suffixes
    (`train.en` beside `train.de`) or a header (TSV; without one, the source comes first). Pairs of which a side is
    blank are left out and counted in the notes. Raises UserError, naming file and line or split and row, for
    anything that is not what it should be, as what has no train split is `for_training`.
    """
    languages = (source_language, target_language)
    if source_language == target_language:
        raise UserError(f"source and target language are both `{source_language}`")
    notes: list[str] = []
    found: dict[str, Rows] | None
    if sources.is_builtin(source):
        found = _builtin(source, languages)
    elif sources.is_local(source):
        path = sources.existing_path(source)
        try:
            found = _text_file(path, languages, progress) if path.is_file() else None
            if path.is_dir():
                found = _text_folder(path, languages, notes, progress, for_training)
        except OSError as error:
            raise sources.unreadable(Path(error.filename or path), error) from error
        if found is not None:
            sources.refuse_configuration(source)
        else:
            with sources.working_folder(sources.cache_folder()) as working:
                loaded = sources.load_splits(source, progress=progress, working=working, for_training=for_training)
                found = _tables(source, loaded, languages, progress)
    else:
        found = _hub(source, languages, offline, progress, for_training)
    splits = {split: _without_blank(split, found[split], source, notes) for split in _SPLITS if split in found}
    return Pairs(splits, source_language, target_language, tuple(notes))


def digest(*splits: Iterable[tuple[str, str]]) -> str:
    """A hash of sentence pairs, in their order, wherever they were read from."""
    found = hashlib.sha256()
    for pair in itertools.chain.from_iterable(splits):
        found.update("\t".join((*pair, "\n")).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def _without_blank(split: str, pairs: Rows, source: str, notes: list[str]) -> list[tuple[str, str]]:
    stripped = [(first.strip(), second.strip()) for first, second in pairs]
    kept = [pair for pair in stripped if all(pair)]
    if not kept:
        raise UserError(f"the {split} split of `{source}` has no sentence pairs")
    if blank := len(stripped) - len(kept):
        notes.append(f"{blank} of {len(stripped)} pairs of the {split} split left out: a side is empty")
    return kept


def _builtin(source: str, languages: tuple[str, str]) -> dict[str, Rows]:
    if source != "builtin:phrases":
        raise UserError(
            f"there are no built-in sentence pairs `{source}`", hint="the built-in pairs are `builtin:phrases`"
        )
    from dl7cli.data import phrases

    _check_languages(languages, ("en", "de"), source)
    forwards = languages == ("en", "de")
    return {
        split: [(english, german) if forwards else (german, english) for english, german in phrases.generate(split)]
        for split in _SPLITS
    }


def _check_languages(languages: Iterable[str], there: Iterable[str], where: str) -> None:
    there = list(there)
    for language in languages:
        if language not in there:
            listed = sources.listed(there) or "nothing"
            raise UserError(
                f"`{where}` has no `{language}`: there is {listed}",
                hint="set `data.source_language` and `data.target_language` to two of these",
            )


def _lines(path: Path, progress: Progress) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line without its end) of a UTF-8 file; a byte order mark at its start is dropped."""
    what, done = f"reading {path.name}", 0
    try:
        size = path.stat().st_size
        if size == 0:
            raise UserError(f"`{path}` is empty")
        with path.open("rb") as file:
            for number, raw in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
                if len(raw) > LONGEST_LINE:
                    raise UserError(
                        f"`{path}` line {number} is longer than {LONGEST_LINE:,} bytes",
                        hint="put one sentence on a line",
                    )
                done += len(raw)
                if number % _EVERY == 0 or done == size:
                    progress(what, done, size)
                try:
                    line = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"`{path}` line {number} is not UTF-8 (byte 0x{raw[error.start]:02x})",
                        hint="convert the file to UTF-8",
                    ) from error
                yield (
                    number,
                    (line.removeprefix("\ufeff") if number == 1 else line).removesuffix("\n").removesuffix("\r"),
                )
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {error.strerror}") from error


def _text_file(path: Path, languages: tuple[str, str], progress: Progress) -> dict[str, Rows] | None:
    """Read a single file as the training split; None where it is for `datasets` to read."""
    match path.suffix:
        case ".jsonl" | ".json":
            return {"train": _json_lines(path, languages, progress)}
        case ".tsv":
            return {"train": _tabbed(path, languages, progress)}
        case ".parquet":
            return None
    raise UserError(f"`{path}` is not a kind of file that sentence pairs are read from", hint=_WANTED)


def _text_folder(
    folder: Path, languages: tuple[str, str], notes: list[str], progress: Progress, for_training: bool
) -> dict[str, Rows] | None:
    """Read a folder of text files, one or two per split; None where it is for `datasets` to read."""
    files = sorted(file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    texts = [name for name in files if name.endswith((".jsonl", ".tsv", *(f".{one}" for one in languages)))]
    # What can be trained on is read as it is for that, whatever lies beside it.
    for_training = for_training or any(_is_wanted(Path(name).stem, True) for name in texts)
    suffix = _layout(folder, files, languages, notes, for_training)
    if suffix is None:
        return _parallel(folder, files, languages, notes, progress, for_training)
    read = _json_lines if suffix == ".jsonl" else _tabbed
    stems = [name.removesuffix(suffix) for name in files if name.endswith(suffix)]
    chosen = _choose_splits(stems, str(folder), notes, for_training)
    return {split: read(folder / (stem + suffix), languages, progress) for split, stem in chosen.items()}


def _layout(
    folder: Path, files: list[str], languages: tuple[str, str], notes: list[str], for_training: bool
) -> str | None:
    """The suffix of the files that have most splits, where that is `.jsonl` or `.tsv`; None for all else.

    What it passes over is noted. Raises UserError where two kinds of files have as many, and one of these in common.
    """
    there: dict[str, dict[str, str]] = {}
    wanted: list[str] = []
    for suffix in (".jsonl", ".tsv", f".{languages[0]}"):
        stems = [name.removesuffix(suffix) for name in files if name.endswith(suffix)]
        if suffix not in (".jsonl", ".tsv"):
            stems = [stem for stem in stems if f"{stem}.{languages[1]}" in files]
        there[suffix] = {_split_of(stem): stem + suffix for stem in stems if _split_of(stem)}
        # JSON lines of other names may be shards, or what a README.md maps to splits.
        named = [stem for stem in stems if suffix != ".jsonl" or sources.split_name(stem)]
        if any(_is_wanted(stem, for_training) for stem in named):
            wanted.append(suffix)
    if not wanted:
        return None
    chosen = max(wanted, key=lambda suffix: len(there[suffix]))
    for suffix, splits in there.items():
        both = [split for split in splits if split in there[chosen]]
        if suffix == chosen or not splits:
            continue
        if both and suffix in wanted and len(splits) == len(there[chosen]):
            raise UserError(
                f"`{folder}` has its {both[0]} split twice: `{there[chosen][both[0]]}` and `{splits[both[0]]}`",
                hint="move one of them away",
            )
        notes.append(f"not read, as there are `*{chosen}`: {sources.listed(splits.values())}")
    return chosen if chosen in (".jsonl", ".tsv") else None


def _split_of(stem: str) -> str:
    """The split that a file of this name may hold; empty where it is none."""
    return sources.split_name(stem) or ("test" if _OTHER_TEST.match(stem) else "")


def _is_wanted(stem: str, for_training: bool) -> bool:
    """Whether a name is that of a split that there has to be."""
    split = _split_of(stem)
    return split == "train" if for_training else bool(split)


def _parallel(
    folder: Path,
    files: list[str],
    languages: tuple[str, str],
    notes: list[str],
    progress: Progress,
    for_training: bool,
) -> dict[str, Rows] | None:
    """Read `train.en` beside `train.de` and so on."""
    named = [(stem, suffix) for stem, _, suffix in (name.rpartition(".") for name in files)]
    ending = {stem: [suffix for other, suffix in named if other == stem] for stem, _ in named}
    wanted = {stem: suffixes for stem, suffixes in ending.items() if _is_wanted(stem, for_training)}
    there = list(dict.fromkeys(suffix for suffixes in wanted.values() for suffix in suffixes))
    if sources.has_tables(folder) and not set(languages) & set(there):
        return None
    if not there:
        names = sorted(entry.name for entry in folder.iterdir())
        if any(_is_wanted(name, for_training) for name in names):
            raise UserError(f"`{folder}` holds no sentence pairs that can be read", hint=_WANTED)
        sources.by_split(names, str(folder), for_training=for_training)
    _check_languages(languages, there, f"{folder}/{next(iter(wanted))}.*")
    # A split counts as there with one of its two files, so that a missing other one is not passed over.
    enough = {stem: any if sources.split_name(stem) else all for stem in ending}
    stems = [stem for stem in ending if enough[stem](language in ending[stem] for language in languages)]
    chosen = _choose_splits(stems, str(folder), notes, for_training)
    splits: dict[str, Rows] = {}
    for split, stem in chosen.items():
        paths = [folder / f"{stem}.{language}" for language in languages]
        for path, other in (paths, reversed(paths)):
            if not path.is_file():
                raise UserError(f"`{path}` is missing beside `{other}`")
        first, second = ([line for _, line in _lines(path, progress)] for path in paths)
        if len(first) != len(second):
            raise UserError(
                f"`{paths[0]}` has {len(first)} lines but `{paths[1]}` has {len(second)}",
                hint="line n of the one has to be the translation of line n of the other",
            )
        splits[split] = zip(first, second, strict=True)
    return splits


def _choose_splits(stems: list[str], where: str, notes: list[str], for_training: bool) -> dict[str, str]:
    """Map splits to the stems of their files; a test set of another name (`test_2016`) serves if it is the only one."""
    others = [stem for stem in stems if _OTHER_TEST.match(stem)]
    needed = for_training or len(others) != 1 or any(map(sources.split_name, stems))
    chosen = sources.by_split(stems, where, for_training=for_training) if needed else {}
    if "test" in chosen or not others:
        return chosen
    if len(others) == 1:
        notes.append(f"the test split is `{others[0]}`")
        return {**chosen, "test": others[0]}
    notes.append(f"no test split: none of {sources.listed(others)} is called `test`")
    return chosen


def _tabbed(path: Path, languages: tuple[str, str], progress: Progress) -> Rows:
    """Yield the two columns of a TSV file, ordered by its header if it has one, without any quoting."""
    first, second = 0, 1
    for number, line in _lines(path, progress):
        cells = line.split("\t")
        if not line.strip():
            cells = ["", ""]
        if len(cells) != 2:
            columns = f"{len(cells)} columns" if len(cells) > 1 else "1 column"
            raise UserError(
                f"`{path}` line {number} has {columns} and not 2", hint="put one tab between the two sentences"
            )
        if number == 1:
            header = [cell.strip() for cell in cells]
            codes, wanted = ([name.lower() for name in names] for names in (header, languages))
            if set(codes) == set(wanted):
                first, second = codes.index(wanted[0]), codes.index(wanted[1])
                continue
            in_one_case = header in (codes, [name.upper() for name in header])
            if in_one_case and set(codes) & set(wanted) and all(_CODE.fullmatch(name) for name in codes):
                _check_languages(languages, codes, str(path))
        yield cells[first], cells[second]


def _json_lines(path: Path, languages: tuple[str, str], progress: Progress) -> Rows:
    """Yield the two languages of a JSON lines file, whose rows have them as keys or as keys of `translation`."""
    first = True
    for number, line in _lines(path, progress):
        if not line.strip():
            continue
        where = f"`{path}` line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise UserError(f"{where} is not JSON: {reason}", hint="each line has to be one JSON object") from error
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object", hint='each line has to be like {"en": "…", "de": "…"}')
        if languages[0] not in row and isinstance(row.get(_NESTED), dict):
            row = row[_NESTED]
        if first:
            _check_languages(languages, row, str(path))
            first = False
        yield _text(row, languages[0], where), _text(row, languages[1], where)


def _text(row: dict[str, Any], language: str, where: str) -> str:
    """Take one sentence out of a row that comes from outside."""
    if language not in row:
        raise UserError(f"{where} has no `{language}`: there is {sources.listed(row) or 'nothing'}")
    text = row[language]
    if not isinstance(text, str):
        raise UserError(f"{where}: `{language}` is {json.dumps(text, default=str)[:60]} and not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: `{language}` has half a character (a lone surrogate)") from error
    return text


def _tables(
    source: str, loaded: "dict[str, datasets.Dataset]", languages: tuple[str, str], progress: Progress
) -> dict[str, Rows]:
    """Take the sentence pairs out of loaded tables: two columns, or the column `translation`."""
    first = next(iter(loaded))
    features = loaded[first].features
    translation = features.get(_NESTED)
    # A column of plain text may have that name, too.
    within: Any = translation if isinstance(translation, dict) else getattr(translation, "languages", None)
    nested = bool(within) and not set(languages) <= set(features)
    if nested:
        _check_languages(languages, within, f"{source} ({_NESTED})")
    else:
        _check_languages(languages, features, source)
    columns = [_NESTED] if nested else list(languages)
    splits: dict[str, Rows] = {}
    for split, table in loaded.items():
        if missing := [name for name in columns if name not in table.features]:
            raise UserError(f"split `{split}` of `{source}` has no column `{missing[0]}`, which `{first}` has")
        pairs: list[tuple[str, str]] = []
        for batch in table.with_format("arrow").select_columns(columns).iter(batch_size=_EVERY):
            for record in sources.values(batch, f"split `{split}` of `{source}`"):
                where = f"row {len(pairs) + 1} of split `{split}` of `{source}`"
                row = record[_NESTED] if nested else record
                if row is None:
                    raise UserError(f"{where}: `{_NESTED}` is null")
                pairs.append((_text(row, languages[0], where), _text(row, languages[1], where)))
            progress(f"reading {split} pairs", len(pairs), len(table))
        splits[split] = pairs
    return splits


def _hub(
    source: str, languages: tuple[str, str], offline: bool, progress: Progress, for_training: bool
) -> dict[str, Rows]:
    """Read from the hub once and from the cache folder ever after."""
    options = hashlib.sha256(json.dumps([_FORMAT, *languages]).encode()).hexdigest()[:8]
    folder = sources.cache_folder() / "pairs" / f"{sources.cache_name(source)}-{options}"
    if (kept := _open_cache(folder, languages, for_training)) is not None:
        return kept
    loaded = sources.load_splits(source, offline=offline, progress=progress, for_training=for_training)
    splits = _tables(source, loaded, languages, progress)
    with sources.working_folder(folder.parent) as working:
        for split, pairs in splits.items():
            rows = (json.dumps(dict(zip(languages, pair, strict=True)), ensure_ascii=False) + "\n" for pair in pairs)
            (working / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8", newline="\n")
        sizes = {split: (working / f"{split}.jsonl").stat().st_size for split in splits}
        (working / "meta.json").write_text(json.dumps({"source": source, "sizes": sizes}), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        # Fails if another process was faster: then its result serves as well.
        with contextlib.suppress(OSError):
            working.rename(folder)
    return splits


def _open_cache(folder: Path, languages: tuple[str, str], for_training: bool) -> dict[str, Rows] | None:
    """Read what was kept of a hub data set; None where it is missing or not whole, or has not what is wanted."""
    try:
        sizes = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["sizes"]
        files = {split: folder / f"{split}.jsonl" for split in sizes}
        if not ("train" in files if for_training else files) or any(
            file.stat().st_size != sizes[split] for split, file in files.items()
        ):
            return None
        return {split: list(_json_lines(file, languages, silent)) for split, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
