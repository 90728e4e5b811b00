"""Evaluating translations: what is printed and noted, several beams, the file of them, and what best is chosen by."""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from running import KEYS
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner, Result

from dl7cli import checkpoint, device, runs, tasks, training
from dl7cli.cli import app, progress
from dl7cli.data.vocabulary import BOS, EOS
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.metrics import Scores, chrf, translation
from dl7cli.recipe import resolve
from dl7cli.runs import Run
from dl7cli.tasks.classification import Classification
from dl7cli.tasks.translation import Translation
from dl7cli.training.evaluation import _table

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")


class Heard:
    """A listener that remembers the epochs."""

    def __init__(self) -> None:
        self.epochs: list[training.Epoch] = []

    def plan(self, plan: training.Plan) -> None:
        pass

    def step(self, step: training.Step) -> None:
        pass

    def epoch(self, epoch: training.Epoch) -> None:
        self.epochs.append(epoch)

    def note(self, text: str) -> None:
        pass

    def progress(self, what: str, done: int, total: int) -> None:
        pass


@pytest.fixture
def train(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Run, dict[str, Any], Heard]]:
    """Train a tiny recipe of a kind, with changes, in `run` of an empty folder to be in."""
    monkeypatch.chdir(tmp_path)

    def make(kind: str, *changes: str) -> tuple[Run, dict[str, Any], Heard]:
        heard = Heard()
        recipe = resolve(str(tiny[kind]), changes).recipe
        result = training.train(recipe, out=Path("run"), runtime=CPU, listener=heard)
        return Run(Path("run")), result, heard

    return make


