"""`dl7 data`: which data there are, and what is in them."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dl7cli.cli import console, options
from dl7cli.errors import NoSplitError, UserError

if TYPE_CHECKING:
    from dl7cli.data.images import Images
    from dl7cli.data.pairs import Pairs
    from dl7cli.data.sources import Progress

app = typer.Typer(no_args_is_help=True, help="List, get and look into data sets.")

Task = Annotated[
    Literal["classification", "translation"] | None,
    typer.Option("--task", help="What the data are for; found out from the data if not given."),
]
Source = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="A folder, a file, a hub id, builtin:shapes or builtin:phrases."),
]

_RECIPE = {"classification": "resnet", "translation": "seq2seq"}
_OF_READING = ("data.image", "data.label", "data.image_size", "data.source_language", "data.target_language")
"""Keys that say how a data set is read."""
ReadingSet = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help=f"Say how it is read: {', '.join(_OF_READING)}; may be given several times.",
    ),
]
_TABLE_SUFFIXES = (".parquet", ".arrow")
_EXAMPLES = 3
_UNEVEN, _APART = 3, 20
"""How many times as long as the other, and how many characters longer, one side of a pair may be."""


@app.command("list", epilog="Example: dl7 data list")
def list_data(as_json: options.Json = False) -> None:
    """List the built-in data sets and those that the shipped recipes use, and whether they are on disk."""
    from dl7cli.data import sources

    listed = [
        {
            "source": source,
            "task": task,
            "state": "built in"
            if sources.is_builtin(source)
            else ("on disk" if sources.available(source, offline=True) else "not on disk"),
        }
        for source, task in sorted(known().items())
    ]
    if as_json:
        console.document({"cache": str(sources.cache_folder()), "sources": listed})
    else:
        console.table(("SOURCE", "TASK", "STATE"), [tuple(entry.values()) for entry in listed])


@app.command(epilog="Example: dl7 data get bentrevett/multi30k")
def get(
    source: Source,
    task: Task = None,
    overrides: ReadingSet = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Read a data set and keep it on disk, so that training can start at once and offline."""
    from dl7cli.data import sources

    contents = _read(source, task, overrides or [], offline, for_training=True)
    splits = _sizes(contents)
    if as_json:
        console.document({"source": source, "splits": splits, "cache": str(sources.cache_folder())})
    else:
        console.write(f"{source}: {', '.join(f'{size:,} {split}' for split, size in splits.items())}")


