"""Labelled images from tables and folders: any size and mode, the cache, and what is said of bad data."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest

from dl7cli.data.images import Images, digest, read_image_file, read_images, statistics
from dl7cli.errors import UserError

Array = npt.NDArray[Any]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DL7_CACHE", str(folder))
    return folder


def pixels(count: int, size: int = 8, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def png(array: Array) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def write_parquet(folder: Path, features: dict[str, Any] | None = None, **splits: dict[str, list[Any]]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for split, columns in splits.items():
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features) if features else None)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def labelled(names: list[str], image: str = "image", label: str = "label") -> dict[str, Any]:
    return {image: datasets.Image(), label: datasets.ClassLabel(names=names)}


def write_image_folder(folder: Path, images: dict[str, Array]) -> str:
    for name, array in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(array).save(folder / name)
    return str(folder)


def arrays(read: Images, split: str = "train") -> tuple[list[Any], list[int]]:
    return read.splits[split].images.tolist(), read.splits[split].labels.tolist()


def test_tables_give_their_pixels_labels_and_classes_in_their_order(tmp_path: Path) -> None:
    train, test = pixels(5), pixels(3, seed=1)
    source = write_parquet(
        tmp_path / "set",
        labelled(["zebra", "ant"], "img"),
        train={"img": [{"bytes": png(one)} for one in train], "label": [0, 1, 1, 0, 1]},
        test={"img": [{"bytes": png(one)} for one in test], "label": [1, 0, 0]},
    )
    reported: list[tuple[str, int, int]] = []
    read = read_images(source, progress=lambda *it: reported.append(it))
    assert read.classes == ("zebra", "ant")
    assert read.notes == ()
    assert list(read.splits) == ["train", "test"]
    assert arrays(read) == (train.tolist(), [0, 1, 1, 0, 1])
    assert arrays(read, "test") == (test.tolist(), [1, 0, 0])
    assert read.splits["train"].images.dtype == np.uint8
    assert read.splits["train"].labels.dtype == np.int64
    assert ("decoding train images", 5, 5) in reported


def test_an_image_folder_gives_the_same_as_a_table(tmp_path: Path) -> None:
    train = pixels(4)
    source = write_image_folder(
        tmp_path / "set",
        {
            "train/cat/1.png": train[0],
            "train/cat/deeper/2.PNG": train[1],
            "train/bee/x.png": train[2],
            "val/bee/x.png": train[3],
            "test/cat/x.png": train[3],
        },
    )
    (tmp_path / "set" / "train" / "cat" / "Thumbs.db").write_text("not an image")
    (tmp_path / "set" / "train" / ".cache").mkdir()
    write_image_folder(tmp_path / "set", {"train/cat/.ipynb_checkpoints/1-checkpoint.png": train[3]})
    read = read_images(source)
    assert read.classes == ("bee", "cat")
    assert arrays(read) == (train[[2, 0, 1]].tolist(), [0, 1, 1])
    assert arrays(read, "validation") == (train[[3]].tolist(), [0])
    assert arrays(read, "test") == (train[[3]].tolist(), [1])


def test_tables_beside_other_images_are_read(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": png(pixels(1)[0])}], "label": [0]}
    write_parquet(tmp_path / "data", labelled(["a"]), train=rows, test=rows)
    source = write_image_folder(tmp_path, {"assets/figures/plot.png": pixels(1)[0], "test/a/1.png": pixels(1)[0]})
    assert arrays(read_images(source)) == (pixels(1).tolist(), [0])


def test_the_second_reading_maps_arrays_and_imports_nothing_slow(tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "set", {"train/a/1.png": pixels(1)[0], "train/b/1.png": pixels(1)[0]})
    first = read_images(source)
    code = f"""