def dl7(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--device", "cpu"])


# Several beams


def test_several_beams_are_one_object_and_a_reading_each(train: Callable[..., Any]) -> None:
    run, _, _ = train("seq2seq", "training.epochs=1")
    document = json.loads(dl7("eval", "run", "--beam", "3,1", "--length-penalty", "0.5", "--json").stdout)
    assert tuple(document) == (*KEYS, "beams")
    alone = [training.evaluate("run", beams=[beam], length_penalty=0.5, runtime=CPU) for beam in (3, 1)]
    unlike = {"seconds": 0, "readings": 0}
    assert {**document, **unlike} == {**alone[0], **unlike, "beams": document["beams"]}
    assert [document["readings"], *(one["readings"] for one in alone)] == [3, 4, 5], "training's is the first"
    for entry, beam, own in zip(document["beams"], (3, 1), alone, strict=True):
        assert tuple(entry) == ("beam", "scores", "details", "seconds")
        assert (entry["beam"], entry["scores"], entry["details"]) == (beam, own["scores"], own["details"])
        assert 0 < entry["seconds"] <= document["seconds"]
    lines = runs.evaluations(run)[1:]
    assert [(line["beam"], line["length_penalty"], line["checkpoint"]) for line in lines] == [
        (beam, 0.5, "best") for beam in (3, 1, 3, 1)
    ]
    for line, own in zip(lines, alone * 2, strict=True):
        assert (line["split"], line["scores"]) == ("test", own["scores"])
        assert line["details"] == {name: value for name, value in own["details"].items() if name != "source_lengths"}


def test_scores_among_which_one_could_choose_are_told_of(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train("seq2seq")[0]
    shutil.copytree(run.folder, "other")
    own = runs.evaluations(run)[0]["scores"]["bleu"]
    values: list[float] = []

    def scored(sources: Any, hypotheses: Any, references: Any, **options: Any) -> Scores:
        found = translation(sources, hypotheses, references)
        return Scores("bleu", {**found.values, "bleu": values[-1]}, found.examples, found.signature, found.details)

    monkeypatch.setattr("dl7cli.tasks.translation.translation", scored)
    for arguments, value, count in (
        (("run",), own, 1),
        (("run/last",), own + 0.001, 1),
        (("run", "--split", "validation"), own + 1, 1),
        (("run", "--with", "other"), own + 2, 1),
        (("run", "--beam", "4"), own + 3, 2),
        (("run", "--with", "other", "--beam", "4"), own + 4, 2),
        (("run",), own, 2),
    ):
        values.append(value)
        told = dl7("eval", *arguments).stderr
        said = f"note: this run has had {count} different scores on this split; the best of them flatters\n"
        assert (said in told) == (count > 1)
        assert ("flatters" in told) == (count > 1)


@pytest.mark.bf16
def test_a_reading_says_in_what_precision_it_was_searched(train: Callable[..., Any]) -> None:
    run, _, _ = train("seq2seq", "training.epochs=1")
    for flags in ((), ("--precision", "bf16"), ("--precision", "fp32")):
        dl7("eval", "run", *flags)
    trained, *read = runs.evaluations(run)
    assert [one["precision"] for one in read] == ["fp32", "bf16", "fp32"]
    assert read[0]["scores"] == read[2]["scores"] == trained["scores"]


def test_a_beam_that_is_given_is_searched_with_where_the_recipe_samples(train: Callable[..., Any]) -> None:
    train("seq2seq", "training.epochs=1", "decoding.method=sample", "decoding.temperature=9.0")
    task = tasks.load(Path("run", "best"), runtime=CPU)
    assert isinstance(task, Translation)
    for beams, method in (([2], "beam"), ([], "sample")):
        found = training.evaluate("run", beams=beams, runtime=CPU)
        expected = task.evaluate("test", task.recipe.decoding.updated(method=method, beam=2))
        assert found["scores"] == expected.values
    assert found["scores"] != task.evaluate("test", task.recipe.decoding.updated(method="beam")).values


def test_keys_of_decoding_can_be_changed_for_one_evaluation(train: Callable[..., Any]) -> None:
    run, _, _ = train("seq2seq", "training.epochs=1")
    task = tasks.load(Path("run", "best"), runtime=CPU)
    assert isinstance(task, Translation)
    changed = dl7("eval", "run", "--beam", "1", "--set", "decoding.min_length=9", "--json")
    expected = task.evaluate("test", task.recipe.decoding.updated(beam=1, min_length=9))
    found = json.loads(changed.stdout)
    assert (found["scores"], found["details"]) == (expected.values, expected.details)
    assert runs.evaluations(run)[-1]["set"] == ["decoding.min_length=9"]
    for key in ("decoding.min_lengt=9", "model.dropout=0.5"):
        refused = dl7("eval", "run", "--set", key)
        assert isinstance(refused.exception, UserError)
    assert len(runs.evaluations(run)) == 2


def test_what_was_trained_in_fp32_is_evaluated_and_used_in_it(
    tiny: dict[str, Path], train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_cpu_flags", lambda: {"avx512_bf16"})
    run, result, _ = train("resnet", "training.epochs=1")
    found = json.loads(dl7("eval", "run", "--json").stdout)
    assert (found["scores"], found["details"]) == (result["scores"], result["details"])
    dl7("eval", "run", "--precision", "bf16")
    assert [line["precision"] for line in runs.evaluations(run)] == ["fp32", "fp32", "bf16"]
    use = ("classify", str(tiny["resnet"].parent / "images/test/red/0.png"), "--run", "run", "--json")
    exact, rough = (dl7(*use, "--precision", name).stdout for name in ("fp32", "bf16"))
    assert dl7(*use).stdout == exact != rough
    assert runs.scoring_precision("auto", ["run"]) == "fp32"
    assert runs.scoring_precision("bf16", ["run"]) == "bf16"
    runs.amend_environment(run, {"precision": "bf16"})
    assert runs.scoring_precision("auto", ["run"]) == "auto"


def test_a_fall_with_the_beam_is_explained_and_choosing_on_test_warned_of(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train("seq2seq", "training.epochs=1")

    def falling(sources: Any, hypotheses: Any, references: Any, **options: Any) -> Scores:
        found = translation(sources, hypotheses, references)
        return Scores("bleu", {**found.values, "bleu": next(scores)}, found.examples, found.signature, found.details)

    monkeypatch.setattr("dl7cli.tasks.translation.translation", falling)
    for order, values, split, explained, warned in (
        ("1,2,4", [3.0, 2.0, 2.5], "test", True, True),
        ("4,2,1", [3.0, 2.0, 1.0], "validation", False, False),
        ("2,2", [1.0], "test", False, False),
    ):
        scores = iter(values)
        told = dl7("eval", "run", "--beam", order, "--split", split).stderr
        assert ("Koehn & Knowles" in told) == explained
        assert ("choose a beam with --split validation" in told) == warned


# Several runs


def test_an_ensemble_is_scored_by_what_it_translates(
    train: Callable[..., Any], tiny: dict[str, Path], tmp_path: Path
) -> None:
    run, _, _ = train("seq2seq")
    recipe = resolve(str(tiny["seq2seq"]), ["training.seed=2"]).recipe
    training.train(recipe, out=Path("other"), runtime=CPU, listener=Heard())
    task, other = (tasks.load(Path(name, "best"), runtime=CPU) for name in ("run", "other"))
    assert isinstance(task, Translation)
    assert isinstance(other, Translation)
    sources, references = zip(*task.pairs.split("test"), strict=True)
    expected = [line.text for line in task.translate(sources, task.recipe.decoding.updated(beam=2), others=[other])]
    assert expected != task.translations("test", task.recipe.decoding.updated(beam=2))
    done = dl7("eval", "run", "--with", "other", "--beam", "2", "--output", "out", "--json")
    document = json.loads(done.stdout)
    assert tuple(document) == (*KEYS, "others")
    assert (document["run"], document["others"]) == ("run", ["other"])
    assert document["scores"] == translation(sources, expected, references, cased=True).values
    assert (tmp_path / "out").read_text(encoding="utf-8").splitlines() == expected
    for one, rest in (("run", ["other"]), ("other", ["run"])):
        noted = runs.evaluations(Run(Path(one)))[-1]
        assert (noted["run"], noted["others"], noted["scores"]) == (one, rest, document["scores"])
    shown = dl7("eval", "run", "--with", "other", "--with", "run/last", "--beam", "1,2").stdout
    assert shown.splitlines()[0].endswith("by run, other and run/last together")
    assert [one["beam"] for one in runs.evaluations(run)[-4:]] == [1, 1, 2, 2], "of each of its checkpoints"
    told = CliRunner().invoke(app, ["runs", "show", "other"]).stdout.splitlines()[-1]
    assert told.endswith("together with run, run/last")


def test_what_is_no_ensemble_is_not_scored(
    train: Callable[..., Any], tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    train("seq2seq", "training.epochs=1")
    for kind, name, change in (("seq2seq", "lower", "data.lowercase=true"), ("resnet", "images", "model.depth=8")):
        recipe = resolve(str(tiny[kind]), ["training.epochs=1", change]).recipe
        training.train(recipe, out=Path(name), runtime=CPU, listener=Heard())
    monkeypatch.setattr(Translation, "translations", None)
    monkeypatch.setattr(Classification, "logits", None)
    for one, other, message in (
        ("run", "lower", "`run` and `lower` differ in vocabulary, languages or reading order"),
        ("run", "images", "run `images` is for classification, not for translation"),
        ("images", "run", "run `run` is for translation, not for classification"),
        ("run", "run/best", "`run` is named twice"),
    ):
        failed = dl7("eval", one, "--with", other)
        assert isinstance(failed.exception, UserError)
        assert failed.exception.message == message
    assert [len(runs.evaluations(Run(Path(name)))) for name in ("run", "lower", "images")] == [1, 1, 1]


# What is printed of one


def test_everything_is_printed_with_its_signature(train: Callable[..., Any]) -> None:
    _, result, _ = train("seq2seq", "training.epochs=1")
    assert set(result["scores"]) == {"bleu", "bleu_lowercase", "chrf"}
    shown = dl7("eval", "run", "--rouge").stdout.splitlines()
    number = r"\d+\.\d\d"
    patterns = [
        rf"BLEU {number} on the test split of .* \(6 sentence pairs, \d+s\), by run",
        r"signature nrefs:1\|case:mixed\|.*version:.*",
        rf"95 % interval {number} to {number} \(bootstrap, nrefs:1\|bs:1000\|seed:12345\|.*\)",
        r"length ratio \d+\.\d{3}, brevity penalty \d\.\d{3}",
        rf"BLEU without case {number} \(nrefs:1\|case:lc\|.*\)",
        rf"chrF {number} \(nrefs:1\|.*nc:6\|.*\)",
        rf"TER {number}, lower is better \(nrefs:1\|.*tok:tercom\|.*\)",
        rf"perplexity {number} of a subword of the references",
        rf"F1 of ROUGE-1 {number}, ROUGE-2 {number}, ROUGE-L {number}",
        "",
        "SOURCE WORDS  SENTENCES +BLEU",
    ]
    for line, pattern in zip(shown, patterns, strict=False):
        assert re.fullmatch(pattern, line), line
    rows = [re.split(r"  +", line.strip()) for line in shown[len(patterns) :]]
    assert [row[0] for row in rows] == [f"{one['from']} to {one['to']}" for one in result["details"]["source_lengths"]]
    assert sum(int(row[1]) for row in rows) == 6


def test_a_translator_of_lower_case_is_scored_without_case(train: Callable[..., Any]) -> None:
    _, result, _ = train("seq2seq", "training.epochs=1", "data.lowercase=true")
    assert (result["primary"], set(result["scores"])) == (
        "bleu_lowercase",
        {"bleu", "bleu_lowercase", "chrf_lowercase"},
    )
    shown = dl7("eval", "run").stdout.splitlines()
    assert re.match(r"BLEU without case \d+\.\d\d on the test split", shown[0])
    assert shown[1].startswith("signature nrefs:1|case:lc|")
    assert "case:lc" in shown[2]
    assert [line.partition(" ")[0] for line in shown[3:6]] == ["length", "chrF", "TER"]
    assert all("case:mixed" not in line for line in shown)
    for line in dl7("eval", "run", "--beam", "1,2").stdout.splitlines()[1:3]:
        assert "|case:lc|" in line


# The file of translations


def test_the_translations_are_written_in_the_order_of_the_data(train: Callable[..., Any], tmp_path: Path) -> None:
    run, _, _ = train("seq2seq", "training.epochs=1")
    task = tasks.load(run.best, runtime=CPU)
    assert isinstance(task, Translation)
    target = tmp_path / "out.de"
    target.write_text("as it was")
    done = dl7("eval", "run", "--split", "train", "--beam", "2", "--output", str(target))
    assert done.exit_code == 0, done.stderr
    expected = task.translations("train", task.recipe.decoding.updated(beam=2))
    assert len(set(expected)) > 1
    assert target.read_text(encoding="utf-8") == "".join(f"{line}\n" for line in expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.de", "run"], "nothing is left beside it"


def test_a_classifiers_answers_are_written_as_a_table(train: Callable[..., Any], tmp_path: Path) -> None:
    run, _, _ = train("resnet", "training.epochs=1")
    task = tasks.load(run.best, runtime=CPU)
    assert isinstance(task, Classification)
    images, labels = task.images.split("train")
    done = dl7("eval", "run", "--split", "train", "--output", "out.tsv", "--json")
    assert done.exit_code == 0, done.stderr
    names, *rows = [line.split("\t") for line in (tmp_path / "out.tsv").read_text(encoding="utf-8").splitlines()]
    assert names == ["image", "label", "predicted", "probability"]
    assert [int(row[0]) for row in rows] == list(range(len(labels)))
    classes = task.assets["classes"]
    for number, label, predicted, probability in rows:
        own = task._scorer()(images[int(number) : int(number) + 1])[0].double().softmax(dim=0)
        assert label == classes[labels[int(number)]]
        assert predicted == classes[int(own.argmax())]
        assert float(probability) == pytest.approx(own.max().item(), abs=1e-5)
    right = sum(label == predicted for _, label, predicted, _ in rows) / len(rows)
    assert json.loads(done.stdout)["scores"]["accuracy"] == right
    broken = torch.zeros(len(labels), len(classes))
    broken[0, 1], broken[1, 1] = torch.nan, torch.inf
    (_, none, _), (_, infinite, unknown), (_, first, even), *_ = task.answers("train", broken)
    assert (none, infinite, first) == ("", classes[1], classes[0]), "as the confusion matrix counts them"
    assert math.isnan(unknown)
    assert even == pytest.approx(1 / len(classes))


def test_the_name_of_a_class_stays_in_its_cell() -> None:
    rows = _table([("a\tb\r", "c\u2028d\udce9", 0.5)])
    assert rows == ["image\tlabel\tpredicted\tprobability", "0\ta b \tc d \t0.500000"]


def test_what_cannot_be_written_is_refused_before_anything_is_scored(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, _, _ = train("seq2seq", "training.epochs=1")
    monkeypatch.setattr(Translation, "translations", None)
    several = dl7("eval", "run", "--beam", "1,2", "--output", "out")
    assert (several.exit_code, several.stdout) == (2, "")
    assert "translations of one beam" in several.stderr
    nowhere = dl7("eval", "run", "--output", "missing/out")
    assert isinstance(nowhere.exception, UserError)
    assert "missing/out` cannot be written" in nowhere.exception.message
    assert len(runs.evaluations(run)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_classifier_has_none_of_it(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, _, _ = train("resnet", "training.epochs=1")
    monkeypatch.setattr(Classification, "logits", None)
    for flags, what in (
        (["--beam", "1,2"], "beam"),
        (["--length-penalty", "1"], "beam"),
        (["--set", "decoding.min_length=3"], "decoding"),
        (["--rouge"], "text for ROUGE"),
    ):
        failed = dl7("eval", "run", *flags)
        assert isinstance(failed.exception, UserError)
        assert failed.exception.message == f"run `run` is a classifier: it has no {what}"
    assert len(runs.evaluations(run)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# What best is chosen by


def test_by_loss(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    translated: list[str] = []
    method = Translation.translations

    def counted(task: Translation, split: str, *settings: Any) -> list[str]:
        translated.append(split)
        return method(task, split, *settings)

    monkeypatch.setattr(Translation, "translations", counted)
    run, result, heard = train("seq2seq", "training.select=loss", "training.keep_last=3")
    assert translated == ["test"], "nothing is searched to choose by"
    values = [likelihood(run, epoch) for epoch in (1, 2, 3)]
    for epoch, value in zip(heard.epochs, values, strict=True):
        assert epoch.scores == Scores("log_likelihood", {"log_likelihood": epoch.scores.score}, 5)
        assert epoch.scores.score == pytest.approx(value, rel=1e-5)
        assert f"validation log-likelihood {epoch.scores.score:.4f}" in progress.summary(epoch)
    assert result["best_epoch"] == 1 + max(range(3), key=values.__getitem__)
    assert (result["primary"], result["signature"] is None) == ("bleu", False), "judged by BLEU all the same"
    closed = [record for record in runs.metrics(run) if "scores" in record]
    assert [record["primary"] for record in closed] == ["log_likelihood"] * 3
    assert checkpoint.load(run.best).progress.best == max(epoch.scores.score for epoch in heard.epochs)


def likelihood(run: Run, epoch: int) -> float:
    """Of a validation subword, one sentence at a time in float64."""
    task = tasks.load(run.epoch(epoch), runtime=CPU)
    assert isinstance(task, Translation)
    model = task.model.double().eval()
    total, count = 0.0, 0
    for source, target in task.pairs.splits["validation"]:
        read = torch.tensor([[*task.pairs.source_vocabulary.encode(source), EOS]])
        answer: Tensor = torch.tensor([*task.pairs.target_vocabulary.encode(target), EOS])
        with torch.no_grad():
            decoded, context = model(read, torch.tensor([read.shape[1]]), torch.tensor([[BOS, *answer.tolist()[:-1]]]))
            total -= functional.cross_entropy(model.logits(decoded, context).double(), answer, reduction="sum").item()
        count += len(answer)
    return total / count


def test_by_chrf(train: Callable[..., Any]) -> None:
    run, result, heard = train("seq2seq", "training.select=chrf", "training.keep_last=3")
    for number, epoch in enumerate(heard.epochs, start=1):
        task = tasks.load(run.epoch(number), runtime=CPU)
        assert isinstance(task, Translation)
        greedy = task.translations("validation", task.recipe.decoding.updated(beam=1))
        sources, references = zip(*task.pairs.splits["validation"], strict=True)
        sample = {"source": sources[0], "translation": greedy[0], "reference": references[0]}
        assert epoch.scores == replace(chrf(greedy, references), details={"sample": sample})
        assert epoch.scores.signature is not None
        first, second = progress.summary(epoch).splitlines()
        assert first.startswith(f"epoch {number}  validation chrF {epoch.scores.score:.2f}, greedy")
        assert second == f"  {sources[0]} → {greedy[0]}"
        closed = [record for record in runs.metrics(run) if "scores" in record]
        assert closed[number - 1]["sample"] == sample
    assert result["primary"] == "bleu"


def test_runs_name_both_scores(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, result, heard = train("seq2seq", "training.select=loss", "training.epochs=1")
    monkeypatch.setattr(runs.folder, "RUNS", Path())
    (summary,) = runs.listing()
    assert (summary.primary, summary.best) == ("log_likelihood", heard.epochs[0].scores.score)
    assert (summary.test_primary, summary.test) == ("bleu", result["scores"]["bleu"])
    listed = CliRunner().invoke(app, ["runs", "list"]).stdout.splitlines()[1]
    assert re.search(rf"log-likelihood {summary.best:.4f} +BLEU {summary.test:.2f}  ", listed)
    shown = CliRunner().invoke(app, ["runs", "show", "run"]).stdout
    assert f"log-likelihood {summary.best:.4f} on validation, epoch 1" in shown


def test_what_there_is_to_choose_by() -> None:
    with pytest.raises(UserError, match=r"`training.select` is `\"ppl\"`: input should be 'bleu', 'chrf', 'loss' or"):
        resolve("seq2seq", ["training.select=ppl"])
    with pytest.raises(UserError, match=r"`training.select` is `\"loss\"`: input should be 'accuracy' or 'last'"):
        resolve("resnet", ["training.select=loss"])
    for name in ("resnet", "seq2seq"):
        with pytest.raises(UserError, match=r"`training.patience` is `3`: no better epoch is waited for where"):
            resolve(name, ["training.select=last", "training.patience=3"])
    with pytest.raises(UserError, match=r"`training.keep_last` is `-1`"):
        resolve("resnet", ["training.keep_last=-1"])


def test_a_likelihood_that_is_no_number_says_so(train: Callable[..., Any]) -> None:
    run, _, _ = train("seq2seq", "training.select=loss", "training.epochs=1")
    task = tasks.load(run.best, runtime=CPU)
    with torch.no_grad():
        next(task.model.parameters()).fill_(math.inf)
    with pytest.raises(UserError, match="is not a number"):
        task.validate()
