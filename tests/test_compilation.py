"""Compiled training: when it is worth while, what it leaves alone, and that a resumed run keeps what it began with."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dl7cli import checkpoint, runs, tasks, training
from dl7cli.device import Runtime
from dl7cli.distributed import Workers
from dl7cli.recipe import resolve
from dl7cli.runs import Run
from dl7cli.tasks.classification import Classification
from dl7cli.training import compilation, session

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")


class Heard:
    """A listener that keeps notes and times left, and may ask its own process to stop at the first step."""

    def __init__(self, *, stopping: bool = False) -> None:
        self.notes: list[str] = []
        self.remaining: list[float] = []
        self.stopping = stopping

    def plan(self, plan: training.Plan) -> None:
        pass

    def step(self, step: training.Step) -> None:
        self.remaining.append(step.remaining_seconds)
        if self.stopping:
            os.kill(os.getpid(), signal.SIGTERM)

    def epoch(self, epoch: training.Epoch) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, what: str, done: int, total: int) -> None:
        pass


@pytest.fixture(autouse=True)
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listeners are told of every step."""
    monkeypatch.setattr(session, "SECONDS_BETWEEN_STEP_EVENTS", -1)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In place of torch's compiler one that changes nothing; the list has the sizes of the batches that came to it."""
    sizes: list[int] = []

    def compiled(model: nn.Module, **settings: Any) -> Callable[[Tensor], Tensor]:
        def forward(images: Tensor) -> Tensor:
            sizes.append(len(images))
            scores: Tensor = model(images)
            return scores

        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    return sizes


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of torch's compiler one that fails as that does: when the model is first used."""

    def compiled(model: nn.Module, **settings: Any) -> Callable[[Tensor], Tensor]:
        def forward(images: Tensor) -> Tensor:
            model(images)
            raise RuntimeError("\nInvalidCxxCompiler: no working compiler\n\nSet TORCHDYNAMO_VERBOSE=1 for more")

        return forward

    monkeypatch.setattr(torch, "compile", compiled)


def build(tiny: dict[str, Path], *overrides: str) -> Classification:
    task = tasks.build(resolve(str(tiny["resnet"]), overrides).recipe, runtime=CPU)
    assert isinstance(task, Classification)
    return task


def environment(run: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run / "environment.json").read_text())
    return document


@pytest.mark.parametrize(
    ("epochs", "images", "size", "device", "expected"),
    [
        (24, 45_000, 32, "cpu", True),  # 21 minutes, of which 5 % are 64 seconds
        (6, 45_000, 32, "cpu", False),  # 16 of 318 seconds saved, for 18
        (24, 2_560, 32, "cpu", False),
        (24, 2_560, 96, "cpu", True),  # nine times the work for each image
        (24, 45_000, 32, "mps", False),
        (200, 45_000, 32, "cuda", True),
        (1, 45_000, 32, "cuda", False),
    ],
)
def test_compilation_is_chosen_where_it_repays_itself(
    epochs: int, images: int, size: int, device: str, expected: bool
) -> None:
    assert compilation.repays(epochs * images, size, device) is expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], False),
        (["training.compile=always"], True),
        (["training.compile=never", "training.epochs=10000000"], False),
        # 24 images of 8x8 in whole batches: 306,000 times 16 of them repay compilation.
        (["training.epochs=203000"], False),
        (["training.epochs=205000"], True),
        # What breaks the graph into pieces, or would be compiled for twice.
        (["training.epochs=205000", "model.survival=0.5"], False),
        (["training.epochs=205000", "model.checkpointing=true"], False),
        (["training.epochs=205000", "data.image_size=16", "training.small_size=12", "training.small_part=0.5"], False),
    ],
)
def test_the_choice_is_that_of_the_whole_run(overrides: list[str], expected: bool, tiny: dict[str, Path]) -> None:
    assert compilation.wanted(build(tiny, *overrides)) is expected


@pytest.mark.parametrize("count", [3, 100])
def test_the_choice_is_that_of_all_workers(count: int, tiny: dict[str, Path]) -> None:
    """Of a hundred the first has no image of a batch."""
    task = build(tiny, "training.epochs=51100", "data.image_size=16")
    task.runtime = replace(task.runtime, workers=Workers(0, count))
    task.images._workers = task.runtime.workers
    assert compilation.wanted(task)


