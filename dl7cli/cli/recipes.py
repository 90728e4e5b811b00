"""`dl7 recipes`: the recipes that come with dl7, and how to make one's own."""

import sys
from pathlib import Path
from typing import Annotated

import typer

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


@app.command(epilog="Example: dl7 recipes show resnet --set model.depth=56")
def show(
    name: Name,
    data: options.Data = None,
    overrides: options.Set = None,
    seed: options.Seed = None,
    as_json: options.Json = False,
) -> None:
    """Print every key of a recipe with its value, as TOML."""
    from dl7cli import recipe as recipes

    resolved = recipes.resolve(name, overrides or [], data=data, seed=seed)
    header = recipes.header(name)
    if as_json:
        fallback = None
        if resolved.fallback is not None:
            try:
                fallback = recipes.to_document(resolved.fallback())
            except UserError as problem:  # the recipe is sound; only the built-in set could not stand in
                console.note(f"note: {problem}")
        console.document({"header": header, "recipe": recipes.to_document(resolved.recipe), "fallback": fallback})
        return
    for line in [
        *(f"# {line}".rstrip() for line in header),
        *recipes.to_toml(resolved.recipe).rstrip("\n").split("\n"),
    ]:
        console.pass_on(line, sys.stdout)
    if unset := recipes.unset_keys(resolved.recipe):
        console.write("")
        console.write(f"# not set: {', '.join(unset)}")


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
        raise UserError(f"`{original}` cannot be read: {console.reason(error)}") from None
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
        raise UserError(f"`{target}` cannot be written: {console.reason(error)}") from None
    console.note(f"written to {target}; train it with: dl7 train {target}")
