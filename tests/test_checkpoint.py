"""Checkpoints come back bit by bit, and damage of any kind is refused by name."""

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FILES, assert_same, example

from dl7cli import checkpoint
from dl7cli.checkpoint import Checkpoint, Progress
from dl7cli.errors import UserError
from dl7cli.recipe import resolve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "last", example())
    return tmp_path / "last"


def test_what_is_saved_comes_back(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert_same(checkpoint.load(folder, training=True), example())
    assert [path.name for path in folder.parent.iterdir()] == ["last"]


@pytest.mark.parametrize("name", ["resnet", "seq2seq"])
def test_every_shipped_kind_of_recipe_comes_back(tmp_path: Path, name: str) -> None:
    recipe = resolve(name, ["training.label_smoothing=0.3"]).recipe
    checkpoint.save(tmp_path / "c", Checkpoint(recipe, {}, {}, {}, Progress(), {}))
    assert_same(checkpoint.load(tmp_path / "c"), Checkpoint(recipe, {}, {}, {}, Progress(), {}))


def test_training_tensors_are_read_on_request_only(folder: Path) -> None:
    (folder / "training.safetensors").unlink()
    assert checkpoint.load(folder).training == {}
    with pytest.raises(UserError, match=r"training\.safetensors` is missing"):
        checkpoint.load(folder, training=True)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    ],
    ids=str,
)
def test_every_dtype_and_shape_keeps_its_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    numbers = torch.randint(0, 2, (4, 6), generator=torch.Generator().manual_seed(3)).to(dtype)
    tensors = {
        "matrix": numbers,
        "scalar": numbers[1, 2].clone(),
        "empty": numbers[:0],
        "also empty": numbers[:0],
        "transposed": numbers.T,
        "every other": numbers[:, ::2],
        "expanded": numbers[0, :1].expand(9),
        "channels last": numbers.reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        "slice": numbers[1:3],
    }
    expected = {name: tensor.tolist() for name, tensor in tensors.items()}
    wanted = Checkpoint(resolve("resnet").recipe, {}, tensors, {}, Progress(), {})
    checkpoint.save(tmp_path / "c", wanted)
    weights = checkpoint.load(tmp_path / "c").weights
    assert {name: tensor.tolist() for name, tensor in weights.items()} == expected
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert all(weights[name].shape == tensor.shape for name, tensor in tensors.items())


def test_nan_infinity_and_negative_zero_keep_their_bits(tmp_path: Path) -> None:
    values = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    wanted = Checkpoint(resolve("resnet").recipe, {}, {"v": values}, {}, Progress(), {})
    checkpoint.save(tmp_path / "c", wanted)
    loaded = checkpoint.load(tmp_path / "c").weights["v"]
    assert torch.equal(loaded.view(torch.int32), values.view(torch.int32))


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False))
    module[1].weight = module[0].weight
    weights = dict(module.state_dict())
    checkpoint.save(tmp_path / "c", Checkpoint(resolve("resnet").recipe, {}, weights, {}, Progress(), {}))
    assert (tmp_path / "c" / "model.safetensors").stat().st_size < 1.5 * 64 * 64 * 4
    loaded = checkpoint.load(tmp_path / "c").weights
    assert loaded["0.weight"].data_ptr() == loaded["1.weight"].data_ptr()
    assert torch.equal(loaded["1.weight"], module[0].weight)


