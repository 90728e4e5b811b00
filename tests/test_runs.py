"""Run folders: numbering, locks and look-ups with real processes and real files."""

import fcntl
import json
import os
import signal
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import pytest
from running import files_no_longer_than, start_python

from dl7cli import runs
from dl7cli.errors import UserError
from dl7cli.recipe import resolve
from dl7cli.runs import Run

RESNET = resolve("resnet").recipe
SEQ2SEQ = resolve("seq2seq").recipe

pytestmark = pytest.mark.usefixtures("work")


def checkpoint(folder: Path, when: int) -> Path:
    """What a look-up sees of a checkpoint, written at second `when`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint.json").write_text("{}")
    os.utime(folder / "checkpoint.json", (when, when))
    return folder


def answer(process: Popen[str]) -> str:
    """The next line a process prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


# Making


def test_runs_are_numbered_and_hold_their_recipe() -> None:
    first = runs.create(RESNET, "resnet", None)
    second = runs.create(RESNET, "resnet", None)
    other = runs.create(SEQ2SEQ, "seq2seq", None)
    assert [run.folder for run in (first, second, other)] == [
        *(Path("runs/resnet-1"), Path("runs/resnet-2"), Path("runs/seq2seq-1"))
    ]
    assert resolve(str(second.recipe_file)).recipe == RESNET
    assert runs.read_recipe(other) == SEQ2SEQ


def test_a_number_is_never_used_again_and_gaps_are_left() -> None:
    for name in ("resnet-2", "resnet-9", "resnet-20-31", "resnet-x", "resnet-", "other-40"):
        Path("runs", name).mkdir(parents=True)
    Path("runs/resnet-11").write_text("a file")
    assert runs.create(RESNET, "resnet", None).name == "resnet-12"
    assert runs.create(RESNET, "resnet-20", None).name == "resnet-20-32"


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("../../x", "x-1"),
        ("a/b c", "a-b-c-1"),
        ("…", "run-1"),
        ("", "run-1"),
        ("ein.größeres", "ein.größeres-1"),
    ],
)
def test_a_name_is_never_a_path(name: str, folder: str) -> None:
    assert runs.create(RESNET, name, None).folder == Path("runs") / folder


def together(code: str) -> tuple[list[str], list[str]]:
    """What two processes print that are let go at the same moment."""
    start_line = """
        import sys
        from pathlib import Path
        from dl7cli import runs
        from dl7cli.errors import UserError
        from dl7cli.recipe import resolve
        recipe = resolve("resnet").recipe
        print("ready", flush=True)
        sys.stdin.readline()
    """
    code = textwrap.dedent(start_line) + textwrap.dedent(code)
    with start_python(code) as first, start_python(code) as second:
        assert answer(first) == answer(second) == "ready"
        for process in (first, second):
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        printed = first.communicate()[0].split(), second.communicate()[0].split()
    assert first.returncode == second.returncode == 0
    return printed


def test_processes_that_start_together_get_runs_of_their_own() -> None:
    code = """
        for _ in range(40):
            print(runs.create(recipe, "resnet", None).name)
    """
    first, second = together(code)
    assert sorted(first + second) == sorted(f"resnet-{number}" for number in range(1, 81))
    assert all(Path("runs", f"resnet-{number}", "recipe.toml").stat().st_size for number in range(1, 81))


def test_of_processes_that_start_together_one_gets_the_folder() -> None:
    code = """
        for number in range(300):
            try:
                print(runs.create(recipe, "resnet", Path(f"out-{number}")).name)
            except UserError as error:
                assert "is not empty" in error.message
    """
    first, second = together(code)
    assert sorted(first + second) == sorted(f"out-{number}" for number in range(300))


def test_out_is_made_with_its_parents() -> None:
    run = runs.create(SEQ2SEQ, "seq2seq", Path("deep/er/one"))
    assert run.folder == Path("deep/er/one")
    assert run.recipe_file.is_file()
    Path("empty").mkdir()
    assert runs.create(SEQ2SEQ, "seq2seq", Path("empty")).recipe_file.is_file()
    assert not Path("runs").exists()


