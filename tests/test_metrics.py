"""Accuracy against counting by hand, BLEU and its like against sacrebleu's command line, ROUGE against its paper."""

import itertools
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import sacrebleu
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dl7cli.metrics import (
    Scores,
    accuracy,
    bleu,
    chrf,
    classification,
    expected_calibration_error,
    rouge,
    tokenizer,
    translation,
    wilson_interval,
    words,
)

REFERENCES = [
    "Ein Mann mit einem orangefarbenen Hut, der etwas anstarrt.",
    "Ein Boston Terrier läuft über saftig-grünes Gras vor einem weißen Zaun.",
    "Ein Mädchen in einem Karateanzug bricht ein Brett mit einem Tritt.",
    "Die Dächer von 1,5 Häusern & einer »Hütte« kosten 3.000 €!",
    "Eine Gruppe von Menschen steht vor einem Iglu.",
]
HYPOTHESES = [
    "Ein Mann mit einem orangen Hut, der etwas anstarrt.",
    "ein Boston Terrier läuft über grünes Gras vor einem weißen Zaun .",
    "Ein Mädchen in einem Karateanzug bricht mit einem Tritt ein Brett.  ",
    "",
    "Eine Gruppe von Menschen steht vor einem &quot;Iglu&quot;.",
]


SOURCES = ["one two three four five", "one two three four five six", "", "w " * 50, "w " * 51]


def command_line(hypotheses: list[str], references: list[str], folder: Path, *flags: str) -> Any:
    """What `sacrebleu` prints for two files."""
    for name, lines in (("hypotheses", hypotheses), ("references", references)):
        (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    command = [
        "-m",
        "sacrebleu",
        "references",
        "-i",
        "hypotheses",
        "-f",
        "json",
        "-w",
        "14",
        *(flags or ("-m", "bleu")),
    ]
    result = subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True, encoding="utf-8")
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "hypotheses",
    [HYPOTHESES, REFERENCES, [line.lower() for line in REFERENCES], ["nichts"] * 5, [""] * 5],
    ids=["near", "equal", "lower case", "no match", "empty"],
)
def test_bleu_is_that_of_the_command_line(hypotheses: list[str], tmp_path: Path) -> None:
    scores = bleu(hypotheses, REFERENCES)
    printed = command_line(hypotheses, REFERENCES, tmp_path, "-m", "bleu")
    assert scores.values == {"bleu": pytest.approx(printed["score"], abs=1e-12)}
    assert scores.signature == printed["signature"]
    assert scores.primary == "bleu"
    assert scores.examples == 5


def test_bleu_worked_out_by_hand() -> None:
    # Of "a b c d e f" against "a b c d e g": 5/6, 4/5, 3/4 and 2/3 of the n-grams match: 1/3 in all.
    assert bleu(["a b c d e f"], ["a b c d e g"]).score == pytest.approx(100 * (1 / 3) ** (1 / 4))
    # Everything matches, but the output has 5 words for 6: only the brevity penalty is left.
    assert bleu(["a b c d e"], ["a b c d e f"]).score == pytest.approx(100 * math.exp(1 - 6 / 5))


def test_bleu_is_cased_and_signed() -> None:
    scores = bleu(["das ist ein Haus ."], ["Das ist ein Haus ."])
    assert scores.score < 100
    assert scores.signature is not None
    assert "case:mixed" in scores.signature
    assert "tok:13a" in scores.signature
    caseless = bleu(["das ist ein Haus ."], ["Das ist ein Haus ."], cased=False)
    assert caseless.values == {"bleu_lowercase": pytest.approx(100)}
    assert caseless.signature is not None
    assert "case:lc" in caseless.signature


def test_bleu_of_unequal_numbers_or_of_nothing() -> None:
    for score in (bleu, chrf, lambda *texts: translation(["one"], *texts)):
        with pytest.raises(ValueError, match="2 hypotheses but 1 references"):
            score(["ein", "zwei"], ["ein"])
        with pytest.raises(ValueError, match="of no sentences"):
            score([], [])


