"""`dl7 doctor`: what this machine has, and what would be chosen on it."""

import importlib.metadata
from typing import Any

from dl7cli import __version__
from dl7cli.cli import console, data, options

_PACKAGES = (
    "torch", "numpy", "datasets", "sentencepiece", "sacrebleu", "safetensors", "pydantic", "typer", "rich"
)  # fmt: skip


def doctor(offline: options.Offline = False, as_json: options.Json = False) -> None:
    """Show versions, processor and GPUs, the device and precision that would be chosen and why, and which data there are."""
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
        case _:
            shown = {True: "yes", False: "no", None: "none"}.get(value, value) if _is_word(value) else value
            console.write(f"{indent}{name:<{26 - len(indent)}}{shown if shown != [] else 'none'}")


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool)