def test_out_that_holds_anything_is_refused() -> None:
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="`mine` is not empty") as caught:
        runs.create(RESNET, "resnet", Path("mine"))
    assert "--resume" not in str(caught.value.hint)
    assert os.listdir("mine") == ["thesis.tex"]
    run = runs.create(RESNET, "resnet", Path("run"))
    checkpoint(run.last, 1)
    with pytest.raises(UserError, match="`run` is not empty") as caught:
        runs.create(RESNET, "resnet", Path("run"))
    assert "dl7 train --resume run" in str(caught.value.hint)
    Path("file").write_text("")
    with pytest.raises(UserError, match="`file` is a file"):
        runs.create(RESNET, "resnet", Path("file"))


@pytest.mark.parametrize("out", [None, Path("runs/deeper")])
def test_a_place_that_cannot_be_written_is_named(out: Path | None) -> None:
    Path("runs").write_text("a file")
    with pytest.raises(UserError, match="cannot write `runs") as caught:
        runs.create(RESNET, "resnet", out)
    assert caught.value.hint


def test_a_full_disk_leaves_nothing_half_written() -> None:
    with files_no_longer_than(10), pytest.raises(UserError, match="cannot write"):
        runs.create(RESNET, "resnet", None)
    assert os.listdir("runs") == []
    run = runs.create(RESNET, "resnet", None)
    runs.append_metrics(run, {"step": 1})
    runs.append_metrics(run, {"step": 2})
    runs.write_result(run, {"split": "test"})
    before = sorted(os.listdir(run.folder))
    with files_no_longer_than(30):
        for write in (
            lambda: runs.append_metrics(run, {"step": 3, "loss": 0.123456789}),
            lambda: runs.write_result(run, {"split": "test", "seconds": 1000.125}),
            lambda: runs.write_environment(run, {}),
        ):
            with pytest.raises(UserError, match="cannot write `runs/resnet-1/"):
                write()
    assert sorted(os.listdir(run.folder)) == before
    assert json.loads((run.folder / "result.json").read_text()) == {"split": "test"}
    assert runs.metrics(run) == [{"step": 1}, {"step": 2}]
    runs.append_metrics(run, {"step": 3})
    assert runs.metrics(run) == [{"step": 1}, {"step": 2}, {"step": 3}]


# The lock

TRAINER = """
    import sys
    from pathlib import Path
    from dl7cli import runs
    with runs.lock(runs.Run(Path(sys.argv[1]))):
        print("locked", flush=True)
        sys.stdin.readline()
"""


@contextmanager
def trainer(run: Run) -> Iterator[Popen[str]]:
    """Another process that holds the lock of a run."""
    with start_python(TRAINER, str(run.folder)) as process:
        assert answer(process) == "locked"
        yield process
        process.kill()


def test_a_second_trainer_is_refused_until_the_first_is_gone() -> None:
    run = runs.create(RESNET, "resnet", None)
    with trainer(run) as process:
        taken = f"`runs/resnet-1` is being trained by process {process.pid}$"
        with pytest.raises(UserError, match=taken), runs.lock(run):
            pytest.fail("two at once")
        with runs.lock(runs.create(RESNET, "resnet", None)):  # another run is free
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with runs.lock(run) as killed:
            assert killed == process.pid
            assert (run.folder / "lock").read_text() == f"{os.getpid()}\n"
        with runs.lock(run) as killed:
            assert killed is None, "it was let go"


def test_the_lock_is_free_after_use_and_after_an_error() -> None:
    run = runs.create(RESNET, "resnet", None)
    with pytest.raises(ZeroDivisionError), runs.lock(run):
        raise ZeroDivisionError
    with runs.lock(run):
        pass
    with trainer(run):
        pass