@pytest.mark.parametrize("cased", [True, False])
@pytest.mark.parametrize("hypotheses", [HYPOTHESES, REFERENCES, [""] * 5], ids=["near", "equal", "empty"])
def test_every_score_of_a_translation_is_that_of_the_command_line(
    hypotheses: list[str], cased: bool, tmp_path: Path
) -> None:
    scores = translation(SOURCES, hypotheses, REFERENCES, cased=cased)
    flags, other_flags = ([], ["-lc"]) if cased else (["-lc"], [])
    main, other, characters = "bleu", "bleu_lowercase", "chrf"
    characters_flags = []
    if not cased:
        main, other, characters, characters_flags = other, main, "chrf_lowercase", ["--chrf-lowercase"]
    details = scores.details
    json.dumps(details, allow_nan=False)
    printed = command_line(hypotheses, REFERENCES, tmp_path, "-m", "bleu", "chrf", "ter", *flags, *characters_flags)
    own = {main: scores.values[main], characters: scores.values[characters], "ter": details["ter"]}
    for (name, value), told in zip(own.items(), printed, strict=True):
        assert value == pytest.approx(told["score"], abs=1e-12)
        assert details["signatures"][name] == told["signature"]
    beside = command_line(hypotheses, REFERENCES, tmp_path, "-m", "bleu", *other_flags)
    assert scores.values[other] == pytest.approx(beside["score"], abs=1e-12)
    assert details["signatures"][other] == beside["signature"]
    resampled = command_line(hypotheses, REFERENCES, tmp_path, "-m", "bleu", "--confidence", *flags)
    assert details["signatures"]["bleu_interval"] == resampled["signature"]
    mean, half = resampled.get("confidence_mean", 0), resampled.get("confidence_var", 0)
    assert details["bleu_interval"] == pytest.approx([max(0, mean - half), min(100, mean + half)])
    assert f"BP = {details['brevity_penalty']:.3f} ratio = {details['length_ratio']:.3f}" in printed[0]["verbose_score"]
    assert set(scores.values) == {main, other, characters}
    assert (scores.primary, scores.signature, scores.examples) == (main, printed[0]["signature"], 5)
    alone = Scores(characters, {characters: own[characters]}, 5, details["signatures"][characters])
    assert chrf(hypotheses, REFERENCES, cased=cased) == alone


def test_the_interval_of_bleu_ends_at_100() -> None:
    right = "the cat sat on the mat today"
    low, high = translation(["x"] * 3, [right, right, "the dog sat on a mat"], [right] * 3).details["bleu_interval"]
    assert low < 100
    assert high == 100


def test_texts_too_long_for_ter_have_none() -> None:
    for mean, there in ((30, True), (31, False)):
        details = translation(["one"] * 2, ["ein"] * 2, ["ein " * 10, "ein " * (2 * mean - 10)]).details
        assert (details["ter"] is not None, details["signatures"]["ter"] is not None) == (there, there)


def test_sources_are_grouped_by_their_words() -> None:
    groups = translation(SOURCES, HYPOTHESES, REFERENCES).details["source_lengths"]
    chosen = {(0, 5): [0, 2], (6, 10): [1], (31, 50): [3], (51, None): [4]}  # 15, 20 and 30 words: none
    assert [(group["from"], group["to"], group["sentences"]) for group in groups] == [
        (*ends, len(numbers)) for ends, numbers in chosen.items()
    ]
    for group, numbers in zip(groups, chosen.values(), strict=True):
        some = [[texts[number] for number in numbers] for texts in (HYPOTHESES, REFERENCES)]
        assert group["bleu"] == bleu(*some).score


def test_translations_that_repeat_one_another_or_themselves_are_counted() -> None:
    hypotheses = ["a b", "a b", "a b c a b c a b", "a b c a b c a b c d", "x x x x x", "x x x x"]
    details = translation(["one"] * 6, hypotheses, ["ein"] * 6).details
    # The third has `a b c` twice only, the last `x x x` too.
    assert details["repetition"] == {"most_frequent": "a b", "times": 2, "looping": 2, "copied": 0}


def test_sources_left_as_they_are_are_counted_unless_that_is_right() -> None:
    sources = ["One dog .", "two dogs .", "Berlin", "three dogs ."]
    hypotheses = ["one dog .", "two dogs .", "Berlin", "drei Hunde ."]
    references = ["ein Hund .", "zwei Hunde .", "Berlin", "drei Hunde ."]
    assert translation(sources, hypotheses, references).details["repetition"]["copied"] == 2


def test_text_that_looks_tokenised_is_spoken_of_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sacrebleu"):
        translation(["one"] * 100, ["ein Haus ."] * 100, ["ein Haus."] * 100)
    assert [record.message for record in caplog.records].count(
        "That's 100 lines that end in a tokenized period ('.')"
    ) == 1


