"""`dl7 doctor`: what this machine has, and what would be chosen on it."""

import importlib.metadata
from typing import Any

from dl7cli import __version__
from dl7cli.cli import console, data, options

_PACKAGES = (
    "torch", "numpy", "datasets", "sentencepiece", "sacrebleu", "safetensors", "pydantic", "typer", "rich"
)  # fmt: skip

_WIDTH = 26


def doctor(offline: options.Offline = False, as_json: options.Json = False) -> None:
    """Show versions, hardware, what would be chosen on it and why, and which of the recipes' data can be had.

    The hub is asked about data sets that are not on disk, unless --offline.
    """
    from dl7cli import device
    from dl7cli.data import sources

    report = {
        "dl7": __version__,
        **device.report(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "data": {source: sources.available(source, offline=offline) for source in sorted(data.known())},
    }
    if as_json:
        console.document(report)
        return
    for name, value in report.items():
        _print(name, value, "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print(name: str, value: Any, indent: str) -> None:
    match value:
        case dict() if value:
            console.write(f"{indent}{name}")
            for key, inner in value.items():
                _print(key, inner, f"{indent}  ")
        case list() if value:
            for number, inner in enumerate(value):
                _print(f"{name} {number}", inner, indent)
        case None | [] | {}:
            console.write(f"{indent}{name:<{_WIDTH - len(indent)}}none")
        case bool():
            console.write(f"{indent}{name:<{_WIDTH - len(indent)}}{'yes' if value else 'no'}")
        case _:
            console.write(f"{indent}{name:<{_WIDTH - len(indent)}}{value}")
