"""Tasks: batches, losses and scores against slow answers made from the same numbers one example at a time."""

import copy
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dl7cli import checkpoint, metrics, tasks
from dl7cli.checkpoint import Checkpoint, Progress
from dl7cli.data import augmentation
from dl7cli.data.images import ImageSet, read_images
from dl7cli.data.transfer import moved
from dl7cli.data.vocabulary import BOS, EOS, PAD
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.metrics import bleu
from dl7cli.recipe import resolve
from dl7cli.tasks import Task, classification, sentences, translation
from dl7cli.tasks.classification import Classification
from dl7cli.tasks.translation import Translation

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")
KINDS = ("resnet", "seq2seq")


@pytest.fixture
def build(tiny: dict[str, Path]) -> Callable[..., Any]:
    """`build(kind, *overrides)` is a task of a tiny recipe."""

    def make(kind: str, *overrides: str, seed: int | None = None) -> Task:
        return tasks.build(resolve(str(tiny[kind]), overrides, seed=seed).recipe, runtime=CPU)

    return make


def save(task: Task, folder: Path) -> Path:
    checkpoint.save(folder, Checkpoint(task.recipe, task.assets, task.model.state_dict(), {}, Progress(), {}))
    return folder


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(
        torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
        for first, second in zip(one, other, strict=True)
    )


# Batches of both


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


def test_every_image_is_used_once_an_epoch(build: Callable[..., Any], tiny: dict[str, Path]) -> None:
    task = build("resnet", "data.crop_padding=0", "data.flip=none")
    mean, deviation = np.array(task.assets["mean"]), np.array(task.assets["deviation"])
    files = (tiny["resnet"].parent / "images" / "train").rglob("*.png")
    wanted = Counter(
        (np.asarray(Image.open(file)).tobytes(), task.assets["classes"].index(file.parent.name)) for file in files
    )
    for epoch in (0, 1):
        seen: Counter[Any] = Counter()
        for batch in task.batches(epoch):
            assert len(batch.images) <= 8
            pixels = (batch.images.permute(0, 2, 3, 1).numpy() * deviation + mean) * 255
            assert np.abs(pixels - pixels.round()).max() < 1e-3
            for image, label in zip(pixels.round().astype(np.uint8), batch.labels.tolist(), strict=True):
                seen[image.tobytes(), label] += 1
        assert seen == wanted


def test_every_pair_is_used_once_an_epoch_and_batches_are_bounded(build: Callable[..., Any]) -> None:
    task = build("seq2seq", "training.batch_tokens=40")
    wanted = Counter(
        (tuple(task.pairs.source_vocabulary.encode(source)), tuple(task.pairs.source_vocabulary.encode(target)))
        for source, target in task.pairs.splits["train"]
    )
    for epoch in (0, 1):
        seen: Counter[Any] = Counter()
        for batch in task.batches(epoch):
            assert max(batch.source.numel(), batch.target.numel()) <= 40
            assert batch.source.shape[1] == batch.lengths.max()
            for source, length, previous, target in zip(*batch[:4], strict=True):
                words = target[target != PAD].tolist()
                assert source[length - 1] == EOS == words[-1]
                assert not source[length:].any()
                assert previous[: len(words)].tolist() == [BOS, *words[:-1]]
                assert not previous[len(words) :].any()
                seen[tuple(source[: length - 1].tolist()), tuple(words[:-1])] += 1
        assert seen == wanted


@pytest.mark.parametrize("tokens", [1, 7, 16, 50, 10_000])
def test_batches_are_filled_as_far_as_they_may_be(tokens: int) -> None:
    random = np.random.default_rng(tokens)
    lengths = random.integers(1, 20, 60)
    order = random.permutation(60)
    batches = sentences.fill(order, lengths, tokens)
    assert np.concatenate(batches).tolist() == order.tolist()
    for number, batch in enumerate(batches):
        assert len(batch) == 1 or lengths[batch].max() * len(batch) <= tokens
        if number + 1 < len(batches):  # the next one did not fit in
            more = np.append(batch, batches[number + 1][0])
            assert lengths[more].max() * len(more) > tokens


