"""What is wrong with a table that cannot be loaded."""

import codecs
import json
from pathlib import Path


def damage(file: Path) -> str | None:
    """Read a table through; return what is wrong with it, if that can be found out."""
    import pandas  # type: ignore[import-untyped]
    import pyarrow
    import pyarrow.parquet

    try:
        if file.suffix == ".parquet":
            for _ in pyarrow.parquet.ParquetFile(file).iter_batches(256):
                pass
        elif file.suffix != ".arrow":
            if file.stat().st_size == 0:
                return "it is empty"
            with file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if found := _line_damage(line.removeprefix(codecs.BOM_UTF8), file.suffix == ".jsonl"):
                        return f"line {number} {found}"
            if file.suffix == ".csv":
                for _ in pandas.read_csv(file, chunksize=10_000):
                    pass
    except (pyarrow.ArrowException, OSError, pandas.errors.ParserError, pandas.errors.EmptyDataError) as error:
        return str(error).splitlines()[0]
    return None


def _line_damage(line: bytes, is_json: bool) -> str | None:
    try:
        text = line.decode("utf-8")
        if is_json and text.strip():
            json.loads(text)
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte 0x{line[error.start]:02x})"
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__}"
    return None


def emptiness(file: Path) -> str | None:
    """Say of a parquet file without rows that it has none."""
    import pyarrow.parquet

    return "it has no rows" if file.suffix == ".parquet" and not pyarrow.parquet.read_metadata(file).num_rows else None