import sys
import numpy
from dl7cli.data.images import read_images
read = read_images({source!r})
assert isinstance(read.splits["train"].images, numpy.memmap)
print(read.splits["train"].images.sum(), read.classes, {{"datasets", "pandas", "PIL"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{first.splits['train'].images.sum()} ('a', 'b') set()\n"


def test_a_changed_source_is_read_anew_and_the_old_arrays_go(tmp_path: Path, cache: Path) -> None:
    source = write_image_folder(tmp_path / "set", {"train/a/1.png": pixels(1)[0]})
    read_images(source)
    write_image_folder(tmp_path / "set", {"train/b/1.png": pixels(1)[0]})
    assert read_images(source).classes == ("a", "b")
    assert len(list((cache / "images").iterdir())) == 1
    assert read_images(source, image_size=4).splits["train"].images.shape == (2, 4, 4, 3)
    assert len(list((cache / "images").iterdir())) == 2


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def shorten(file: Path) -> None:
    np.save(file, np.load(file)[:1])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.images.npy", cut),
        ("train.images.npy", shorten),
        ("train.images.npy", lambda file: file.write_bytes(file.read_bytes() + b"x")),
        ("train.images.npy", Path.unlink),
        ("train.labels.npy", cut),
        ("train.labels.npy", shorten),
        ("train.labels.npy", lambda file: np.save(file, np.array([0, 7]))),
        ("train.labels.npy", lambda file: np.save(file, np.array([0.0, 1.0]))),
        ("meta.json", cut),
        ("meta.json", lambda file: file.write_text("[]")),
        ("meta.json", Path.unlink),
    ],
)
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, cache: Path, name: str, damage: Callable[[Path], object]) -> None:
    source = write_image_folder(tmp_path / "set", {"train/a/1.png": pixels(1)[0], "train/b/1.png": pixels(2)[1]})
    whole = arrays(read_images(source))
    (kept,) = (cache / "images").iterdir()
    damage(kept / name)
    assert arrays(read_images(source)) == whole
    assert [it.name for it in (cache / "images").iterdir()] == [kept.name]


def test_nothing_is_left_in_the_cache_by_a_reading_that_fails(tmp_path: Path, cache: Path) -> None:
    source = write_image_folder(tmp_path / "set", {"train/a/1.png": pixels(1)[0]})
    (tmp_path / "set" / "train" / "a" / "2.png").write_bytes(b"no")
    with pytest.raises(UserError):
        read_images(source)
    assert list((cache / "images").iterdir()) == []


@pytest.mark.parametrize(
    ("sizes", "wanted", "shape", "notes"),
    [
        ([(28, 28), (28, 28)], None, (28, 28), ()),
        ([(64, 64), (64, 64)], None, (64, 64), ()),
        ([(65, 65), (65, 65)], None, (32, 32), ("images of 65x65 resized to 32x32",)),
        ([(20, 20), (32, 32)], None, (32, 32), ("images of 20x20 to 32x32 resized to 32x32",)),
        ([(48, 32), (48, 32)], None, (32, 32), ("images of 48x32 resized and cropped to 32x32",)),
        ([(40, 90), (9, 7)], 16, (16, 16), ("images of 9x7 to 40x90 resized and cropped to 16x16",)),
        ([(16, 16), (16, 16)], 16, (16, 16), ()),
    ],
)
def test_images_of_any_size(
    tmp_path: Path, sizes: list[tuple[int, int]], wanted: int | None, shape: tuple[int, int], notes: tuple[str, ...]
) -> None:
    images = {f"train/a/{n}.png": np.zeros((h, w, 3), np.uint8) for n, (w, h) in enumerate(sizes)}
    read = read_images(write_image_folder(tmp_path / "set", images), image_size=wanted)
    assert read.splits["train"].images.shape == (2, *shape, 3)
    assert read.notes == notes


def test_an_image_is_cropped_to_its_centre_and_not_stretched(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    read = read_images(write_image_folder(tmp_path / "set", {"train/a/1.png": wide}), image_size=10)
    assert (read.splits["train"].images == 200).all()


GREY = np.array([[0, 255], [128, 3]], np.uint8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (PIL.Image.fromarray(GREY), GREY),
        (PIL.Image.fromarray(GREY.astype(np.uint16) * 256 + 77), GREY),
        (PIL.Image.fromarray(GREY > 100), (GREY > 100) * 255),
        (PIL.Image.fromarray(GREY).convert("P"), GREY),
        (PIL.Image.fromarray(GREY).convert("RGBA"), GREY),
        (PIL.Image.fromarray(GREY).convert("LA"), GREY),
        (PIL.Image.fromarray(np.stack([GREY, GREY, GREY, 0 * GREY], axis=-1)), np.full((2, 2), 255)),
    ],
    ids=["L", "I;16", "1", "P", "RGBA", "LA", "transparent"],
)
def test_images_of_any_mode_come_out_in_three_channels(tmp_path: Path, image: PIL.Image.Image, expected: Array) -> None:
    (tmp_path / "set" / "train" / "a").mkdir(parents=True)
    image.save(tmp_path / "set" / "train" / "a" / "1.png")
    read = read_images(str(tmp_path / "set"))
    assert read.splits["train"].images[0].tolist() == np.stack([expected] * 3, axis=-1).tolist()
    assert bool(read.notes) == (image.mode in ("L", "I;16", "1", "LA"))
    assert (
        read_image_file(tmp_path / "set" / "train" / "a" / "1.png", 2).tolist()
        == read.splits["train"].images[0].tolist()
    )