@app.command(epilog="Example: dl7 data info builtin:shapes")
def info(
    source: Source,
    task: Task = None,
    overrides: ReadingSet = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Show what is in a data set: its splits, and its classes or languages with examples.

    Its digests are hashes of what is read, by which the same data is known again, whatever files it was in;
    dl7 eval notes that of the split it has read, of images with the classes as the model numbers them.
    As also_in_train it says how many images of another split, pixel by pixel as they are read, or how many
    source sentences are among those of training, too: what a model has seen is no test of it.
    Of the training pairs, or without these those of the first split, also the lengths in characters, and
    as odd how many are there more than once (all but the first), have the same text on both sides, or
    one side that is over three times as long as the other and 20 characters longer.

    --set data.source_language=fr and the like say how to read it, as for dl7 train.
    """
    try:
        contents = _read(source, task, overrides or [], offline, for_training=True)
    except NoSplitError as problem:
        try:
            contents = _read(source, task, overrides or [], offline, for_training=False)
        except NoSplitError:
            raise problem from None
    from dl7cli.data.images import Images

    about = _about_images(contents) if isinstance(contents, Images) else _about_pairs(contents)
    sizes = {"splits": _sizes(contents), "digests": _digests(contents), "also_in_train": _also_in_train(contents)}
    shown = {"source": source, **about, **sizes, "notes": list(contents.notes)}
    if as_json:
        console.document(shown)
        return
    for name, value in shown.items():
        for number, line in enumerate(_lines(value)):
            console.write(f"{'' if number else name:<14}{line}")


def known() -> dict[str, str]:
    """The sources that shipped recipes name, with the task they are for."""
    from dl7cli import recipe as recipes

    resolved = [recipes.resolve(name) for name in recipes.shipped()]
    both = [one.recipe for one in resolved] + [one.fallback() for one in resolved if one.fallback is not None]
    return {recipe.data.source: recipe.task for recipe in both}


def _read(
    source: str, task: str | None, overrides: list[str], offline: bool, *, for_training: bool
) -> "Images | Pairs":
    """Read a source as a training or an evaluation would, with the keys of `data` that `overrides` change."""
    from dl7cli import recipe as recipes

    for key in (text.partition("=")[0].strip() for text in overrides):
        if key not in _OF_READING:
            raise UserError(
                f"`--set {key}` does not change how `{source}` is read",
                hint=f"these do: {', '.join(f'`{one}`' for one in _OF_READING)}",
            )
    with console.display() as display:
        task = task or known().get(source) or _guess(source, offline, display.progress, for_training)
        data = recipes.resolve(_RECIPE[task], overrides, data=source).recipe.data
        if isinstance(data, recipes.ImageData):
            from dl7cli.data.images import read_images

            return read_images(
                source,
                image=data.image,
                label=data.label,
                image_size=data.image_size,
                offline=offline,
                progress=display.progress,
                for_training=for_training,
            )
        from dl7cli.data.pairs import read_pairs

        return read_pairs(
            source,
            source_language=data.source_language,
            target_language=data.target_language,
            offline=offline,
            progress=display.progress,
            for_training=for_training,
        )


def _guess(source: str, offline: bool, progress: "Progress", for_training: bool) -> str:
    """Tell from the names of its files, or else from the types of its columns, what a data set is for."""
    from dl7cli.data import columns, sources
    from dl7cli.data.cifar import is_cifar
    from dl7cli.data.images import IMAGE_SUFFIXES

    if sources.is_local(source):
        path = sources.existing_path(source)
        suffixes: Counter[str] = Counter()
        in_a_split = False
        for file in [path] if path.is_file() else sources.files_below(path):
            suffixes[file.suffix.lower()] += 1
            if not in_a_split and file.suffix.lower() in IMAGE_SUFFIXES and file != path:
                in_a_split = sources.split_name(file.relative_to(path).parts[0]) is not None
        images = sum(suffixes[suffix] for suffix in IMAGE_SUFFIXES)
        # One picture in a corpus of text is a logo.
        if in_a_split or 2 * images > suffixes.total() or (path.is_dir() and is_cifar(path)):
            return "classification"
        if not any(suffixes[suffix] for suffix in _TABLE_SUFFIXES):
            return "translation"
    with sources.working_folder(sources.cache_folder()) as working:
        splits = sources.load_splits(
            source, offline=offline, progress=progress, working=working, for_training=for_training
        )
        kinds = [columns.kind(column) for column in next(iter(splits.values())).features.values()]
    return "classification" if "image" in kinds else "translation"


def _sizes(contents: "Images | Pairs") -> dict[str, int]:
    from dl7cli.data.images import Images

    if isinstance(contents, Images):
        return {split: len(part.labels) for split, part in contents.splits.items()}
    return {split: len(pairs) for split, pairs in contents.splits.items()}


def _digests(contents: "Images | Pairs") -> dict[str, str]:
    from dl7cli.data import images, pairs

    if isinstance(contents, images.Images):
        return {split: images.digest(part) for split, part in contents.splits.items()}
    return {split: pairs.digest(part) for split, part in contents.splits.items()}


def _also_in_train(contents: "Images | Pairs") -> dict[str, int]:
    """Of every split besides training, where there is that, how many of its inputs are among those of training."""
    from dl7cli.data.images import Images

    def inputs(split: str) -> Iterator[object]:
        if isinstance(contents, Images):
            return (hashlib.sha256(image).digest() for image in contents.splits[split].images)
        return (source for source, _ in contents.splits[split])

    if "train" not in contents.splits:
        return {}
    seen = set(inputs("train"))
    return {split: sum(one in seen for one in inputs(split)) for split in contents.splits if split != "train"}


def _about_images(contents: "Images") -> dict[str, Any]:
    import numpy as np

    first = next(iter(contents.splits.values()))
    counts = np.bincount(first.labels, minlength=len(contents.classes))
    return {
        "task": "classification",
        "image": "x".join(map(str, first.images.shape[1:])),
        "classes": dict(zip(contents.classes, counts.tolist(), strict=True)),
    }


def _about_pairs(contents: "Pairs") -> dict[str, Any]:
    import numpy as np

    first = next(iter(contents.splits.values()))
    lengths = np.array([(len(source), len(target)) for source, target in first])
    shorter, longer = lengths.min(axis=1), lengths.max(axis=1)
    return {
        "task": "translation",
        "from": contents.source_language,
        "to": contents.target_language,
        "examples": [list(pair) for pair in first[:_EXAMPLES]],
        "characters": {
            f"{side}_{what}": int(value)
            for side, column in zip(("source", "target"), lengths.T, strict=True)
            for what, value in (("median", np.percentile(column, 50, method="lower")), ("longest", column.max()))
        },
        "odd": {
            "repeated": len(first) - len(set(first)),
            "copied": sum(source == target for source, target in first),
            "uneven": int(((longer > _UNEVEN * shorter) & (longer > shorter + _APART)).sum()),
        },
    }


def _lines(value: Any) -> list[str]:
    """Return what `info` prints beside a name, in lines."""
    match value:
        case dict():
            return [f"{key}  {one:,}" if isinstance(one, int) else f"{key}  {one}" for key, one in value.items()]
        case list():
            return [" → ".join(entry) if isinstance(entry, list) else str(entry) for entry in value]
        case _:
            return [str(value)]
