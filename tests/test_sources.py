"""Where data come from: names, splits, the cache, and the hub: here a closed port or a tiny server."""

import errno
import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow.parquet
import pytest

from dl7cli.data import growth, sources
from dl7cli.data.pairs import read_pairs
from dl7cli.errors import UserError

CLOSED = "http://127.0.0.1:9"
NO_SOCKETS = """
import socket
def refuse(*_, **__): raise SystemExit("a connection was opened")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
"""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DL7_CACHE", str(folder))
    return folder


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A server that answers as the hub does where a data set does not exist; and what was asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def write_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    rows = {"en": ["one", "two"], "de": ["eins", "zwei"]}
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DL7_CACHE", str(tmp_path / "a"))
    assert sources.cache_folder() == tmp_path / "a"
    monkeypatch.delenv("DL7_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert sources.cache_folder() == tmp_path / "b" / "dl7"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.cache_folder() == tmp_path / ".cache" / "dl7"


@pytest.mark.parametrize(
    ("source", "local"),
    [
        ("uoft-cs/cifar10", False),
        ("wmt/wmt14:de-en", False),
        ("cifar10", False),
        ("builtin:shapes", False),
        ("./cifar10", True),
        ("/data/cifar10", True),
        ("~/cifar10", True),
        ("a/b/c", True),
        ("pairs.tsv", True),
        ("my data", True),
        ("", True),
    ],
)
def test_a_source_is_told_to_be_a_path(
    source: str, local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sources.is_local(source) is local


def test_a_folder_that_exists_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "uoft-cs" / "cifar10").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert sources.is_local("uoft-cs/cifar10")
    assert sources.is_local("uoft-cs/cifar10:plain_text")
    assert sources.cache_name("uoft-cs/cifar10") != sources.cache_name("uoft-cs/cifar10:plain_text")


def test_splits_are_known_by_their_usual_names() -> None:
    found = sources.by_split(["extra", "test", "dev", "Train"], "here")
    assert found == {"train": "Train", "validation": "dev", "test": "test"}
    with pytest.raises(UserError, match="`here` has both `val` and `dev` for its validation split"):
        sources.by_split(["train", "val", "dev"], "here")
    with pytest.raises(UserError, match="`here` has no train split: there is `test`, `unsupervised`"):
        sources.by_split(["test", "unsupervised"], "here")


def test_the_fingerprint_follows_names_sizes_and_times(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "x"
    file.write_text("1")
    os.utime(file, ns=(0, 10**9))
    marks = [sources.fingerprint(tmp_path)]
    os.utime(file, ns=(0, 2 * 10**9))
    marks.append(sources.fingerprint(tmp_path))
    file.rename(tmp_path / "a" / "y")
    marks.append(sources.fingerprint(tmp_path))
    (tmp_path / "a" / "y").write_text("22")
    os.utime(tmp_path / "a" / "y", ns=(0, 2 * 10**9))
    marks.append(sources.fingerprint(tmp_path))
    assert len(set(marks)) == 4
    assert sources.fingerprint(tmp_path) == marks[-1]


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / ".#lock").symlink_to("user@host.1:2")
    sources.fingerprint(tmp_path)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"`.*gone` cannot be read: No such file"):
        sources.fingerprint(tmp_path)


def test_links_in_a_circle_are_followed_once_and_hidden_folders_not(tmp_path: Path) -> None:
    (tmp_path / "a" / ".git").mkdir(parents=True)
    (tmp_path / "a" / ".git" / "index").write_text("x")
    (tmp_path / "a" / "file").write_text("x")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert list(sources.files_below(tmp_path)) == [tmp_path / "a" / "file"]


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, scandir = tmp_path / "closed", os.scandir
    closed.mkdir()

    def refuse(path: str) -> object:
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"`.*closed` cannot be read: Permission denied"):
        sources.fingerprint(tmp_path)


def test_a_folder_of_parquet_is_loaded_and_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bars = datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    folder = write_folder(tmp_path / "set")
    capfd.readouterr()  # the bar of to_parquet
    loaded = sources.load_splits(str(folder))
    assert list(loaded) == ["train", "validation"]
    assert loaded["train"][1] == {"en": "two", "de": "zwei"}
    assert capfd.readouterr() == ("", "")
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == (bars, verbosity)


