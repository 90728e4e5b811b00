"""The task of translation: losses, translations and scores against slow answers made one sentence at a time."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dl7cli import checkpoint, metrics, tasks
from dl7cli.checkpoint import Checkpoint, Progress
from dl7cli.data.vocabulary import BOS, EOS, PAD
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.metrics import bleu
from dl7cli.recipe import resolve
from dl7cli.tasks import translation
from dl7cli.tasks.decoding import teacher_forced
from dl7cli.tasks.translation import Translation

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")


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


# Losses


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
        context, state = task.model.begin(torch.tensor([[*source, EOS]]), torch.tensor([len(source) + 1]), 2)
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
        context, state = task.model.eval().begin(torch.tensor([[*source, EOS]]), torch.tensor([len(source) + 1]), 2)
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


def test_r_drop_is_the_mean_of_two_readings_and_how_far_apart_they_are(build: Callable[..., Any]) -> None:
    """Word by word, by the divergences of Liang et al. 2021; padding counts in neither."""
    keys = ("model.dropout=0.5", "training.label_smoothing=0")
    without, task = confident(build("seq2seq", *keys)), confident(build("seq2seq", *keys, "training.r_drop=3"))
    batch = task.pairs.batch([([5, 8, 4], [6, 7, 8, 9]), ([5, 6, 7, 8, 9, 10, 11], [4]), ([9, 4], [7, 7])])
    torch.manual_seed(5)
    total, count = task.loss(batch)
    torch.manual_seed(5)
    again = [one.repeat(2, 1) for one in (batch.source, batch.previous)]
    logits = task.model.logits(*task.model(again[0], batch.lengths.repeat(2), again[1]))
    answers = logits.detach().double().log_softmax(dim=1).unflatten(0, (6, -1))
    expected, apart = 0.0, 0.0
    for at, (_, target) in enumerate(batch.pairs):
        for step, word in enumerate([*target, EOS]):
            one, two = answers[at, step], answers[at + 3, step]
            expected -= (one[word] + two[word]).item() / 2
            apart += ((one.exp() * (one - two)).sum() + (two.exp() * (two - one)).sum()).item() / 2
    assert count == without.loss(batch)[1] == 5 + 2 + 3
    assert apart > 1
    assert total.item() == pytest.approx(expected + 3 * apart / 2, rel=1e-4)
    for one in (without, task):  # nothing is drawn, and both readings are one
        one.model.eval()
    assert task.loss(batch)[0].item() == pytest.approx(without.loss(batch)[0].item(), rel=1e-5)


# Translating


@pytest.mark.parametrize("changes", [{"beam": 3}, {"method": "sample"}])
def test_several_threads_translate_as_one(
    changes: dict[str, Any], build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In evaluation mode until the last is done, and afterwards in that of before; with dropout it would show."""
    monkeypatch.setattr(translation, "HYPOTHESES_AT_ONCE", 9)
    task = confident(build("seq2seq", "model.dropout=0.9"))
    task.model.train()
    lines = [" ".join(map(str, range(number % 9 + 1))) for number in range(30)]
    decoding = task.recipe.decoding.updated(**changes)
    alone = task.translate(lines, decoding)
    torch.set_num_threads(2)
    try:
        together = task.translate(lines, decoding)
    finally:
        torch.set_num_threads(1)
    assert [line.text for line in together] == [line.text for line in alone]
    assert [line.score for line in together] == pytest.approx([line.score for line in alone], abs=1e-4)
    assert task.model.training


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


