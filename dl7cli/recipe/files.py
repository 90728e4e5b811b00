"""Recipes as TOML: found, read, changed by `--set`, checked as a whole and written."""

import itertools
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from dl7cli.errors import UserError, suggestion
from dl7cli.recipe.classification import ClassificationRecipe
from dl7cli.recipe.translation import Decoding, TranslationRecipe

Recipe = ClassificationRecipe | TranslationRecipe
_BY_KIND: dict[str, type[ClassificationRecipe] | type[TranslationRecipe]] = {
    "resnet": ClassificationRecipe,
    "fast_resnet": ClassificationRecipe,
    "seq2seq": TranslationRecipe,
    "transformer": TranslationRecipe,
    "convs2s": TranslationRecipe,
}
LONGEST = 1 << 16
"""Bytes of a recipe's file."""
MOST_TOLD = 20
"""Mistakes."""
DEEPEST = 8
"""Tables and lists within one another."""
_NEEDED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "model.shortcut": ("model.residual", ()),
    "model.decoder": ("model.attention", ()),
    "data.crop_fill": ("data.crop_padding", ()),
    "training.small_part": ("training.small_size", ()),
    "decoding.beam": ("decoding.method", ("beam",)),
    "model.heads": ("model.attention", ("multihead",)),
    "model.match": ("model.activation", ("maxout", "glu")),
    "optim.milestones": ("optim.schedule", ("step",)),
    "optim.factor": ("optim.schedule", ("step",)),
    "optim.other_learning_rate": ("optim.name", ("muon",)),
    **{f"decoding.{key}": ("decoding.method", ("sample",)) for key in ("temperature", "top_k", "top_p", "seed")},
}
"""What a key is of, where it does nothing otherwise: of these values of another key, or of any that is something. A
recipe may hold it all the same; who sets it wants something.
"""
_NOTHING = (None, 0, "none")  # False is 0
WHILE_TRAINING = ("parts", "on_oom", "on_nonfinite", "checkpoint_minutes")
"""Keys of `training` that a run may go on with otherwise: none is of what is learnt, as far as all goes well."""


class Resolved(NamedTuple):
    recipe: Recipe
    fallback: Callable[[], Recipe] | None
    """Gives the same recipe on the built-in set, where the data was not asked for by name and the file names such a
    set. Raises UserError where the overrides do not go with the smaller model there.
    """


def resolve(name: str, overrides: Sequence[str] = (), *, data: str | None = None, seed: int | None = None) -> Resolved:
    """Load the recipe called `name` (shipped, or a TOML file) and apply `key.path=value` overrides, which win.

    Raises UserError for a recipe that does not exist, a file that is not TOML, and, all at once, for every key that is
    unknown or has a value out of its range.
    """
    path = find(name)
    document = read(path, hint="`dl7 recipes copy resnet` writes one")
    document.setdefault("name", path.stem)
    fallback = dict(_flat(document.pop("fallback", {})))
    mistakes: list[str] = ["`fallback` must be a table of keys"] if "" in fallback else []
    changes: list[tuple[list[str], Any]] = []
    if data is not None:
        changes.append((["data", "source"], data))
    if seed is not None:
        changes.append((["training", "seed"], seed))
    for text in overrides:
        try:
            changes.append(parse_override(text))
        except ValueError as error:
            mistakes.append(str(error))
    standing_in = [(key.split("."), value) for key, value in fallback.items()]
    own = _changed(document, changes, mistakes)
    built_in = fallback.get("data.source")
    if built_in is not None and ("data.source", built_in) in _flat(own):
        own = _changed(document, [*standing_in, *changes], [])
    recipe = from_document(own, mistakes, origin=f"recipe `{name}`")
    from_document(own, _idle(recipe, changes), origin="`--set`")
    asked = any(path == ["data", "source"] for path, _ in changes)
    if built_in is None or asked:
        return Resolved(recipe, None)
    small = f"recipe `{name}` with its keys for `{built_in}`"
    # A mistake of the file is told at once, one of the overrides only where the built-in set does stand in.
    from_document(_changed(document, standing_in, []), origin=small)
    return Resolved(recipe, partial(from_document, _changed(document, [*standing_in, *changes], []), origin=small))


def from_document(document: dict[str, Any], mistakes: Iterable[str] = (), *, origin: str) -> Recipe:
    """The recipe a plain dictionary describes; `mistakes` found before are reported together with those found here."""
    found = list(mistakes)
    model = document.get("model")
    kind = model.get("kind") if isinstance(model, dict) else None
    schema = _BY_KIND.get(kind) if isinstance(kind, str) else None
    if schema is None:
        seen = "is missing" if kind is None else f"is {_show(kind)}"
        found.append(f"`model.kind` {seen}; it must be one of {_choices(_BY_KIND)}{suggestion(str(kind), _BY_KIND)}")
    else:
        try:
            recipe = schema.model_validate(document)
        except ValidationError as error:
            errors = error.errors()
            found.extend(_explain(item, _keys(schema, kind)) for item in errors[:MOST_TOLD])
            if len(errors) > MOST_TOLD:
                found.append(f"and {len(errors) - MOST_TOLD:,} more")
        else:
            if not found:
                return recipe
    what = "one mistake" if len(found) == 1 else f"{len(found)} mistakes"
    raise UserError(
        "\n  ".join([f"{origin} has {what}:", *found]),
        hint="`dl7 recipes show NAME --explain` prints every key with what it means and may be",
    )


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with another seed. Raises UserError for one that is out of range."""
    return from_document(_changed(to_document(recipe), [(["training", "seed"], seed)], []), origin="`--seed`")


def alike(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes train the same but for their seeds."""
    unlike = differences(one, other).keys() - {f"training.{key}" for key in WHILE_TRAINING if key != "parts"}
    return unlike <= {"training.seed"}