@pytest.mark.parametrize("scale", [1, 256])
def test_32_bits_hold_8_or_16(tmp_path: Path, scale: int) -> None:
    PIL.Image.fromarray(GREY.astype(np.int32) * scale).save(tmp_path / "1.tif")
    assert read_image_file(tmp_path / "1.tif", 2)[:, :, 0].tolist() == GREY.tolist()


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    image = PIL.Image.new("RGB", (16, 16))
    image.paste((255, 255, 255), (0, 0, 16, 8))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: the upper half becomes the right one
    image.save(tmp_path / "1.jpg", exif=exif, quality=95)
    read = read_image_file(tmp_path / "1.jpg", 16)
    assert read[:, 12:].min() > 200
    assert read[:, :4].max() < 50


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".jp2", ".pnm"])
def test_images_of_less_usual_names_are_read(suffix: str, tmp_path: Path) -> None:
    images = {f"train/{name}/1{suffix}": pixels(1)[0] for name in ("a", "b")}
    assert read_images(write_image_folder(tmp_path, images)).classes == ("a", "b")


def columns_of(tmp_path: Path, features: dict[str, Any], values: dict[str, list[Any]], **options: str) -> Images:
    source = write_parquet(tmp_path / "set", features, train=values)
    return read_images(source, **options)  # type: ignore[arg-type]


TWO = [{"bytes": png(one)} for one in pixels(2)]


def test_of_several_label_columns_the_finest_is_taken_and_said(tmp_path: Path) -> None:
    features = {
        "coarse_label": datasets.ClassLabel(names=["x", "y"]),
        "img": datasets.Image(),
        "fine_label": datasets.ClassLabel(names=["a", "b", "c"]),
    }
    values = {"img": TWO, "fine_label": [2, 0], "coarse_label": [1, 1]}
    read = columns_of(tmp_path, features, values)
    assert read.classes == ("a", "b", "c")
    assert read.splits["train"].labels.tolist() == [2, 0]
    assert read.notes == ("labels from column `fine_label` (3 classes) of `fine_label`, `coarse_label`",)
    assert columns_of(tmp_path, features, values, label="coarse_label").classes == ("x", "y")


def test_a_column_called_label_comes_before_a_finer_one(tmp_path: Path) -> None:
    features = labelled(["x", "y"]) | {"breed": datasets.ClassLabel(names=["a", "b", "c"])}
    assert columns_of(tmp_path, features, {"image": TWO, "label": [1, 1], "breed": [0, 2]}).classes == ("x", "y")


def test_labels_without_class_names(tmp_path: Path) -> None:
    image, string, number = datasets.Image(), datasets.Value("string"), datasets.Value("int32")
    read = columns_of(tmp_path / "1", {"image": image, "kind": string}, {"image": TWO, "kind": ["dog", "ant"]})
    assert (read.classes, read.splits["train"].labels.tolist()) == (("ant", "dog"), [1, 0])
    read = columns_of(tmp_path / "2", {"image": image, "kind": number}, {"image": TWO, "kind": [2, 0]})
    assert (read.classes, read.splits["train"].labels.tolist()) == (("0", "1", "2"), [2, 0])
    values = {"image": TWO, "id": [7, 8], "label": [1, 0]}
    read = columns_of(tmp_path / "3", {"image": image, "id": number, "label": number}, values)
    assert read.splits["train"].labels.tolist() == [1, 0]


def test_named_columns_may_hold_plain_bytes(tmp_path: Path) -> None:
    for kind in ("binary", "large_binary"):
        features = {"png": datasets.Value(kind), "n": datasets.Value("int64"), "m": datasets.Value("int64")}
        values = {"png": [it["bytes"] for it in TWO], "n": [0, 1], "m": [1, 0]}
        read = columns_of(tmp_path / kind, features, values, image="png", label="m")
        assert arrays(read) == (pixels(2).tolist(), [1, 0])