def test_pairs_beyond_the_limit_are_left_out_and_counted(build: Callable[..., Any]) -> None:
    task = build("seq2seq", "data.max_length=8")
    list(task.batches(0))
    assert task.notes == []  # no more than seven digits

    def limited(limit: int) -> Task:
        """The same task with a limit lower than a recipe may set."""
        data = task.recipe.data.model_copy(update={"max_length": limit})
        return tasks.build(task.recipe.model_copy(update={"data": data}), task.assets, runtime=CPU)

    encode = task.pairs.source_vocabulary.encode
    short = [pair for pair in task.pairs.splits["train"] if max(len(encode(side)) for side in pair) <= 4]
    shorter = limited(4)
    assert sum(len(batch.lengths) for batch in shorter.batches(1)) == len(short) < 40
    assert shorter.notes == [f"{40 - len(short)} training pairs longer than 4 subwords are left out"]
    with pytest.raises(UserError, match="is within 0 subwords"):
        limited(0).steps(2)


# Validation kept back


@pytest.mark.parametrize(("count", "fraction", "kept"), [(40, 0.05, 2), (40, 0.001, 1), (2, 0.6, 1), (50, 0.1, 5)])
def test_what_is_kept_for_validation_is_not_trained_on(count: int, fraction: float, kept: int) -> None:
    pairs = [(f"source {n}", f"target {n}") for n in range(count)]
    images = ImageSet(np.arange(count * 12, dtype=np.uint8).reshape(count, 2, 2, 3), np.arange(count))
    rest, first = sentences._carve(pairs, fraction)
    assert len(first) == kept
    assert sorted(rest + first) == sorted(pairs)
    other_rest, other = classification._carve(images, fraction)
    assert len(other.labels) == kept
    assert sorted([*other.labels, *other_rest.labels]) == list(range(count))
    for part in (other_rest, other):
        assert np.array_equal(part.images, images.images[part.labels])
    assert sorted(pairs[label] for label in other.labels) == sorted(first)


def test_no_pair_or_image_is_left_to_train_on() -> None:
    with pytest.raises(UserError, match="1 training pairs are too few"):
        sentences._carve([("a", "b")], 0.1)
    with pytest.raises(UserError, match="2 training images are too few"):
        classification._carve(ImageSet(np.zeros((2, 2, 2, 3), np.uint8), np.zeros(2, np.int64)), 0.9)


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
    what = {"resnet": "images", "seq2seq": "pairs"}[kind]
    assert f"{kept} {what} of train are kept for validation" in one.notes


# Changing images


def test_training_batches_are_changed_and_evaluation_is_not(build: Callable[..., Any]) -> None:
    plain = build("resnet", "data.crop_padding=0", "data.flip=none")
    changing = build("resnet")
    pairs = list(zip(plain.batches(0), changing.batches(0), strict=True))
    assert all(torch.equal(one.labels, two.labels) for one, two in pairs)
    assert not any(torch.equal(one.images, two.images) for one, two in pairs)
    assert plain.evaluate("test") == changing.evaluate("test")


def test_images_are_normalised() -> None:
    images = torch.randint(256, (5, 4, 3, 3), dtype=torch.uint8)
    mean, deviation = (0.2, 0.5, 0.7), (0.3, 0.1, 0.25)
    found = augmentation.Normalisation(mean, deviation, torch.device("cpu"))(images)
    expected = (images.numpy().astype(np.float64) / 255 - mean) / deviation
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert np.abs(found.permute(0, 2, 3, 1).numpy() - expected).max() < 1e-5


@pytest.mark.gpu
def test_what_is_moved_to_a_gpu_is_there_in_the_order_of_the_calls() -> None:
    device = torch.device("cuda", 0)
    rows = [torch.full((1000,), number) for number in range(100)]
    assert [moved(row, device).sum().item() for row in rows] == [1000 * number for number in range(100)]