def differences(one: Recipe, other: Recipe) -> dict[str, list[Any]]:
    """The keys in which two recipes differ, whatever they are called, with both values; None where one has none."""
    documents = [recipe.model_dump(mode="json", exclude={"name"}) for recipe in (one, other)]
    first, second = (dict(_flat(document)) for document in documents)
    values = {key: [first.get(key), second.get(key)] for key in {**first, **second}}
    return {key: both for key, both in values.items() if both[0] != both[1]}


def to_document(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dictionaries; `from_document` gives the same recipe back."""
    return recipe.model_dump(exclude_none=True)


def decoding(recipe: TranslationRecipe, overrides: Iterable[str] = (), **flags: Any) -> Decoding:
    """How to search: as the recipe says, but for `--set decoding.KEY=VALUE` and the flags that are not None.

    Raises UserError, all at once, for what is not such a key, out of its range, or said otherwise by a flag.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    changes, mistakes = _permitted(overrides, "decoding", (), "keys of `decoding`")
    for path, value in changes:
        if path[1] in given and given[path[1]] != value:
            mistakes.append(f"`decoding.{path[1]}` is {_show(value)}, and by a flag {_show(given[path[1]])}")
    document = _changed(to_document(recipe), changes, mistakes)
    document["decoding"] |= given
    changed = from_document(document, mistakes, origin="`--set`")
    from_document(document, _idle(changed, changes), origin="`--set`")
    assert isinstance(changed, TranslationRecipe)
    return changed.decoding


def resumed(recipe: Recipe, overrides: Iterable[str], *, data: str | None = None) -> Recipe:
    """The recipe of a run that goes on, with other keys of those that settle how it runs and not what is trained, and
    with `data` as where its data lies now, if it has been moved.

    Raises UserError, all at once, for other keys and for values that are out of range.
    """
    told = _choices(f"training.{key}" for key in WHILE_TRAINING)
    changes, mistakes = _permitted(overrides, "training", WHILE_TRAINING, told)
    if data is not None:
        changes.append((["data", "source"], data))
    origin = "`--set`" if data is None else "what was given"
    return from_document(_changed(to_document(recipe), changes, mistakes), mistakes, origin=origin)


def _permitted(
    overrides: Iterable[str], section: str, keys: Sequence[str], told: str
) -> tuple[list[tuple[list[str], Any]], list[str]]:
    """The changes of `--set` to these keys of a section, or without to any of its keys, and what else is a mistake."""
    changes, mistakes = [], []
    for text in overrides:
        try:
            path, value = parse_override(text)
        except ValueError as error:
            mistakes.append(str(error))
            continue
        if path[0] == section and len(path) == 2 and (not keys or path[1] in keys):
            changes.append((path, value))
        else:
            mistakes.append(f"`{'.'.join(path)}` was settled in training; only {told} can be changed")
    return changes, mistakes


def unset_keys(recipe: Recipe) -> list[str]:
    """The keys that have no value, which TOML cannot write down."""
    return [key for key, value in _flat(recipe.model_dump()) if value is None]


def to_toml(recipe: Recipe) -> str:
    """The recipe with every key, as a TOML file that `resolve` reads back to the same recipe."""
    return tomli_w.dumps(to_document(recipe))


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split `key.path=value` at its first `=` and read the value as TOML, or else as the text it is.

    Raises ValueError where there is no `=` or the key is not names joined by dots.
    """
    key, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"`--set {text}` has no `=`; write `--set key.path=value`")
    if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", key.strip()):
        raise ValueError(f"`--set {text}`: `{key}` is not a key such as `optim.learning_rate`")
    return key.strip().split("."), _value(value.strip())


def folder() -> Path:
    """Where the shipped recipes lie: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped() -> list[str]:
    """Names of the recipes that come with dl7, in alphabetical order."""
    return sorted(path.stem for path in folder().glob("*.toml"))


def find(name: str) -> Path:
    """The file of a shipped recipe's name or of a path ending in `.toml`."""
    if name.endswith(".toml"):
        if not os.path.isfile(name):  # unlike Path's, False for a name that no file can have
            raise UserError(f"there is no recipe file `{name}`", hint="`dl7 recipes list` shows the shipped ones")
        return Path(name)
    if name not in shipped():
        raise UserError(
            f"there is no recipe `{name}`{suggestion(name, shipped())}",
            hint=f"the shipped recipes are {_choices(shipped())}; a file of your own must end in `.toml`; "
            "`dl7 models` lists other networks with the keys that make them of a recipe",
        )
    return folder() / f"{name}.toml"


def header(name: str) -> list[str]:
    """The comment lines at the top of a recipe's file: what it reproduces, its command, its cost and its score."""
    lines = find(name).read_text(encoding="utf-8-sig").split("\n")
    return [line.removeprefix("#").strip() for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]


def read(path: Path, *, hint: str | None = None) -> dict[str, Any]:
    """What a recipe's file says; raises UserError, with the hint, where it is not TOML as a recipe is written."""
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST + 1)
        if len(content) > LONGEST:
            raise ValueError(f"it is longer than {LONGEST:,} bytes, and a recipe has some 2,000")
        return _parsed(content.decode("utf-8-sig"))  # some editors begin a file with a byte order mark
    except ValueError as error:  # or not UTF-8
        raise UserError(f"`{path}` is not a TOML file: {error}", hint) from None
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {error.strerror}") from None


