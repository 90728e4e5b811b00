"""Checkpoints survive damage, kills and full disks: each fault is a real one, made on real files."""

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dl7cli import checkpoint
from dl7cli.checkpoint import Checkpoint, Progress
from dl7cli.errors import UserError
from dl7cli.recipe import resolve

# In which other processes find dl7 and what this file has.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).resolve().parents[:2]))}
FILES = ("checkpoint.json", "model.safetensors", "training.safetensors")


def example(fill: int = 1) -> Checkpoint:
    """A small checkpoint that `fill` tells from others in every part."""
    generator = torch.Generator().manual_seed(fill)
    return Checkpoint(
        recipe=resolve("resnet").recipe,
        assets={"classes": ["Käfer", "ship"], "mean": [0.5, fill], "nested": {"none": None, "yes": True}},
        weights={"weight": torch.full((3, 4), float(fill)), "bias": torch.rand(5, generator=generator)},
        training={"momentum": torch.full((7,), float(-fill)), "random": generator.get_state()},
        progress=Progress(epoch=2, batch=fill, step=70, seconds=1.5, best=0.25, best_epoch=1),
        scores={"accuracy": fill / 1000},
    )


def assert_same(actual: Checkpoint, expected: Checkpoint) -> None:
    assert actual.recipe == expected.recipe
    assert (actual.assets, actual.scores) == (expected.assets, expected.scores)
    assert actual.progress == expected.progress
    for ours, theirs in ((actual.weights, expected.weights), (actual.training, expected.training)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            assert torch.equal(ours[name], theirs[name]), name


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


@pytest.mark.parametrize("name", FILES)
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


# Kills

KILLED = """
import os, signal, stat, sys
from pathlib import Path
from dl7cli import checkpoint
from test_checkpoint import assert_same, example

# Python announces each of these before it happens: together, every change that `save` makes to the disk but
# the writes, which are cut short below.
EVENTS = {{"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree"}}


def die_at(call):
    left = call
    def count():
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    def fsync(descriptor):
        status = os.fstat(descriptor)
        if left == 0 and stat.S_ISREG(status.st_mode):
            os.ftruncate(descriptor, status.st_size // 2)  # not synced yet: a power cut may take it
        count()
        sync(descriptor)
    os.fsync = fsync
    sys.addaudithook(lambda event, _: count() if event in EVENTS else None)


def survives(folder, call):
    "Save in a process that is killed at its call-th change; True where it made fewer."
    child = os.fork()
    if child == 0:
        die_at(call)
        checkpoint.save(folder, example(2))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status == 0


sync = os.fsync
os.fsync = lambda descriptor: None  # takes most of the time, and matters only where a process is killed
work = Path({work!r})
for scene in ("first", "again", "only old", "after a kill"):
    call, seen, done = 0, set(), False
    while not done:
        folder = work / scene.replace(" ", "-") / str(call) / "last"
        folder.parent.mkdir(parents=True)
        if scene != "first":
            checkpoint.save(folder, example(1))
        if scene == "only old":
            folder.rename(folder.with_name("last.old"))
        if scene == "after a kill":
            checkpoint.save(folder.with_name("last.new"), example(9))
            checkpoint.save(folder.with_name("last.old"), example(9))
            (folder.with_name("last.old") / "model.safetensors").unlink()
        done = survives(folder, call)
        try:
            loaded = checkpoint.load(folder, training=True)
        except checkpoint.UserError as error:
            assert scene == "first", (call, error.message)
            assert "there is no checkpoint" in error.message
            seen.add("none")
        else:
            which = loaded.progress.batch
            assert_same(loaded, example(which))
            assert which in (1, 2), which
            seen.add(which)
        if done:
            assert which == 2
        checkpoint.save(folder, example(3))  # and the next save finds its way
        assert_same(checkpoint.load(folder, training=True), example(3))
        assert os.listdir(folder.parent) == ["last"], os.listdir(folder.parent)
        call += 1
    print(scene, call, *sorted(map(str, seen)), sep=",")
"""


def test_a_kill_at_any_moment_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED.format(work=str(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    lines = [line.split(",") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["first", "again", "only old", "after a kill"]
    assert [line[2:] for line in lines] == [["2", "none"], ["1", "2"], ["1", "2"], ["1", "2"]]
    assert all(int(line[1]) > 10 for line in lines)  # so many moments were tried


def test_loading_while_another_process_saves_gives_one_whole_checkpoint(folder: Path) -> None:
    code = f"""
        from pathlib import Path
        from dl7cli import checkpoint
        from test_checkpoint import example
        print("ready", flush=True)
        for number in range(2, 80):
            checkpoint.save(Path({str(folder)!r}), example(number))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT)
    seen = set()
    try:
        assert writer.stdout is not None
        writer.stdout.readline()
        while writer.poll() is None:
            loaded = checkpoint.load(folder, training=True)
            assert_same(loaded, example(loaded.progress.batch))
            seen.add(loaded.progress.batch)
    finally:
        writer.kill()
        writer.wait()
        if writer.stdout is not None:
            writer.stdout.close()
    assert writer.returncode == 0
    assert len(seen) > 3


# Disks


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """Writes over this size come up short, as on a full disk: Python ignores SIGXFSZ."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_cut_short_at_any_size_keeps_the_previous_one(folder: Path) -> None:
    largest = max((folder / name).stat().st_size for name in FILES)
    for size in range(0, largest, 97):
        too_large = r"cannot write checkpoint .*: file too large"
        with files_no_longer_than(size), pytest.raises(UserError, match=too_large) as caught:
            checkpoint.save(folder, example(2))
        assert "MB are free" in str(caught.value.hint)
        assert os.listdir(folder.parent) == ["last"]
        assert_same(checkpoint.load(folder, training=True), example(1))
    checkpoint.save(folder, example(2))
    assert_same(checkpoint.load(folder, training=True), example(2))


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    code = """
        import os
        from pathlib import Path
        from dl7cli import checkpoint
        from test_checkpoint import assert_same, example
        folder = Path("disk/last").absolute()
        checkpoint.save(folder, example(1))
        tried = 0
        while True:
            try:
                with open(f"disk/{tried}", "wb", buffering=0) as file:
                    file.write(bytes(4096))
            except OSError:
                break
            tried += 1
        for _ in range(tried):
            try:
                checkpoint.save(folder, example(2))
            except checkpoint.UserError as error:
                assert error.message == f"cannot write checkpoint `{folder}`: no space left on device"
                assert "MB are free" in error.hint, error.hint
                assert not folder.with_name("last.new").exists()
                assert_same(checkpoint.load(folder, training=True), example(1))
                tried -= 1
                os.unlink(f"disk/{tried}")
            else:
                break
        assert_same(checkpoint.load(folder, training=True), example(2))
        print("freed until it fitted")
    """
    (tmp_path / "disk").mkdir()
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    mount = "mount -t tmpfs -o size=128k none disk || exit 99; exec " + f"{sys.executable} {script}"
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs `unshare` for a disk of its own")
    command = [unshare, "--map-root-user", "--mount", "sh", "-c", mount]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False, env=ENVIRONMENT
    )
    if done.returncode == 99 or "unshare failed" in done.stderr:
        pytest.skip("this machine lends no process a disk of its own")
    assert done.stdout == "freed until it fitted\n", done.stderr


@pytest.fixture
def ordinary_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run as a user whom permissions bind, in a folder that everyone may read and nobody may write."""
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o555)
    if os.geteuid() != 0:
        yield
    else:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
    tmp_path.chmod(0o755)


def test_a_folder_that_may_not_be_written_is_named(folder: Path, ordinary_user: None) -> None:
    with pytest.raises(UserError, match="cannot write checkpoint `last`: permission denied") as caught:
        checkpoint.save(Path("last"), example(2))
    assert "may write" in str(caught.value.hint)
    assert_same(checkpoint.load(Path("last"), training=True), example(1))


def test_a_file_that_may_not_be_read_is_named(folder: Path, ordinary_user: None) -> None:
    if os.getuid() == 0:
        os.seteuid(0)
    (folder / "model.safetensors").chmod(0)
    if os.getuid() == 0:
        os.seteuid(65534)
    with pytest.raises(UserError, match=r"`last/model\.safetensors` cannot be read: permission denied"):
        checkpoint.load(Path("last"))


def test_a_file_in_the_place_of_the_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"cannot write checkpoint `.*run/last`: not a directory"):
        checkpoint.save(tmp_path / "run" / "last", example())


@pytest.mark.parametrize("scene", ["first", "again"])
def test_everything_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scene: str
) -> None:
    folder = tmp_path / "last"
    if scene == "again":
        checkpoint.save(folder, example(1))
    events: list[tuple[str, int | str]] = []
    sync, rename, remove = os.fsync, Path.rename, shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("sync", os.fstat(fd).st_ino)), sync(fd)))
    monkeypatch.setattr(Path, "rename", lambda a, b: (events.append(("rename", a.name)), rename(a, b)))
    monkeypatch.setattr(shutil, "rmtree", lambda p, **_: (events.append(("remove", p.name)), remove(p, True)))
    checkpoint.save(folder, example(2))
    first_rename = next(index for index, (what, _) in enumerate(events) if what == "rename")
    before = {number for what, number in events[:first_rename] if what == "sync"}
    assert before >= {folder.stat().st_ino, *(path.stat().st_ino for path in folder.iterdir())}
    swapped = events.index(("rename", "last.new"))
    assert events[swapped + 1 :] == [("sync", tmp_path.stat().st_ino), ("remove", "last.old")]


def test_a_disk_that_syncs_no_folders_is_good_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.save(tmp_path / "last", example())
    assert_same(checkpoint.load(tmp_path / "last", training=True), example())


def test_a_checkpoint_can_be_named_from_inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert_same(checkpoint.load(Path(), training=True), example())


def test_what_cannot_be_removed_is_no_checkpoint_any_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.rmtree

    def rmtree(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    checkpoint.remove(folder)
    with pytest.raises(UserError, match="is not a checkpoint"):
        checkpoint.load(folder)
    monkeypatch.setattr(shutil, "rmtree", real)
    checkpoint.remove(folder)
    assert not folder.exists()
