"""What hypothesis draws bad input from: recipes, settings, lines, images, JSON and the files of a run."""

import copy
import hashlib
import io
import json
import zlib
from typing import Any

import PIL.Image
import safetensors.torch
import torch
from hypothesis import strategies as st
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dl7cli import recipe as recipes

CONTROL = "\x1b]0;title\x07\x1b[31m\x9b2J\r\x00\x08\x7f\u2028\u202e[bold]x[/bold][/]:smile:"
"""What a terminal obeys, what turns a line round, and what Rich reads as markup."""

_WRITTEN = r"""1e999 nan -inf -1 0 1 3 0.5 1.0 -0 1e-320 9223372036854775808 true "" [] {} [[1]] 1979-05-27 07:32:00
[0.5,0.25] [1,'a',nan] "\ud800" "\u001b]0;x\u0007" "\u202e" "../../x" "builtin:phrases" {a.b.c=1} "resnet" "\u0000"
''' "none" """
_NESTED = ("[" * 500, "[" * 30_000, "{a=" * 300, "[" * 200 + "]" * 200, "[" * 20 + "]" * 20)
_LONG = ("9" * 30, "9" * 5000, "0x" + "f" * 5000, f'"{"x" * 5000}"')
SMALL_VALUES = st.sampled_from(_WRITTEN.split())
TOML_VALUES = st.sampled_from([*_WRITTEN.split(), *_NESTED, *_LONG])
SHIPPED = {name: recipes.find(name).read_text(encoding="utf-8") for name in recipes.shipped()}
KEYS = sorted(
    {
        f"{section}.{key}"
        for name in SHIPPED
        for section, table in recipes.to_document(recipes.resolve(name).recipe).items()
        if isinstance(table, dict)
        for key in table
    }
    | {"name", "data", "model", "fallback", "optim.other_learning_rate", "model.group_width", "data.image_size"}
)
WORDS = st.text(st.characters(codec="utf-8"), max_size=12)


