"""Checkpoints survive kills and full disks: each fault is a real one, made on real files."""

import errno
import os
import shlex
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import FILES, assert_same, example
from running import files_no_longer_than

from dl7cli import checkpoint
from dl7cli.checkpoint import Checkpoint
from dl7cli.errors import UserError

# In which other processes find dl7 and what this file has.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).resolve().parents[:2]))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "last", example())
    return tmp_path / "last"


# Kills

KILLED = """
import os, signal, stat, sys
from pathlib import Path
from dl7cli import checkpoint
from checkpoints import assert_same, example

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
        from checkpoints import example
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
        from checkpoints import assert_same, example
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
    mount = "mount -t tmpfs -o size=128k none disk || exit 99; exec " + shlex.join([sys.executable, str(script)])
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


@pytest.fixture
def another() -> Checkpoint:
    """Made before who makes it is changed: that one may not enter every folder that the tests lie in."""
    return example(2)


def test_a_folder_that_may_not_be_written_is_named(folder: Path, another: Checkpoint, ordinary_user: None) -> None:
    with pytest.raises(UserError, match="cannot write checkpoint `last`: permission denied") as caught:
        checkpoint.save(Path("last"), another)
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


def test_a_link_is_replaced_and_what_it_leads_to_is_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    folder.rename(tmp_path / "disk" / "last")
    folder.symlink_to(tmp_path / "disk" / "last")
    for _ in range(3):
        checkpoint.save(folder, example())
        assert not folder.is_symlink()
    assert_same(checkpoint.load(tmp_path / "disk" / "last", training=True), example())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "last"]
    folder.rename(tmp_path / "last.old")
    for _ in range(2):  # once with a whole checkpoint beside it
        shutil.rmtree(folder, ignore_errors=True)
        folder.symlink_to(tmp_path / "nowhere")
        checkpoint.save(folder, example())
        assert_same(checkpoint.load(folder, training=True), example())
    # As a version that left it there did.
    (tmp_path / "last.old").symlink_to(tmp_path / "disk" / "last")
    checkpoint.save(folder, example())
    assert_same(checkpoint.load(tmp_path / "disk" / "last", training=True), example())


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