def test_rouge_is_that_of_the_paper() -> None:
    """Lin 2004, §3.1: of equal length, so that precision, recall and F1 are one."""
    reference = "Police killed the gunman."
    one, other = "police kill the gunman", "the gunman kill police"
    assert rouge([one], [reference]) == pytest.approx({"rouge_1": 75, "rouge_2": 100 / 3, "rouge_l": 75})
    assert rouge([other], [reference]) == pytest.approx({"rouge_1": 75, "rouge_2": 100 / 3, "rouge_l": 50})
    assert rouge([one, other], [reference] * 2)["rouge_l"] == pytest.approx(62.5)


def test_rouge_worked_out_by_hand() -> None:
    # `the` counts once, as in the reference: precision 1/3, recall 1/2.
    assert rouge(["the the the"], ["The cat"]) == pytest.approx({"rouge_1": 40, "rouge_2": 0, "rouge_l": 40})
    # The shared: 5 of 6 and 7 words; `on the`, `the mat` of 5 and 6 pairs; `cat sat on the mat` in order.
    scores = rouge(["a cat sat, on the mat"], ["the black cat was on the mat"])
    assert scores == pytest.approx({"rouge_1": 800 / 13, "rouge_2": 400 / 11, "rouge_l": 800 / 13})
    assert rouge(["", "ein", "…"], ["ein", "", "…"]) == {"rouge_1": 0, "rouge_2": 0, "rouge_l": 0}
    assert rouge(["Größe_1"], ["größe 1"])["rouge_l"] == 100


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_the_longest_common_subsequence_is_the_longest_of_all(one: str, other: str) -> None:
    def subsequences(text: str) -> set[str]:
        return {"".join(chosen) for size in range(len(text) + 1) for chosen in itertools.combinations(text, size)}

    longest = max(len(text) for text in subsequences(one) & subsequences(other))
    total = len(one) + len(other)
    assert rouge([" ".join(one)], [" ".join(other)])["rouge_l"] == pytest.approx(200 * longest / max(total, 1))


def test_rouge_is_there_where_it_is_asked_for() -> None:
    values = translation(SOURCES, HYPOTHESES, REFERENCES, with_rouge=True).values
    assert {name: values[name] for name in ("rouge_1", "rouge_2", "rouge_l")} == rouge(HYPOTHESES, REFERENCES)


def test_accuracy_counted_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, -1.0, 5.0], [-3.0, -2.0, -4.0], [1.0, 1.0, 0.0]])
    scores = accuracy(logits, torch.tensor([0, 2, 0, 0]))
    assert scores == Scores("accuracy", {"accuracy": 0.75}, examples=4)
    assert scores.score == 0.75
    assert scores.signature is None


def test_accuracy_of_half_precision_logits() -> None:
    logits = torch.eye(4, dtype=torch.bfloat16)
    assert accuracy(logits, torch.tensor([0, 1, 2, 0])).score == 0.75


def test_nan_is_never_right() -> None:
    logits = torch.tensor([[math.nan, 1.0], [0.0, math.nan], [0.0, 1.0]])
    assert accuracy(logits, torch.tensor([0, 1, 1])).score == pytest.approx(1 / 3)


def test_accuracy_of_shapes_that_do_not_fit_or_of_nothing() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        accuracy(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="do not fit"):
        accuracy(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="no examples"):
        accuracy(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))


def scored(logits: Tensor, labels: Tensor) -> tuple[Scores, dict[str, Any]]:
    scores = classification(logits, labels, [str(number) for number in range(logits.shape[1])])
    json.dumps(scores.details, allow_nan=False)
    return scores, scores.details


