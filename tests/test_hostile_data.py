"""Data, images and text made to do harm: nothing in them is run, memory is bounded, the error is clear.

Nothing outside is written. All commands run in a process that has a gigabyte of memory above what it starts with.
"""

import gzip
import io
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import fuzzing
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import Payload, Run

# Data


def varint(number: int) -> bytes:
    """A number as Thrift writes it: seven bits a byte, of twice its size for the sign."""
    number, found = number << 1, b""
    while number > 127:
        number, found = number >> 7, found + bytes([number & 127 | 128])
    return found + bytes([number])


PNG = fuzzing.IMAGES[0]


def images(rows: int, **metadata: str) -> pa.Table:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = pa.array([{"bytes": PNG, "path": None}] * rows, kind)
    return pa.table({"image": cells, "label": [row % 2 for row in range(rows)]}).replace_schema_metadata(metadata)


def claims_a_billion_rows(folder: Path) -> None:
    file = folder / "train.parquet"
    pq.write_table(images(77), file)
    data = file.read_bytes()
    size = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - size : -8].replace(b"\x16" + varint(77), b"\x16" + varint(10**9))
    file.write_bytes(data[: -8 - size] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def repeats_one_row(folder: Path) -> None:
    cell = pa.DictionaryArray.from_arrays(pa.array([0] * 1_100_000, pa.int32()), pa.array([PNG])).cast(pa.binary())
    pq.write_table(pa.table({"image": cell, "label": [0] * 1_100_000}), folder / "train.parquet")


def repeats_one_value(folder: Path) -> None:
    cell = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["x" * 1_000_000]))
    pq.write_table(pa.table({"image": cell, "en": cell, "de": cell}), folder / "train.parquet")


def names_itself(folder: Path) -> None:
    pq.write_table(images(20), folder / "train.parquet")
    lines = ["a: &a [x,x,x,x,x,x,x,x,x,x]"]
    for one, other in zip("abcdefghi", "bcdefghij", strict=True):
        lines.append(f"{other}: &{other} [{','.join([f'*{one}'] * 10)}]")
    configs = ["configs:", "- config_name: default", "  data_files: train.parquet", "  x: *j"]
    (folder / "README.md").write_text("\n".join(["---", *lines, *configs, "---", ""]))


def has_a_pickled_type(folder: Path) -> None:
    named = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    named[b"ARROW:extension:metadata"] = pickle.dumps(Payload(folder.parent))
    schema = pa.schema([pa.field("image", pa.binary(), metadata=named), pa.field("label", pa.int64())])
    pq.write_table(pa.table([pa.array([PNG] * 20), pa.array([0, 1] * 10)], schema=schema), folder / "train.parquet")


def has_a_script(folder: Path) -> None:
    (folder / f"{folder.name}.py").write_text(f"open({str(folder.parents[1] / 'executed')!r}, 'w')\n")
    pq.write_table(images(20), folder / "train.parquet")


def has_pickles(folder: Path) -> None:
    for suffix in ("pkl", "pickle", "pt", "npy"):
        (folder / f"train.{suffix}").write_bytes(pickle.dumps(Payload(folder.parent)))
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: train.pkl\n---\n")


def names_devices(folder: Path) -> None:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = pa.array([{"bytes": None, "path": "/dev/zero"}] * 4, kind)
    pq.write_table(pa.table({"image": cells, "label": [0, 1, 0, 1]}), folder / "train.parquet")


def has_a_large_image(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / "train" / name).mkdir(parents=True)
        large_png(folder / "train" / name / "1.png")


def has_compressed_lines(folder: Path) -> None:
    """As JSON lines by its name, which `datasets` unpacks all the same."""
    line = b'{"en": "a dog runs", "de": "ein Hund rennt"}\n'
    with gzip.open(folder / "train-0.jsonl", "wb") as file:
        for _ in range(1000):
            file.write(line * 1000)


def has_an_archive(folder: Path) -> None:
    """By its name a table, and with something before it."""
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: table.tsv\n---\n")
    with zipfile.ZipFile(folder / "inner.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train.jsonl", b'{"en": "a dog runs", "de": "ein Hund rennt"}\n' * 1000)
    (folder / "table.tsv").write_bytes(b'{"en": "a", "de": "b"}\n' + (folder / "inner.zip").read_bytes())
    (folder / "inner.zip").unlink()
    (folder / "notes.csv").write_text("a,b\n")


def has_a_tape(folder: Path) -> None:
    with tarfile.open(folder / "train.csv", "w") as archive:
        lines = b'{"en": "a dog runs", "de": "ein Hund rennt"}\n'
        member = tarfile.TarInfo("train.jsonl")
        member.size = len(lines)
        archive.addfile(member, io.BytesIO(lines))