def test_slices_that_share_a_storage_are_not_taken_for_tied(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    weights = {"first": flat[:6], "second": flat[6:], "all": flat, "as matrix": flat.view(3, 4)}
    checkpoint.save(tmp_path / "c", Checkpoint(resolve("resnet").recipe, {}, weights, {}, Progress(), {}))
    loaded = checkpoint.load(tmp_path / "c").weights
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_what_is_saved_is_not_changed_by_what_comes_after(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    wanted = Checkpoint(resolve("resnet").recipe, {}, {"w": weight}, {}, Progress(), {})
    checkpoint.save(tmp_path / "c", wanted)
    loaded = checkpoint.load(tmp_path / "c").weights["w"]
    loaded.add_(1)  # in memory of its own, and not a leaf that wants a gradient
    assert weight.tolist() == [1, 1, 1]
    assert not loaded.requires_grad
    assert checkpoint.load(tmp_path / "c").weights["w"].tolist() == [1, 1, 1]


def test_a_number_that_json_cannot_hold_leaves_the_previous_checkpoint(folder: Path) -> None:
    wanted = Checkpoint(example().recipe, {}, {}, {}, Progress(), {"accuracy": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.save(folder, wanted)
    assert_same(checkpoint.load(folder, training=True), example())


# Damage


def refused(folder: Path, file: Path) -> str:
    """The message of the UserError that loading gives, which must name the file."""
    with pytest.raises(UserError) as caught:
        checkpoint.load(folder, training=True)
    assert str(file) in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value.message


def test_the_index_cut_at_any_byte_is_refused(folder: Path) -> None:
    path = folder / "checkpoint.json"
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(folder, path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_or_with_more_at_its_end_is_refused(folder: Path, name: str) -> None:
    path = folder / name
    content = path.read_bytes()
    chance = random.Random(5)
    lengths = {0, 1, 7, 8, 9, len(content) - 1, *(chance.randrange(len(content)) for _ in range(200))}
    for length in lengths:
        path.write_bytes(content[:length])
        refused(folder, path)
    for more in (b"\0", b"\n", b" ", content):
        path.write_bytes(content + more)
        refused(folder, path)
        path.write_bytes(more + content)
        refused(folder, path)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_flipped_bit_anywhere_is_refused(folder: Path, name: str) -> None:
    path = folder / name
    content = path.read_bytes()
    chance = random.Random(6)
    for position in chance.sample(range(len(content)), min(400, len(content))):
        damaged = bytearray(content)
        damaged[position] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        refused(folder, path)
    path.write_bytes(content)
    assert_same(checkpoint.load(folder, training=True), example())


def test_a_flipped_bit_in_every_byte_of_the_index_is_refused(folder: Path) -> None:
    """So in every key, value, digest, bracket and blank of it."""
    path = folder / "checkpoint.json"
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        refused(folder, path)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_flipped_bit_in_every_part_of_a_tensor_file_is_refused(folder: Path, name: str) -> None:
    """Every byte of the header and of its length, and the first, middle and last byte of every tensor."""
    path = folder / name
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    places = [tensor["data_offsets"] for tensor in json.loads(content[8:begin]).values()]
    assert max(end for _, end in places) == len(content) - begin
    data = {begin + at for first, end in places for at in (first, (first + end) // 2, end - 1)}
    for position in (*range(begin), *data):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        refused(folder, path)


@pytest.mark.parametrize("name", FILES)
def test_blocks_of_zeros_as_a_power_cut_leaves_them_are_refused(folder: Path, name: str) -> None:
    path = folder / name
    content = path.read_bytes()
    for start in range(0, len(content), max(1, len(content) // 50)):
        damaged = content[:start] + bytes(len(content) - start)
        if damaged != content:  # random states end with zeros
            path.write_bytes(damaged)
            refused(folder, path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    checkpoint.save(tmp_path / "other", example(2))
    shutil.copy(tmp_path / "other" / name, folder / name)
    # With the index of the other one, it is the first of the other files that does not fit.
    refused(folder, folder / ("model.safetensors" if name == "checkpoint.json" else name))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"missing|has no `{name}`") as caught:
        checkpoint.load(folder, training=True)
    assert name in caught.value.message
    assert str(folder) in caught.value.message


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_the_place_of_a_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    assert "cannot be read" in refused(folder, folder / name)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not whole JSON"),
        (b"{", "not whole JSON"),
        (b"\xff\xfe\x00", "not whole JSON"),
        (b"PK\x03\x04" + bytes(200), "not whole JSON"),
        (b"[" * 200_000, "not whole JSON"),
        (b"9" * 10_000, "not whole JSON"),
        (b"[]", "not written by dl7"),
        (b"null", "not written by dl7"),
        (b"{}", "not written by dl7"),
        (b'{"format": 1}', "not written by dl7"),
        (b'{"dl7": "1", "format": "1"}', "not written by dl7"),
        (b'{"dl7": "1", "format": true}', "not written by dl7"),
        (b'{"dl7": "1", "format": 0}', "not written by dl7"),
        (b'{"dl7": "1", "format": 1}', "does not match its digest"),
        (b'{"dl7": "1", "format": 1, "scores": NaN}', "does not match its digest"),
        (b'{"dl7": "1", "format": 1, "scores": 1e999}', "does not match its digest"),
        (b'{"dl7": "1", "format": 1, "x": ' + b"[" * 900 + b"]" * 900 + b"}", "does not match its digest"),
        (b'{"_name_or_path": "gpt2", "architectures": ["GPT2LMHeadModel"]}', "not written by dl7"),
    ],
)
def test_a_foreign_index_is_refused(folder: Path, content: bytes, reason: str) -> None:
    (folder / "checkpoint.json").write_bytes(content)
    assert reason in refused(folder, folder / "checkpoint.json")


def test_the_same_values_written_another_way_are_refused(folder: Path) -> None:
    path = folder / "checkpoint.json"
    document = json.loads(path.read_bytes())
    for content in (
        json.dumps(document),
        json.dumps(document, indent=1, ensure_ascii=False) + "\n",
        json.dumps(document, indent=1, sort_keys=True) + "\n",
        path.read_text().replace('"format": 1,', '"format": 1,\n "format": 1,'),
    ):
        path.write_text(content, encoding="utf-8")
        assert "does not match its digest" in refused(folder, path)


def test_a_newer_format_says_what_to_do(folder: Path) -> None:
    path = folder / "checkpoint.json"
    path.write_text(json.dumps({"dl7": "9.0", "format": 2, "layout": "all new"}))
    with pytest.raises(UserError) as caught:
        checkpoint.load(folder)
    expected = f"`{path}` was made by a newer dl7 (format 2, this one reads up to 1)"
    assert caught.value.message == expected
    assert "upgrade" in str(caught.value.hint)


@pytest.mark.parametrize("place", ["nothing here", "file", "folder"])
def test_what_is_no_checkpoint_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("weights")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"{place}`") as caught:
        checkpoint.load(tmp_path / place)
    assert caught.value.hint


def sign(document: dict[str, Any]) -> bytes:
    """An index with a right digest, written from the description of the format."""
    document.pop("sha256", None)
    digest = hashlib.sha256(json.dumps(document, indent=1).encode()).hexdigest()
    return (json.dumps({**document, "sha256": digest}, indent=1) + "\n").encode()


def test_the_digests_are_those_of_the_files(folder: Path) -> None:
    content = (folder / "checkpoint.json").read_bytes()
    document = json.loads(content)
    assert sign(dict(document)) == content
    for name in FILES[1:]:
        whole = (folder / name).read_bytes()
        assert document["files"][name]["sha256"] == hashlib.sha256(whole).hexdigest()
        assert document["files"][name]["size"] == len(whole)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scores": {"accuracy": "high"}}, "`scores.accuracy` is wrong"),
        ({"scores": None}, "`scores` is wrong"),
        ({"progress": {"epoch": 1.5}}, "`progress.epoch` is wrong"),
        ({"files": {}}, "names no file `model.safetensors`"),
        ({"files": []}, "`files` is wrong"),
        ({"assets": 3}, "`assets` is wrong"),
        ({"surprise": 3}, "`surprise` is wrong"),
        ({"recipe": {}}, "`model.kind` is missing"),
        ({"recipe": {"model": {"kind": "transformer"}}}, "the recipe in"),
    ],
)
def test_an_index_with_wrong_values_and_a_right_digest_is_refused(
    folder: Path, change: dict[str, Any], reason: str
) -> None:
    path = folder / "checkpoint.json"
    path.write_bytes(sign(json.loads(path.read_bytes()) | change))
    with pytest.raises(UserError) as caught:
        checkpoint.load(folder)
    assert str(path) in caught.value.message
    assert reason in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x" * 50,
        (8).to_bytes(8, "little") + b"{}      ",
        (2**60).to_bytes(8, "little") + b"{}",
        b"\x40" + bytes(7) + b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}'.ljust(64) + bytes(4),
        b"\x40" + bytes(7) + b'{"w":{"dtype":"F7","shape":[1],"data_offsets":[0,4]}}'.ljust(64) + bytes(4),
        b"\x40" + bytes(7) + b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(64) + bytes(4),
    ],
)
def test_a_tensor_file_with_a_right_digest_that_is_none_is_refused(folder: Path, content: bytes) -> None:
    index = folder / "checkpoint.json"
    document = json.loads(index.read_bytes())
    digest = hashlib.sha256(content).hexdigest()
    aliases = {"tied": "weight"}  # to a tensor that is not there
    document["files"]["model.safetensors"] = {"size": len(content), "sha256": digest, "aliases": aliases}
    index.write_bytes(sign(document))
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, folder / "model.safetensors")