@pytest.mark.parametrize(("classes", "kind"), [(3, torch.float32), (10, torch.float32), (10, torch.bfloat16)])
def test_everything_against_a_slow_loop(classes: int, kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = (3 * torch.randn(200, classes, generator=generator)).to(kind)  # bfloat16 has many ties
    labels = torch.where(
        torch.rand(200, generator=generator) < 0.5,
        logits.argmax(dim=1),
        torch.randint(classes, (200,), generator=generator),
    )
    scores, details = scored(logits, labels)

    right = near = 0
    loss = 0.0
    confusion = [[0] * classes for _ in range(classes)]
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(classes), key=lambda column, row=row: (-row[column], column))  # type: ignore[misc]
        chosen = order[0]
        right += chosen == label
        near += label in order[:5]
        total = math.fsum(math.exp(value) for value in row)
        loss += math.log(total) - row[label]
        confusion[label][chosen] += 1
        confidence = math.exp(row[chosen]) / total
        bins[math.ceil(15 * confidence) - 1].append((confidence, chosen == label))
    error = 0.0
    for held in filter(None, bins):
        share = sum(correct for _, correct in held) / len(held)
        error += len(held) / 200 * abs(share - sum(confidence for confidence, _ in held) / len(held))

    assert scores.values == {"accuracy": right / 200} | ({"top_5_accuracy": near / 200} if classes > 5 else {})
    assert accuracy(logits, labels).values == scores.values
    assert (scores.primary, scores.examples, scores.signature) == ("accuracy", 200, None)
    assert details["confusion"] == confusion
    assert details["negative_log_likelihood"] == pytest.approx(loss / 200, rel=1e-12)
    assert details["expected_calibration_error"] == pytest.approx(error, rel=1e-12)
    for number, entry in enumerate(details["classes"]):
        count = sum(confusion[number])
        assert entry == {
            "class": str(number),
            "examples": count,
            "accuracy": confusion[number][number] / count,
        }


def test_the_interval_is_where_the_score_test_would_just_not_refuse() -> None:
    """Its ends are, by definition, the shares p of which the one seen is 1.96 standard errors of p away."""
    for right, examples in ((1, 10), (9151, 10_000), (50, 100), (1, 2), (9_999, 10_000)):
        low, high = wilson_interval(right, examples)
        assert 0 < low < right / examples < high < 1
        for end in (low, high):
            distance = abs(right / examples - end) / math.sqrt(end * (1 - end) / examples)
            assert distance == pytest.approx(NormalDist().inv_cdf(0.975), rel=1e-9)


def test_the_interval_of_none_and_of_all() -> None:
    z = NormalDist().inv_cdf(0.975)
    assert wilson_interval(0, 10) == (0, pytest.approx(z * z / (10 + z * z)))  # a closed form at the ends
    assert wilson_interval(10, 10) == (pytest.approx(10 / (10 + z * z)), 1)
    # Method 3 in table I of Newcombe 1998.
    assert wilson_interval(81, 263) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))


def test_calibration_by_hand() -> None:
    # Two bins: (0, 1/2] holds 0.3 and 0.5, one of them right; (1/2, 1] holds 0.8 and 1, both right.
    confidence = torch.tensor([0.3, 0.5, 0.8, 1.0], dtype=torch.float64)
    correct = torch.tensor([True, False, True, True])
    expected = 2 / 4 * abs(1 / 2 - 0.4) + 2 / 4 * abs(1 - 0.9)
    assert expected_calibration_error(confidence, correct, 2) == pytest.approx(expected)
    # Within a bin, what is too sure and what is too unsure cancel.
    assert expected_calibration_error(confidence, correct, 1) == pytest.approx(abs(3 / 4 - 2.6 / 4))


def test_a_model_that_knows_nothing_is_calibrated_and_costs_the_log_of_the_classes() -> None:
    scores, details = scored(torch.zeros(40, 8), torch.arange(40) % 8)
    assert details["negative_log_likelihood"] == pytest.approx(math.log(8))
    assert details["expected_calibration_error"] == pytest.approx(0)
    assert scores.values == {"accuracy": 1 / 8, "top_5_accuracy": 5 / 8}, "among equal entries the first count"


def test_five_classes_have_no_top_five() -> None:
    logits, labels = torch.randn(20, 6), torch.arange(20) % 5
    assert set(accuracy(logits[:, :5], labels).values) == {"accuracy"}
    assert set(accuracy(logits, labels).values) == {"accuracy", "top_5_accuracy"}


def test_rows_that_are_not_numbers_are_wrong_in_everything() -> None:
    logits = torch.eye(7).repeat(2, 1)
    labels = torch.arange(14) % 7
    logits[3, 5] = logits[9, 2] = math.nan
    scores, details = scored(logits, labels)
    assert scores.values == {"accuracy": 12 / 14, "top_5_accuracy": 12 / 14}
    assert (details["negative_log_likelihood"], details["expected_calibration_error"]) == (None, None)
    assert [entry["accuracy"] for entry in details["classes"]] == [1, 1, 0.5, 0.5, 1, 1, 1]
    assert sum(map(sum, details["confusion"])) == 12
    assert [entry["examples"] for entry in details["classes"]] == [2] * 7


