"""Data that are not read: what would be fetched from elsewhere, and what would unpack without end."""

import itertools
import re
import tarfile
import zipfile
from pathlib import Path

from dl7cli.errors import UserError

_FEW_ROWS = 1_000_000
_MOST_UNPACKED = 200
"""Times the size of the file."""
_LITTLE = 1 << 30
_COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"\xfd7zXZ\0", b"BZh", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
"""How files of gzip, zip, xz, bzip2, zstd and lz4 begin."""


def refuse_endless(file: Path) -> None:
    """Raise UserError for a parquet file that would unpack to so much more than it is that no real data can be in it.

    A row that is repeated takes up no room in it, nor does a number of rows that is not true. Any file is refused that
    is compressed or an archive, by what is in it: `datasets` would unpack it, however much comes out.
    """
    if not file.is_file():  # a pipe would be waited for
        return
    with file.open("rb") as stream:
        packed_as_such = stream.read(8).startswith(_COMPRESSED)
    if packed_as_such or zipfile.is_zipfile(file) or tarfile.is_tarfile(file):
        raise UserError(f"`{file}` is compressed: how much is in it cannot be told", hint="unpack it first")
    if file.suffix != ".parquet":
        return
    import pyarrow.parquet

    packed = file.stat().st_size
    most = max(_MOST_UNPACKED * packed, _LITTLE)
    metadata = pyarrow.parquet.read_metadata(file)
    unpacked = 0
    if metadata.num_rows <= max(packed, _FEW_ROWS):
        for group, column in itertools.product(range(metadata.num_row_groups), range(metadata.num_columns)):
            chunk = metadata.row_group(group).column(column)
            size = chunk.total_uncompressed_size
            if chunk.has_dictionary_page and chunk.num_values * size > most:
                size = chunk.num_values * _longest(file, group, chunk.path_in_schema)
            unpacked += size
        if unpacked <= most:
            return
    seen = f"{unpacked:,} bytes" if unpacked else f"{metadata.num_rows:,} rows"
    raise UserError(f"`{file}` has {packed:,} bytes and unpacks to {seen}", hint="no real data do: get the file anew")


def _longest(file: Path, group: int, column: str) -> int:
    """Return the bytes of the longest of the different values in a column, each of which may be there many times."""
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file, read_dictionary=[column]).read_row_group(group, columns=[column])
    while any(pyarrow.types.is_struct(field.type) for field in table.schema):
        table = table.flatten()
    longest = 0
    for piece in (piece for one in table.columns for piece in one.chunks if pyarrow.types.is_dictionary(piece.type)):
        longest = max(longest, pyarrow.compute.max(pyarrow.compute.binary_length(piece.dictionary)).as_py() or 0)
    return longest


def refuse_remote(folder: Path) -> None:
    """Raise UserError if what configures a local folder names data elsewhere, which would be fetched, or is endless."""
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub import DatasetCard

    for file, fence in ((folder / "README.md", ""), (folder / ".huggingface.yaml", "---\n")):
        if file.is_file():
            text = f"{fence}{file.read_text(encoding='utf-8')}\n{fence}"
            header = re.match(r"\s*---\n(.*?)\n---[ \t]*(\n|$)", text, re.DOTALL)
            if header and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(header[1])):
                # Nine of them that name one another are a billion values.
                raise UserError(f"`{file}` has YAML aliases", hint="write out what they stand for")
            card = DatasetCard(text, ignore_metadata_errors=True)
            if "://" in str(card.data.get("configs")):
                raise UserError(
                    f"`{file}` names data that are not on this machine (`://` below `configs`)",
                    hint="fetch them into the folder and give their path in it",
                )
