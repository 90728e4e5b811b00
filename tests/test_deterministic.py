"""`--deterministic`: nothing changes on a CPU, it is kept across resuming, and what cannot be had is named."""

import json
import os
from pathlib import Path

import pytest
import torch
from running import Silent, start, succeed

from dl7cli import runs, training
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.recipe import resolve
from dl7cli.runs import Run

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")
REPEATABLE = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked", deterministic=True)

pytestmark = pytest.mark.usefixtures("work")


@pytest.fixture(autouse=True)
def workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was, after each test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")


def settings() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


CASES = pytest.mark.parametrize(
    ("kind", "changes"), [("resnet", ()), ("seq2seq", ()), ("seq2seq", ("decoding.method=sample",))]
)


@CASES
def test_on_a_cpu_the_bits_are_the_same(kind: str, changes: tuple[str, ...], tiny: dict[str, Path]) -> None:
    recipe = resolve(str(tiny[kind]), changes).recipe
    for name, runtime in (("with", REPEATABLE), ("without", CPU)):
        training.train(recipe, out=Path(name), runtime=runtime, listener=Silent())
        assert runs.environment(Run(Path(name)))["deterministic"] == runtime.deterministic
    for file in ("last/model.safetensors", "last/training.safetensors", "best/model.safetensors"):
        assert Path("with", file).read_bytes() == Path("without", file).read_bytes()
    with_it, without = (runs.evaluations(Run(Path(name)))[0] for name in ("with", "without"))
    assert (with_it["scores"], with_it["details"]) == (without["scores"], without["details"])


@pytest.mark.gpu
@CASES
def test_on_a_gpu_the_bits_are_the_same_each_time(
    kind: str, changes: tuple[str, ...], tiny: dict[str, Path], work: Path
) -> None:
    flags = [flag for change in changes for flag in ("--set", change)]
    for name in ("one", "other"):
        # Each in a process of its own: what cuBLAS is to do is settled when it starts.
        with start(
            "train", str(tiny[kind]), "--device", "cuda", "--deterministic", *flags, "--out", name, cwd=work
        ) as process:
            _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told
    for file in ("last/model.safetensors", "best/model.safetensors"):
        assert Path("one", file).read_bytes() == Path("other", file).read_bytes()


def test_torch_is_asked_for_it_and_no_longer_than_training_lasts(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[tuple[bool, bool, bool], str]] = []

    class Looking(Silent):
        def epoch(self, epoch: training.Epoch) -> None:
            seen.append((settings(), os.environ["CUBLAS_WORKSPACE_CONFIG"]))

    before = settings()
    recipe = resolve(str(tiny["resnet"]), ["training.epochs=1"]).recipe
    training.train(recipe, out=Path("with"), runtime=REPEATABLE, listener=Looking())
    assert settings() == before
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    training.train(recipe, out=Path("without"), runtime=CPU, listener=Looking())
    assert seen == [((True, True, False), ":16:8"), (before, "")]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with REPEATABLE.repeatable():
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8", "one that does as well is left"


def test_an_operation_that_prevents_it_is_named() -> None:
    """`put_` has no deterministic form on any device."""
    before = settings()
    with (
        pytest.raises(UserError, match="torch's `put_` is not deterministic on cpu") as raised,
        REPEATABLE.repeatable(),
    ):
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
    assert raised.value.hint is not None
    assert "`--deterministic`" in raised.value.hint
    assert settings() == before
    with pytest.raises(RuntimeError, match="another"), REPEATABLE.repeatable():
        raise RuntimeError("another")
    assert settings() == before
    with CPU.repeatable():
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))


def test_the_flag_is_kept_when_the_run_is_gone_on_with(
    work: Path, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--device", "cpu", "--precision", "fp32", "--json")
    done = succeed("train", str(tiny["resnet"]), "--out", "run", "--deterministic", *flags, cwd=work)
    assert done.document["scores"] == json.loads(Path("run/result.json").read_text())["scores"]
    Path("run/result.json").unlink()
    asked: list[bool] = []
    monkeypatch.setattr(training, "resume", lambda run, runtime, **_: asked.append(runtime.deterministic) or {})
    monkeypatch.setattr("dl7cli.cli.train.print_result", lambda *_: None)
    monkeypatch.setattr("dl7cli.cli.train._next_commands", lambda *_: "")
    succeed("train", "--resume", "run", "--device", "cpu", cwd=work)
    assert asked == [True]