def has_an_endless_line(folder: Path) -> None:
    for language in ("en", "de"):
        with (folder / f"train.{language}").open("wb") as file:
            file.truncate(1 << 36)


@pytest.mark.parametrize(
    ("make", "task", "expected"),
    [
        (claims_a_billion_rows, "classification", " and unpacks to 1,000,000,000 rows"),
        (repeats_one_row, "classification", " and unpacks to 1,100,000 rows"),
        (repeats_one_value, "translation", " and unpacks to "),
        (names_itself, "classification", "README.md` has YAML aliases"),
        (has_a_pickled_type, "classification", "no image column in"),
        (has_a_script, "classification", "cannot be loaded: "),
        (has_pickles, "classification", "cannot be loaded: "),
        (names_devices, "classification", "is not a file: /dev/zero"),
        (has_a_large_image, "classification", "has too many pixels to be read"),
        (has_compressed_lines, "translation", "train-0.jsonl` is compressed"),
        (has_an_archive, "translation", "table.tsv` is compressed"),
        (has_a_tape, "translation", "train.csv` is compressed"),
        (has_an_endless_line, "translation", "line 1 is longer than 4,194,304 bytes"),
    ],
)
def test_data(make: Callable[[Path], None], task: str, expected: str, confined: Run, watched: Path) -> None:
    (watched / "data").mkdir()
    make(watched / "data")
    failed = confined("data", "info", "data", "--task", task)
    assert (failed.code, failed.out) == (1, "")
    assert failed.err.startswith("error: ")
    assert expected in failed.err


# Images


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int, *chunks: bytes, data: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def zeros(megabytes: int) -> bytes:
    """So many, packed: a thousandth of them. Only the checksum, for which all have to be unpacked, is wrong."""
    packing = zlib.compressobj(9)
    first, again = (packing.compress(bytes(1 << 20)) + packing.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + again * (megabytes - 1) + packing.flush()


def large_png(file: Path) -> None:
    file.write_bytes(png_of(50_000, 50_000, data=zeros(50_000 * 6251 // (1 << 20) + 1)))


def text_png(file: Path) -> None:
    file.write_bytes(png_of(8, 8, chunk(b"zTXt", b"a\0\0" + zeros(2000)), data=zlib.compress(bytes(16))))


def international_text_png(file: Path) -> None:
    packed = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zeros(2000))
    file.write_bytes(png_of(8, 8, packed, data=zlib.compress(bytes(16))))


def profile_png(file: Path) -> None:
    file.write_bytes(png_of(8, 8, chunk(b"iCCP", b"a\0\0" + zeros(2000)), data=zlib.compress(bytes(16))))


def large_jpeg(file: Path) -> None:
    data = next(data for data in fuzzing.IMAGES if data.startswith(b"\xff\xd8"))
    at = data.index(b"\xff\xc0") + 5
    file.write_bytes(data[:at] + struct.pack(">HH", 65_500, 65_500) + data[at + 4 :])


def large_bmp(file: Path) -> None:
    data = next(data for data in fuzzing.IMAGES if data.startswith(b"BM"))
    file.write_bytes(data[:18] + struct.pack("<ii", 1 << 30, 1 << 30) + data[26:])


def many_frames(file: Path) -> None:
    frames = [PIL.Image.new("P", (64, 64), number % 256) for number in range(3000)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (large_png, "has too many pixels to be read"),
        (large_jpeg, "has too many pixels to be read"),
        (large_bmp, "has too many pixels to be read"),
        (text_png, "is not an image that can be read: "),
        (international_text_png, "is not an image that can be read: "),
        (profile_png, "is not an image that can be read: "),
        (many_frames, None),
    ],
)
def test_images(
    make: Callable[[Path], None], expected: str | None, confined: Run, small_runs: Path, watched: Path
) -> None:
    """Of many frames the first is read."""
    shutil.copytree(small_runs / "resnet", watched / "run")
    make(watched / "image")
    assert (watched / "image").stat().st_size < 3_000_000
    seen = confined("classify", "--run", "run", "image")
    assert seen.err.startswith(f"error: `image` {expected}" if expected else "")
    assert (seen.code, len(seen.out.splitlines())) == ((1, 0) if expected else (0, 3))


# Text


@pytest.mark.parametrize("command", [["translate"], ["translate", "--jsonl"], ["score"]])
def test_text_without_end(command: list[str], confined: Run, small_runs: Path, watched: Path) -> None:
    shutil.copytree(small_runs / "seq2seq", watched / "run")
    failed = confined(*command, "--run", "run", "--input", "/dev/zero", "--output", "out")
    assert failed.err.startswith("error: /dev/zero: line 1 is longer than 4,194,304 bytes\nhint: ")
    assert not (watched / "out").exists()