def test_a_worker_that_outlives_its_trainer_keeps_no_lock() -> None:
    run = runs.create(RESNET, "resnet", None)
    code = """
        import os, sys, time
        from pathlib import Path
        from dl7cli import runs
        with runs.lock(runs.Run(Path(sys.argv[1]))):
            worker = os.fork()
            if worker == 0:
                os.close(1)
                time.sleep(60)
                os._exit(0)
        print(worker)
    """
    with start_python(code, str(run.folder)) as process:
        worker = int(process.communicate()[0])
    try:
        with runs.lock(run):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_look_at_the_lock_does_not_keep_a_trainer_from_it() -> None:
    run = runs.create(RESNET, "resnet", None)
    with (run.folder / "lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as `listing` does, but not for as short
        look = threading.Timer(0.1, fcntl.flock, (file, fcntl.LOCK_UN))
        look.start()
        with runs.lock(run):
            look.join()


def test_a_run_that_cannot_be_locked_is_named() -> None:
    with (
        pytest.raises(UserError, match="cannot write `nowhere/lock`: no such file"),
        runs.lock(Run(Path("nowhere"))),
    ):
        pass


# Looking up


def test_no_name_means_the_newest_checkpoint_that_fits() -> None:
    for number, (recipe, when) in enumerate([(RESNET, 300), (SEQ2SEQ, 200), (SEQ2SEQ, 100), (RESNET, 250)]):
        run = runs.create(recipe, f"r{number}", None)
        checkpoint(run.best, when - 50)
        checkpoint(run.last, when)
    runs.create(SEQ2SEQ, "unfinished", None)
    Path("runs/notes").mkdir()
    Path("runs/file").write_text("")
    assert runs.find(None) == (Run(Path("runs/r0-1")), Path("runs/r0-1/best"))
    assert runs.find(None, task="classification")[0].name == "r0-1"
    assert runs.find(None, task="translation")[0].name == "r1-1"
    os.utime("runs/r2-1/best/checkpoint.json", (500, 500))  # now the newest is not a `last`
    assert runs.find(None, task="translation")[0].name == "r2-1"
    assert runs.find(None)[0].name == "r2-1"


def test_the_run_trained_last_is_the_newest_though_the_clock_was_set_back() -> None:
    first, second = runs.create(RESNET, "resnet", None), runs.create(SEQ2SEQ, "seq2seq", None)
    year = time.time() + 365 * 86400
    for run in (first, second):
        os.utime(run.recipe_file, (year, year))
    checkpoint(first.best, int(year))
    third = runs.create(RESNET, "a", None)
    assert [summary.name for summary in runs.listing()][-1] == third.name
    for run in (second, third, first, second):
        checkpoint(run.best, 1)
        checkpoint(run.last, int(time.time()))
        runs.mark_newest(run)
        assert runs.find(None)[0] == run


def test_a_run_means_its_best_checkpoint_or_else_its_last() -> None:
    run = runs.create(RESNET, "resnet", None)
    with pytest.raises(UserError, match="`runs/resnet-1` has no checkpoint yet"):
        runs.find("resnet-1")
    checkpoint(run.last, 1)
    assert runs.find("resnet-1") == (run, run.last)
    checkpoint(run.best, 1)
    for name in ("resnet-1", "runs/resnet-1", "runs/resnet-1/", "./runs/resnet-1"):
        assert runs.find(name) == (run, run.best)
    for name in ("resnet-1/last", "runs/resnet-1/last", "./runs/resnet-1/last/"):
        assert runs.find(name) == (run, run.last)
    assert runs.find(str(run.last.absolute())) == (Run(run.folder.absolute()), run.last.absolute())


def test_a_checkpoint_that_was_being_swapped_counts() -> None:
    run = runs.create(RESNET, "resnet", None)
    checkpoint(run.folder / "best.old", 7)
    assert runs.find(None) == (run, run.best)
    assert runs.find("resnet-1") == (run, run.best)
    assert runs.find("runs/resnet-1/best") == (run, run.best)


def test_runs_can_be_named_from_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.create(RESNET, "resnet", Path("elsewhere"))
    checkpoint(run.last, 1)
    folder = run.folder.absolute()
    monkeypatch.chdir(folder)
    assert runs.find(".") == (Run(Path()), Path("last"))
    assert runs.find(".")[0].name == "elsewhere"
    assert runs.find("last") == (Run(Path()), Path("last"))
    monkeypatch.chdir("last")
    assert runs.find(".") == (Run(folder), Path())
    assert runs.find("..")[0].folder == Path("..")


def test_a_folder_here_comes_before_a_run_of_that_name() -> None:
    checkpoint(runs.create(RESNET, "resnet", None).last, 1)
    run = runs.create(RESNET, "resnet", Path("resnet-1"))
    checkpoint(run.last, 1)
    assert runs.find("resnet-1") == (run, run.last)


def test_a_checkpoint_copied_out_of_its_run_is_a_run_by_itself() -> None:
    folder = checkpoint(Path("models/mine"), 1)
    assert runs.find("models/mine") == (Run(folder), folder)
    assert runs.find("models/mine", task="translation") == (Run(folder), folder)


def test_a_run_for_another_task_is_refused() -> None:
    checkpoint(runs.create(RESNET, "resnet", None).last, 1)
    with pytest.raises(UserError, match="`runs/resnet-1` is for classification, not for translation") as caught:
        runs.find("resnet-1", task="translation")
    assert "`dl7 train seq2seq`" in str(caught.value.hint)
    assert runs.find("resnet-1", task="classification")[1].name == "last"


@pytest.mark.parametrize(
    ("task", "what", "command"),
    [
        (None, "no run with", "dl7 train resnet"),
        ("classification", "no classification run", "dl7 train resnet"),
        ("translation", "no translation run", "dl7 train seq2seq"),
    ],
)
@pytest.mark.parametrize("there", ["nothing", "file", "empty", "unfinished", "damaged"])
def test_nothing_to_find_says_what_to_train(task: str | None, what: str, command: str, there: str) -> None:
    match there:
        case "file":
            Path("runs").write_text("")
        case "empty":
            Path("runs").mkdir()
        case "unfinished":
            runs.create(RESNET, "resnet", None)
            runs.create(SEQ2SEQ, "seq2seq", None)
        case "damaged":
            runs.create(RESNET, "resnet", None).recipe_file.write_bytes(b"\xff[model")
    with pytest.raises(UserError, match=what) as caught:
        runs.find(None, task=task)
    assert f"`{command}`" in str(caught.value.hint)


def test_a_name_that_is_nearly_right_is_suggested() -> None:
    runs.create(RESNET, "resnet", None)
    with pytest.raises(UserError, match=r"no run `runs/resent-1` \(did you mean `resnet-1`\?\)"):
        runs.find("runs/resent-1")
    with pytest.raises(UserError, match=r"no run `quite different`$"):
        runs.find("quite different")
    Path("folder").mkdir()
    with pytest.raises(UserError, match="`folder` is neither a run nor a checkpoint"):
        runs.find("folder")


# The list


def test_the_list_says_how_far_every_run_has_come() -> None:
    assert runs.listing() == []
    made = [runs.create(recipe, recipe.name, None) for recipe in (RESNET, RESNET, SEQ2SEQ, SEQ2SEQ)]
    for when, run in enumerate(made):
        os.utime(run.recipe_file, (100 - when, 100 - when))
    finished, interrupted, training, _ = made
    for epoch, accuracy in enumerate([0.5, 0.75, 0.625], start=1):
        runs.append_metrics(finished, {"step": 10 * epoch, "epoch": epoch - 1, "loss": 1.0})
        scores = {"loss": 9.0, "accuracy": accuracy}
        runs.append_metrics(finished, {"step": 10 * epoch, "epoch": epoch, "primary": "accuracy", "scores": scores})
    result = {"split": "test", "primary": "accuracy", "scores": {"accuracy": 0.7}}
    runs.write_result(finished, result)
    runs.append_evaluation(finished, {"split": "validation"})
    runs.append_evaluation(finished, {"split": "test", "beam": 5})
    checkpoint(finished.last, 1)
    checkpoint(interrupted.last, 1)
    runs.append_metrics(interrupted, {"step": 3, "epoch": 0, "loss": 2.0})
    interrupted.recipe_file.write_text("damaged", encoding="utf-8")
    os.utime(interrupted.recipe_file, (99, 99))
    with trainer(training):
        summaries = {summary.name: summary for summary in runs.listing()}
    assert list(summaries) == ["seq2seq-2", "seq2seq-1", "resnet-2", "resnet-1"]
    states = {name: summary.state for name, summary in summaries.items()}
    assert states == {
        "resnet-1": "finished",
        "resnet-2": "interrupted",
        "seq2seq-1": "training",
        "seq2seq-2": "empty",
    }
    first = summaries["resnet-1"]
    assert (first.recipe, first.task, first.data) == ("resnet", "classification", "uoft-cs/cifar10")
    assert (first.epochs, first.primary, first.best, first.test) == (3, "accuracy", 0.75, 0.7)
    assert first.evaluation is not None
    assert first.evaluation["beam"] == 5
    second = summaries["resnet-2"]
    assert (second.recipe, second.task, second.data) == (None, None, None)
    assert (second.epochs, second.best, second.test, second.evaluation) == (0, None, None, None)
    assert [summary.state for summary in runs.listing() if summary.name == "seq2seq-1"] == ["empty"]


def test_looking_up_runs_needs_no_torch() -> None:
    code = "import sys, dl7cli.runs; print({'torch', 'datasets', 'numpy'} & set(sys.modules))"
    with start_python(code) as process:
        assert answer(process) == "set()"
