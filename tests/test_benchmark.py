"""Timing the parts of a step: in which settings, on what, and with what left out."""

import math
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from running import succeed
from torch import Tensor, nn

from dl7cli import device, tasks
from dl7cli.device import Runtime, precisions
from dl7cli.errors import UserError
from dl7cli.recipe import resolve
from dl7cli.tasks.classification import Classification
from dl7cli.tasks.translation import Translation
from dl7cli.training import optimisation
from dl7cli.training.benchmark import BATCHES, LAYOUTS, ROUNDS, SETTLING_STEPS, Measured, Setting, benchmark, soonest

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")
HERE = precisions(CPU.device)
"""Those of this machine: what runs as a command is timed in them."""


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that computes in bf16, or is taken for one: convolutions can be had in it everywhere."""
    monkeypatch.setattr(device, "_cpu_flags", set)


def build(tiny: dict[str, Path], *overrides: str) -> Classification:
    task = tasks.build(resolve(str(tiny["resnet"]), overrides).recipe, runtime=CPU)
    assert isinstance(task, Classification)
    return task


def test_each_setting_is_run_as_it_says_and_the_tasks_own_model_stays(
    tiny: dict[str, Path], bf16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    own_loss = Classification.loss

    def loss(self: Classification, batch: Any) -> tuple[Tensor, int]:
        order = torch.channels_last if self._memory_format is torch.channels_last else torch.contiguous_format
        tensors = [batch.images, *(weight for weight in self.model.parameters() if weight.ndim == 4)]
        assert all(one.is_contiguous(memory_format=order) for one in tensors)
        seen.add((self.runtime.precision, order, self._compiled is not None))
        assert self.model is not task.model
        return own_loss(self, batch)

    def compiled(model: nn.Module, **settings: Any) -> nn.Module:
        return nn.Sequential(model)

    monkeypatch.setattr(Classification, "loss", loss)
    monkeypatch.setattr(torch, "compile", compiled)
    task = build(tiny)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    found = benchmark(task, seconds=0.001)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    everything = {(p, layout, c) for p in ("fp32", "bf16") for layout in LAYOUTS.values() for c in (False, True)}
    assert seen == everything
    assert len(found.measured) == len(everything)
    assert all((one.compile_seconds is not None) is one.setting.compiled for one in found.measured)
    assert all(math.isfinite(one.rate) for one in found.measured)


def test_the_work_of_muon_is_timed_though_the_weights_stay(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, seen = optimisation.orthogonalise, []

    def orthogonalise(matrices: Tensor) -> Tensor:
        seen.append(len(matrices))
        return own(matrices)

    monkeypatch.setattr(optimisation, "orthogonalise", orthogonalise)
    task = build(tiny, "optim.name=muon", "training.compile=never")
    filters = sum(weight.ndim == 4 and weight.shape[1] > 3 for weight in task.model.parameters())
    found = benchmark(task, seconds=0.001)
    steps = len(found.measured) * (ROUNDS + SETTLING_STEPS)
    assert sum(seen) >= steps * filters > 0


def test_steps_are_those_of_the_last_epoch(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images have their full size, and the moving average of its weights is kept."""
    sizes, averaged = set(), []
    own_loss, own_update = Classification.loss, optimisation.WeightAverage.update

    def loss(self: Classification, batch: Any) -> tuple[Tensor, int]:
        sizes.add(batch.images.shape[-1])
        return own_loss(self, batch)

    def update(self: optimisation.WeightAverage, step: int, skipped: Tensor | None = None) -> None:
        averaged.append(step)
        own_update(self, step, skipped)

    monkeypatch.setattr(Classification, "loss", loss)
    monkeypatch.setattr(optimisation.WeightAverage, "update", update)
    small = ("data.image_size=16", "training.small_size=8", "training.small_part=0.6")
    found = benchmark(build(tiny, *small, "training.ema_decay=0.9", "training.compile=never"), seconds=0.001)
    assert sizes == {16}
    assert len(averaged) >= len(found.measured) * (ROUNDS + SETTLING_STEPS)