@st.composite
def recipe_files(draw: st.DrawFn) -> bytes:
    """A shipped recipe with a few things wrong, or what may not even be TOML."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200) | st.text(st.characters(codec="utf-8"), max_size=200).map(str.encode))
    lines = draw(st.sampled_from(sorted(SHIPPED.values()))).splitlines()
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        match draw(st.integers(0, 6)):
            case 0 | 1 | 2:
                at = draw(st.sampled_from([number for number, line in enumerate(lines) if "=" in line[1:]] or [at]))
                lines[at] = f"{lines[at].partition('=')[0]} = {draw(TOML_VALUES)}"
            case 3:
                lines[at] = draw(WORDS)
            case 4:
                lines.insert(at, lines[draw(st.integers(0, len(lines) - 1))])
            case 5:
                lines.insert(at, f"{'.'.join(draw(st.sampled_from(KEYS)).split('.'))} = {draw(TOML_VALUES)}")
            case 6 if len(lines) > 1:
                del lines[at]
    text = "\n".join(lines).encode()
    return mutated(draw, text) if draw(st.integers(0, 3)) == 0 else text


@st.composite
def settings(draw: st.DrawFn, keys: list[str] = KEYS) -> str:
    """What is typed after `--set`, as the shell hands it over."""
    key = draw(st.sampled_from(keys) | arguments(12))
    value = draw(TOML_VALUES | arguments(30) | st.integers().map(str) | st.floats().map(str))
    return draw(st.sampled_from([f"{key}={value}", f"{key}.{value}", f" {key} = {value}", key]))


def arguments(longest: int) -> st.SearchStrategy[str]:
    """Text as it comes from a command line: no NUL, and bytes that are not UTF-8 as lone surrogates."""
    text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=longest)
    data = st.binary(max_size=longest).map(lambda data: data.replace(b"\0", b"").decode("utf-8", "surrogateescape"))
    return text | data | st.sampled_from(["x" * 5000, "x/" * 3000, "~", "~nobody-there/x", "/dev/zero", "-", "."])


LINE = (
    st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=40).map(str.encode)
    | st.sampled_from([CONTROL.encode(), b"", b" ", b"red blue", b"red\tblau", b"\t", b"red\tblau\tgelb", b"\x00" * 9])
    | st.sampled_from([b"red " * 9000, b"x" * 70_000, "\u0301".encode() * 3000, b"\xff", b"\xed\xa0\x80", b"\xf0\x9f"])
    | st.sampled_from(["\ufeffred".encode(), b"red\r", b"red\x0cblue", "red\u2029blue\tblau".encode(), b"\r"])
    | st.binary(max_size=30).map(lambda data: data.replace(b"\n", b""))
)
LINES = st.lists(LINE, max_size=4).map(b"\n".join)

_NO_JSON = ("NaN", "-Infinity", "1e999", "1 2", "{", '"\\ud800"', '"\\u0000\\u001b[31m"')
JSON_TEXT = st.sampled_from([*_NO_JSON, "9" * 5000, "[" * 100_000, '{"a":' * 400])
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, -1, 0, 1, 2, 1e300, -0.0, 10**400, 2**31, 2**63])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from([CONTROL, "\ud83d", "\udcff", "../../x", "x" * 300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
) | st.builds(lambda: json.loads("[" * 200 + "]" * 200))


@st.composite
def json_lines(draw: st.DrawFn, fields: tuple[str, ...]) -> bytes:
    """A few lines, most of them objects with those fields and values of any kind."""
    lines = []
    for _ in range(draw(st.integers(1, 3))):
        keys = draw(st.lists(st.sampled_from(fields) | st.text(max_size=4), max_size=4))
        text = json.dumps({key: draw(JSON_VALUES | st.just("red blue")) for key in keys})
        if draw(st.integers(0, 3)) == 0:
            text = text[:-1] + ', "x": ' + draw(JSON_TEXT) + "}"
        lines.append(mutated(draw, text.encode()) if draw(st.integers(0, 4)) == 0 else text.encode())
    return b"\n".join(lines)


def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with a few cut off, changed, put in or doubled."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 4)):
            case 0:
                data = data[:at]
            case 1:
                data = data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at:]
            case 2:
                data = data[:at] + data[at + draw(st.integers(1, 8)) :]
            case 3:
                new = draw(
                    st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"]) | st.binary(max_size=4)
                )
                data = data[:at] + new + data[at + len(new) :]
            case 4:
                data = data[:at] + data[max(0, at - 40) :]
    return data


def _encoded(mode: str, suffix: str, **options: Any) -> bytes:
    image = PIL.Image.effect_noise((13, 9), 60).convert("RGB").convert(mode)
    stream = io.BytesIO()
    image.save(stream, suffix, **options)
    return stream.getvalue()


def _text_chunks() -> PngInfo:
    info = PngInfo()
    info.add_text("a", "b" * 50, zip=True)
    info.add_itxt("XML:com.adobe.xmp", '<x xmlns:tiff="t" tiff:Orientation="6"/>', zip=True)
    return info


_EXIF = PIL.Image.Exif()
_EXIF[0x0112] = 6
IMAGES = [
    *(_encoded(mode, "PNG") for mode in ("RGB", "RGBA", "P", "LA", "1", "I;16")),
    _encoded("RGB", "PNG", pnginfo=_text_chunks(), exif=_EXIF),
    *(_encoded(mode, "JPEG", exif=_EXIF) for mode in ("RGB", "L", "CMYK")),
    _encoded("RGB", "JPEG", progressive=True),
    *(_encoded(mode, "BMP") for mode in ("RGB", "P")),
    _encoded("P", "GIF", save_all=True, append_images=[PIL.Image.new("P", (13, 9), number) for number in range(5)]),
    *(_encoded("RGB", suffix) for suffix in ("WEBP", "TIFF", "PPM", "JPEG2000")),
    _encoded("RGB", "TIFF", compression="tiff_lzw"),
]


@st.composite
def image_files(draw: st.DrawFn) -> bytes:
    """A small image of any kind with a few bytes wrong; a PNG perhaps with the checksums that go with them."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=100))
    data = draw(st.sampled_from(IMAGES))
    if draw(st.booleans()):
        return _checked(mutated(draw, data))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(4, len(data) - 1))
        data = data[:at] + draw(st.binary(min_size=1, max_size=2)) + data[at + 1 :]
    return _checked(data)


