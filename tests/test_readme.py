"""Lines of code in the READMEs that begin with `dl7` are what the commands take; and files are short, as they say."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from dl7cli import recipe
from dl7cli.cli import app

ROOT = Path(__file__).parents[1]


def commands(name: str) -> Iterator[list[str]]:
    """The arguments of every line of code that begins with `dl7`."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^    dl7 (.*)$", text, re.MULTILINE):
        yield shlex.split(re.sub(r"[<>|].*", "", line), comments=True)


@pytest.mark.parametrize(("name", "least"), [("README.md", 40), ("README.zh-CN.md", 6)])
def test_every_command_is_one(name: str, least: int) -> None:
    found = 0
    for arguments in commands(name):
        command: Any = typer.main.get_command(app)
        rest = list(arguments)
        while hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]
        flags = {flag for parameter in command.params for flag in parameter.opts}
        assert {one for one in rest if one.startswith("--")} <= flags, arguments
        overrides = [rest[at + 1] for at, one in enumerate(rest) if one == "--set"]
        if arguments[0] == "train" and rest[0] in recipe.shipped():
            recipe.resolve(rest[0], overrides)
        found += 1
    assert found >= least


def test_files_are_short() -> None:
    for folder in ("dl7cli", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            assert len(file.read_text(encoding="utf-8").splitlines()) < 500, file