def test_a_translator_is_timed_on_batches_whose_shapes_it_has_met(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks.build(
        resolve(str(tiny["seq2seq"]), ["training.epochs=3", "training.batch_tokens=16"]).recipe, runtime=CPU
    )
    assert isinstance(task, Translation)
    seen: list[Any] = []
    own_loss = Translation.loss
    monkeypatch.setattr(Translation, "loss", lambda self, batch: (seen.append(batch.pairs), own_loss(self, batch))[1])
    benchmark(task, seconds=0.001)
    expected = [batch.pairs for batch in islice(task.batches(2), BATCHES)]
    ways = len(HERE)
    assert len(expected) == BATCHES
    assert seen[: ways * BATCHES] == ways * expected, "untimed"
    assert len(seen) >= ways * (BATCHES + ROUNDS)
    assert all(pairs in expected for pairs in seen)


def test_what_cannot_be_compiled_is_left_out_and_said(
    tiny: dict[str, Path], bf16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(model: nn.Module, **settings: Any) -> nn.Module:
        raise RuntimeError("no compiler\nand much advice")

    monkeypatch.setattr(torch, "compile", compiled)
    found = benchmark(build(tiny), seconds=0.001)
    assert [one.setting.compiled for one in found.measured] == [False] * 4
    assert found.notes[0] == "fp32, channels-last, compiled: cannot be compiled here: no compiler"
    assert len(found.notes) == 4
    with pytest.raises(UserError, match="cannot be compiled here: no compiler") as refused:
        benchmark(build(tiny, "training.compile=always"), seconds=0.001)
    assert refused.value.hint == "use `--set training.compile=never`"


def test_bf16_is_timed_where_the_cpu_has_it_and_its_lack_is_said(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for flags, timed, notes in (
        ({"avx2"}, ["fp32"], ["bf16: not timed, as this CPU has no instructions that it needs"]),
        ({"avx2", "avx512bw"}, ["fp32", "bf16"], []),
    ):
        monkeypatch.setattr(device, "_cpu_flags", lambda flags=flags: flags)
        found = benchmark(build(tiny, "training.compile=never"), seconds=0.001)
        assert [one.setting.precision for one in found.measured] == [name for name in timed for _ in LAYOUTS]
        assert found.notes == notes


# The command


SMALL_BENCH = ("--set", "model.depth=8", "--set", "training.batch_size=16", "--seconds", "0.01", "--json")


def check_bench(document: dict[str, Any]) -> None:
    """Every number is one, rates and times of a step agree, and the choice is the fastest of those that train."""
    results = document["results"]
    assert document["rounds"] == 5
    for result in results:
        assert list(result["step_ms"]) == ["data", "forward", "backward", "optimiser"]
        assert all(value > 0 for value in result["step_ms"].values())
        assert len(result["rates"]) == 5
        assert result["rate"] == sorted(result["rates"])[2]
    best = max((one for one in results if one["layout"] != "nchw"), key=lambda result: result["rate"])
    assert document["chosen"] == {key: best[key] for key in ("precision", "layout", "compiled")}
    said = float(document["reason"].split()[0].replace(",", ""))
    assert said == pytest.approx(best["rate"], abs=1)


def test_bench_times_a_classifier_in_every_setting(tmp_path: Path) -> None:
    flags = ("--data", "builtin:shapes", "--set", "training.compile=never", "--device", "cpu", *SMALL_BENCH)
    document = succeed("bench", "resnet", *flags, cwd=tmp_path).document
    check_bench(document)
    assert (document["task"], document["data"], document["unit"]) == ("classification", "builtin:shapes", "images/s")
    found = [(one["precision"], one["layout"], one["compiled"], one["compile_seconds"]) for one in document["results"]]
    assert sorted(found) == [
        (precision, layout, False, None) for precision in sorted(HERE) for layout in ("channels-last", "nchw")
    ]
    assert not list(tmp_path.iterdir()), "no run is made"


@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [
        ("seq2seq", "embedding_width encoder_width decoder_width"),
        ("convs2s", "embedding_width width"),
        ("transformer-tiny", "width feedforward_width"),
    ],
)
def test_bench_times_a_translator_in_every_precision(recipe: str, sizes: str, tmp_path: Path) -> None:
    flags = [text for name in sizes.split() for text in ("--set", f"model.{name}=16")]
    flags += ["--set", "data.vocabulary_size=1500", "--data", "builtin:phrases", "--device", "cpu"]
    flags += ["--set", "training.batch_tokens=256", "--seconds", "0.01"]
    document = succeed("bench", recipe, *flags, "--json", cwd=tmp_path).document
    check_bench(document)
    assert document["unit"] == "target tokens/s"
    found = [(one["precision"], one["layout"], one["compiled"]) for one in document["results"]]
    assert found == [(precision, None, False) for precision in HERE]


def test_the_table_of_bench_names_the_chosen(tmp_path: Path) -> None:
    flags = ("--data", "builtin:shapes", "--set", "training.compile=never", "--device", "cpu", *SMALL_BENCH[:-1])
    shown = succeed("bench", "resnet", *flags, cwd=tmp_path)
    header, *rows, last, _ = shown.out.splitlines()
    assert header.split()[:3] == ["PRECISION", "LAYOUT", "COMPILED"]
    rates = {tuple(row.split()[:2]): float(row.split()[-1].replace(",", "")) for row in rows}
    assert len(rates) == len(HERE) * len(LAYOUTS)
    named = re.fullmatch(r"chosen: (\S+), channels-last: .*", last)
    assert named is not None
    assert rates[named[1], "channels-last"] == max(rate for (_, layout), rate in rates.items() if layout != "nchw")


@pytest.mark.parametrize(
    ("keys", "bound"),
    [((), "about"), (("training.small_size=16",), "at most"), (("training.patience=3",), "at most")],
)
def test_bench_says_how_long_the_training_takes(keys: tuple[str, ...], bound: str, tmp_path: Path) -> None:
    """By the time of its steps, of which an epoch of 2,560 images has 160."""
    changes = [text for key in ("training.compile=never", "training.epochs=100", *keys) for text in ("--set", key)]
    flags = ("--data", "builtin:shapes", *changes, "--device", "cpu", *SMALL_BENCH[:-1])
    last = succeed("bench", "resnet", *flags, cwd=tmp_path).out.splitlines()[-1]
    assert re.fullmatch(rf"16,000 steps take {bound} \S+( \d\dm)?, without validations", last)
    document = succeed("bench", "resnet", *flags, "--json", cwd=tmp_path).document
    assert document["steps"] == 16_000
    for one in document["results"]:
        assert one["training_seconds"] == pytest.approx(16 * sum(one["step_ms"].values()), rel=0.01)


def test_compilation_is_a_part_of_the_training() -> None:
    seconds = {"data": 0.25, "forward": 0.5, "backward": 1.0, "optimiser": 0.25}
    assert Measured(Setting("fp32", None, True), 1.0, [], seconds, 7.0).training_seconds(10) == 27
    assert Measured(Setting("fp32", None, False), 1.0, [], seconds, None).training_seconds(10) == 20


def test_bench_chooses_what_is_over_soonest(tiny: dict[str, Path]) -> None:
    """A compilation counts, for as many steps as the recipe has; nchw is never trained."""
    task = build(tiny)
    images = task.splits()["train"] * task.recipe.training.epochs
    eager = Measured(Setting("fp32", "channels-last", False), images / 10, [], {}, None)
    other = Measured(Setting("fp32", "nchw", False), images / 4, [], {}, None)
    for seconds, compiled in ((4.0, True), (6.0, False)):
        quick = Measured(Setting("fp32", "channels-last", True), images / 5, [], {}, seconds)
        assert soonest([eager, quick, other], task).setting == Setting("fp32", "channels-last", compiled)


def test_bench_times_the_built_in_set_without_other_data(tmp_path: Path) -> None:
    flags = ("--offline", "--set", "training.compile=never", "--device", "cpu", *SMALL_BENCH)
    shown = succeed("bench", "resnet", *flags, cwd=tmp_path)
    assert shown.document["data"] == "builtin:shapes"
    assert "timing steps on the built-in set builtin:shapes instead" in shown.err
    assert "dl7 bench resnet --data FOLDER" in shown.err