def _parsed(text: str) -> dict[str, Any]:
    """What a TOML text says. Raises ValueError for what is none, and for what would take up time or memory without end.

    Of these, TOML itself forbids only integers of more than 64 bits.
    """
    # A key so long takes tomllib its length squared; the dots of a comment are none.
    if re.search(r"^(?![ \t]*#)[^\n.]*(?:\.[^\n.]*){100}", text, re.MULTILINE):
        raise ValueError("it is nested too deeply")
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # of the thousands of digits that Python does not read
        raise ValueError("an integer has more than 64 bits") from None
    _refuse_endless(document)
    return document


def _refuse_endless(value: Any, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise ValueError("it is nested too deeply")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise ValueError("an integer has more than 64 bits")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_endless(inner, depth + 1)


def _value(text: str) -> Any:
    try:
        parsed = _parsed(f"value = {text}")
    except ValueError:
        return text
    return parsed["value"] if list(parsed) == ["value"] else text


def _changed(document: dict[str, Any], changes: Iterable[tuple[list[str], Any]], mistakes: list[str]) -> dict[str, Any]:
    """A copy of `document` with the changes made; a path that leads through a plain value is added to `mistakes`."""
    copy: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in document.items()}
    for path, value in changes:
        table: Any = copy
        for name in path[:-1]:
            table = table.setdefault(name, {}) if isinstance(table, dict) else table
        if isinstance(table, dict):
            table[path[-1]] = value
        else:
            mistakes.append(f"`{'.'.join(path)}` leads through a key that holds a value")
    return copy


def _idle(recipe: Recipe, changes: Iterable[tuple[list[str], Any]]) -> list[str]:
    """What is wrong with changes of keys that do nothing in this recipe."""
    values = dict(_flat(recipe.model_dump()))
    mistakes = []
    for key in (".".join(path) for path, _ in changes):
        other, needed = _NEEDED.get(key, ("", ()))
        if other in values and (values[other] not in needed if needed else values[other] in _NOTHING):
            wanted = f" = {' or '.join(map(json.dumps, needed))}" if needed else ""
            mistakes.append(f"`{key}` does nothing without `{other}{wanted}`")
    return mistakes


def _flat(table: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested tables with their dotted keys."""
    if not isinstance(table, dict):
        return [(prefix.removesuffix("."), table)]
    return [leaf for key, value in table.items() for leaf in _flat(value, f"{prefix}{key}.")]


def _explain(error: Any, known: list[str]) -> str:
    """One pydantic error as a line that names the key, what was seen and what is allowed; `known` are all keys."""
    location = [str(part) for part in error["loc"]]
    if location[:1] == ["model"] and location[1:2] and location[1] in _BY_KIND:
        del location[1]  # pydantic puts the kind there
    key = ".".join(location)
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key `{key}`{suggestion(key, known)}"
        case "missing":
            return f"`{key}` is missing"
        case _:
            reason = str(error["msg"]).removeprefix("Value error, ")
            # What keys of several sections ask of one another is said of a whole table, which no one wants to read.
            seen = "" if isinstance(error["input"], dict) else f" is {_show(error['input'])}"
            return f"`{key}`{seen}: {reason[:1].lower()}{reason[1:]}"


def _keys(schema: type[BaseModel], kind: Any, prefix: str = "") -> list[str]:
    """Every key path of a schema, sections included; of a section of several kinds those of this `kind`."""
    paths = []
    for name, field in schema.model_fields.items():
        paths.append(prefix + name)
        for section in (field.annotation, *get_args(field.annotation)):  # itself, or one of several kinds
            if isinstance(section, type) and issubclass(section, BaseModel):
                kinds = section.model_fields.get("kind")
                if kinds is None or kind in get_args(kinds.annotation):
                    paths.extend(_keys(section, kind, f"{prefix}{name}."))
    return paths


def _choices(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"`{text if len(text) <= 60 else text[:57] + '…'}`"