@pytest.mark.parametrize("compile", ["auto", "always"])
def test_workers_that_meet_in_every_layer_are_not_compiled(compile: str, tiny: dict[str, Path]) -> None:
    task = build(tiny, "training.epochs=511000", "training.batch_norm=sync", f"training.compile={compile}")
    assert compilation.wanted(task)
    task.runtime = replace(task.runtime, workers=Workers(0, 2))
    assert not compilation.wanted(task)


def test_a_translator_is_not_compiled(tiny: dict[str, Path]) -> None:
    assert not compilation.wanted(tasks.build(resolve(str(tiny["seq2seq"])).recipe, runtime=CPU))


def test_only_whole_training_batches_go_through_what_is_compiled(tiny: dict[str, Path], compiler: list[int]) -> None:
    task = build(tiny)
    task.compile()
    compiler.clear()
    for batch in task.batches(1):  # 26 images in batches of 8
        task.loss(batch)
    task.evaluate("validation")
    assert compiler == [8, 8, 8]


def test_the_only_batch_of_an_epoch_is_a_whole_one(tiny: dict[str, Path], compiler: list[int]) -> None:
    task = build(tiny, "training.batch_size=100")
    task.compile()
    assert compiler == [26]


def test_images_of_both_sizes_are_compiled_for_before_the_first_step(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch would compile in the middle of the training else."""
    sides: list[tuple[int, int]] = []

    def compiled(model: nn.Module, **settings: Any) -> Callable[[Tensor], Tensor]:
        def forward(images: Tensor) -> Tensor:
            sides.append((len(images), images.shape[2]))
            scores: Tensor = model(images)
            return scores

        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    for small, part, expected in ((8, 0.5, [(8, 8), (8, 16)]), (8, 1.0, [(8, 8), (8, 8)]), (0, 0.5, [(8, 16)])):
        keys = [f"training.small_size={small}", f"training.small_part={part}"] if small else []
        build(tiny, "data.image_size=16", *keys).compile()
        assert sides == expected
        sides.clear()


def test_compiling_changes_neither_weights_nor_statistics_nor_names_nor_random_numbers(
    tiny: dict[str, Path], compiler: list[int]
) -> None:
    task = build(tiny)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    random = torch.get_rng_state()
    task.compile()
    assert compiler == [8], "it has been used"
    after = task.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in task.model.parameters())


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_training_goes_on_and_says_so(tiny: dict[str, Path], tmp_path: Path) -> None:
    results = []
    for choice in ("always", "never"):
        heard = Heard()
        recipe = resolve(str(tiny["resnet"]), [f"training.compile={choice}"]).recipe
        training.train(recipe, out=tmp_path / choice, runtime=CPU, listener=heard)
        results.append(checkpoint.load(tmp_path / choice / "last").weights)
        assert environment(tmp_path / choice)["compiled"] is False
        notes = [
            "compiling the model …",
            "the model cannot be compiled here, and is trained as it is: InvalidCxxCompiler: no working compiler",
        ]
        assert heard.notes == (notes if choice == "always" else [])
    first, second = results
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_resumed_run_is_compiled_if_it_began_so(
    tiny: dict[str, Path], compiler: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for began in (True, False):
        run = tmp_path / str(began)
        monkeypatch.setattr(compilation, "wanted", lambda task, began=began: began)
        heard = Heard(stopping=True)
        with pytest.raises(training.Interrupted):
            training.train(resolve(str(tiny["resnet"])).recipe, out=run, runtime=CPU, listener=heard)
        assert heard.notes[:1] == ["compiling the model …"] * began
        monkeypatch.setattr(compilation, "wanted", lambda task, began=began: not began)
        compiler.clear()
        heard = Heard()
        training.resume(str(run), runtime=CPU, listener=heard)
        assert bool(compiler) is began
        assert environment(run)["compiled"] is began
        assert len(heard.notes) == 2 * began


def test_a_run_that_began_compiled_says_that_it_goes_on_otherwise(
    tiny: dict[str, Path], compiler: list[int], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    recipe = resolve(str(tiny["resnet"]), ["training.compile=always"]).recipe
    with pytest.raises(training.Interrupted):
        training.train(recipe, out=tmp_path / "run", runtime=CPU, listener=Heard(stopping=True))
    request.getfixturevalue("no_compiler")
    heard = Heard()
    training.resume(str(tmp_path / "run"), runtime=CPU, listener=heard)
    assert heard.notes[-1] == "the steps before were compiled: the result may differ from that of the run never stopped"
    assert environment(tmp_path / "run")["compiled"] is False


def test_neither_the_rate_nor_the_time_left_count_compilation(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = {"ahead": 0.0}
    own = time.monotonic

    def compile_for_hours(self: Classification) -> None:
        clock["ahead"] += 100_000

    monkeypatch.setattr(Classification, "compile", compile_for_hours)
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: own() + clock["ahead"]))
    heard = Heard()
    recipe = resolve(str(tiny["resnet"]), ["training.compile=always"]).recipe
    result = training.train(recipe, out=tmp_path / "run", runtime=CPU, listener=heard)
    assert len(heard.remaining) == 15  # of 12 steps and 3 validations
    assert max(heard.remaining) < 10_000
    assert result["rate"] > 3 * 26 / 10_000
    assert result["training_seconds"] > 100_000, "what it took in all is told as it is"


COMPILED = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from dl7cli import training
    from dl7cli.device import Runtime
    from dl7cli.recipe import resolve
    from dl7cli.training import session

    session.SECONDS_BETWEEN_STEP_EVENTS = -1
    file, run, precision, deadly = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

    class Listener:
        def plan(self, plan): pass
        def step(self, step):
            if step.step == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
        def epoch(self, epoch): pass
        def note(self, text): print(text, flush=True)
        def progress(self, what, done, total): pass

    runtime = Runtime(torch.device("cpu"), precision, "cpu", "as asked")
    if run.exists():
        training.resume(str(run), runtime=runtime, listener=Listener())
    else:
        recipe = resolve(file, ["training.compile=always"]).recipe
        training.train(recipe, out=run, runtime=runtime, listener=Listener())
    print(sorted(torch._dynamo.utils.counters["stats"].items()))
"""


def compiled(recipe: Path, run: Run, precision: str, cache: Path, *, deadly: int = -1) -> tuple[int, str]:
    """Train in a process of its own, with torch's compiler and a cache for it, in a folder without blanks."""
    command = [sys.executable, "-c", textwrap.dedent(COMPILED), str(recipe), str(run.folder), precision, str(deadly)]
    paths = {"PYTHONPATH": str(Path(__file__).parents[1]), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env={**os.environ, **paths})
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.bf16)])
def test_a_compiled_run_that_is_killed_goes_on_to_the_same_bits(
    precision: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    whole, killed = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    status, said = compiled(tiny["resnet"], whole, precision, tmp_path / "cache1")
    assert status == 0
    assert said.startswith("compiling the model …\ncompiled the model in ")
    assert "('unique_graphs', 1)" in said, "neither the last batch nor evaluation is compiled for"
    assert compiled(tiny["resnet"], killed, precision, tmp_path / "cache2", deadly=6)[0] == -signal.SIGKILL
    assert runs.environment(killed)["compiled"] is True
    assert compiled(tiny["resnet"], killed, precision, tmp_path / "cache3")[0] == 0
    for name in ("last", "best"):
        first = checkpoint.load(whole.folder / name, training=True)
        second = checkpoint.load(killed.folder / name, training=True)
        assert first.progress._replace(seconds=0) == second.progress._replace(seconds=0)
        assert first.scores == second.scores
        for one, other in ((first.weights, second.weights), (first.training, second.training)):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "su", "maxout"])
def test_what_is_compiled_has_the_loss_and_the_gradients_of_what_is_not(
    activation: str, tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That they are finite, which is all that is looked at before a training, does not make them right."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    task = build(tiny, f"model.activation={activation}")
    batch, found = next(task.batches(0)), []
    task.model.train()
    for compiled in (False, True):
        if compiled:
            task.compile()
        task.model.zero_grad()
        total, _ = task.loss(batch)
        total.backward()  # type: ignore[no-untyped-call]
        gradients = {name: one.grad.clone() for name, one in task.model.named_parameters()}  # compiling adds to them
        found.append(gradients | {"loss": total.detach()})
    eager, other = found
    for name, expected in eager.items():
        torch.testing.assert_close(other[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_machine_without_a_compiler_trains(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    status, said = compiled(tiny["resnet"], Run(tmp_path / "run"), "fp32", tmp_path / "cache")
    assert status == 0
    assert "the model cannot be compiled here, and is trained as it is: " in said
    assert environment(tmp_path / "run")["compiled"] is False