def test_training_images_have_mean_zero_and_deviation_one(build: Callable[..., Any]) -> None:
    task = build("resnet", "data.crop_padding=0", "data.flip=none")
    images = torch.cat([batch.images for batch in task.batches(0)])
    assert images.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (images.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-4


# Losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_cross_entropy_summed(smoothing: float, build: Callable[..., Any]) -> None:
    task = build("resnet", f"training.label_smoothing={smoothing}")
    batch = next(task.batches(0))
    task.model.eval()
    total, count = task.loss(batch)
    assert count == 8
    expected = 0.0
    for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
        scores = task.model(image[None])[0].double().log_softmax(0)
        expected -= ((1 - smoothing) * scores[label] + smoothing * scores.mean()).item()
    assert total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_padding_does_not_change_a_sentences_loss(smoothing: float, build: Callable[..., Any]) -> None:
    task = build("seq2seq", f"training.label_smoothing={smoothing}", "training.batch_tokens=400")
    task.model.eval()
    ids = [([5], [6, 7, 8, 9]), ([5, 6, 7, 8, 9, 10, 11], [4]), ([9, 4], [7, 7])]
    total, count = task.loss(task.pairs.batch(ids))
    singles = [task.loss(task.pairs.batch([pair])) for pair in ids]
    assert count == sum(number for _, number in singles) == 5 + 2 + 3
    assert total.item() == pytest.approx(sum(loss.item() for loss, _ in singles), rel=1e-5)
    expected = 0.0
    for source, target in ids:  # and word by word
        context, state = task.model.encode(torch.tensor([[*source, EOS]]), torch.tensor([len(source) + 1]))
        for previous, word in zip([BOS, *target], [*target, EOS], strict=True):
            scores, state, _ = task.model.step(torch.tensor([previous]), context, state)
            expected -= ((1 - smoothing) * scores[0, word] + smoothing * scores[0].mean()).item()
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_the_coverage_loss_is_the_overlap_with_what_was_looked_at_before(build: Callable[..., Any]) -> None:
    keys = ("model.attention=additive", "model.coverage=true")
    without, task = build("seq2seq", *keys), build("seq2seq", *keys, "training.coverage_weight=0.7")
    ids = [([5, 8, 4], [6, 7, 8, 9]), ([5, 6, 7, 8, 9, 10, 11], [4]), ([9, 4], [7, 7])]
    batch = task.pairs.batch(ids)
    expected = 0.0
    for source, target in ids:
        context, state = task.model.eval().encode(torch.tensor([[*source, EOS]]), torch.tensor([len(source) + 1]))
        covered = [0.0] * (len(source) + 1)
        for previous in [BOS, *target]:
            _, state, looked = task.model.step(torch.tensor([previous]), context, state)
            weights = looked[0].tolist()
            expected += sum(min(pair) for pair in zip(weights, covered, strict=True))
            covered = [sum(pair) for pair in zip(weights, covered, strict=True)]
    assert expected > 1
    without.model.eval()
    added = task.loss(batch)[0] - without.loss(batch)[0]
    assert added.item() == pytest.approx(0.7 * expected, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_two_half_batches_make_the_gradient_of_the_whole(kind: str, build: Callable[..., Any]) -> None:
    task = build(kind)
    task.model.double().eval()  # statistics of a batch and dropout do depend on how it is cut
    batch = next(task.batches(0))
    if kind == "resnet":
        batch = batch._replace(images=batch.images.double())
    halves = []
    for side in (slice(0, 3), slice(3, None)):
        half = type(batch)(*(part[side] for part in batch if isinstance(part, torch.Tensor)))
        if kind == "seq2seq":  # the places of real words count through the batch
            half = half._replace(real=(half.target != PAD).flatten().nonzero().flatten())
        halves.append(half)

    def gradients(parts: list[Any]) -> list[Tensor]:
        task.model.zero_grad()
        count = sum(task.loss(part)[1] for part in parts)
        for part in parts:
            (task.loss(part)[0].double() / count).backward()
        return [parameter.grad.clone() for parameter in task.model.parameters() if parameter.grad is not None]

    for one, two in zip(gradients([batch]), gradients(halves), strict=True):
        # The loss itself is taken in float32.
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)


# Classifying


def test_accuracy_is_the_share_of_images_whose_greatest_score_is_their_label(build: Callable[..., Any]) -> None:
    task = build("resnet")
    for _ in range(3):  # so that running statistics are not those of the start
        for batch in task.batches(0):
            task.model.train()(batch.images)
    data = task._splits()["test"]
    task.model.eval()
    right = 0
    for image, label in zip(data.images, data.labels, strict=True):
        pixels = (torch.tensor(image) / 255 - torch.tensor(task.assets["mean"])) / torch.tensor(
            task.assets["deviation"]
        )
        right += int(task.model(pixels.permute(2, 0, 1)[None]).argmax()) == label
    task.model.train()
    scores = task.evaluate("test")
    assert (scores.primary, scores.examples, scores.signature) == ("accuracy", 7, None)
    assert scores.score == right / 7
    assert task.model.training, "the mode is what it was"


def test_evaluation_does_not_depend_on_its_batches(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    task = build("resnet")
    whole = task.evaluate("train")
    monkeypatch.setattr(classification, "EVALUATION_BATCH", 3)
    parts = task.evaluate("train")
    assert parts.values == whole.values
    assert parts.details["confusion"] == whole.details["confusion"]
    loss = whole.details["negative_log_likelihood"]
    assert parts.details["negative_log_likelihood"] == pytest.approx(loss, rel=1e-6)


def test_scores_are_the_mean_over_an_image_and_its_mirror_image(build: Callable[..., Any]) -> None:
    plain, both = build("resnet"), build("resnet", "evaluation.flip=true")
    for task in (plain, both):
        for batch in plain.batches(0):  # so that running statistics are not those of the start
            task.model.train()(batch.images)
    images = torch.tensor(plain._splits()["test"].images)
    found = both._scores(images)
    model = copy.deepcopy(plain.model).double().eval()
    for number, image in enumerate(images.numpy()):
        passes = []
        for pixels in (image, image[:, ::-1]):
            values = (pixels / 255 - plain.assets["mean"]) / plain.assets["deviation"]
            with torch.no_grad():
                passes.append(model(torch.tensor(values).permute(2, 0, 1)[None])[0])
        assert (passes[0] - passes[1]).abs().max() > 1e-3, "a mirror image has scores of its own"
        assert (found[number] - (passes[0] + passes[1]) / 2).abs().max() < 1e-5
    assert torch.equal(both._scores(images.flip(2)), found)
    assert [task.evaluate("test").details["flip"] for task in (plain, both)] == [False, True], "a score says so"
    assert not torch.equal(plain._scores(images.flip(2)), plain._scores(images))


def test_validation_test_and_classifying_all_see_mirror_images(
    build: Callable[..., Any], tiny: dict[str, Path]
) -> None:
    task = build("resnet", "evaluation.flip=true")
    file = next((tiny["resnet"].parent / "images" / "test").rglob("*.png"))
    seen: list[Tensor] = []
    task.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for use in (task.validate, lambda: task.evaluate("test"), lambda: task.classify([file], 3)):
        seen.clear()
        use()
        assert len(seen) == 2
        assert torch.equal(seen[0].flip(3), seen[1])
    assert resolve(str(tiny["resnet"])).recipe.evaluation.flip is False, "it is asked for"


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_that_is_not_there_is_an_error(kind: str, build: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="has no split `valid`") as refused:
        build(kind).evaluate("valid")
    assert refused.value.hint == "it has train, validation, test"


def test_images_are_classified_without_the_data(tiny: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "images"
    shutil.copytree(tiny["resnet"].parent / "images", data)
    recipe = resolve(str(tiny["resnet"]), data=str(data)).recipe
    task = tasks.build(recipe, runtime=CPU)
    assert isinstance(task, Classification)
    folder = save(task, tmp_path / "checkpoint")
    shutil.rmtree(data)
    files = sorted((tiny["resnet"].parent / "images" / "test").rglob("*.png"))
    found = tasks.load(folder, runtime=CPU)
    assert isinstance(found, Classification)
    answers = found.classify(files, 2)
    assert len(answers) == len(files) == 7
    for answer, file in zip(answers, files, strict=True):
        image = torch.from_numpy(np.array(Image.open(file)))[None]
        task.model.eval()
        normalise = augmentation.Normalisation(task.assets["mean"], task.assets["deviation"], CPU.device)
        scores = task.model(normalise(image))[0].double().softmax(0)
        assert [value for _, value in answer] == pytest.approx(scores.sort(descending=True).values[:2].tolist())
        assert task.assets["classes"].index(answer[0][0]) == int(scores.argmax())
    assert [len(answer) for answer in found.classify(files[:1], 99)] == [3], "no more than there are"
    assert sum(value for _, value in found.classify(files[:1], 99)[0]) == pytest.approx(1)
    with pytest.raises(UserError, match="there is no file or folder"):
        found.evaluate("test")


def test_odd_files_are_classified_as_if_they_were_data(build: Callable[..., Any], tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "grey.png": Image.fromarray(pixels[:, :, 0]),
        "alpha.png": Image.fromarray(np.concatenate([pixels, pixels[:, :, :1]], axis=2)),
        "deep.png": Image.fromarray(pixels[:, :, 1].astype(np.uint16) * 256),
        "turned.jpg": Image.fromarray(pixels),
        "wide.png": Image.fromarray(random.integers(0, 256, (20, 50, 3), dtype=np.uint8)),
        "palette.gif": Image.fromarray(pixels).convert("P"),
    }
    folder = tmp_path / "data" / "train" / "a"
    folder.mkdir(parents=True)
    for name, image in files.items():
        image.save(folder / name, **({"exif": turned, "quality": 95} if name.endswith("jpg") else {}))
    task = build("resnet")
    data = read_images(str(tmp_path / "data"), image_size=8).splits["train"].images
    answers = task.classify(sorted(folder.iterdir()), 3)
    model = copy.deepcopy(task.model).double().eval()
    for image, answer in zip(data, answers, strict=True):
        values = torch.tensor((image / 255 - task.assets["mean"]) / task.assets["deviation"])
        expected = model(values.permute(2, 0, 1)[None])[0].softmax(0)
        named = dict(zip(task.assets["classes"], expected.tolist(), strict=True))
        assert dict(answer) == pytest.approx(named, abs=1e-5)
    assert len({tuple(answer) for answer in answers}) == len(files), "or the test could not tell them apart"


def test_all_files_are_read_before_any_is_scored(
    build: Callable[..., Any], tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = build("resnet")
    good = next((tiny["resnet"].parent / "images" / "test").rglob("*.png"))
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    monkeypatch.setattr(task, "_scores", None)
    with pytest.raises(UserError, match=r"^`.*text\.png` is not an image that can be read$") as one:
        task.classify([good, tmp_path / "text.png", good], 3)
    assert one.value.hint is not None
    assert "PNG" in one.value.hint
    bad = [tmp_path / "missing.png", tmp_path / "text.png", tmp_path]
    with pytest.raises(UserError) as several:
        task.classify([good, *bad], 3)
    first, *rest = several.value.message.splitlines()
    assert first == "3 of 4 files cannot be classified:"
    assert [line.split("`")[1] for line in rest] == [str(path) for path in bad]
    assert several.value.hint == one.value.hint


# Translating


def confident(task: Translation) -> Translation:
    """A model whose answers differ from sentence to sentence; one fresh from its seed says nearly nothing."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        task.model.embedding.weight[PAD] = 0
        task.model.output_bias[EOS] -= 4
    return task


LINES = ["1 2 3 4 5", "7", "", "0 0", "  9 8 1  ", "   ", "4 4 4 4", "1 3 5 7 9 2 4 6", "2", "5 6"]


@pytest.mark.parametrize(
    ("n_best", "changes"),
    [
        (1, {"beam": 1}),
        (1, {"beam": 3}),
        (3, {"beam": 3, "length_normalisation": "average", "min_length": 4}),
        (3, {"beam": 3, "coverage_penalty": 0.2, "no_repeat_ngram": 2, "max_length_ratio": 1.0}),
        (3, {"method": "sample", "top_k": 9, "temperature": 0.5}),
    ],
)
def test_a_translation_does_not_depend_on_its_neighbours(
    n_best: int, changes: dict[str, Any], build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = confident(build("seq2seq"))
    decoding = task.recipe.decoding.updated(**changes)

    def translate(lines: list[str], first_line: int = 1) -> list[tuple[str, list[str], list[tuple[str, float]]]]:
        return [
            (line.text, line.source_tokens, [(one.text, round(one.score, 4)) for one in line.alternatives])
            for line in task.translate(lines, decoding, n_best=n_best, first_line=first_line)
        ]

    together = translate(LINES)
    assert len({text for text, _, _ in together}) > 5
    assert together == [translate([line], number)[0] for number, line in enumerate(LINES, start=1)]
    if decoding.method == "beam":
        order = np.random.default_rng(0).permutation(len(LINES)).tolist()
        assert translate([LINES[at] for at in order]) == [together[at] for at in order]
    else:
        assert translate(LINES, 2) != together, "draws depend on the number of the line"
    monkeypatch.setattr(translation, "HYPOTHESES_AT_ONCE", 9)
    assert translate(LINES) == together
    for (text, tokens, alternatives), source in zip(together, LINES, strict=True):
        if not source.strip():
            assert (text, tokens, alternatives) == ("", [], [])
            continue
        assert "".join(tokens).replace("▁", " ") == f" {source.strip()}</s>"
        assert text == alternatives[0][0]
        assert len(alternatives) == n_best
        scores = [score for _, score in alternatives]
        assert decoding.method == "sample" or scores == sorted(scores, reverse=True)


def test_the_keys_of_decoding_reach_the_search(build: Callable[..., Any]) -> None:
    task = confident(build("seq2seq"))
    decoding = task.recipe.decoding.updated(beam=4)
    lines = [line for line in LINES if line.strip()]

    def candidates(**changes: Any) -> list[tuple[int, translation.Candidate]]:
        found = task.translate(lines, decoding.updated(**changes), n_best=4, attention=True)
        return [(len(line.source_tokens) - 1, one) for line in found for one in line.alternatives]

    for source, one in candidates(max_length_ratio=0.5, max_length_offset=3, min_length=3):
        assert 3 <= len(one.tokens) - 1 <= max(3, source // 2 + 3)
    for _, one in candidates(no_repeat_ngram=1):
        assert len(set(one.tokens)) == len(one.tokens)
    for _, one in candidates(length_normalisation="average", length_penalty=2.0):
        assert one.score == pytest.approx(one.log_probability / len(one.tokens) ** 2)
    for _, one in candidates(length_normalisation="none", coverage_penalty=0.5):
        assert one.attention is not None
        coverage = np.log(np.clip(one.attention.astype(np.float64).sum(axis=0), 1e-6, 1)).sum()
        assert one.score == pytest.approx(one.log_probability + 0.5 * coverage, abs=1e-5)
    with torch.no_grad():
        task.model.output_bias[PAD:EOS] = 100
    assert not any("<" in token for _, one in candidates() for token in one.tokens[:-1])
    assert any("<unk>" in one.tokens for _, one in candidates(allow_unknown=True))
    task.model.step = lambda *arguments: (*type(task.model).step(task.model, *arguments)[:2], None)
    assert {one.attention for _, one in candidates()} == {None}
    with pytest.raises(UserError, match="a coverage penalty is of attention, and this model has none"):
        candidates(coverage_penalty=0.5)


def test_attention_is_there_where_it_is_asked_for(build: Callable[..., Any]) -> None:
    task = confident(build("seq2seq"))
    for line in task.translate(LINES, n_best=2, attention=True):
        for one in line.alternatives:
            assert one.attention is not None
            assert one.attention.shape == (len(one.tokens), len(line.source_tokens))
            assert one.attention.sum(axis=1) == pytest.approx(1, abs=1e-5)
            ids = [task.pairs.source_vocabulary._processor.piece_to_id(token) for token in one.tokens[:-1]]
            source = [task.pairs.source_vocabulary._processor.piece_to_id(token) for token in line.source_tokens[:-1]]
            batch = task.pairs.batch([(source, ids)])
            expected = task.model.eval()(batch.source, batch.lengths, batch.previous)[0].attention[0]
            assert one.attention == pytest.approx(expected.detach().numpy(), abs=1e-5)
    assert task.translate(["1 2"])[0].alternatives[0].attention is None


def test_translations_begin_with_their_prefix(build: Callable[..., Any]) -> None:
    task = confident(build("seq2seq"))
    decoding = task.recipe.decoding.updated(beam=3, max_length_ratio=0.0, max_length_offset=2)
    prefixes = ["9 9 9 9 9", "", " 3 "]
    free = task.translate(["1 2", "3 4", "5 6"], decoding)
    found = task.translate(["1 2", "3 4", "5 6"], decoding, prefixes=prefixes)
    assert all(line.text.startswith(prefix.strip()) for line, prefix in zip(found, prefixes, strict=True))
    assert found[1] == free[1]
    assert not free[0].text.startswith("9")
    forced = task.score([(source, line.text) for source, line in zip(["1 2", "3 4", "5 6"], found, strict=True)])
    for line, scored in zip(found, forced, strict=True):
        if scored.tokens == line.alternatives[0].tokens:  # there may be another way to cut the text
            assert line.alternatives[0].log_probability == pytest.approx(scored.log_probability, abs=1e-4)
    assert forced[0].tokens == found[0].alternatives[0].tokens


def test_an_ensemble_answers_by_the_mean_of_its_probabilities(build: Callable[..., Any]) -> None:
    task, other = confident(build("seq2seq")), confident(build("seq2seq"))
    decoding = task.recipe.decoding.updated(beam=3)
    alone = task.translate(LINES, decoding, n_best=3)
    twice = task.translate(LINES, decoding, n_best=3, others=[other])
    for one, two in zip(alone, twice, strict=True):
        assert [candidate.text for candidate in two.alternatives] == [candidate.text for candidate in one.alternatives]
        assert two.score == pytest.approx(one.score, abs=1e-5)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(-0.7)
        other.model.output_bias[EOS] -= 8
    pairs = []
    for line, translated in zip(LINES, task.translate(LINES, decoding, n_best=3, others=[other]), strict=True):
        for one in translated.alternatives:
            ids = [task.pairs.source_vocabulary._processor.piece_to_id(token) for token in one.tokens[:-1]]
            batch = task.pairs.batch([(task.pairs.source_vocabulary.encode(line.strip()), ids)])
            each = []
            for member in (task, other):
                scores = member.model.logits(*member.model.eval()(batch.source, batch.lengths, batch.previous))
                each.append(scores.double().softmax(-1).gather(1, batch.target[0][:, None])[:, 0])
            assert not torch.allclose(*each, rtol=0.1)
            expected = ((each[0] + each[1]) / 2).log().tolist()
            assert one.token_log_probabilities == pytest.approx(expected, abs=1e-4)
            if task.pairs.source_vocabulary.encode(one.text) == ids:
                pairs.append((line, one.text, expected))
    assert len(pairs) > 5
    scored = task.score([(line, text) for line, text, _ in pairs], others=[other])
    for one, (_, _, expected) in zip(scored, pairs, strict=True):
        assert one.token_log_probabilities == pytest.approx(expected, abs=1e-4)
    stranger = build("seq2seq", 'data.source_language="de"', 'data.target_language="en"')
    for use in (lambda: task.translate(["1"], others=[stranger]), lambda: task.score([], others=[stranger])):
        with pytest.raises(UserError, match="differ in vocabulary, languages"):
            use()


def test_scores_of_given_translations(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    task = confident(build("seq2seq", "data.max_length=8"))
    pairs = [("1 2 3", "3 2 1"), ("7", ""), (" ", "5"), ("1 2 3 4 5 6 7 8 9 0 1 2 3", "4 4 4 4 4 4 4 4 4"), ("0", "ä")]
    found = task.score(pairs)
    for (source, target), one in zip(pairs, found, strict=True):
        ids = task.pairs.source_vocabulary.encode(target)
        batch = task.pairs.batch([(task.pairs.source_vocabulary.encode(source.strip())[:8], ids)])
        scores = task.model.eval().double().logits(*task.model(batch.source, batch.lengths, batch.previous))
        expected = scores.detach().log_softmax(-1).gather(1, batch.target[0][:, None])[:, 0]
        assert one.tokens == task.pairs.source_vocabulary.pieces([*ids, EOS])
        assert one.token_log_probabilities == pytest.approx(expected.tolist(), abs=1e-4)
        assert one.log_probability == pytest.approx(float(expected.sum()), abs=1e-4)
        assert one.perplexity == pytest.approx(float((-expected.mean()).exp()), rel=1e-4)
        task.model.float()
    tokens = sum(len(one.tokens) for one in found)
    whole = translation.perplexity(found)
    assert whole == pytest.approx(math.exp(-sum(one.log_probability for one in found) / tokens))
    monkeypatch.setattr(translation, "SUBWORDS_AT_ONCE", 1)
    assert [one.log_probability for one in task.score(pairs)] == pytest.approx([one.log_probability for one in found])
    assert task.score([]) == []
    with torch.no_grad():
        task.model.output_bias[7] = math.inf
    with pytest.raises(UserError, match="the model's output is not a number"):
        task.score(pairs)


def test_no_line_and_only_blank_lines(build: Callable[..., Any]) -> None:
    task = build("seq2seq")
    assert task.translate([]) == []
    assert task.translate(["", "\t "]) == [("", 0.0, [], [], False)] * 2


def test_more_translations_than_the_beam_are_refused(build: Callable[..., Any]) -> None:
    task = build("seq2seq")
    with pytest.raises(UserError, match="a beam of 2 cannot give the 3 best"):
        task.translate(["1 2 3"], n_best=3)
    with pytest.raises(UserError, match="a beam of 4 cannot give the 5 best"):
        task.translate(["1 2 3"], task.recipe.decoding.updated(beam=4), n_best=5)


def test_a_line_too_long_is_cut_and_said_to_be(build: Callable[..., Any]) -> None:
    task = confident(build("seq2seq", "data.max_length=8"))
    pieces = task.pairs.source_vocabulary.encode("1 2 3 4 5 6 7 8 9 0 1 2 3")
    assert len(pieces) > 8
    within, beyond = task.translate(["1 2 3", "1 2 3 4 5 6 7 8 9 0 1 2 3"])
    assert (within.cut, beyond.cut) == (False, True)
    start = task.pairs.source_vocabulary.decode(pieces[:8])
    assert task.pairs.source_vocabulary.encode(start) == pieces[:8]
    assert beyond.text == task.translate([start])[0].text


def test_the_score_is_that_of_teacher_forcing(build: Callable[..., Any]) -> None:
    task = confident(build("seq2seq"))
    lines = [line for line in LINES if line.strip()]
    found = task.translate(lines, task.recipe.decoding.updated(beam=4, length_penalty=0.6), n_best=4)
    pairs = [(line, one) for line, translated in zip(lines, found, strict=True) for one in translated.alternatives]
    compared = 0
    for (_, one), scored in zip(pairs, task.score([(line, one.text) for line, one in pairs]), strict=True):
        if one.tokens == scored.tokens:  # there may be another way to cut the text
            compared += 1
            assert one.token_log_probabilities == pytest.approx(scored.token_log_probabilities, abs=1e-4)
            assert one.log_probability == pytest.approx(scored.log_probability, abs=1e-4)
            assert one.score == pytest.approx(scored.log_probability / ((5 + len(one.tokens)) / 6) ** 0.6, abs=1e-4)
    assert compared > 5
    assert [(line.text, line.score) for line in found] == [line.alternatives[0][:2] for line in found]


@pytest.mark.parametrize(
    "keys",
    [
        "attention=none decoder_layers=1",
        "decoder=luong input_feeding=true attention=dot decoder_width=16 decoder_layers=2",
        "decoder=bahdanau attention=additive coverage=true readout=maxout cell=gru",
        "attention=multihead heads=2 copying=true",
    ],
)
def test_search_keeps_its_promises_for_every_decoder(keys: str, build: Callable[..., Any]) -> None:
    task = confident(build("seq2seq", *(f"model.{key}" for key in keys.split())))
    decoding = task.recipe.decoding.updated(beam=3, no_repeat_ngram=3)
    lines = [line for line in LINES if line.strip()]
    found = task.translate(lines, decoding, n_best=3, attention=True)
    twice = task.translate(lines, decoding, n_best=3, others=[task])
    for line, together, ensemble in zip(lines, found, twice, strict=True):
        alone = task.translate([line], decoding, n_best=1)[0]
        if together.score - together.alternatives[1].score > 1e-4:
            assert alone.text == ensemble.text == together.text
        assert alone.score == pytest.approx(together.score, abs=1e-4)
        assert ensemble.score == pytest.approx(together.score, abs=1e-4)
        for one in together.alternatives:
            assert (one.attention is None) == (task.recipe.model.attention == "none")
            scored = task.score([(line, one.text)])[0]
            if scored.tokens == one.tokens:  # there may be another way to cut the text
                assert scored.token_log_probabilities == pytest.approx(one.token_log_probabilities, abs=1e-4)


def test_bleu_is_of_the_translations(build: Callable[..., Any]) -> None:
    task = confident(build("seq2seq"))
    pairs = task.pairs.splits["test"]
    decoding = task.recipe.decoding.updated(beam=3, length_penalty=1.0)
    texts = [task.translate([source], decoding)[0].text for source, _ in pairs]
    sources, targets = zip(*pairs, strict=True)
    assert task.evaluate("test", decoding) == metrics.translation(sources, texts, targets)
    sources = [source for source, _ in task.pairs.splits["validation"]]
    greedy = [line.text for line in task.translate(sources, decoding.updated(beam=1))]
    assert task.validate() == bleu(greedy, [target for _, target in task.pairs.splits["validation"]])
    own = [(source, line.text) for (source, _), line in zip(pairs, task.translate([s for s, _ in pairs]), strict=True)]
    task.pairs.splits["test"][:] = own
    assert task.evaluate("test").score == pytest.approx(100)


def test_text_is_translated_without_the_data_and_scored_on_other_data(tiny: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "pairs"
    shutil.copytree(tiny["seq2seq"].parent / "pairs", data)
    task = tasks.build(resolve(str(tiny["seq2seq"]), data=str(data)).recipe, runtime=CPU)
    assert isinstance(task, Translation)
    folder = save(confident(task), tmp_path / "checkpoint")
    expected = task.translate(LINES)
    shutil.rmtree(data)
    found = tasks.load(folder, runtime=CPU)
    assert isinstance(found, Translation)
    assert found.translate(LINES) == expected
    with pytest.raises(UserError, match="there is no file or folder"):
        found.evaluate("test")
    other = tiny["seq2seq"].parent / "pairs"
    elsewhere = tasks.load(folder, runtime=CPU, data=str(other))
    assert elsewhere.data_name == str(other)
    sources, targets = zip(*elsewhere.pairs.splits["test"], strict=True)
    texts = [line.text for line in task.translate(sources)]
    assert elsewhere.evaluate("test") == metrics.translation(sources, texts, targets)


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


def test_a_diverged_translator_says_so(build: Callable[..., Any]) -> None:
    task = build("seq2seq")
    with torch.no_grad():
        task.model.output_bias[7] = math.inf
    with pytest.raises(UserError, match="the model's output is not a number"):
        task.translate(["1 2 3"])
