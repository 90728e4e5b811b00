"""Files that take a place when they are whole: before that, and where anything goes wrong, it is what it was."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from running import ENVIRONMENT

from dl7cli import files


def test_the_place_is_taken_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"before")
    with files.replacing(tmp_path / "file") as file:
        file.write(b"after")
        file.flush()
        assert (tmp_path / "file").read_bytes() == b"before"
    assert (tmp_path / "file").read_bytes() == b"after"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("mistake", [ValueError, OSError, KeyboardInterrupt])
def test_what_goes_wrong_inside_leaves_nothing(mistake: type[BaseException], tmp_path: Path) -> None:
    def half(path: Path) -> None:
        with files.replacing(path) as file:
            file.write(b"half")
            raise mistake

    (tmp_path / "file").write_bytes(b"before")
    for name in ("file", "new"):
        with pytest.raises(mistake):
            half(tmp_path / name)
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    for content in (b"one", b"two"):
        with files.replacing(tmp_path / "link") as file:
            file.write(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_bytes() == content


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    with files.replacing(tmp_path / "pipe") as file:
        file.write(b"through")
    reader.join()
    assert read == [b"through"]
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("append", [True, False])
@pytest.mark.parametrize("place", ["/dev/stdout", "/dev/fd/1"])
def test_what_standard_output_has_stays(place: str, append: bool, tmp_path: Path) -> None:
    """Also what is written after it by others; a file would lose the one, and both where it takes its place."""
    (tmp_path / "log").write_text("before\n")
    code = f"""
import os
from pathlib import Path
from dl7cli import files
os.write(1, b"first\\n")
with files.replacing(Path({place!r})) as file:
    file.write(b"inside\\n")
os.write(1, b"last\\n")
"""
    with (tmp_path / "log").open("ab" if append else "wb") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True, env=ENVIRONMENT)
    assert (tmp_path / "log").read_text() == "before\n" * append + "first\ninside\nlast\n"
    assert os.listdir(tmp_path) == ["log"]


def test_a_link_that_leads_to_itself_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with files.replacing(tmp_path / "loop") as file:
        file.write(b"content")
    assert (tmp_path / "loop").read_bytes() == b"content"


def test_an_open_pipe_is_written_to_by_its_number() -> None:
    reading, writing = os.pipe()
    with files.replacing(Path(f"/dev/fd/{writing}")) as file:
        file.write(b"through")
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"through"


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_the_same_may_read_it_as_before(mode: int, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "file").chmod(mode)
    with files.replacing(tmp_path / "file") as file:
        file.write(b"secret")
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}, "at no moment may others"
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode
