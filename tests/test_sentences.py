"""The data of translation: batches, vocabularies, the order in which a source is read, and subwords drawn at random."""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dl7cli import checkpoint, metrics, tasks
from dl7cli.checkpoint import Checkpoint, Progress
from dl7cli.data.vocabulary import BOS, EOS, PAD, Subwords
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.recipe import resolve
from dl7cli.tasks import sentences
from dl7cli.tasks.sentences import PairBatch
from dl7cli.tasks.translation import Translation

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")
SAMPLED = "data.subword_sampling=0.3"
SEPARATE = ("data.joint=false", "model.tied=output")
ORDERS: dict[str, Callable[[list[int]], list[int]]] = {
    "forward": lambda ids: ids,
    "reversed": lambda ids: ids[::-1],
    "doubled": lambda ids: ids + ids,
}


@pytest.fixture
def build(tiny: dict[str, Path]) -> Callable[..., Translation]:
    """`build(*overrides)` is the task of a tiny recipe whose model answers differently from sentence to sentence."""

    def make(*overrides: str, **options: Any) -> Translation:
        task = tasks.build(resolve(str(tiny["seq2seq"]), overrides, **options).recipe, runtime=CPU)
        assert isinstance(task, Translation)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in task.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            output_bias = task.model.get_parameter("output_bias")
            output_bias[EOS] -= 4
        return task

    return make


@pytest.fixture
def capitals(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """Pairs of letters, every other one a capital."""
    folder = tmp_path / "capitals"
    folder.mkdir()
    for file in (tiny["seq2seq"].parent / "pairs").iterdir():
        letters = file.read_text().translate(str.maketrans("0123456789", "AbCdEfGhIj"))
        (folder / file.name).write_text(letters)
    return folder


def sides(task: Translation, batch: PairBatch) -> list[tuple[list[int], list[int]]]:
    """The ids of each pair without padding and eos."""
    targets = [[one for one in row if one != PAD][:-1] for row in batch.target.tolist()]
    sources = [row[: length - 1] for row, length in zip(batch.source.tolist(), batch.lengths.tolist(), strict=True)]
    return list(zip(sources, targets, strict=True))


def same(one: PairBatch, other: PairBatch) -> bool:
    both = zip(one[:5], other[:5], strict=True)
    return one.pairs == other.pairs and all(
        first.shape == second.shape and torch.equal(first, second) for first, second in both
    )


# Batches


def test_every_pair_is_used_once_an_epoch_and_batches_are_bounded(build: Callable[..., Translation]) -> None:
    task = build("training.batch_tokens=40")
    wanted = Counter(
        (tuple(task.pairs.source_vocabulary.encode(source)), tuple(task.pairs.source_vocabulary.encode(target)))
        for source, target in task.pairs.splits["train"]
    )
    for epoch in (0, 1):
        seen: Counter[Any] = Counter()
        for batch in task.batches(epoch):
            assert max(batch.source.numel(), batch.target.numel()) <= 40
            for rectangle, longest in (
                (batch.source, batch.lengths.max()),
                (batch.target, (batch.target != PAD).sum(1).max()),
            ):
                assert rectangle.shape[1] == longest + longest % 2
            for source, length, previous, target in zip(*batch[:4], strict=True):
                words = target[target != PAD].tolist()
                assert source[length - 1] == EOS == words[-1]
                assert not source[length:].any()
                assert previous[: len(words)].tolist() == [BOS, *words[:-1]]
                assert not previous[len(words) :].any()
                seen[tuple(source[: length - 1].tolist()), tuple(words[:-1])] += 1
        assert seen == wanted


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 16, 50, 600, 3000, 10_000])
def test_batches_are_filled_as_far_as_they_may_be(tokens: int, few: bool) -> None:
    """Where few sizes are wanted only the first four binary digits of their numbers of pairs count."""
    random = np.random.default_rng(tokens)
    lengths = random.integers(1, 20, 300)
    order = random.permutation(300)
    batches = sentences.fill(order, lengths, tokens, few_sizes=few)
    assert np.concatenate(batches).tolist() == order.tolist()
    at = 0
    for batch in batches:
        most = max(n for n in range(1, 301 - at) if n == 1 or lengths[order[at : at + n]].max() * n <= tokens)
        at += len(batch)
        digits = f"{most:b}"
        assert len(batch) == (int(digits[:4].ljust(len(digits), "0"), 2) if few and at < 300 else most)
    assert at == 300
    assert sentences.fill(order[:0], lengths, tokens, few_sizes=few) == []


def test_batches_are_of_few_shapes_and_other_partners(build: Callable[..., Translation]) -> None:
    """On 3,000 pairs, of which none is as another."""
    random = np.random.default_rng(1)
    task = build("training.batch_tokens=1024", "data.vocabulary=word", "data.max_length=60")
    sides = [[" ".join(map(str, random.integers(1, 9, size))) for size in random.integers(4, 30, 3000)] for _ in "ab"]
    task.pairs.splits["train"][:] = list(zip(*sides, strict=True))
    epochs = [list(task.batches(epoch)) for epoch in (0, 1)]
    for batches in epochs:
        numbers = sorted(len(batch.pairs) for batch in batches)
        assert numbers[-1] > 32
        assert sum(number % (1 << max(0, number.bit_length() - 4)) > 0 for number in numbers) <= 1, "but for the last"
        shapes = {tuple(one.shape) for batch in batches for one in (batch.source, batch.target)}
        assert len(shapes) < len(batches), "of twice as many rectangles"
    first, second = ({frozenset(map(str, batch.pairs)) for batch in batches} for batches in epochs)
    assert len(first & second) < len(first) / 4


@pytest.mark.parametrize("keys", [[], ["model.copying=true", "model.coverage=true", "training.coverage_weight=0.5"]])
def test_scores_are_of_a_round_number_of_subwords_where_code_is_written(
    keys: list[str], build: Callable[..., Translation], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = build("training.batch_tokens=400", "model.dropout=0", "model.attention=additive", *keys)
    batch = next(batch for batch in task.batches(0) if len(batch.real) % 64)
    rows: list[int] = []
    logits = task.model.logits
    task.model.logits = lambda decoded, context, at: (rows.append(len(at)), logits(decoded, context, at))[1]  # type: ignore

    monkeypatch.setattr(Runtime, "autocast", lambda self: nullcontext())  # few CPUs train LSTMs in bf16

    def gradients(precision: str) -> list[Tensor]:
        task.runtime = replace(CPU, precision=precision)
        loss, _ = task.loss(batch)
        return [loss.detach(), *torch.autograd.grad(loss, [*task.model.parameters()])]

    found = gradients("bf16")
    monkeypatch.setattr("dl7cli.tasks.translation.ROWS_TOGETHER", 1)
    torch.testing.assert_close(found, gradients("bf16"))
    gradients("fp32")
    count = len(batch.real)
    assert rows == [count + -count % 64, count, count]


def test_pairs_beyond_the_limit_are_left_out_and_counted(build: Callable[..., Translation]) -> None:
    task = build("data.max_length=8")
    list(task.batches(0))
    assert task.notes == []  # no more than seven digits

    def limited(limit: int) -> tasks.Task:
        """The same task with a limit lower than a recipe may set."""
        data = task.recipe.data.model_copy(update={"max_length": limit})
        return tasks.build(task.recipe.model_copy(update={"data": data}), task.assets, runtime=CPU)

    encode = task.pairs.source_vocabulary.encode
    short = [pair for pair in task.pairs.splits["train"] if max(len(encode(side)) for side in pair) <= 4]
    shorter = limited(4)
    assert sum(len(batch.lengths) for batch in shorter.batches(1)) == len(short) < 40
    assert shorter.notes == [f"left out: {40 - len(short)} of 40 training pairs, longer than 4 subwords"]
    with pytest.raises(UserError, match="is within 0 subwords"):
        limited(0).steps(2)


# Vocabularies


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word", "character"])
@pytest.mark.parametrize("joint", [True, False])
def test_pairs_and_translations_are_of_their_own_vocabulary(
    kind: str, joint: bool, build: Callable[..., Translation], tmp_path: Path
) -> None:
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.en").write_text("one two\nthree four five\nsix six\n" * 3)
        (tmp_path / f"{name}.de").write_text("ä öü\nß äß\nüüü ö\n" * 3)
    task = build(f"data.vocabulary={kind}", *(() if joint else SEPARATE), data=str(tmp_path))
    source, target = task.pairs.source_vocabulary, task.pairs.target_vocabulary
    assert (source is target) == joint
    assert (source.encode("ä")[-1] > EOS) == joint
    assert task.model.get_parameter("output_bias").shape == (len(target),)
    pairs = task.pairs.splits["train"]
    for batch in task.batches(0):
        assert {(source.decode(one), target.decode(other)) for one, other in sides(task, batch)} <= set(pairs)
        task.loss(batch)[0].backward()
    found = task.translate(["one two", "six"])
    assert any(line.text for line in found)
    for line in found:
        letters = set("äöüß" + "onetwhrfuivsx " * joint + " ")
        assert set(line.text) <= letters
        assert "".join(line.source_tokens).replace("▁", "").startswith(("onetwo", "six"))


@pytest.mark.parametrize("separate", [(), SEPARATE])
def test_a_checkpoint_brings_its_vocabularies(
    separate: tuple[str, ...], build: Callable[..., Translation], tmp_path: Path
) -> None:
    task = build(*separate)
    assert ("target_vocabulary" in task.assets) == bool(separate)
    saved = Checkpoint(task.recipe, task.assets, task.model.state_dict(), {}, Progress(), {})
    checkpoint.save(tmp_path / "checkpoint", saved)
    found = tasks.load(tmp_path / "checkpoint", runtime=CPU)
    assert isinstance(found, Translation)
    lines = ["1 2 3 4", "7 7"]
    assert found.translate(lines) == task.translate(lines)
    assert (found.pairs.source_vocabulary is found.pairs.target_vocabulary) == (not separate)


def test_a_joint_vocabulary_is_asked_for_by_what_needs_it(tiny: dict[str, Path]) -> None:
    for key in ("model.tied=all", "model.copying=true"):
        with pytest.raises(UserError, match="`model`: "):
            resolve(str(tiny["seq2seq"]), [*SEPARATE, key])


@pytest.mark.parametrize("kind", ["word", "character"])
def test_only_subwords_are_sampled(kind: str, tiny: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="only subwords can be sampled"):
        resolve(str(tiny["seq2seq"]), [SAMPLED, f"data.vocabulary={kind}"])


# Subwords drawn at random


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("separate", [(), SEPARATE])
def test_sampled_batches_are_a_function_of_seed_and_epoch(
    kind: str, separate: tuple[str, ...], build: Callable[..., Translation]
) -> None:
    overrides = (SAMPLED, f"data.vocabulary={kind}", *separate)
    task, plain = build(*overrides), build(f"data.vocabulary={kind}", *separate)
    every = list(task.batches(1))
    assert len(every) == task.steps(1) == plain.steps(1) > 3
    for start in range(len(every) + 1):  # as after a run that was stopped there
        rest = list(build(*overrides).batches(1, start))
        assert all(same(one, other) for one, other in zip(rest, every[start:], strict=True))
    for others in (task.batches(2), build(*overrides, seed=2).batches(1), plain.batches(1)):
        assert not any(same(one, other) for one, other in zip(every, others, strict=False))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sampled_batches_are_every_sentence_once_in_like_lengths_and_as_many_as_planned(
    kind: str, build: Callable[..., Translation]
) -> None:
    task, plain = build(SAMPLED, f"data.vocabulary={kind}"), build(f"data.vocabulary={kind}")
    vocabulary = task.pairs.source_vocabulary
    spellings = set()
    for epoch in range(3):
        batches, planned = list(task.batches(epoch)), list(plain.batches(epoch))
        assert [len(batch.lengths) for batch in batches] == [len(batch.lengths) for batch in planned]
        drawn = [pair for batch in batches for pair in sides(task, batch)]
        texts = Counter(tuple(map(vocabulary.decode, pair)) for pair in drawn)
        assert texts == Counter(task.pairs.splits["train"])
        spellings |= {tuple(source) for source, _ in drawn}
        ranges = sorted((min(own), max(own)) for own in ([len(ids) for _, ids in sides(task, one)] for one in batches))
        for (_, longest), (shortest, _) in itertools.pairwise(ranges):
            assert longest <= shortest + 1, "those of like length are together"
        assert ranges[0][1] < ranges[-1][0]
    assert len(spellings) > 2 * 40  # for 40 sentences


def test_the_draw_of_an_epoch_tells_its_progress(tiny: dict[str, Path]) -> None:
    told: list[tuple[str, int, int]] = []
    recipe = resolve(str(tiny["seq2seq"]), [SAMPLED]).recipe
    task = tasks.build(recipe, runtime=CPU, progress=lambda *what: told.append(what))
    next(iter(task.batches(0)))
    assert [one for one in told if one[0] == "drawing subwords"] == [
        ("drawing subwords", 0, 40),
        ("drawing subwords", 40, 40),
    ]


def test_what_is_drawn_longer_than_the_limit_is_taken_as_it_is(build: Callable[..., Translation]) -> None:
    task = build("data.subword_sampling=1.0", "data.max_length=10")
    vocabulary = task.pairs.source_vocabulary
    lengths = {True: 0, False: 0}
    for batch in task.batches(0):
        for pair in sides(task, batch):
            for ids in pair:
                letters = list("▁" + vocabulary.decode(ids).replace(" ", "▁"))
                assert len(ids) <= 10
                lengths[len(letters) > 10] += 1
                assert vocabulary.pieces(ids) == (
                    vocabulary.pieces(vocabulary.encode(vocabulary.decode(ids))) if len(letters) > 10 else letters
                )
    assert min(lengths.values()) > 5, "some are too long and some are not"


@pytest.mark.parametrize(("separate", "built"), [((), 1), (SEPARATE, 2)])
def test_each_vocabulary_has_one_sampler(
    separate: tuple[str, ...], built: int, build: Callable[..., Translation], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = build(SAMPLED, *separate)
    sampler, asked = Subwords.sampler, []
    monkeypatch.setattr(Subwords, "sampler", lambda self, *key: (asked.append(self), sampler(self, *key))[1])
    for epoch in (0, 1):
        list(task.batches(epoch))
    assert len(asked) == built


def test_neither_scores_nor_translations_are_sampled(build: Callable[..., Translation]) -> None:
    task, plain = build(SAMPLED), build()
    assert task.translate(["1 2 3"]) == plain.translate(["1 2 3"])
    assert task.evaluate("test") == plain.evaluate("test")


# The order in which a source is read


@pytest.mark.parametrize("order", ORDERS)
def test_a_source_is_read_in_one_order_everywhere(order: str, build: Callable[..., Translation]) -> None:
    task, plain = build(f"data.source_order={order}"), build()
    assert task.model.state_dict().keys() == plain.model.state_dict().keys()
    read = ORDERS[order]
    seen: list[tuple[Tensor, Tensor]] = []
    encode = task.model.encode
    task.model.encode = lambda source, lengths: (seen.append((source, lengths)), encode(source, lengths))[1]  # type: ignore
    usual = {tuple(source): target for batch in plain.batches(0) for source, target in sides(plain, batch)}
    batches = list(task.batches(0))
    assert {tuple(source): target for batch in batches for source, target in sides(task, batch)} == {
        tuple(read(list(source))): target for source, target in usual.items()
    }
    assert max(batch.source.numel() for batch in batches) <= 60, "batch_tokens counts what is read"
    vocabulary = task.pairs.source_vocabulary
    expected = [*read(vocabulary.encode("1 2 3")), EOS]
    decoding = task.recipe.decoding.updated(beam=1)
    for use in (
        lambda: task.translate(["1 2 3"], decoding, attention=True),
        lambda: task.score([("1 2 3", "4")]),
    ):
        seen.clear()
        use()
        (source, lengths), *others = seen
        assert not others
        assert lengths.tolist() == [len(expected)]
        assert source.tolist() == [expected + [PAD] * (len(expected) % 2)]
    line = task.translate(["1 2 3"], decoding, attention=True)[0]
    assert line.source_tokens == vocabulary.pieces(expected) == task.pairs.source_tokens(vocabulary.encode("1 2 3"))
    assert line.alternatives[0].attention is not None
    assert line.alternatives[0].attention.shape == (len(line.alternatives[0].tokens), len(expected))
    again = task.score([("1 2 3", line.text)])[0]
    if again.tokens == line.alternatives[0].tokens:
        assert again.log_probability == pytest.approx(line.alternatives[0].log_probability, abs=1e-4)


def test_a_line_break_in_a_source_is_a_space_to_the_model_and_in_a_target_itself(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    digits = [f"{one} {two}" for one, two in itertools.permutations("12345", 2)]
    for folder, space in (("broken", "\n"), ("whole", " ")):
        for split in ("train", "validation", "test"):
            rows = [{"en": f"{line}{space}9", "de": f"{line}\n9"} for line in digits]
            (tmp_path / folder).mkdir(exist_ok=True)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    keys = ["data.vocabulary=character", *SEPARATE]
    broken, whole = (
        tasks.build(resolve(str(tiny["seq2seq"]), keys, data=str(tmp_path / folder)).recipe, runtime=CPU)
        for folder in ("broken", "whole")
    )
    assert isinstance(broken, Translation)
    assert isinstance(whole, Translation)
    assert broken.assets["vocabulary"] == whole.assets["vocabulary"]
    assert broken.digest != whole.digest, "which is of the data as they are"
    assert broken.pairs._training_pairs.ids == whole.pairs._training_pairs.ids
    assert broken.pairs.source_ids(["1\r\n2\r3"]) == broken.pairs.source_ids(["1 2 3"])
    assert "\n" in broken.pairs.target_vocabulary.decode(broken.pairs.target_ids(["1 2\n9"])[0])


@pytest.mark.parametrize("order", ORDERS)
def test_the_limit_is_of_the_sentence_itself(order: str, build: Callable[..., Translation]) -> None:
    task = build(f"data.source_order={order}", "data.max_length=8", "data.vocabulary=word")
    within, beyond = task.translate(["1 2 3 4 5 6 7 8", "1 2 3 4 5 6 7 8 9"])
    assert (within.cut, beyond.cut) == (None, 8)
    assert (beyond.text, beyond.source_tokens) == (within.text, within.source_tokens), "the end is cut off"
    assert len(within.source_tokens) == len(ORDERS[order]([0] * 8)) + 1
    assert sum(len(batch.lengths) for batch in task.batches(0)) == 40


@pytest.mark.parametrize("order", ORDERS)
def test_batches_that_are_scored_hold_as_much_as_is_read(
    order: str, build: Callable[..., Translation], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = build(f"data.source_order={order}", "data.max_length=8", "data.vocabulary=word")
    seen: list[torch.Size] = []
    encode = task.model.encode
    task.model.encode = lambda source, lengths: (seen.append(source.shape), encode(source, lengths))[1]  # type: ignore
    longest = len(ORDERS[order]([0] * 8)) + 2  # made even
    monkeypatch.setattr("dl7cli.tasks.translation.SUBWORDS_AT_ONCE", 2 * longest)
    task.score([("1 2 3 4 5 6 7 8", "1")] * 2 + [("1 2 3 4 5 6 7 8 " * 9, "1")] * 2)
    assert seen == [(2, longest)] * 2, "neither more of what is read twice nor less of what is cut"


def test_a_translation_is_as_long_as_its_source_lets_it_be_however_often_that_is_read(
    build: Callable[..., Translation],
) -> None:
    longest = []
    for order in ORDERS:
        task = build(f"data.source_order={order}", "data.vocabulary=word")
        with torch.no_grad():
            task.model.get_parameter("output_bias")[EOS] = -1e4
        (line,) = task.translate(["1 2 3"], task.recipe.decoding.updated(beam=1))
        longest.append(len(line.alternatives[0].tokens))
    assert len(set(longest)) == 1


def test_what_reads_a_source_otherwise_is_no_ensemble(build: Callable[..., Translation]) -> None:
    task = build()
    for key in ("data.source_order=reversed", "data.lowercase=true"):
        with pytest.raises(ValueError, match="must read and write the same"):
            task.translate(["1 2 3"], others=[build(key)])


# Lower case


def test_lower_case_is_read_and_written_and_the_references_stay(
    build: Callable[..., Translation], capitals: Path
) -> None:
    task = build("data.lowercase=true", data=str(capitals))
    vocabulary = task.pairs.source_vocabulary
    assert "".join(vocabulary.pieces(range(4, len(vocabulary)))).islower()
    assert task.translate(["A b C"]) == task.translate(["A B C"]) == task.translate(["a b c"])
    pairs = task.pairs.splits["test"]
    assert not any(target.islower() for _, target in pairs)
    texts = [line.text for line in task.translate([source for source, _ in pairs])]
    assert all(text == text.lower() for text in texts)
    sources, references = zip(*pairs, strict=True)
    found = task.evaluate("test")
    assert found.details.pop("perplexity") > 1
    assert (found.details.pop("cut_sources"), found.details.pop("unknown_sources")) == (0, 0)
    assert found == metrics.translation(sources, texts, references, cased=False)
    pairs[:] = [(source, text) for (source, _), text in zip(pairs, texts, strict=True)]
    assert task.evaluate("test").score == pytest.approx(100)
    greedy = [line.text for line in task.translate(sources, task.recipe.decoding.updated(beam=1))]
    assert any(text != text.upper() for text in greedy), "with case the score would be another"
    task.pairs.splits["validation"][:] = zip(sources, map(str.upper, greedy), strict=True)
    assert task.validate().values == {"bleu_lowercase": pytest.approx(100)}
    training = task.recipe.training.model_copy(update={"select": "chrf"})
    task.recipe = task.recipe.model_copy(update={"training": training})
    assert task.validate().values == {"chrf_lowercase": pytest.approx(100)}
    assert task.score([("A B", "C d")]) == task.score([("a b", "c D")])
    cased = build(data=str(capitals))
    assert cased.pairs.source_vocabulary.encode("A") != cased.pairs.source_vocabulary.encode("a")
    for keys in ((), (SAMPLED,)):
        batches = build("data.lowercase=true", *keys, data=str(capitals)).batches(0)
        read = Counter(vocabulary.decode(ids) for batch in batches for ids, _ in sides(task, batch))
        assert read == Counter(source.lower() for source, _ in task.pairs.splits["train"])


def test_two_keys_turn_the_direction_round(tiny: dict[str, Path]) -> None:
    keys = ["data.source_language=de", "data.target_language=en"]
    there, back = (
        tasks.build(resolve(str(tiny["seq2seq"]), overrides).recipe, runtime=CPU) for overrides in ([], keys)
    )
    assert isinstance(there, Translation)
    assert isinstance(back, Translation)
    for split in ("train", "validation", "test"):
        assert back.pairs.splits[split] == [(target, source) for source, target in there.pairs.splits[split]]