@pytest.mark.parametrize(
    ("features", "options", "message", "hint"),
    [
        (
            {"text": "string", "label": "int64"},
            {},
            "no image column in `.*`: there is `text` .string., `label` .int64.",
            "image",
        ),
        ({"image": None, "box": "float32"}, {}, "no label column in `.*`: there is `box` .float32.", "label"),
        ({"image": None, "a": "int64", "b": "int64"}, {}, "more than one column that could be the label", "label"),
        ({"image": None, "label": "int64"}, {"image": "photo"}, "has no column `photo`: there is `image` .image.", ""),
        ({"image": None, "label": "int64"}, {"label": "kind"}, "has no column `kind`", ""),
        ({"image": None, "label": "int64"}, {"image": "label"}, "column `label` of `.*` holds no images", ""),
        ({"image": None, "x": "float32"}, {"label": "x"}, "column `x` of `.*` holds no labels", ""),
    ],
)
def test_columns_that_are_not_there_are_errors_that_list_those_that_are(
    tmp_path: Path, features: dict[str, str | None], options: dict[str, str], message: str, hint: str
) -> None:
    types = {name: datasets.Value(kind) if kind else datasets.Image() for name, kind in features.items()}
    values = {name: ["x"] if kind == "string" else [0] if kind else TWO[:1] for name, kind in features.items()}
    with pytest.raises(UserError, match=message) as caught:
        columns_of(tmp_path, types, values, **options)
    assert caught.value.hint == (f"name it: `--set data.{hint}=…`" if hint else None)


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("int64", [0, None, 1], r"row 2 of split `train` of `.*set` has no label \(column `label`\)"),
        ("int64", [0, 1, -1], r"row 3 of split `train` of `.*set` has the label `-1`"),
        ("int64", [0, 10**9, 1], r"row 2 of split `train` of `.*set` has the label `1000000000`"),
        ("string", ["a", None, "b"], r"row 2 of split `train` of `.*set` has no label"),
        ("class", [0, 1, None], r"row 3 of split `train` of `.*set` has no label"),
        ("class", [0, -1, 1], r"row 2 of split `train` of `.*set` has the label `-1`, .* one of the 2 classes"),
    ],
)
def test_bad_labels_are_named_by_row(tmp_path: Path, kind: str, labels: list[Any], message: str) -> None:
    feature = datasets.ClassLabel(names=["a", "b"]) if kind == "class" else datasets.Value(kind)
    with pytest.raises(UserError, match=message):
        columns_of(tmp_path, {"image": datasets.Image(), "label": feature}, {"image": [TWO[0]] * 3, "label": labels})


def test_a_test_split_with_a_class_that_was_not_trained_is_an_error(tmp_path: Path) -> None:
    features = {"image": datasets.Image(), "label": datasets.Value("string")}
    rows = {"train": {"image": TWO, "label": ["a", "b"]}, "test": {"image": TWO, "label": ["b", "c"]}}
    with pytest.raises(UserError, match=r"row 2 of split `test` of `.*` has the label `c`"):
        read_images(write_parquet(tmp_path / "table", features, **rows))
    images = {"train/a/1.png": pixels(1)[0], "test/a/1.png": pixels(1)[0], "test/c/1.png": pixels(1)[0]}
    with pytest.raises(UserError, match=r"`.*test/c` is a class that `.*train` does not have"):
        read_images(write_image_folder(tmp_path / "folder", images))


@pytest.mark.parametrize("damage", [b"", b"no image", png(pixels(1, 32)[0])[:200], png(pixels(1)[0])[:40] + b"x" * 99])
def test_a_corrupt_image_is_named_by_file_or_row(tmp_path: Path, damage: bytes) -> None:
    source = write_image_folder(tmp_path / "folder", {f"train/a/{n}.png": pixels(1)[0] for n in range(3)})
    bad = tmp_path / "folder" / "train" / "a" / "1.png"
    bad.write_bytes(damage)
    with pytest.raises(UserError, match=r"`.*train/a/1\.png` is not an image that can be read"):
        read_images(source)
    with pytest.raises(UserError, match=r"1\.png` is not an image that can be read"):
        read_image_file(bad, 32)

    rows = {"image": [*TWO, {"bytes": damage}], "label": [0, 0, 0]}
    with pytest.raises(UserError, match=r"the image in row 3 of split `train` of `.*table` is"):
        read_images(write_parquet(tmp_path / "table", labelled(["a"]), train=rows))