def test_fewer_long_sentences_are_searched_at_once(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    task = confident(build("seq2seq"))
    shapes = []
    own = translation.search

    def search(models: Any, source: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        shapes.append(tuple(source.shape))
        return own(models, source, *arguments, **named)

    monkeypatch.setattr(translation, "search", search)
    monkeypatch.setattr(translation, "HYPOTHESES_AT_ONCE", 12)
    monkeypatch.setattr(translation, "_SHORT", 8)
    lines = ["1 2 3"] * 9 + ["1 2 3 4 5 6 7"] * 5 + ["1 2 3 4 5 6 7 8 9 " * 5]
    task.translate(lines, task.recipe.decoding.updated(beam=3, max_length_offset=2))
    assert sum(count for count, _ in shapes) == len(lines)
    assert all(count == 1 or 3 * count * -(-length // 8) <= 12 for count, length in shapes), shapes
    assert shapes[0][0] == 1
    assert shapes[-1][0] == 4


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
    for _, one in candidates(length_penalty=0.0, coverage_penalty=0.5):
        assert one.attention is not None
        coverage = np.log(np.clip(one.attention.astype(np.float64).sum(axis=0), 1e-6, 1)).sum()
        assert one.score == pytest.approx(one.log_probability + 0.5 * coverage, abs=1e-5)
    with torch.no_grad():
        task.model.output_bias[PAD:EOS] = 100
    assert not any("<" in token for _, one in candidates() for token in one.tokens[:-1])
    assert any("<unk>" in one.tokens for _, one in candidates(allow_unknown=True))
    task.model.step = lambda *arguments: (*type(task.model).step(task.model, *arguments)[:2], None)
    assert {one.attention for _, one in candidates()} == {None}
    with pytest.raises(ValueError, match="a coverage penalty needs attention"):
        candidates(coverage_penalty=0.5)


@pytest.mark.parametrize("keys", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-3}])
def test_what_leaves_the_most_probable_word_alone_draws_what_greedy_search_finds(
    keys: dict[str, float], build: Callable[..., Any]
) -> None:
    task = confident(build("seq2seq"))
    greedy = [line.text for line in task.translate(LINES, task.recipe.decoding.updated(beam=1))]
    flat = {"method": "sample", "seed": 3, "temperature": 3.0}

    def drawn(**changes: Any) -> list[str]:
        return [line.text for line in task.translate(LINES, task.recipe.decoding.updated(**{**flat, **changes}))]

    assert drawn(**keys) == greedy != drawn()


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
            expected = task.model.eval()(batch.source, batch.lengths, batch.previous)[0].attention[0].detach().numpy()
            assert one.attention == pytest.approx(expected[: len(ids) + 1, : len(source) + 1], abs=1e-5)
            assert not expected[:, len(source) + 1 :].any()
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
                scores = member.model.logits(
                    *member.model.eval()(batch.source, batch.lengths, batch.previous), batch.real
                )
                each.append(scores.double().softmax(-1).gather(1, batch.target[0, batch.real, None])[:, 0])
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
        with pytest.raises(ValueError, match="must read and write the same"):
            use()


def test_scores_of_given_translations(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    task = confident(build("seq2seq", "data.max_length=8"))
    pairs = [("1 2 3", "3 2 1"), ("7", ""), (" ", "5"), ("1 2 3 4 5 6 7 8 9 0 1 2 3", "4 4 4 4 4 4 4 4 4"), ("0", "ä")]
    found = task.score(pairs)
    for (source, target), one in zip(pairs, found, strict=True):
        ids = task.pairs.source_vocabulary.encode(target)
        batch = task.pairs.batch([(task.pairs.source_vocabulary.encode(source.strip())[:8], ids)])
        scores = task.model.eval().double().logits(*task.model(batch.source, batch.lengths, batch.previous), batch.real)
        expected = scores.detach().log_softmax(-1).gather(1, batch.target[0, batch.real, None])[:, 0]
        assert one.tokens == task.pairs.source_vocabulary.pieces([*ids, EOS])
        assert one.token_log_probabilities == pytest.approx(expected.tolist(), abs=1e-4)
        assert one.log_probability == pytest.approx(float(expected.sum()), abs=1e-4)
        assert one.perplexity == pytest.approx(float((-expected.mean()).exp()), rel=1e-4)
        task.model.float()
    assert [one.cut for one in found] == [None, None, None, 8, None]
    tokens = sum(len(one.tokens) for one in found)
    total = sum(one.log_probability for one in found)
    assert translation.perplexity(total, tokens) == pytest.approx(math.exp(-total / tokens))
    assert translation.perplexity(0.0, 0) is None
    monkeypatch.setattr(translation, "SUBWORDS_AT_ONCE", 1)
    assert [one.log_probability for one in task.score(pairs)] == pytest.approx([one.log_probability for one in found])
    assert task.score([]) == []
    with torch.no_grad():
        task.model.output_bias[7] = 1e5
    assert [one.perplexity for one in task.score(pairs)] == [None] * 5, "it is beyond a float"
    with torch.no_grad():
        task.model.output_bias[7] = math.inf
    with pytest.raises(UserError, match="the model's output is not a number"):
        task.score(pairs)


def test_no_line_and_only_blank_lines(build: Callable[..., Any]) -> None:
    task = build("seq2seq")
    assert task.translate([]) == []
    assert task.translate(["", "\t "]) == [("", 0.0, [], [], None, False)] * 2


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
    assert (within.cut, beyond.cut) == (None, 8)
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


@pytest.mark.bf16
def test_search_and_scores_are_in_the_precision_of_search_and_not_of_training(tiny: dict[str, Path]) -> None:
    recipe = resolve(str(tiny["seq2seq"])).recipe
    lines = [line for line in LINES if line.strip()]
    pairs = [(line, "1 2 3") for line in lines]

    def said(training: str, searching: str) -> tuple[list[float], list[float]]:
        runtime = Runtime(torch.device("cpu"), training, "", "", search_precision=searching)
        task = confident(tasks.build(recipe, runtime=runtime))
        return [one.score for one in task.translate(lines)], [one.log_probability for one in task.score(pairs)]

    exact, trained_otherwise, rough = said("fp32", "fp32"), said("bf16", "fp32"), said("fp32", "bf16")
    assert trained_otherwise == exact
    for found, expected in zip(rough, exact, strict=True):
        assert found != expected
        assert found == pytest.approx(expected, abs=1.0, rel=0.05)


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
    vocabulary = task.pairs.target_vocabulary
    ids = {piece: number for number, piece in enumerate(vocabulary.pieces(range(len(vocabulary))))}
    for line, together, ensemble in zip(lines, found, twice, strict=True):
        alone = task.translate([line], decoding, n_best=1)[0]
        if together.score - together.alternatives[1].score > 1e-4:
            assert alone.text == ensemble.text == together.text
        assert alone.score == pytest.approx(together.score, abs=1e-4)
        assert ensemble.score == pytest.approx(together.score, abs=1e-4)
        for one in together.alternatives:
            assert (one.attention is None) == (task.recipe.model.attention == "none")
            batch = task.pairs.batch([(task.pairs.source_ids([line])[0], [ids[token] for token in one.tokens[:-1]])])
            forced = teacher_forced([task.model], *batch[:5]).tolist()
            assert forced == pytest.approx(one.token_log_probabilities, abs=1e-4)


def test_bleu_is_of_the_translations(build: Callable[..., Any]) -> None:
    task = confident(build("seq2seq"))
    pairs = task.pairs.splits["test"]
    decoding = task.recipe.decoding.updated(beam=3, length_penalty=1.0)
    texts = [task.translate([source], decoding)[0].text for source, _ in pairs]
    sources, targets = zip(*pairs, strict=True)
    found = task.evaluate("test", decoding)
    scored = task.score(pairs)
    mean = sum(one.log_probability for one in scored) / sum(len(one.tokens) for one in scored)
    assert found.details.pop("perplexity") == pytest.approx(math.exp(-mean))
    assert (found.details.pop("cut_sources"), found.details.pop("unknown_sources")) == (0, 0)
    assert found == metrics.translation(sources, texts, targets)
    sources = [source for source, _ in task.pairs.splits["validation"]]
    greedy = [line.text for line in task.translate(sources, decoding.updated(beam=1))]
    references = [target for _, target in task.pairs.splits["validation"]]
    sample = {"source": sources[0], "translation": greedy[0], "reference": references[0]}
    assert task.validate() == replace(bleu(greedy, references), details={"sample": sample})
    task.assets["target_language"] = "zh"
    assert all("tok:zh|" in str(one.signature) for one in (task.validate(), task.evaluate("test", decoding)))
    task.assets["target_language"] = "de"
    own = [(source, line.text) for (source, _), line in zip(pairs, task.translate([s for s, _ in pairs]), strict=True)]
    task.pairs.splits["test"][:] = own
    assert task.evaluate("test").score == pytest.approx(100)


def test_sources_with_what_the_vocabulary_has_not_are_counted(build: Callable[..., Any]) -> None:
    task = build("seq2seq")
    pairs = task.pairs.splits["test"]
    for at in (1, 3):
        pairs[at] = (f"{pairs[at][0]} ☃ ☃", pairs[at][1])
    assert task.evaluate("test").details["unknown_sources"] == 2
    assert [line.unknown for line in task.translate([source for source, _ in pairs[:4]])] == [False, True] * 2


def test_sources_that_are_cut_are_counted(build: Callable[..., Any]) -> None:
    task = build("seq2seq", "data.vocabulary=character", "data.max_length=10")
    lengths = [len(ids) for ids in task.pairs.source_ids([source for source, _ in task.pairs.splits["test"]])]
    cut = sum(length > 10 for length in lengths)
    assert 0 < cut < len(lengths)
    assert task.evaluate("test").details["cut_sources"] == cut


def test_text_is_translated_without_the_data_and_scored_on_other_data(tiny: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "pairs"
    shutil.copytree(tiny["seq2seq"].parent / "pairs", data)
    task = tasks.build(resolve(str(tiny["seq2seq"]), data=str(data)).recipe, runtime=CPU)
    assert isinstance(task, Translation)
    folder = tmp_path / "checkpoint"
    confident(task)
    checkpoint.save(folder, Checkpoint(task.recipe, task.assets, task.model.state_dict(), {}, Progress(), {}))
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
    assert elsewhere.evaluate("test").values == metrics.translation(sources, texts, targets).values


def test_a_diverged_translator_says_so(build: Callable[..., Any]) -> None:
    task = build("seq2seq")
    with torch.no_grad():
        task.model.output_bias[7] = math.inf
    with pytest.raises(UserError, match="the model's output is not a number"):
        task.translate(["1 2 3"])
