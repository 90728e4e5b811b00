"""Labelled images from any source, as uint8 arrays that are decoded once and then mapped from disk."""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dl7cli.data import sources
from dl7cli.data.cifar import is_cifar, read_cifar
from dl7cli.data.columns import Content, Encoded, Split, holds_images, holds_labels
from dl7cli.data.columns import read as read_columns
from dl7cli.data.sources import Progress, silent
from dl7cli.errors import UserError

if TYPE_CHECKING:
    import PIL.Image

_FORMAT = 1
_OF_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".jpx")
IMAGE_SUFFIXES = (".png", *_OF_JPEG, ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
# Named, so that no file is ever handed to a plug-in that starts other programs (EPS does).
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000")
_DEFAULT_SIZE = 32
_LARGEST_KEPT_SIZE = 64


@dataclass(frozen=True)
class ImageSet:
    """One split: images, uint8 (N, H, W, 3), perhaps mapped read-only from disk; labels, int64 (N,)."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Images:
    """The splits of a source by name, of `train`, `validation` and `test` those that it has, and its classes.

    `classes` are in the order of the labels. `notes` say what was done to the data, for the user to read.
    """

    splits: dict[str, ImageSet]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def read_images(
    source: str,
    *,
    image: str | None = None,
    label: str | None = None,
    image_size: int | None = None,
    offline: bool = False,
    progress: Progress = silent,
    for_training: bool = True,
    if_named: bool = False,
) -> Images:
    """Read labelled images from a hub id, a folder in its layout or CIFAR's own, an image folder or `builtin:shapes`.

    `image` and `label` name the columns where they are not to be found by their type, `if_named` in so far as there
    are such columns of these names. Images that are not `image_size` pixels wide and high are scaled to fill that
    square and cropped to its centre. Without `image_size` the images keep their size if all are square, equal and at
    most 64 wide, and become 32 by 32 otherwise.

    The first reading decodes and keeps arrays below the cache folder; later ones map those. They are made anew when
    the name, size or time of a file of the source changes. Raises UserError for a source or data that cannot be used,
    as one without a train split is `for_training`.
    """
    mark = ""
    if sources.is_builtin(source):
        if source != "builtin:shapes":
            raise UserError(f"there are no built-in images `{source}`", hint="the built-in images are `builtin:shapes`")
        mark = sources.fingerprint(Path(__file__).with_name("shapes.py"))[:12]
    elif sources.is_local(source):
        files = sources.fingerprint(sources.existing_path(source))
        mark = hashlib.sha256(" ".join([files, *IMAGE_SUFFIXES]).encode()).hexdigest()[:12]
    if_named = if_named and bool(image or label)
    read_as = [_FORMAT, image, label, image_size, *["if named"] * if_named]
    options = hashlib.sha256(json.dumps(read_as).encode()).hexdigest()[:8]
    entry = f"{sources.cache_name(source)}-{options}-"
    kept = sources.cache_folder() / "images"
    target = kept / (entry + mark)
    if found := _open_cache(target, for_training):
        return found
    with sources.working_folder(kept) as working:
        content = _encoded(source, image, label, offline, progress, working, for_training, if_named)
        _decode_to(working, source, content, image_size, progress)
        shutil.rmtree(working / "datasets", ignore_errors=True)
        for old in kept.glob(entry + "*"):
            # What an earlier state of the files gave, or what is damaged.
            if old.name != target.name or _open_cache(old, for_training) is None:
                shutil.rmtree(old, ignore_errors=True)
        # Fails if another process was faster: then its result serves as well.
        with contextlib.suppress(OSError):
            working.rename(target)
    if found := _open_cache(target, for_training):
        return found
    raise UserError(f"what was written to `{target}` cannot be read back", hint="is the disk full or damaged?")


def digest(*splits: ImageSet) -> str:
    """A hash of images and labels, in their order, wherever they were read from."""
    found = hashlib.sha256()
    for split in splits:
        found.update(np.ascontiguousarray(split.images).data)
        found.update(np.ascontiguousarray(split.labels).data)
    return found.hexdigest()


def read_image_file(path: str | Path, image_size: int) -> npt.NDArray[np.uint8]:
    """Read one image file as uint8 (image_size, image_size, 3), treated as in `read_images`.

    Raises UserError if it is missing, damaged, no image, or has more pixels than fit a sensible memory.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path's, False for a name that no file can have
        if os.path.isdir(path):
            raise UserError(f"`{path}` is not a file", hint=f"name the images in it, such as `{path}/*.png`")
        raise UserError(f"`{path}` is not a file" if os.path.exists(path) else f"there is no file `{path}`")
    with warnings.catch_warnings():
        _refuse_bombs()
        return np.asarray(_square(_open(path, f"`{path}`"), image_size))


def statistics(images: npt.NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of uint8 images (N, H, W, C), on the scale of 0 to 1.

    Exact, from counts of the 256 values; memory stays within a few megabytes.
    """
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), dtype=np.int64)
    step = max(1, (1 << 20) // max(1, images[0].size))
    for start in range(0, len(images), step):
        values = np.asarray(images[start : start + step]).reshape(-1, channels)
        for channel in range(channels):
            counts[channel] += np.bincount(values[:, channel], minlength=256)
    scale = np.arange(256) / 255
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ scale
    deviation = np.sqrt((shares * (scale - mean[:, None]) ** 2).sum(axis=1))
    return tuple(mean.tolist()), tuple(deviation.tolist())


@dataclass
class _Seen:
    """What was met while decoding, for the notes."""

    sizes: set[tuple[int, int]] = field(default_factory=set)
    modes: set[str] = field(default_factory=set)


def _generated() -> Content:
    """Take the built-in images as if they had been read."""
    from dl7cli.data import shapes

    splits = {}
    for split in ("train", "validation", "test"):
        images, labels = shapes.generate(split)
        splits[split] = Split(labels.tolist(), functools.partial(zip, itertools.repeat(split), images))
    return Content(splits, tuple(shapes.CLASSES))


def _encoded(
    source: str,
    image: str | None,
    label: str | None,
    offline: bool,
    progress: Progress,
    working: Path,
    for_training: bool,
    if_named: bool,
) -> Content:
    """Find the images of a source and their labels, not yet decoded."""
    if sources.is_builtin(source):
        return _generated()
    if sources.is_local(source):
        path = sources.existing_path(source)
        found = None
        if path.is_dir():
            found = _image_folder(path, for_training) or (read_cifar(path) if is_cifar(path) else None)
        if found:
            sources.refuse_configuration(source)
            if (image or label) and not if_named:
                raise UserError(f"`{source}` has images and no columns", hint="leave out data.image and data.label")
            return found
    tables = working / "datasets"
    loaded = sources.load_splits(source, offline=offline, progress=progress, working=tables, for_training=for_training)
    if if_named:
        there = next(iter(loaded.values())).features
        image = image if image in there and holds_images(there[image]) else None
        label = label if label in there and holds_labels(there[label]) else None
    return read_columns(source, loaded, image, label)


def _image_folder(path: Path, for_training: bool) -> Content | None:
    """Read the layout `train/<class>/*.png`; None where it is another layout."""
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    images = {name: _files_of_classes(path / name) for name in folders if sources.split_name(name)}
    trained = any(found and (sources.split_name(name) == "train" or not for_training) for name, found in images.items())
    if not any(images.values()) or (not trained and sources.has_tables(path)):
        return None
    names = sources.by_split(folders, str(path), for_training=for_training)
    splits = {split: images[name] for split, name in names.items()}
    classes = tuple(
        sorted(splits["train"] if "train" in splits else {name for found in splits.values() for name in found})
    )
    for split, found in splits.items():
        if unknown := sorted(set(found) - set(classes)):
            raise UserError(
                f"`{path / names[split] / unknown[0]}` is a class that `{path / names['train']}` does not have",
                hint="every class needs training images",
            )
        if not found:
            raise UserError(f"`{path / names[split]}` has no folders with images, one per class")
    return Content({split: _split_of_files(found, classes) for split, found in splits.items()}, classes)


def _files_of_classes(folder: Path) -> dict[str, list[Path]]:
    """Map each class, a folder in this one, to its image files at any depth, in order; empty classes left out."""
    found = {}
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        if files := sorted(file for file in sources.files_below(entry) if file.suffix.lower() in IMAGE_SUFFIXES):
            found[entry.name] = files
    return found


def _split_of_files(found: dict[str, list[Path]], classes: tuple[str, ...]) -> Split:
    rows = [(file, label) for label, name in enumerate(classes) for file in found.get(name, [])]
    return Split([label for _, label in rows], lambda: ((f"`{file}`", file) for file, _ in rows))


def _decode_to(folder: Path, source: str, content: Content, image_size: int | None, progress: Progress) -> None:
    """Decode every split and write its arrays and `meta.json` into a folder."""
    size, seen = image_size, _Seen()
    with warnings.catch_warnings():
        _refuse_bombs()
        if size is None:
            split, it = next(iter(content.splits.items()))
            where, first = next(it.encoded(), ("", None))
            if first is None:
                raise UserError(f"the {split} split of `{source}` has no images")
            width, height = _open(first, where).size
            size = width if width == height <= _LARGEST_KEPT_SIZE else _DEFAULT_SIZE
        if not _write_splits(folder, source, content, size, seen, progress, guessed=image_size is None):
            size = _DEFAULT_SIZE
            _write_splits(folder, source, content, size, seen, progress, guessed=False)
    notes = [*content.notes, *_size_notes(seen.sizes, size)]
    if seen.modes & {"L", "1", "LA", "I", "I;16"}:
        notes.append("grey images given three equal channels")
    meta = {
        "format": _FORMAT,
        "source": source,
        "classes": content.classes,
        "notes": notes,
        "shapes": {split: [len(it.labels), size, size, 3] for split, it in content.splits.items()},
    }
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _write_splits(
    folder: Path, source: str, content: Content, size: int, seen: _Seen, progress: Progress, *, guessed: bool
) -> bool:
    """Decode all images to squares of one size; False as soon as a size that was guessed is not that of all images.

    The array is written as a stream and not through a map: a full disk is then an error and not a dead process.
    """
    for split, it in content.splits.items():
        total, done = len(it.labels), 0
        if not total:
            raise UserError(f"the {split} split of `{source}` has no images")
        with (folder / f"{split}.images.npy").open("wb", buffering=1 << 20) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (total, size, size, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            for where, encoded in it.encoded():
                decoded = _open(encoded, where, seen)
                if guessed and size != _DEFAULT_SIZE and decoded.size != (size, size):
                    return False
                file.write(_square(decoded, size).tobytes())
                done += 1
                if done % 100 == 0 or done == total:
                    progress(f"decoding {split} images", done, total)
        np.save(folder / f"{split}.labels.npy", np.array(it.labels, dtype=np.int64))
    return True


def _size_notes(sizes: set[tuple[int, int]], size: int) -> list[str]:
    if sizes <= {(size, size)}:
        return []
    smallest, *others = (f"{width}x{height}" for width, height in sorted(sizes, key=lambda it: it[0] * it[1]))
    extent = f"{smallest} to {others[-1]}" if others else smallest
    cropped = any(width != height for width, height in sizes)
    return [f"images of {extent} resized {'and cropped ' if cropped else ''}to {size}x{size}"]


def _refuse_bombs() -> None:
    """Make an error of Pillow's warning of images beyond 89 million pixels (it only refuses twice that)."""
    import PIL.Image

    warnings.simplefilter("ignore")
    warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)


def _open(encoded: Encoded, where: str, seen: _Seen | None = None) -> "PIL.Image.Image":
    """Decode an image to RGB, upright as its EXIF data say; raise UserError saying where a bad one is."""
    import PIL.Image
    import PIL.ImageOps

    if isinstance(encoded, np.ndarray):
        image = PIL.Image.fromarray(encoded)
        if seen is not None:
            seen.sizes.add(image.size)
        return image
    if not isinstance(encoded, bytes) and not os.path.isfile(encoded):
        raise UserError(f"{where} is not a file: {encoded}")
    try:
        with PIL.Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=_FORMATS) as image:
            image.load()
            if seen is not None:
                seen.sizes.add(image.size)
                seen.modes.add(image.mode)
            PIL.ImageOps.exif_transpose(image, in_place=True)
            return _colour(image)
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning, MemoryError) as error:
        raise UserError(f"{where} has too many pixels to be read", hint="scale it down first") from error
    # For damaged files Pillow's readers raise whatever comes.
    except Exception as error:
        reason = "" if isinstance(error, PIL.UnidentifiedImageError) else f": {error}"
        hint = "what can be read are PNG, JPEG, JPEG 2000, GIF, WebP, TIFF, BMP and PPM images"
        raise UserError(f"{where} is not an image that can be read{reason}", hint) from error