def _checked(data: bytes) -> bytes:
    """A PNG whose chunks have the right checksums, so that what is in them is read."""
    at = 8
    while data.startswith(b"\x89PNG") and at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        if end + 4 > len(data):
            break
        data = data[:end] + zlib.crc32(data[at + 4 : end]).to_bytes(4) + data[end + 4 :]
        at = end + 4
    return data


def paths(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values in a JSON document are, as far as it is not nested too deeply to look at all of them."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = inner if len(before) < 8 else ()
    return [before, *(path for key, one in inner for path in paths(one, (*before, key)))]


@st.composite
def changed(draw: st.DrawFn, document: dict[str, Any]) -> dict[str, Any]:
    """A JSON document with one to three values replaced, most by others of their kind, taken away or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        top = draw(st.sampled_from([key for key in document if key not in ("dl7", "format")]))
        *above, key = draw(st.sampled_from([path for path in paths(document) if path[:1] == (top,)]))
        table: Any = document
        for step in above:
            table = table[step]
        match draw(st.integers(0, 9)):
            case 0 if above:
                del table[key]
            case 1 if isinstance(table, dict):
                table[draw(st.text(max_size=6))] = copy.deepcopy(draw(JSON_VALUES))
            case 2:
                table[key] = copy.deepcopy(draw(JSON_VALUES))
            case _ if isinstance(table[key], bool):
                table[key] = not table[key]
            case _ if isinstance(table[key], int):
                table[key] = draw(st.integers(0, 9) | st.integers(-(2**65), 2**65) | st.just(10**400))
            case _ if isinstance(table[key], float):
                table[key] = draw(st.floats(0, 1) | st.floats(allow_nan=False, allow_infinity=False))
            case _ if isinstance(table[key], str):
                table[key] = draw(
                    st.sampled_from(["", "none", CONTROL, "\ud83d", "..", "x" * 300]) | st.text(max_size=6)
                )
            case _ if isinstance(table[key], list):
                table[key] = (table[key] * 2)[: draw(st.integers(0, 8))]
            case _ if isinstance(table[key], dict) and table[key]:
                del table[key][draw(st.sampled_from(sorted(table[key])))]
    return document


@st.composite
def tensors(draw: st.DrawFn, original: dict[str, Tensor]) -> bytes:
    """A safetensors file with one or two of the tensors changed or gone, or a few bytes of its header."""
    found = dict(original)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(found)))
        tensor = found[name]
        match draw(st.integers(0, 7)):
            case 0:
                del found[name]
            case 1:
                found[draw(st.sampled_from(["x", "", CONTROL, f"{name}.x", "optimiser.999.step", "optimiser.x"]))] = (
                    tensor
                )
            case 2:
                found[name] = torch.full(tensor.shape, draw(st.sampled_from([torch.nan, torch.inf, 1e38])))
            case 3:
                found[name] = tensor.to(draw(st.sampled_from([torch.float64, torch.int8, torch.complex64, torch.bool])))
            case 4:
                found[name] = tensor.reshape(-1)
            case 5:
                found[name] = torch.zeros(draw(st.lists(st.integers(0, 3), max_size=3)))
            case 6:
                found[name] = tensor[None]
            case 7:
                found[name] = torch.zeros_like(tensor) - draw(st.integers(0, 9))
        if not found:
            break
    data = safetensors.torch.save({name: tensor.clone().contiguous() for name, tensor in found.items()})
    if draw(st.integers(0, 2)) == 0:
        head = 8 + int.from_bytes(data[:8], "little")
        header = mutated(draw, data[8:head])
        size = len(header) if draw(st.booleans()) else draw(st.sampled_from([0, 2**63, 2**64 - 1, 10**7, len(header)]))
        data = size.to_bytes(8, "little") + header + data[head:]
    return data


def signed(document: dict[str, Any]) -> bytes:
    """A `checkpoint.json` whose digest is right, whatever it holds."""
    body = {key: value for key, value in document.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=1) + "\n").encode()
