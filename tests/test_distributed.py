"""Several workers: the same training as one process, and what becomes of it when one of them fails."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from launching import (
    ALONE,
    LONGER,
    RARELY_SAVED,
    SECONDS,
    WORKERS,
    ended,
    greatest_difference,
    last,
    losses,
    started,
    together,
    wait_for_record,
    wait_for_step,
    workers_of,
)
from running import ENVIRONMENT, dl7, succeed

from dl7cli import runs
from dl7cli.runs import Run

# The same as one process


CHANGES = {
    "resnet": ("--set", "training.batch_norm=sync", "--set", "training.label_smoothing=0.1"),
    "seq2seq": ("--set", "model.dropout=0.0"),
}


@pytest.mark.parametrize("kind", ["resnet", "seq2seq"])
def test_two_workers_train_as_one_process(kind: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    arguments = ("train", str(tiny[kind]), *CHANGES[kind], "--json")
    alone = succeed(*arguments, *ALONE, "--out", "one", cwd=tmp_path).document
    both = together(*arguments, *WORKERS, "--out", "two", cwd=tmp_path)
    shared = json.loads(both.out)
    assert alone["steps"] == shared["steps"] >= 10
    one, two = last(tmp_path / "one"), last(tmp_path / "two")
    assert greatest_difference(one.weights, two.weights) < 1e-5
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
    assert shared["scores"] == pytest.approx(alone["scores"], abs=1e-12)
    assert (shared["examples"], shared["best_epoch"]) == (alone["examples"], alone["best_epoch"])
    assert runs.environment(Run(tmp_path / "two"))["workers"] == 2
    assert both.err.count("epoch 1") == 1


def test_two_workers_evaluate_as_one_process(tmp_path: Path) -> None:
    """The same trained weights on 1,024 images and their mirror images: of each worker more than one batch."""
    small = ("--set", "model.depth=8", "--set", "training.epochs=1", "--set", "training.compile=never")
    arguments = ("train", "resnet", "--data", "builtin:shapes", *small, *ALONE, "--json", "--out", "run")
    alone = succeed(*arguments, cwd=tmp_path).document
    (tmp_path / "run" / "result.json").unlink()  # so that its evaluation is what is left to do
    both = json.loads(together("train", "--resume", "run", *WORKERS, "--json", cwd=tmp_path).out)
    assert both["examples"] == alone["examples"] == 1024
    assert both["scores"] == pytest.approx(alone["scores"], rel=1e-6)
    readings = runs.evaluations(Run(tmp_path / "run"))
    assert [record["scores"] for record in readings] == [alone["scores"], both["scores"]]


# Faults


SPOILT = """
    import os

    if os.environ.get("RANK") == "1":
        from dl7cli.errors import UserError
        from dl7cli.training import session

        def fit(task, trainer, *, start, fit=session.fit):
            {before}
            for report in fit(task, trainer, start=start):
                {after}
                yield report

        session.fit = fit