def test_a_missing_image_is_named_by_row(tmp_path: Path) -> None:
    rows = {"image": [TWO[0], None], "label": [0, 0]}
    with pytest.raises(UserError, match=r"the image in row 2 of split `train` of `.*` is missing"):
        read_images(write_parquet(tmp_path / "table", labelled(["a"]), train=rows))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_an_image_too_large_for_memory_is_refused(tmp_path: Path, side: int) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + data)
    with pytest.raises(UserError, match=r"`.*bomb\.png` has too many pixels"):
        read_image_file(tmp_path / "bomb.png", 32)


def test_an_image_that_memory_does_not_hold_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(image: PIL.Image.Image) -> None:
        raise MemoryError

    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(UserError, match=r"`.*x\.png` has too many pixels"):
        read_image_file(tmp_path / "x.png", 8)


def test_a_file_that_would_start_another_program_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match="is not an image"):
        read_image_file(tmp_path / "x.png", 8)


def test_an_image_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file `.*x\.png`"):
        read_image_file(tmp_path / "x.png", 8)
    with pytest.raises(UserError, match="is not a file"):
        read_image_file(tmp_path, 8)


def test_folders_without_training_images_are_errors(tmp_path: Path) -> None:
    one = pixels(1)[0]
    with pytest.raises(UserError, match="has no train split: there is `cat`, `dog`"):
        read_images(write_image_folder(tmp_path / "1", {"cat/1.png": one, "dog/1.png": one}))
    with pytest.raises(UserError, match="has no train split: there is `test`"):
        read_images(write_image_folder(tmp_path / "2", {"test/cat/1.png": one}))
    with pytest.raises(UserError, match="has no folders with images"):
        read_images(write_image_folder(tmp_path / "3", {"train/1.png": one, "test/a/1.png": one}))
    (tmp_path / "4").mkdir()
    with pytest.raises(UserError, match=r"the folder `.*` is empty"):
        read_images(str(tmp_path / "4"))
    with pytest.raises(UserError, match="there is no file or folder"):
        read_images(str(tmp_path / "5"))
    with pytest.raises(UserError, match="has both `val` and `valid`"):
        read_images(write_image_folder(tmp_path / "6", {f"{it}/a/1.png": one for it in ("train", "val", "valid")}))
    with pytest.raises(UserError, match="has images and no columns"):
        read_images(write_image_folder(tmp_path / "7", {"train/a/1.png": one}), label="label")
    with pytest.raises(UserError, match="7` has no configurations: `:plain_text` means nothing"):
        read_images(f"{tmp_path / '7'}:plain_text")


def test_the_built_in_images_come_the_same_way() -> None:
    read = read_images("builtin:shapes")
    assert list(read.splits) == ["train", "validation", "test"]
    assert read.splits["train"].images.shape[1:] == (32, 32, 3)
    assert len(read.classes) == 10
    smaller = read_images("builtin:shapes", image_size=16)
    assert smaller.splits["test"].images.shape[1:] == (16, 16, 3)
    assert smaller.notes == ("images of 32x32 resized to 16x16",)
    with pytest.raises(UserError, match="no built-in images `builtin:phrases`"):
        read_images("builtin:phrases")


def test_statistics_are_those_of_numpy() -> None:
    images = pixels(50, 16)
    images[..., 1] //= 3
    mean, deviation = statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(deviation, (images / 255).std(axis=(0, 1, 2)))


def test_cifar10_as_published(real_data: Callable[[str], Path]) -> None:
    """Sizes, names, order of the test labels' counts, and the channel statistics that papers quote."""
    source = str(real_data("cifar10"))
    read = read_images(source)
    assert read.classes == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert read.notes == ()
    assert {split: it.images.shape for split, it in read.splits.items()} == {
        "train": (50_000, 32, 32, 3),
        "test": (10_000, 32, 32, 3),
    }
    assert np.bincount(read.splits["train"].labels).tolist() == [5000] * 10
    assert np.bincount(read.splits["test"].labels).tolist() == [1000] * 10
    mean, deviation = statistics(read.splits["train"].images)
    np.testing.assert_allclose(mean, (0.4914, 0.4822, 0.4465), atol=5e-5)
    np.testing.assert_allclose(deviation, (0.2470, 0.2435, 0.2616), atol=5e-5)
    assert digest(read.splits["test"]).startswith("26acb75a0652"), "as README says"

    # Against the decoding of `datasets` itself.
    table = datasets.load_dataset("parquet", data_files=f"{source}/plain_text/test-*", split="train[:20]")
    for row, image, label in zip(table, *(it[:20] for it in vars(read.splits["test"]).values()), strict=True):
        assert np.asarray(row["img"]).tolist() == image.tolist()
        assert row["label"] == label