def _colour(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """Convert any mode to RGB: 16 bits to 8 by their upper half, transparent parts laid on white.

    32 bits (mode `I`) may hold either: they count as 16 where a value needs more than 8.
    """
    import PIL.Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        if image.mode != "I" or grey.max() > 255:
            grey >>= 8
        return PIL.Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _square(image: "PIL.Image.Image", size: int) -> "PIL.Image.Image":
    """Scale an image to fill a square and crop it to its centre; bicubic, averaging where it shrinks."""
    import PIL.Image
    import PIL.ImageOps

    if image.size == (size, size):
        return image
    return PIL.ImageOps.fit(image, (size, size), method=PIL.Image.Resampling.BICUBIC)


def _open_cache(folder: Path, for_training: bool) -> Images | None:
    """Map what was kept of a source; None where it is missing or not whole, or is `for_training` and has not that."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        splits = {}
        for split, shape in meta["shapes"].items():
            file = folder / f"{split}.images.npy"
            images = np.load(file, mmap_mode="r", allow_pickle=False)
            labels = np.load(folder / f"{split}.labels.npy", allow_pickle=False)
            if (
                images.shape != tuple(shape)
                or images.dtype != np.uint8
                or file.stat().st_size != images.offset + images.nbytes
                or labels.shape != (len(images),)
                or labels.dtype != np.int64
                or not 0 <= labels.min() <= labels.max() < len(meta["classes"])
            ):
                return None
            splits[split] = ImageSet(images, labels)
        if not ("train" in splits if for_training else splits):
            return None
        return Images(splits, tuple(meta["classes"]), tuple(meta["notes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None