"""


def spoilt(folder: Path, before: str = "pass", after: str = "pass") -> dict[str, str]:
    """The environment in which worker 1 does something else before it trains, or after each step."""
    (folder / "sitecustomize.py").write_text(textwrap.dedent(SPOILT).format(before=before, after=after))
    return {"PYTHONPATH": os.pathsep.join((str(folder), ENVIRONMENT["PYTHONPATH"]))}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "told"),
    [
        ("UserError('the fifth step is too much', hint='rest')", "error: the fifth step is too much\nhint: rest\n"),
        ("ZeroDivisionError('by nothing')", "ZeroDivisionError: by nothing\n"),
    ],
)
def test_a_worker_that_fails_is_told_of_before_what_that_does_to_the_others(
    problem: str, told: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    after = f"if report.progress.step == 5: raise {problem}"
    arguments = ("train", str(tiny["seq2seq"]), *LONGER, *WORKERS, "--out", "run")
    with started(*arguments, cwd=tmp_path, **spoilt(tmp_path, after=after)) as process:
        result = ended(process)
    assert result.code == 1
    assert told + "so ended worker 1" in result.err.replace("\n\n", "\n")
    assert "start again" not in result.err
    assert "lost the others" not in result.err[: result.err.index("so ended worker 1")]
    assert last(tmp_path / "run").progress.step <= 5


@pytest.mark.slow
def test_a_worker_out_of_memory_makes_all_go_on_with_parts_of_the_batch(tiny: dict[str, Path], tmp_path: Path) -> None:
    """A real limit, of one of them."""
    before = (
        "import resource, torch; torch.backends.mkldnn.set_flags(False);"
        " pages = int(open('/proc/self/statm').read().split()[0]); most = pages * 4096 + 60_000_000;"
        " resource.setrlimit(resource.RLIMIT_AS, (most, most))"
    )
    large = ("--set", "training.batch_size=26", "--set", "data.image_size=128", "--set", "training.epochs=1")
    arguments = ("train", str(tiny["resnet"]), *large, "--set", "training.on_oom=halve", *WORKERS, "--out", "run")
    environment = {**spoilt(tmp_path, before), "MALLOC_MMAP_THRESHOLD_": "131072"}
    with started(*arguments, cwd=tmp_path, **environment) as process:
        result = ended(process)
    assert result.code == 0, result.err
    found = last(tmp_path / "run")
    parts = int(found.training["parts"])
    assert parts > 1
    assert f"worker 1 is out of memory: a batch is taken in {parts} parts from now on" in result.err
    assert (found.progress.epoch, found.progress.step) == (1, 1), "the same global batch"
    assert "of 3 times" not in result.err, "the attempts for want of memory are not counted"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resnet", "seq2seq"])
def test_all_workers_and_their_launcher_killed_again_and_again_cost_nothing(
    kind: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    """While they start, and while they train or save."""
    draw = random.Random(kind)
    arguments = ("train", str(tiny[kind]), *LONGER, *WORKERS)
    together(*arguments, "--out", "one", cwd=tmp_path)
    steps = last(tmp_path / "one").progress.step
    with started(*arguments, "--out", "run", cwd=tmp_path) as process:
        wait_for_step(tmp_path / "run", 2, process)
        time.sleep(draw.uniform(0, 0.1))
        for victim in (process.pid, *workers_of(process.pid)):
            os.kill(victim, signal.SIGKILL)
    for kill in range(6):
        with started("train", "--resume", "run", *WORKERS, cwd=tmp_path) as process:
            if kill:
                wait_for_step(tmp_path / "run", steps * kill // 7, process)
            time.sleep(draw.uniform(0, 0.1 if kill else 4))
            for victim in (process.pid, *workers_of(process.pid)):
                os.kill(victim, signal.SIGKILL)
    together("train", "--resume", "run", *WORKERS, cwd=tmp_path)
    assert greatest_difference(last(tmp_path / "run").weights, last(tmp_path / "one").weights) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_killed_at_any_step_costs_nothing(
    victim: int, undisturbed: Path, tiny: dict[str, Path], tmp_path: Path
) -> None:
    step = random.Random(victim).randrange(2, 30)
    arguments = ("train", str(tiny["seq2seq"]), *LONGER, *WORKERS, "--out", "run")
    with started(*arguments, cwd=tmp_path) as process:
        wait_for_step(tmp_path / "run", step, process)
        os.kill(workers_of(process.pid)[victim], signal.SIGKILL)
        result = ended(process)
    assert result.code == 0, result.err
    assert (
        f"worker {victim} was ended by SIGKILL; all start again from the last checkpoint (1 of 3 times)" in result.err
    )
    assert greatest_difference(last(tmp_path / "run").weights, last(undisturbed).weights) == 0
    assert losses(tmp_path / "run") == losses(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resnet", "seq2seq"])
def test_three_workers_train_as_one_though_some_batches_are_too_small_for_them(
    kind: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    """The last batch of an epoch has two images, and pairs of nearly 60 subwords are alone in theirs."""
    smaller = {"resnet": (), "seq2seq": ("--set", "training.batch_tokens=20", "--set", "training.select=loss")}[kind]
    arguments = ("train", str(tiny[kind]), *CHANGES[kind], *smaller, "--set", "training.epochs=2", *ALONE, "--json")
    alone = succeed(*arguments, "--out", "one", cwd=tmp_path).document
    three = together(*arguments, "--workers", "3", "--timeout", "60", "--out", "three", cwd=tmp_path)
    assert json.loads(three.out)["scores"] == pytest.approx(alone["scores"], abs=1e-4)
    assert greatest_difference(last(tmp_path / "one").weights, last(tmp_path / "three").weights) < 1e-5
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "three"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "counts"),
    [("seq2seq", ("2", "1")), ("seq2seq", ("1", "2")), ("resnet", ("2", "1")), ("resnet", ("1", "2"))],
)
def test_a_run_goes_on_with_another_number_of_workers(
    kind: str, counts: tuple[str, str], tiny: dict[str, Path], tmp_path: Path
) -> None:
    # Small steps for the images: in 48 large ones what is rounded otherwise grows.
    slower = {"resnet": ("--set", "optim.learning_rate=0.01"), "seq2seq": ()}[kind]
    arguments = ("train", str(tiny[kind]), *CHANGES[kind], *slower, *LONGER, *ALONE)
    succeed(*arguments, "--out", "one", cwd=tmp_path)
    with started(*arguments, "--workers", counts[0], "--out", "run", cwd=tmp_path) as process:
        wait_for_step(tmp_path / "run", 9, process)
        process.send_signal(signal.SIGTERM)
        stopped = ended(process)
    assert stopped.code == 128 + signal.SIGTERM, stopped.err
    assert "go on with: dl7 train --resume run" in stopped.err
    step = last(tmp_path / "run").progress.step
    resumed = together("train", "--resume", "run", "--workers", counts[1], "--device", "cpu", cwd=tmp_path)
    assert f"after step {step}" in resumed.err
    assert greatest_difference(last(tmp_path / "one").weights, last(tmp_path / "run").weights) < 1e-5
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "run"), abs=1e-5)


@pytest.mark.slow
def test_workers_lose_their_patience_together(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Where the best epoch is lost it is chosen, and waited for, anew: by all, though the first alone looks at it."""
    steady = ("--set", "optim.learning_rate=1e-9", "--set", "training.epochs=20", "--set", "training.patience=2")
    arguments = ("train", str(tiny["seq2seq"]), *steady, *WORKERS, "--out", "run", "--json")
    assert json.loads(together(*arguments, cwd=tmp_path).out)["best_epoch"] == 1
    assert last(tmp_path / "run").progress.epoch == 3
    shutil.rmtree(tmp_path / "run" / "best")
    (tmp_path / "run" / "result.json").unlink()
    resumed = together("train", "--resume", "run", *WORKERS, "--json", cwd=tmp_path)
    assert json.loads(resumed.out)["best_epoch"] == 4
    assert last(tmp_path / "run").progress.epoch == 6


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_workers_after_the_same_step_and_leaves_none_behind(
    number: signal.Signals, undisturbed: Path, tiny: dict[str, Path], tmp_path: Path
) -> None:
    arguments = ("train", str(tiny["seq2seq"]), *LONGER, *WORKERS, "--out", "run")
    with started(*arguments, cwd=tmp_path) as process:
        wait_for_step(tmp_path / "run", 5, process)
        workers = workers_of(process.pid)
        process.send_signal(number)
        result = ended(process)
    assert result.code == 128 + number
    assert "stopping after this step" in result.err
    assert result.out == ""
    assert len(workers) == 2
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    together("train", "--resume", "run", *WORKERS, cwd=tmp_path)
    assert greatest_difference(last(tmp_path / "run").weights, last(undisturbed).weights) == 0


