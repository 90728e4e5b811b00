"""CIFAR in the binary files of its authors: what is read, and what is said of files that are not whole."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
from running import dl7, succeed

from dl7cli.data.images import read_images
from dl7cli.errors import UserError

BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
LAYOUTS = {
    "cifar-10-batches-bin": ([f"{name}.bin" for name in BATCHES], "test_batch.bin", "batches.meta.txt", 10),
    "cifar-100-binary": (["train.bin"], "test.bin", "fine_label_names.txt", 100),
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DL7_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(folder: Path, layout: str) -> tuple[list[tuple[npt.NDArray[np.uint8], int]], ...]:
    """Write a few images to each file, byte by byte as the authors describe it; what they are, for each split."""
    train, test, names, classes = LAYOUTS[layout]
    folder.mkdir()
    random = np.random.default_rng(0)
    written: dict[bool, list[Any]] = {False: [], True: []}
    for name in (*train, test):
        data = bytearray()
        for _ in range(3):
            image, label = random.integers(0, 256, (32, 32, 3), dtype=np.uint8), int(random.integers(classes))
            if classes == 100:
                data.append(int(random.integers(20)))
            data.append(label)
            for colour in range(3):
                for row in range(32):
                    data.extend(image[row, column, colour] for column in range(32))
            written[name == test].append((image, label))
        (folder / name).write_bytes(data)
    (folder / names).write_text("".join(f"class {number}\n" for number in range(classes)) + "\n")
    (folder / "readme.html").write_text("<html>")
    return written[False], written[True]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_images_and_their_classes_are_those_written(layout: str, tmp_path: Path) -> None:
    train, test = write(tmp_path / layout, layout)
    found = read_images(str(tmp_path / layout))
    assert found.classes == tuple(f"class {number}" for number in range(LAYOUTS[layout][3]))
    assert list(found.splits) == ["train", "test"]
    for split, expected in (("train", train), ("test", test)):
        assert found.splits[split].labels.tolist() == [label for _, label in expected]
        assert np.array_equal(found.splits[split].images, [image for image, _ in expected])
    assert found.notes == ()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_such_a_folder_is_known_for_what_it_is(layout: str, tmp_path: Path) -> None:
    write(tmp_path / layout, layout)
    about = succeed("data", "info", layout, "--json", cwd=tmp_path).document
    train, _, _, classes = LAYOUTS[layout]
    assert (about["task"], about["image"], len(about["classes"])) == ("classification", "32x32x3", classes)
    assert about["splits"] == {"train": 3 * len(train), "test": 3}


def test_files_that_are_not_whole_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    write(folder, folder.name)
    third, whole = folder / "data_batch_3.bin", (folder / "data_batch_3.bin").read_bytes()
    for content, message in (
        (whole[:-1], r"`.*data_batch_3\.bin` is damaged: 9,218 bytes are not images of 3,073 bytes each"),
        (b"", r"`.*data_batch_3\.bin` is damaged: 0 bytes"),
        (bytes([10]) + whole[1:], r"`.*data_batch_3\.bin` is damaged: it has label 10, and there are 10 classes"),
    ):
        third.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_images(str(folder))
    third.unlink()
    with pytest.raises(UserError, match=r"there is no file `.*data_batch_3\.bin`, which is a part of CIFAR"):
        read_images(str(folder))


def test_a_names_file_that_is_not_whole_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    write(folder, folder.name)
    (folder / "batches.meta.txt").write_text("airplane\n")
    with pytest.raises(UserError, match=r"`.*batches\.meta\.txt` is damaged: it names 1 classes of 10"):
        read_images(str(folder))


def test_images_beside_such_files_are_read_as_images(tmp_path: Path) -> None:
    for name in (*BATCHES, "test_batch", "batches.meta", "batches.meta.txt", "data_batch_1.bin"):
        (tmp_path / name).write_bytes(b"x")
    for label in ("cat", "dog"):
        (tmp_path / "train" / label).mkdir(parents=True)
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / "train" / label / "1.png")
    assert read_images(str(tmp_path)).classes == ("cat", "dog")


def test_a_file_that_may_not_be_read_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-100-binary"
    write(folder, folder.name)

    def memmap(path: Path, **more: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(np, "memmap", memmap)
    failed = dl7("data", "info", folder.name, cwd=tmp_path)
    assert failed.code == 1
    assert failed.err.startswith(f"error: `{folder.name}/train.bin`")
    assert "Permission denied" in failed.err


def test_columns_are_of_tables(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    write(folder, folder.name)
    with pytest.raises(UserError, match="has images and no columns"):
        read_images(str(folder), label="coarse_label")


@pytest.mark.parametrize("names", [(*BATCHES, "test_batch", "batches.meta"), ("train", "test", "meta")])
def test_pickles_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "python"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"\x80\x02}q\x01.")
    for command in (("train", "resnet", "--data", "python"), ("data", "info", "python", "--task", "classification")):
        failed = dl7(*command, cwd=tmp_path)
        assert failed.code == 1
        assert "holds CIFAR as Python pickles" in failed.err
        assert "cifar-10-batches-bin" in failed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["python"]


def test_the_real_images_are_the_same_in_either_layout(real_data: Any, tmp_path: Path) -> None:
    whole = read_images(str(real_data("cifar10")))
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("\n".join(whole.classes))
    parts = {f"{name}.bin": ("train", number * 10_000) for number, name in enumerate(BATCHES)}
    for name, (split, begin) in {**parts, "test_batch.bin": ("test", 0)}.items():
        images, labels = whole.splits[split].images, whole.splits[split].labels
        pixels = np.asarray(images[begin : begin + 10_000]).transpose(0, 3, 1, 2).reshape(10_000, 3072)
        np.concatenate([labels[begin : begin + 10_000, None].astype(np.uint8), pixels], axis=1).tofile(folder / name)
    again = read_images(str(folder))
    assert again.classes == whole.classes
    for split in ("train", "test"):
        assert np.array_equal(again.splits[split].images, whole.splits[split].images)
        assert np.array_equal(again.splits[split].labels, whole.splits[split].labels)
