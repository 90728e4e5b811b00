"""`dl7 train --seeds`: runs like any other, what they come to, stopping and going on, and several devices."""

import contextlib
import json
import math
import os
import re
import shlex
import signal
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Silent, dl7, succeed

from dl7cli import runs, training
from dl7cli.cli.repeats import print_summary, show
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.recipe import resolve, with_seed
from dl7cli.runs import Run
from dl7cli.training import Interrupted, repeats

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")
ON_CPU = ("--device", "cpu", "--precision", "fp32")
SHORT = ("--set", "training.epochs=2")
KEYS = {
    *("runs", "seeds", "task", "recipe", "data", "split", "examples", "primary", "scores", "standard_deviation"),
    *("interval", "readings", "signature", "seconds", "results"),
}

pytestmark = pytest.mark.usefixtures("work")


def weights(run: str) -> bytes:
    return Path(run, "last", "model.safetensors").read_bytes()


def test_each_seed_is_a_run_and_one_object_sums_them_up(tiny: dict[str, Path], work: Path) -> None:
    arguments = ("train", str(tiny["resnet"]), *SHORT, *ON_CPU)
    done = succeed(*arguments, "--seeds", "3", "--seed", "4", "--json", cwd=work)
    document = done.document
    assert set(document) == KEYS
    assert document["runs"] == ["runs/resnet-1", "runs/resnet-2", "runs/resnet-3"]
    assert document["seeds"] == [4, 5, 6]
    assert [result["run"] for result in document["results"]] == document["runs"]
    for run, seed in zip(document["runs"], document["seeds"], strict=True):
        assert runs.read_recipe(Run(Path(run))).training.seed == seed
    values = [result["scores"]["accuracy"] for result in document["results"]]
    assert document["scores"]["accuracy"] == pytest.approx(sum(values) / 3)
    deviation = math.sqrt(sum((value - sum(values) / 3) ** 2 for value in values) / 2)
    assert document["standard_deviation"]["accuracy"] == pytest.approx(deviation)
    half = 4.302652729911275 * deviation / math.sqrt(3)  # of two degrees of freedom
    assert document["interval"]["accuracy"] == pytest.approx([sum(values) / 3 - half, sum(values) / 3 + half])
    assert document["readings"] == [1, 1, 1]
    assert (document["split"], document["examples"], document["primary"]) == ("test", 7, "accuracy")
    assert re.findall(r"^seed \d  test accuracy \S+ \((\d of 3)\)$", done.err, re.MULTILINE) == [
        *("1 of 3", "2 of 3", "3 of 3")
    ]
    assert "next: dl7 compare runs/resnet-1,runs/resnet-2,runs/resnet-3 RUN,RUN,…" in done.err
    succeed(*arguments, "--seed", "5", "--out", "alone", cwd=work)
    assert weights("alone") == weights("runs/resnet-2"), "as if it had been trained by itself"


def test_of_a_translator(tiny: dict[str, Path], work: Path) -> None:
    flags = ("--set", "training.epochs=1", "--seeds", "2", "--out", "runs/x", "--json")
    document = succeed("train", str(tiny["seq2seq"]), *flags, *ON_CPU, cwd=work).document
    assert document["runs"] == ["runs/x-1", "runs/x-2"]
    assert document["signature"].startswith("nrefs:1|")
    for name in ("bleu", "chrf", "bleu_lowercase"):
        values = [result["scores"][name] for result in document["results"]]
        assert document["scores"][name] == pytest.approx(statistics.fmean(values))
        assert document["standard_deviation"][name] == pytest.approx(statistics.stdev(values))
    assert [one["name"] for one in succeed("runs", "list", "--json", cwd=work).document["runs"]] == ["x-1", "x-2"]


