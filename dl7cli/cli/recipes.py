"""`dl7 recipes`: the recipes that come with dl7, and how to make one's own."""

import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from dl7cli import files
from dl7cli.cli import console, options
from dl7cli.errors import UserError

app = typer.Typer(no_args_is_help=True, help="List, show and copy recipes: what is trained, as TOML files.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe's name or a TOML file.")]


@app.command("list", epilog="Example: dl7 recipes list")
def list_recipes(as_json: options.Json = False) -> None:
    """List the recipes that come with dl7."""
    from dl7cli import recipe as recipes

    titles = {name: next(iter(recipes.header(name)), "") for name in recipes.shipped()}
    if as_json:
        console.document({"recipes": [{"name": name, "title": title} for name, title in titles.items()]})
    else:
        console.table(("RECIPE", "TITLE"), titles.items())


@app.command(epilog="Example: dl7 recipes show resnet --explain")
def show(
    name: Name,
    data: options.Data = None,
    overrides: options.Set = None,
    seed: options.Seed = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say what each key means and may be.")] = False,
    as_json: options.Json = False,
) -> None:
    """Print every key of a recipe with its value, as TOML."""
    from dl7cli import recipe as recipes

    resolved = recipes.resolve(name, overrides or [], data=data, seed=seed)
    header = recipes.header(name)
    explained = recipes.explanations(resolved.recipe) if explain else {}
    if as_json:
        fallback = None
        if resolved.fallback is not None:
            try:
                fallback = recipes.to_document(resolved.fallback())
            except UserError as problem:  # the recipe is sound; only the built-in set could not stand in
                console.note(f"note: {problem}")
        document = {"header": header, "recipe": recipes.to_document(resolved.recipe), "fallback": fallback}
        console.document({**document, "keys": explained} if explain else document)
        return
    for line in [
        *(f"# {line}".rstrip() for line in header),
        *_commented(recipes.to_toml(resolved.recipe).rstrip("\n").split("\n"), explained),
    ]:
        console.pass_on(line, sys.stdout)
    unset = recipes.unset_keys(resolved.recipe)
    if unset:
        console.write("")
        console.write(f"# not set: {', '.join(unset)}")
    for key in unset if explain else ():
        for line in _comment(f"{key}: {explained[key]}"):
            console.write(line)


def _commented(lines: list[str], explained: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of a TOML file, each key of those that are explained after a comment that says so."""
    table = ""
    for line in lines:
        if header := re.fullmatch(r"\[(\w+)\]", line):
            table = f"{header[1]}."
        elif key := re.match(r"(\w+) = ", line):
            yield from _comment(explained.get(f"{table}{key[1]}", ""))
        yield line


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="# ", subsequent_indent="# ")


@app.command(epilog="Example: dl7 recipes copy resnet mine.toml && dl7 train mine.toml")
def copy(
    name: Name,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Where to write it; NAME.toml if not given.")
    ] = None,
) -> None:
    """Copy a recipe's file, to change it and train the copy."""
    from dl7cli import recipe as recipes

    original = recipes.find(name)
    target = file or Path(original.name)
    if target.suffix != ".toml":
        raise UserError(f"`{target}` does not end in `.toml`", hint="`dl7 train` knows a recipe file by that")
    try:
        content = original.read_bytes()
    except OSError as error:
        raise UserError(f"`{original}` cannot be read: {files.reason(error)}") from None
    try:
        with target.open("xb") as stream:
            try:
                stream.write(content)
                stream.flush()
            except OSError:
                target.unlink()
                raise
    except FileExistsError:
        raise UserError(f"`{target}` exists", hint="give another name: `dl7 recipes copy NAME FILE`") from None
    except OSError as error:
        raise UserError(f"`{target}` cannot be written: {files.reason(error)}") from None
    console.note(f"written to {target}; train it with: dl7 train {target}")
