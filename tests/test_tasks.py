"""What both tasks promise: batches that depend on seed and epoch alone, the same validation set for every seed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dl7cli import tasks
from dl7cli.checkpoint import Checkpoint, Progress
from dl7cli.data.dividing import kept_back
from dl7cli.data.transfer import moved
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.recipe import resolve
from dl7cli.tasks.translation import Translation

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")
KINDS = ("resnet", "seq2seq")


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(
        torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
        for first, second in zip(one, other, strict=True)
    )


# Batches


@pytest.mark.parametrize("kind", KINDS)
def test_batches_depend_on_seed_and_epoch_alone(kind: str, build: Callable[..., Any]) -> None:
    task, other = build(kind), build(kind)
    first = list(task.batches(1))
    assert len(first) == task.steps(1) > 2
    torch.rand(100)
    list(other.batches(0)), other.validate()  # what came before makes no difference
    assert all(same(one, two) for one, two in zip(first, other.batches(1), strict=True))
    epochs_and_seeds = [task.batches(0), task.batches(2), build(kind, seed=2).batches(1)]
    for others in epochs_and_seeds:
        assert not all(one[0].shape == two[0].shape and same(one, two) for one, two in zip(first, others, strict=False))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_from_a_number_on_are_the_rest(kind: str, build: Callable[..., Any]) -> None:
    every = list(build(kind).batches(2))
    for start in range(len(every) + 1):
        rest = list(build(kind).batches(2, start))
        assert len(rest) == len(every) - start
        assert all(same(one, two) for one, two in zip(rest, every[start:], strict=True))


@pytest.mark.gpu
def test_what_is_moved_to_a_gpu_is_there_in_the_order_of_the_calls() -> None:
    device = torch.device("cuda", 0)
    rows = [torch.full((1000,), number) for number in range(100)]
    assert [moved(row, device).sum().item() for row in rows] == [1000 * number for number in range(100)]


# Validation kept back


@pytest.mark.parametrize(("count", "fraction", "kept"), [(40, 0.05, 2), (40, 0.001, 1), (2, 0.6, 1), (50, 0.1, 5)])
def test_what_is_kept_for_validation_is_not_trained_on(count: int, fraction: float, kept: int) -> None:
    rest, first = kept_back(count, fraction, "pairs")
    assert len(first) == kept
    assert sorted([*rest, *first]) == list(range(count))
    assert list(rest) == sorted(rest)
    assert list(first) == sorted(first)


@pytest.mark.parametrize("repeated", [False, True])
def test_it_is_said_where_sources_kept_for_validation_are_trained_on_too(
    repeated: bool, tiny: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "pairs.tsv"
    rows = [f"{number // 2 if repeated else number} 1\t{number} 1\n" for number in range(40)]
    file.write_text("".join(rows))
    changes = ["data.validation_fraction=0.05", "data.vocabulary_size=50", "data.vocabulary=word"]
    task = tasks.build(resolve(str(tiny["seq2seq"]), changes, data=str(file)).recipe, runtime=CPU)
    assert isinstance(task, Translation)
    trained = {source for source, _ in task.pairs.splits["train"]}
    met = sum(source in trained for source, _ in task.pairs.splits["validation"])
    told = [note for note in task.notes if "trained on, too" in note]
    assert (met > 0) == repeated
    expected = f"{met} of those kept have a source that is trained on, too: they score too well"
    assert told == ([expected] if repeated else [])
    few = resolve(str(tiny["seq2seq"]), [*changes, "data.train_examples=1"], data=str(file)).recipe
    other = tasks.build(few, task.assets, runtime=CPU)
    assert isinstance(other, Translation)
    trained = {source for source, _ in other.pairs.splits["train"]}
    met = sum(source in trained for source, _ in other.pairs.splits["validation"])
    assert sum("trained on, too" in note for note in other.notes) == (met > 0)
    evaluated = tasks.build(task.recipe, task.assets, runtime=CPU, for_training=False)
    assert isinstance(evaluated, Translation)
    assert len(evaluated.pairs.split("test")) == 40
    assert not any("trained on, too" in note for note in evaluated.notes)


def test_no_pair_or_image_is_left_to_train_on() -> None:
    with pytest.raises(UserError, match="1 training pairs are too few"):
        kept_back(1, 0.1, "pairs")
    with pytest.raises(UserError, match="2 training images are too few"):
        kept_back(2, 0.9, "images")


def examples(task: Any, split: str) -> list[tuple[Any, Any]]:
    if isinstance(task, Translation):
        return list(task.pairs.splits[split])
    found = task.images.splits[split]
    return [(image.tobytes(), int(label)) for image, label in zip(found.images, found.labels, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_validation_set_is_the_same_for_every_seed(kind: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "data"
    source = tiny[kind].parent / {"resnet": "images", "seq2seq": "pairs"}[kind]
    shutil.copytree(source, data, ignore=lambda _, names: [name for name in names if name.startswith("validation")])
    recipes = [resolve(str(tiny[kind]), data=str(data), seed=seed).recipe for seed in (1, 2)]
    one, two = (tasks.build(recipe, runtime=CPU) for recipe in recipes)
    total, kept = {"resnet": (26, 3), "seq2seq": (40, 2)}[kind]
    assert one.splits() == two.splits() == {"train": total - kept, "validation": kept, "test": one.splits()["test"]}
    assert one.digest == two.digest
    whole, parts = examples(tasks.build(resolve(str(tiny[kind])).recipe, runtime=CPU), "train"), []
    for split in ("train", "validation"):
        assert examples(one, split) == examples(two, split)
        parts += examples(one, split)
    assert sorted(parts) == sorted(whole), "each once, with its own label or target"
    what = {"resnet": "images", "seq2seq": "pairs"}[kind]
    assert f"kept for validation: {kept} of {total} {what} of train" in one.notes


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_the_training_data_is_that_of_every_seed_and_of_larger_parts(
    kind: str, build: Callable[..., Any]
) -> None:
    whole = build(kind)
    parts = {number: examples(build(kind, f"data.train_examples={number}"), "train") for number in (1, 9, 20)}
    assert [len(part) for part in parts.values()] == [1, 9, 20]
    assert set(parts[1]) < set(parts[9]) < set(parts[20]) < set(examples(whole, "train"))
    assert examples(build(kind, "data.train_examples=9", "training.seed=2"), "train") == parts[9]
    part, total = build(kind, "data.train_examples=20"), whole.splits()["train"]
    assert part.splits() == {**whole.splits(), "train": 20}
    assert part.digest == whole.digest, "of what there is"
    assert part.digest_of("train") != whole.digest_of("train")
    assert any(note.startswith(f"trained on: 20 of {total} ") for note in part.notes)
    assert build(kind, "data.train_examples=1000").splits() == whole.splits()


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_that_is_not_there_is_an_error(kind: str, build: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="has no split `valid`") as refused:
        build(kind).evaluate("valid")
    assert refused.value.hint == "it has train, validation, test"


# The model


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize(
    ("kind", "overrides"), [("resnet", []), ("resnet", ["training.mixup=0.5"]), ("seq2seq", [])], ids=str
)
def test_parts_of_a_batch_make_the_gradient_of_the_whole(
    kind: str, overrides: list[str], parts: int, build: Callable[..., Any]
) -> None:
    task = build(kind, *overrides)
    task.model.double().eval()  # statistics of a batch and dropout do depend on how it is cut
    batch = next(batch for batch in task.batches(0) if len(batch[0]) >= parts)
    if kind == "resnet":
        batch = batch._replace(images=batch.images.double())
    cut = [task.part(batch, index, parts) for index in range(parts)]
    assert [len(one[0]) for one in cut] == [len(batch[0][index::parts]) for index in range(parts)]
    assert batch.whole == task.loss(batch)[1] == sum(one.whole for one in cut)
    if kind == "seq2seq":
        for one in cut:
            steps = one.source.shape[1], one.target.shape[1]
            longest = int(one.lengths.max()), int((one.target != 0).sum(dim=1).max())
            assert steps == tuple(length + length % 2 for length in longest), "padded no more than needed"

    def gradients(cut: list[Any]) -> list[Tensor]:
        task.model.zero_grad()
        for one in cut:
            (task.loss(one)[0].double() / batch.whole).backward()
        return [parameter.grad.clone() for parameter in task.model.parameters() if parameter.grad is not None]

    for one, two in zip(gradients([batch]), gradients(cut), strict=True):
        # The loss itself is taken in float32.
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)


def test_weights_of_another_model_are_refused(build: Callable[..., Any]) -> None:
    small, deep = build("resnet"), build("resnet", "model.depth=14")
    saved = Checkpoint(deep.recipe, deep.assets, deep.model.state_dict(), {}, Progress(), {})
    with pytest.raises(UserError, match="do not fit its recipe"):
        tasks.restore(small, saved)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_a_function_of_the_seed(kind: str, build: Callable[..., Any]) -> None:
    one, same_seed, other = (build(kind, seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same_seed[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