@pytest.mark.parametrize("source", ["folder", "somebody/words"])
def test_it_is_told_how_much_has_been_loaded(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `datasets` and the hub's client write while they load, be it a file that is not complete."""
    heard: list[tuple[str, int, int]] = []
    hub = tmp_path / "hub"
    own = datasets.load_dataset(str(write_folder(tmp_path / "set")), cache_dir=str(tmp_path / "own"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(sources, "_reachable", lambda _: True)
    monkeypatch.setattr(growth, "TOLD_SECONDS", 0.01)

    def load_dataset(path: str, **arguments: object) -> object:
        folder = hub / "datasets--somebody--words" if source == "somebody/words" else Path(str(arguments["cache_dir"]))
        (folder / "blobs").mkdir(parents=True)
        for number, told in enumerate((1, 4)):
            (folder / "blobs" / f"{number}.incomplete").write_bytes(bytes((told - number) * 10**6))
            deadline = time.monotonic() + 60
            while heard[-1][1] < told and time.monotonic() < deadline:
                time.sleep(0.01)
        return own

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    name = str(tmp_path / "set") if source == "folder" else source
    sources.load_splits(name, progress=lambda *said: heard.append(said))
    assert {what for what, _, _ in heard} == {f"loading {name}, megabytes"}
    assert heard[0][1:] == (0, 0)
    assert heard[-1][1:] == (1, 1)
    steps = [done for _, done, total in heard if not total]
    assert steps == sorted(steps)
    assert set(steps) >= {0, 4}
    count = len(heard)
    time.sleep(0.05)
    assert len(heard) == count, "nothing is told of what is over"


def test_a_readme_names_the_files_of_the_splits_and_a_colon_chooses_a_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.jsonl").write_text(f'{{"en": "{name}"}}\n')
    config = "- config_name: {0}\n  data_files:\n  - split: train\n    path: {0}.jsonl\n"
    (folder / "README.md").write_text("---\nconfigs:\n" + config.format("one") + config.format("two") + "---\n")
    assert sources.load_splits(f"{folder}:two")["train"][0] == {"en": "two"}
    with pytest.raises(UserError, match="has several configurations: there is `one`, `two`") as caught:
        sources.load_splits(str(folder))
    assert caught.value.hint == f"choose one after a colon: `{folder}:NAME`"
    with pytest.raises(UserError, match="has no configuration `three`: there is `one`, `two`"):
        sources.load_splits(f"{folder}:three")


def test_paths_that_hold_nothing_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file or folder `.*absent`"):
        sources.load_splits(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the folder `.*empty` is empty"):
        sources.load_splits(str(tmp_path / "empty"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.doc").write_text("x")
    with pytest.raises(UserError, match=r"has no train split: there is `notes\.doc`"):
        sources.load_splits(str(tmp_path / "other"))
    with pytest.raises(UserError, match="`builtin:nothing` is generated"):
        sources.load_splits("builtin:nothing")


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set")
    (folder / "validation-00000-of-00001.parquet").write_bytes(b"PAR1 and then nothing that it should be")
    with pytest.raises(UserError, match=r"validation-00000-of-00001\.parquet` cannot be read"):
        sources.load_splits(str(folder))


@pytest.mark.parametrize(
    ("name", "content", "damage"),
    [
        ("test.csv", b"", "it is empty"),
        ("test.csv", b"en,de\na,b\nc,\xe4\n", r"line 3 is not UTF-8 \(byte 0xe4\)"),
        ("test.csv", b"en,de\na,b\nc,d,e\n", "Error tokenizing data.* line 3"),
        ("test.jsonl", b'{"en": "a"}\n{"en":\n', "line 2 is not JSON: Expecting value"),
    ],
)
def test_a_damaged_text_table_is_named_with_line(tmp_path: Path, name: str, content: bytes, damage: str) -> None:
    good = {"test.csv": "en,de\na,b\n", "test.jsonl": '{"en": "a"}\n'}[name]
    (tmp_path / name.replace("test", "train")).write_text(good)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"`.*{name}` cannot be read: {damage}"):
        sources.load_splits(str(tmp_path))


@pytest.mark.parametrize("source", ["local", "some/where"])
@pytest.mark.parametrize("name", ["datasets", "huggingface_hub"])
def test_a_package_that_is_missing_is_named(
    name: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "train.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "_reachable", lambda _: True)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"the package `{name}`, which tables and the hub need") as caught:
        sources.load_splits(f"./{source}" if source == "local" else source)
    assert "`pip install datasets huggingface-hub`" in (caught.value.hint or "")


def test_a_table_without_rows_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set")
    file = folder / "validation-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(file).slice(0, 0), file)
    with pytest.raises(UserError, match=r"validation-00000-of-00001\.parquet` cannot be read: it has no rows"):
        sources.load_splits(str(folder))


def test_where_no_file_is_known_to_be_bad_all_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("en,de\na,b\n")
    (tmp_path / "test.csv").write_text("en,fr\na,b\n")
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        sources.load_splits(str(tmp_path))
    assert caught.value.hint == f"look into `{tmp_path / 'test.csv'}`, `{tmp_path / 'train.csv'}`"


@pytest.mark.parametrize(("name", "fence"), [("README.md", "---\n"), (".huggingface.yaml", "")])
def test_a_local_folder_may_not_name_data_elsewhere(tmp_path: Path, name: str, fence: str) -> None:
    (tmp_path / "train.csv").write_text("en,de\na,b\n")
    (tmp_path / name).write_text(f"{fence}homepage: https://hub.invalid\n{fence}")
    assert len(sources.load_splits(str(tmp_path))["train"]) == 1
    config = f"configs:\n- config_name: x\n  data_files: {CLOSED}/train.csv\n"
    (tmp_path / name).write_text(f"{fence}{config}{fence}")
    with pytest.raises(UserError, match=f"`.*{name}` names data that are not on this machine"):
        sources.load_splits(str(tmp_path))


def test_what_is_local_or_built_in_is_available_without_a_network(tmp_path: Path) -> None:
    assert sources.available("builtin:shapes", offline=False)
    assert not sources.available("builtin:nothing", offline=False)
    assert sources.available(str(tmp_path), offline=False)
    assert not sources.available(str(tmp_path / "absent"), offline=False)


def test_a_hub_that_answers_is_available_and_one_that_does_not_is_not(
    hub: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, asked = hub
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert sources.available("owner/name:part", offline=False)
    assert asked == ["/api/datasets/owner/name"]
    assert not sources.available("owner/name", offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not sources.available("owner/name", offline=False)
    assert len(asked) == 1
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    assert not sources.available("owner/name", offline=False)


def test_a_look_up_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(sources, "REACH_SECONDS", 0.6)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: released.wait(60) and [])
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    started = time.monotonic()
    assert not sources.available("owner/name", offline=False)
    assert time.monotonic() - started < 30
    released.set()


@pytest.mark.parametrize(
    ("offline", "reason"),
    [(False, "the hub at .* cannot be reached"), (True, "it was not kept from the hub, which may not be asked")],
)
def test_a_hub_out_of_reach_is_said_without_retries(
    offline: bool, reason: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    with pytest.raises(UserError, match=f"`owner/name` is no file or folder here, and {reason}") as it:
        sources.load_splits("owner/name", offline=offline)
    assert "--data FOLDER" in (it.value.hint or "")
    assert "builtin:shapes" in (it.value.hint or "")
    assert ("HF_ENDPOINT" in (it.value.hint or "")) != offline
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("says", "error", "advice"),
    [
        (
            "Dataset scripts are no longer supported, but found name.py",
            RuntimeError,
            "it is a program, and none is run",
        ),
        (
            "peer closed connection",
            type("RemoteProtocolError", (Exception,), {"__module__": "httpx"}),
            "try again: what has come so far is kept; or give the",
        ),
        ("timed out", TimeoutError, "try again: what has come so far is kept; or give the data"),
        ("Couldn't cast", ValueError, "give the data with"),
        ("No space left on device", lambda says: OSError(errno.ENOSPC, says), "make room, or set `HF_HOME`"),
    ],
)
def test_what_the_hub_cannot_give_is_said_with_what_to_do(
    says: str,
    error: Callable[[str], Exception],
    advice: str,
    hub: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error(f"{says}\nmore")

    monkeypatch.setenv("HF_ENDPOINT", hub[0])
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=f"^`owner/name` cannot be loaded: .*{says}") as it:
        sources.load_splits("owner/name")
    assert (it.value.hint or "").startswith(advice)


def test_a_data_set_that_the_hub_does_not_have_is_said(hub: tuple[str, list[str]]) -> None:
    code = """
from dl7cli.data.sources import load_splits
from dl7cli.errors import UserError
try: load_splits("owner/name")
except UserError as error: print(error)
"""
    done = run(code, HF_ENDPOINT=hub[0])
    assert done.stdout == "the hub has no data set `owner/name` that is open to you\n"
    assert done.stderr == ""


def test_local_data_open_no_connection(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set")
    code = f"from dl7cli.data.sources import load_splits\nprint(len(load_splits({str(folder)!r})['train']))"
    done = run(NO_SOCKETS + code)
    assert (done.stdout, done.stderr, done.returncode) == ("2\n", "", 0)


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": CLOSED}])
def test_what_the_hub_gave_before_is_read_without_it(tmp_path: Path, environment: dict[str, str]) -> None:
    """A folder prepared by `datasets` is renamed to what it would be for a hub id: then nothing is fetched."""
    kept = tmp_path / "hf"
    datasets.load_dataset(str(write_folder(tmp_path / "name")), cache_dir=str(kept))
    (kept / "name").rename(kept / "owner___name")
    code = """
from dl7cli.data.pairs import read_pairs
from dl7cli.data.sources import available
print(available("owner/name", offline=False))
pairs = read_pairs("owner/name", source_language="de", target_language="en")
print(pairs.splits)
"""
    guard = NO_SOCKETS if "HF_HUB_OFFLINE" in environment else ""
    cache = {"HF_DATASETS_CACHE": str(kept), "DL7_CACHE": str(tmp_path / "dl7")}
    done = run(guard + code, **cache, **environment)
    pairs = [("eins", "one"), ("zwei", "two")]
    assert (done.stdout, done.stderr) == (f"True\n{ {'train': pairs, 'validation': pairs} }\n", "")

    # From now on it is in this program's own cache, and datasets is not needed any more.
    again = run(
        NO_SOCKETS + code + "import sys; assert 'datasets' not in sys.modules",
        **{**cache, "HF_DATASETS_CACHE": str(tmp_path / "nowhere")},
        **environment,
    )
    assert (again.stdout, again.stderr) == (done.stdout, "")

    # A damaged copy is not trusted, and here there is nothing to make it anew from.
    (file,) = (tmp_path / "dl7" / "pairs").glob("*/train.jsonl")
    file.write_text('{"de": "eins", "en": "one"}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DL7_CACHE", str(tmp_path / "dl7"))
        with pytest.raises(UserError, match="may not be asked"):
            read_pairs("owner/name", source_language="de", target_language="en", offline=True)


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(UserError, match=r"the cache folder `.*` cannot be written"),
        sources.working_folder(tmp_path / "file" / "below"),
    ):
        pass


def test_errors_in_the_working_folder_blame_what_they_concern(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`.*absent` cannot be read"), sources.working_folder(cache):
        (tmp_path / "absent").read_bytes()
    with (
        pytest.raises(UserError, match=r"the cache folder `.*` cannot be written"),
        sources.working_folder(cache) as it,
    ):
        (it / "absent" / "file").write_bytes(b"")
    with pytest.raises(UserError, match="No space left"), sources.working_folder(cache):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ConnectionResetError), sources.working_folder(cache):
        raise ConnectionResetError
    assert list(cache.iterdir()) == []


def test_a_working_folder_of_another_process_may_go_while_looked_at(cache: Path) -> None:
    (cache / ".new-gone").symlink_to(cache / "nowhere")
    with sources.working_folder(cache) as working:
        assert working.is_dir()