def test_one_run_has_no_interval(tiny: dict[str, Path], work: Path) -> None:
    flags = ("--set", "training.epochs=1", "--seeds", "1")
    document = succeed("train", str(tiny["resnet"]), *flags, "--json", *ON_CPU, cwd=work).document
    assert document["scores"]["accuracy"] == document["results"][0]["scores"]["accuracy"]
    assert document["standard_deviation"]["accuracy"] is None
    assert document["interval"]["accuracy"] is None
    *_, said, read = succeed("train", str(tiny["resnet"]), *flags, *ON_CPU, cwd=work).out.splitlines()
    assert said == "one run does not tell how far chance goes: no deviation and no interval"
    assert read == "the test split was read once by each run"


def summed(**changes: Any) -> dict[str, Any]:
    values = [0.9131, 0.9207, 0.9150]
    interval = [0.9164 - 4.3026527 * 0.0039 / math.sqrt(3), 0.9164 + 4.3026527 * 0.0039 / math.sqrt(3)]
    return {
        **{"runs": ["runs/a-1", "runs/a-2", "runs/a-3"], "seeds": [1, 2, 3], "task": "classification", "recipe": "a"},
        **{"data": "d", "split": "test", "examples": 10_000, "primary": "accuracy", "scores": {"accuracy": 0.91627}},
        **{"standard_deviation": {"accuracy": 0.00396}, "interval": {"accuracy": interval}, "readings": [1, 1, 1]},
        **{"signature": None, "seconds": 100.0, "results": [{"scores": {"accuracy": value}} for value in values]},
        **changes,
    }


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(summed(), as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "SEED  RUN       ACCURACY",
        "   1  runs/a-1    0.9131",
        "   2  runs/a-2    0.9207",
        "   3  runs/a-3    0.9150",
        "accuracy 0.9163 on the test split of d: mean of 3 runs (10,000 images, 2m)",
        "standard deviation 0.0040 (n - 1), 95 % interval of the mean 0.9067 to 0.9261 (Student's t, n = 3)",
        "the test split was read once by each run",
    ]
    print_summary(summed(readings=[1, 3, 1]), as_json=False)
    assert capsys.readouterr().out.splitlines()[-1] == "the test split was read 1, 3, 1 times by these runs"


# Stopping and going on


def stop_at(patch: pytest.MonkeyPatch, run: str, epoch: int) -> None:
    """Have this process interrupted when an epoch of a run closes, once."""
    append, done = runs.append_metrics, []

    def interrupting(folder: Run, record: dict[str, Any]) -> None:
        append(folder, record)
        if folder.name == run and record["epoch"] == epoch and "scores" in record and not done:
            done.append(True)
            signal.raise_signal(signal.SIGINT)

    patch.setattr(runs, "append_metrics", interrupting)