@pytest.mark.slow
def test_a_signal_after_which_nothing_can_be_saved_ends_with_the_error(tiny: dict[str, Path], tmp_path: Path) -> None:
    with started("train", str(tiny["seq2seq"]), *LONGER, *WORKERS, "--out", "run", cwd=tmp_path) as process:
        wait_for_step(tmp_path / "run", 5, process)
        first = workers_of(process.pid)[0]
        os.kill(first, signal.SIGSTOP)
        (tmp_path / "run").rename(tmp_path / "moved")
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        os.kill(first, signal.SIGCONT)
        result = ended(process)
    assert result.code == 1
    assert "stopping after this step" in result.err
    assert "error: cannot write" in result.err


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Here while the workers wait for one that is itself stopped, and so could not agree on a step."""
    with started("train", str(tiny["seq2seq"]), *LONGER, *WORKERS, "--out", "run", cwd=tmp_path) as process:
        wait_for_step(tmp_path / "run", 5, process)
        workers = workers_of(process.pid)
        os.kill(workers[1], signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        result = ended(process)
    assert result.code == 128 + signal.SIGINT
    assert time.monotonic() - begin < 20
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert last(tmp_path / "run").progress.step >= 5


@pytest.mark.slow
def test_a_signal_to_launcher_and_workers_is_one(tiny: dict[str, Path], tmp_path: Path) -> None:
    """As a scheduler sends it: the second that a worker gets, from its launcher, does not keep it from saving."""
    with started("train", str(tiny["seq2seq"]), *LONGER, *RARELY_SAVED, *WORKERS, cwd=tmp_path) as process:
        wait_for_record(tmp_path / "run", process)
        workers = workers_of(process.pid)
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
            os.kill(worker, signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
        time.sleep(0.05)
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGTERM)
        result = ended(process)
    assert result.code == 128 + signal.SIGTERM
    assert "go on with: dl7 train --resume run" in result.err
    assert last(tmp_path / "run").progress.batch > 0, "not the end of an epoch"


@pytest.mark.slow
def test_the_end_of_the_terminal_saves_unless_nohup_has_it_ignored(tiny: dict[str, Path], tmp_path: Path) -> None:
    arguments = ("train", str(tiny["seq2seq"]), *LONGER, *RARELY_SAVED)
    with started(*arguments, *ALONE, cwd=tmp_path) as process:
        wait_for_record(tmp_path / "run", process)
        process.send_signal(signal.SIGHUP)
        result = ended(process)
    assert result.code == 128 + signal.SIGHUP
    assert "go on with: dl7 train --resume run" in result.err
    shutil.rmtree(tmp_path / "run")
    with started(*arguments, *WORKERS, cwd=tmp_path, inside=("nohup",)) as process:
        wait_for_record(tmp_path / "run", process)
        process.send_signal(signal.SIGHUP)
        result = ended(process)
    assert result.code == 0, result.err


@pytest.mark.slow
def test_workers_run_no_code_that_lies_beside_the_data(tiny: dict[str, Path], tmp_path: Path) -> None:
    program = tmp_path / "bin" / "dl7"
    program.parent.mkdir()
    program.write_text("from dl7cli.cli import main\nmain()\n")  # as it is installed
    (tmp_path / "data").mkdir()
    for name in ("numpy", "queue", "sacrebleu"):
        (tmp_path / "data" / f"{name}.py").write_text("open('executed', 'w').close()\n")
    command = [sys.executable, str(program), "train", str(tiny["resnet"]), "--set", "training.epochs=1", *WORKERS]
    subprocess.run(command, cwd=tmp_path / "data", check=True, timeout=SECONDS, env=ENVIRONMENT, capture_output=True)
    assert not (tmp_path / "data" / "executed").exists()


@pytest.mark.slow
def test_workers_whose_launcher_is_killed_save_and_leave(tiny: dict[str, Path], tmp_path: Path) -> None:
    with started("train", str(tiny["seq2seq"]), *LONGER, *WORKERS, "--out", "run", cwd=tmp_path) as process:
        wait_for_step(tmp_path / "run", 5, process)
        workers = workers_of(process.pid)
        process.kill()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and any(Path(f"/proc/{worker}").exists() for worker in workers):
            time.sleep(0.1)
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert together("train", "--resume", "run", *WORKERS, cwd=tmp_path).code == 0


@pytest.mark.slow
def test_a_worker_that_stays_silent_is_given_up_within_the_time_out(tiny: dict[str, Path], tmp_path: Path) -> None:
    """It is stopped, so that its connections stay open: the others can only find out by the clock."""
    arguments = ("train", str(tiny["seq2seq"]), "--set", "training.epochs=20", *WORKERS[:-1], "15", "--out", "run")
    with started(*arguments, cwd=tmp_path) as process:
        wait_for_step(tmp_path / "run", 5, process)
        os.kill(workers_of(process.pid)[1], signal.SIGSTOP)
        begin = time.monotonic()
        result = ended(process)
    assert time.monotonic() - begin < 2 * 15 + 60 + 60  # as it says, and the rest of the training
    assert result.code == 0, result.err
    assert "worker 0 has lost the others" in result.err
    assert "start again from the last checkpoint (1 of 3 times)" in result.err


@pytest.mark.slow
def test_a_mistake_is_told_once_by_the_worker_that_made_it(tiny: dict[str, Path], tmp_path: Path) -> None:
    """No other attempt is made, and what it does to the others is not what is told."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").touch()
    with started("train", str(tiny["resnet"]), *WORKERS, "--json", "--out", "run", cwd=tmp_path) as process:
        result = ended(process)
    assert result.code == 1
    assert result.err.startswith("error: folder `run` is not empty\nhint: ")
    assert result.err.count("error:") == 1
    assert "start again" not in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-such-recipe", "--workers", "2"), "no-such-recipe"),
        (("resnet", "--workers", "2", "--set", "training.epoch=1"), "training.epochs"),
        (("resnet", "--gpus", "0,1"), "`--gpus 0,1`: these are not all to be had"),
        (("resnet", "--workers", "2", "--gpus", "0"), "`--workers` says how many share the CPU"),
        (("resnet", "--nodes", "2"), "which node this is"),
        (("resnet", "--node-rank", "1"), "are for several nodes"),
    ],
)
def test_mistakes_are_found_before_any_worker_is_started(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused = dl7("train", *arguments, cwd=tmp_path)
    assert refused.code == 1
    assert refused.err.startswith("error: ")
    assert message in refused.err
    assert not list(tmp_path.iterdir())


# Other launchers


@pytest.mark.slow
def test_torchrun_starts_the_same_training(undisturbed: Path, tiny: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dl7cli"]
    arguments = ["train", str(tiny["seq2seq"]), *LONGER, *ALONE, "--json", "--out", "run"]
    result = subprocess.run(
        [*command, *arguments], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT, timeout=SECONDS
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == last(tmp_path / "run").progress.step
    assert greatest_difference(last(tmp_path / "run").weights, last(undisturbed).weights) == 0


def test_workers_that_torchrun_has_started_again_do_not_begin_another_run(tmp_path: Path) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "0"}
    refused = dl7("train", "resnet", *ALONE, cwd=tmp_path, **place, TORCHELASTIC_RESTART_COUNT="1")
    assert refused.code == 1
    assert "error: the launcher has started the workers again" in refused.err
    assert "`dl7 train --resume RUN` goes on from its last checkpoint" in refused.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (
            ("--seeds", "2"),
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "`--seeds` trains each seed on one device",
        ),
        (
            ("--workers", "2"),
            {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "4"},
            "SLURM starts 4 tasks on 1 node",
        ),
    ],
)
def test_what_a_launcher_would_start_several_times_over_is_refused(
    arguments: tuple[str, ...], environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    refused = dl7("train", "resnet", *arguments, "--device", "cpu", cwd=tmp_path, **environment)
    assert refused.code == 1
    assert refused.err.startswith("error: ")
    assert message in refused.err
    assert not list(tmp_path.iterdir())
