"""What trains, evaluates and uses models on local data opens no connection, and with --offline nothing does."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from running import ENVIRONMENT

from dl7cli.runs import Run

WITHOUT_SOCKETS = """
import socket, sys
def refuse(*_, **__):
    print("a connection was opened", file=sys.__stderr__, flush=True)  # in whatever thread
    raise OSError("no connections here")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
from dl7cli.cli import main
sys.argv = ["dl7", *sys.argv[1:]]
main()
"""
ON_CPU = ("--device", "cpu", "--precision", "fp32")


@pytest.fixture(scope="module")
def runs(tiny: dict[str, Path], whole: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with copies of one run of each kind, and a picture."""
    folder = tmp_path_factory.mktemp("offline")
    for kind in ("resnet", "seq2seq"):
        shutil.copytree(whole(kind, "training.epochs=1").folder, folder / kind)
    shutil.copy(next((tiny["resnet"].parent / "images" / "test").rglob("*.png")), folder / "one.png")
    (folder / "table.csv").mkdir()
    (folder / "table.csv" / "train.csv").write_text("en,de\na,b\n")  # which `datasets` reads
    return folder


def without_sockets(*arguments: str, runs: Path, at: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**ENVIRONMENT, "DL7_CACHE": str(at / "cache"), "HF_HOME": str(at / "hub")}
    command = [sys.executable, "-c", WITHOUT_SOCKETS, *arguments]
    return subprocess.run(command, cwd=runs, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("train", "RESNET", "--set", "training.epochs=1", "--out", "again", *ON_CPU), 0),
        (("eval", "resnet", *ON_CPU), 0),
        (("eval", "seq2seq", *ON_CPU), 0),
        (("translate", "--run", "seq2seq", *ON_CPU, "1 2 3"), 0),
        (("classify", "--run", "resnet", *ON_CPU, "one.png"), 0),
        (("data", "info", "table.csv", "--task", "translation"), 0),
        (("doctor", "--offline"), 0),
        (("data", "list"), 0),
        (("data", "get", "owner/name", "--offline"), 1),
    ],
)
def test_no_connection_is_opened(
    command: tuple[str, ...], code: int, runs: Path, tiny: dict[str, Path], tmp_path: Path
) -> None:
    done = without_sockets(
        *(str(tiny["resnet"]) if one == "RESNET" else one for one in command), runs=runs, at=tmp_path
    )
    assert "a connection was opened" not in done.stderr
    assert done.returncode == code, done.stderr


def test_a_connection_would_be_seen(runs: Path, tmp_path: Path) -> None:
    done = without_sockets("data", "get", "owner/name", runs=runs, at=tmp_path)
    assert done.returncode == 1
    assert "a connection was opened" in done.stderr