def test_what_was_stopped_is_gone_on_with_by_the_command_that_is_printed(
    tiny: dict[str, Path], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("train", str(tiny["resnet"]), *SHORT, "--seeds", "3", "--json", *ON_CPU)
    whole = succeed(*arguments, "--out", "whole run", cwd=work).document
    stop_at(monkeypatch, "my run-2", 1)
    stopped = dl7(*arguments, "--out", "my run", cwd=work)
    assert (stopped.code, stopped.out) == (130, "")
    said, command = stopped.err.splitlines()[-2:]
    assert said == "stopped; what was trained is saved"
    assert command == "go on with: dl7 train --resume 'my run-1,my run-2' --seeds 3 --out 'my run'"
    assert sorted(path.name for path in work.iterdir() if path.name.startswith("my")) == ["my run-1", "my run-2"]
    finished = weights("my run-1")
    again = succeed(*shlex.split(command.partition("dl7 ")[2]), "--json", *ON_CPU, cwd=work).document
    assert weights("my run-1") == finished
    assert again["runs"] == ["my run-1", "my run-2", "my run-3"]
    assert again["readings"] == [1, 1, 1]
    assert (again["scores"], again["interval"]) == (whole["scores"], whole["interval"])
    for seed in (1, 2, 3):
        assert weights(f"my run-{seed}") == weights(f"whole run-{seed}")
    # What is finished is not trained again, and a seed may be added.
    os.rename("my run-1", "moved")
    # However they are named, each is named once when it says how to go on.
    arguments = ("train", "--resume", "moved/last,my run-3/", "--seeds", "2", "--json", *ON_CPU)
    stop_at(monkeypatch, "resnet-1", 1)
    stopped = dl7(*arguments, cwd=work)
    command = "dl7 train --resume 'moved,my run-3,runs/resnet-1' --seeds 3"
    assert stopped.err.endswith(f"go on with: {command}\n")
    again = succeed(*shlex.split(command)[1:], "--json", *ON_CPU, cwd=work).document
    assert (again["runs"], again["seeds"]) == (["moved", "runs/resnet-1", "my run-3"], [1, 2, 3])
    assert again["scores"] == whole["scores"]


def test_what_is_stopped_before_there_is_a_run_names_none(
    tiny: dict[str, Path], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> Any:
        raise training.Interrupted(Path(), signal.SIGINT)

    monkeypatch.setattr(repeats, "train_all", stopped)
    outcome = dl7("train", str(tiny["resnet"]), "--seeds", "2", *ON_CPU, cwd=work)
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "stopped\n")


def test_what_went_wrong_leaves_the_others_and_says_how_to_go_on(
    tiny: dict[str, Path], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = runs.append_metrics

    def failing(run: Run, record: dict[str, Any]) -> None:
        if run.name == "x-2":
            raise UserError("the disk is full")
        append(run, record)

    monkeypatch.setattr(runs, "append_metrics", failing)
    flags = ("--set", "training.epochs=1", "--seeds", "3", "--out", "x")
    failed = dl7("train", str(tiny["resnet"]), *flags, *ON_CPU, cwd=work)
    assert (failed.code, failed.out) == (1, "")
    assert failed.err.endswith("go on with: dl7 train --resume x-1,x-2 --seeds 3 --out x\nerror: the disk is full\n")
    assert runs.result(Run(Path("x-1"))) is not None


def test_what_cannot_be_is_refused_before_anything_is_trained(tiny: dict[str, Path], work: Path) -> None:
    recipe = resolve(str(tiny["resnet"]), ["training.epochs=1"]).recipe
    for name, changed in (("a", recipe), ("b", with_seed(recipe, 3)), ("c", with_seed(recipe, 1))):
        training.train(changed, out=Path(name), runtime=CPU, listener=Silent())
    other = resolve(str(tiny["resnet"]), ["training.epochs=1", "model.width=8"], seed=2).recipe
    training.train(other, out=Path("other"), runtime=CPU, listener=Silent())
    before = sorted(work.iterdir())
    Path("x-3").mkdir()
    Path("x-3", "file").touch()
    for arguments, expected in (
        ((recipe, 3, (), Path("x")), "folder `x-3` is not empty"),
        ((with_seed(recipe, 2**31 - 1), 2, (), None), "`training.seed` is `2147483648`"),
        ((None, 3, ("a", "other"), None), "`a` and `other` are of different recipes"),
        ((None, 3, ("a", "c"), None), "`a` and `c` have the same seed"),
        ((None, 3, ("nothing",), None), "there is no run `nothing`"),
    ):
        changed, count, begun, out = arguments
        with pytest.raises(UserError, match=re.escape(expected)):
            repeats.plan(changed, count, begun=begun, out=out)
    planned = repeats.plan(None, 4, begun=("b", "a"))
    assert [(one.seed, one.begun) for one in planned] == [(1, "a"), (2, None), (3, "b"), (4, None)]
    assert all(one.recipe == with_seed(recipe, one.seed) for one in planned)
    assert sorted(path for path in work.iterdir() if path.name != "x-3") == before


# Several devices, here two processes on one


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail, and do not hang, where something takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def children() -> int:
    return len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_each_gpu_is_one_of_several_devices(tiny: dict[str, Path], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def choose(*arguments: str, deterministic: bool, **_: object) -> Runtime:
        asked.append((*arguments, deterministic))
        return CPU

    monkeypatch.setattr("dl7cli.device.choose", choose)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr("dl7cli.cli.repeats.show", lambda planned, used, _: asked.append([planned, used]))
    succeed("train", str(tiny["resnet"]), "--seeds", "3", "--gpus", "0,2", "--deterministic", cwd=work)
    *chosen, (planned, used) = asked
    assert chosen == [("cuda:0", "auto", True), ("cuda:2", "auto", True)]
    assert used == [CPU, CPU]
    assert [one.seed for one in planned] == [1, 2, 3]


@pytest.mark.slow
def test_two_at_a_time_train_what_one_does(tiny: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = resolve(str(tiny["resnet"])).recipe
    before = children()
    with within(300):
        show(repeats.plan(recipe, 3, out=Path("two")), [CPU, CPU], as_json=True)
    printed = capsys.readouterr()
    side_by_side = json.loads(printed.out)
    assert side_by_side["runs"] == ["two-1", "two-2", "two-3"]
    one = dict(repeats.train_all(repeats.plan(recipe, 3, out=Path("one")), [CPU], lambda _: Silent()))
    for (seed, alone), result in zip(one.items(), side_by_side["results"], strict=True):
        assert weights(f"two-{seed}") == weights(f"one-{seed}")
        assert (result["run"], result["scores"]) == (f"two-{seed}", alone["scores"])
        assert f"seed {seed}  run two-{seed} on cpu, fp32\n" in printed.err
        assert re.search(rf"^seed {seed}  epoch 3  validation accuracy ", printed.err, re.MULTILINE)
    assert children() <= before + 1, "multiprocessing's own tracker of resources may stay"


class Counting(Silent):
    """Calls `once` at the first epoch that ends."""

    def __init__(self, once: Callable[[], None]) -> None:
        self.once: Callable[[], None] | None = once

    def epoch(self, epoch: training.Epoch) -> None:
        if self.once is not None:
            once, self.once = self.once, None
            once()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_all_that_is_under_way(number: int, tiny: dict[str, Path]) -> None:
    recipe = resolve(str(tiny["resnet"]), ["training.epochs=300"]).recipe
    listener = Counting(lambda: os.kill(os.getpid(), number))
    before = children()
    with within(300), pytest.raises(Interrupted) as raised:
        list(repeats.train_all(repeats.plan(recipe, 3, out=Path("x")), [CPU, CPU], lambda _: listener))
    assert raised.value.signal == number
    assert children() <= before + 1
    begun = sorted(path.name for path in Path().glob("x-*"))
    assert begun in (["x-1"], ["x-2"], ["x-1", "x-2"]), "the third was not begun"
    for name in begun:
        with runs.lock(Run(Path(name))):  # nobody trains it any more
            assert runs.find(name)[1].name in ("best", "last")


@pytest.mark.slow
def test_an_error_of_one_stops_the_others_and_is_told(tiny: dict[str, Path]) -> None:
    recipe = resolve(str(tiny["resnet"]), ["training.epochs=300"]).recipe
    planned = repeats.plan(recipe, 2, out=Path("x"))
    Path("x-2").mkdir()
    Path("x-2", "file").touch()  # since it was looked at
    with within(300), pytest.raises(UserError, match="folder `x-2` is not empty") as raised:
        list(repeats.train_all(planned, [CPU, CPU], lambda _: Silent()))
    assert raised.value.hint is not None
    for name in Path().glob("x-1"):
        with runs.lock(Run(name)):
            pass


@pytest.mark.slow
def test_a_process_that_is_killed_is_told_of(tiny: dict[str, Path]) -> None:
    recipe = resolve(str(tiny["resnet"]), ["training.epochs=300"]).recipe

    def kill() -> None:
        lock = next(path for path in Path().glob("x-*/lock") if path.read_text().strip())
        os.kill(int(lock.read_text()), signal.SIGKILL)

    listener = Counting(kill)
    with within(300), pytest.raises(UserError, match=r"the training with seed [12] has ended without a word"):
        list(repeats.train_all(repeats.plan(recipe, 2, out=Path("x")), [CPU, CPU], lambda _: listener))