def test_an_impossible_label_costs_more_than_json_can_say() -> None:
    scores, details = scored(torch.tensor([[0.0, -math.inf], [0.0, 1.0]]), torch.tensor([1, 1]))
    assert scores.score == 0.5
    assert details["negative_log_likelihood"] is None
    assert details["expected_calibration_error"] is not None


def test_a_class_without_examples_has_no_accuracy() -> None:
    _, details = scored(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]]), torch.tensor([0, 0]))
    assert [entry["accuracy"] for entry in details["classes"]] == [0.5, None, None]
    assert details["confusion"] == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_details_of_nothing() -> None:
    with pytest.raises(ValueError, match="no examples"):
        classification(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), ["a", "b"])


@pytest.mark.parametrize(
    ("language", "name"),
    [
        ("de", "13a"),
        ("zh", "zh"),
        ("zh_CN", "zh"),
        ("chinese", "zh"),
        ("cn", "zh"),
        ("Japanese", "char"),
        ("thai", "char"),
        ("zh-Hans", "zh"),
        ("zho_Hans", "zh"),
        ("ja", "char"),
        ("th", "char"),
        (None, "13a"),
    ],
)
def test_languages_without_spaces_have_a_tokenizer_of_their_own(language: str | None, name: str) -> None:
    """As whole lines, two sentences that differ in a character share nothing."""
    assert tokenizer(language) == name
    hypotheses, references = ["我喜欢红色的猫和狗。"], ["我喜欢黑色的猫和狗。"]
    scores = bleu(hypotheses, references, language=language)
    assert f"tok:{name}|" in str(scores.signature)
    assert scores.score == sacrebleu.corpus_bleu(hypotheses, [references], tokenize=name).score
    whole = translation(["one"], hypotheses, references, language=language)
    assert whole.values["bleu"] == scores.score
    assert {f"tok:{name}|" in whole.details["signatures"][one] for one in ("bleu", "bleu_lowercase")} == {True}
    assert whole.details["source_lengths"][0]["bleu"] == scores.score
    assert (scores.score > 30) == (name != "13a")


def test_words_of_languages_without_spaces_are_characters() -> None:
    assert words("a dog, 犬だ", "en") == ["a", "dog,", "犬だ"]
    assert words("我爱 GPU 2号", "zh_CN") == ["我", "爱", "GPU", "2", "号"]
    assert words("犬 だ。", "ja") == ["犬", "だ"]
    assert words("ไป กิน", "th") == list("ไปกิน")
    wrong, right = "我喜欢红色的猫", "我喜欢黑色的猫"  # one of seven
    details = translation(["我们今天去北京看朋友"], [wrong], [right], language="zh", source_language="zh").details
    assert details["ter"] == pytest.approx(100 / 7)
    assert [(group["from"], group["to"]) for group in details["source_lengths"]] == [(6, 10)]
    assert translation(["one"], [wrong], [right], language="en").details["ter"] == 100
    assert translation(["one"], [wrong], [right], language="th").details["ter"] is None
    looping = ["我喜欢我喜欢我喜欢", "我喜欢猫"]
    assert [
        translation(["one"] * 2, looping, [right] * 2, language=language).details["repetition"]["looping"]
        for language in ("zh", "en", "th")
    ] == [1, 0, 0]


def test_rouge_takes_marks_for_a_part_of_their_word() -> None:
    assert rouge(["किताब"], ["कातिब"])["rouge_1"] == 0, "of the same letters, other vowel signs"
    assert rouge(["u\u0308ber e\u0301te\u0301"], ["über été"])["rouge_2"] == 100
    assert rouge(["ไปกิน"], ["ไปดู"], "th")["rouge_1"] == pytest.approx(100 * 2 * 2 / (5 + 4))


def test_rouge_of_chinese_is_of_characters() -> None:
    """猫 喜 欢 我 and 我 喜 欢 猫: all four shared, one of three pairs, and two in order."""
    found = rouge(["猫喜欢我"], ["我喜欢猫!"])
    assert found == pytest.approx({"rouge_1": 100, "rouge_2": 100 / 3, "rouge_l": 50})
    assert rouge(["BERT 模型2"], ["bert模型 2"])["rouge_l"] == 100
    assert rouge(["ラーメン・うどん"], ["らーめん ・"])["rouge_1"] == pytest.approx(100 * 2 * 2 / (7 + 4))
