"""Whether a run is better than another or only luckier: both answer the same examples, and the difference is tested."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from dl7cli import checkpoint, runs, significance, tasks
from dl7cli.data.sources import Progress, silent
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.metrics import Scores, among_first, tokenizer
from dl7cli.recipe import alike, differences
from dl7cli.significance import LEVEL
from dl7cli.tasks import Task
from dl7cli.tasks.classification import Classification
from dl7cli.tasks.translation import Translation
from dl7cli.training.evaluation import Loaded, note_reading, refuse_trained_on, refuse_unfit, result_of


def compare(
    sides: Sequence[Sequence[str]],
    *,
    split: str = "test",
    data: str | None = None,
    beam: int | None = None,
    runtime: Runtime,
    offline: bool = False,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Test every other side against the first, by their primary scores on a split; returns what `--json` prints.

    A side is one run, or several of one recipe with different seeds. Of single runs the answers to the same examples
    are compared: of classifiers by McNemar's exact test, of translators by approximate randomisation, with the paired
    bootstrap beside it; without case where one of them knows none. Of several runs a side the scores are, by Welch's
    t-test. With several other sides the p-values that count are Holm's. Every run is evaluated anew, and that reading
    noted.

    The `recipe_differences` of a comparison are the keys in which the recipes that were trained differ, with the values
    of the first and the second, but for the seeds of several.

    Raises UserError, before anything is scored, where the runs are not of one task and the same examples, where a side
    is not of one recipe with different seeds, or some are of one run and others of several.
    """
    begin = time.monotonic()
    found = [[runs.find(name) for name in side] for side in sides]
    refuse_unfit([one for side in found for one in side])
    several = len(sides[0]) > 1
    if any((len(side) > 1) != several for side in sides):
        hint = "name several runs of every side, with commas between them, or one of each"
        raise UserError("some sides have one run and others several: what is by chance is not known of the one", hint)
    contestants = [
        [
            Loaded(run, folder, tasks.load(folder, runtime=runtime, offline=offline, progress=progress, data=data))
            for run, folder in side
        ]
        for side in found
    ]
    together = [one for side in contestants for one in side]
    task = together[0].task
    _refuse_other_examples(together, split, beam)
    for one in together:
        refuse_trained_on(one, one.task, split, data)
    for side in contestants:
        _refuse_other_recipes(side)
    for text in dict.fromkeys(text for one in together for text in one.task.notes):
        note(text)
    cased = all(one.task.cased for one in together if isinstance(one.task, Translation))
    answered = [[_answers(one, split, beam, cased=cased) for one in side] for side in contestants]
    scores, _ = answered[0][0]
    values = [[found.score for found, _ in side] for side in answered]
    first, *others = (side[0][1] for side in answered)
    if several:
        test, tested = "welch", [_by_scores(values[0], other) for other in values[1:]]
    elif isinstance(task, Classification):
        test, tested = "mcnemar", [_by_correctness(first, other) for other in others]
    else:
        references = [target for _, target in task.pairs.split(split)]
        tokenize = tokenizer(task.assets["target_language"])
        test = "approximate randomisation"
        tested = _by_translations(first, others, references, cased=cased, tokenize=tokenize)
    names = [",".join(one.name for one in side) for side in contestants]
    adjusted = significance.holm([one["p_value"] for one in tested])
    return {
        "task": task.recipe.task,
        "data": task.data_name,
        "split": split,
        "examples": scores.examples,
        "primary": scores.primary,
        "signature": scores.signature,
        "test": test,
        "sides": [
            {
                "name": name,
                "runs": [one.name for one in side],
                "seeds": [one.seed for one in side],
                "values": own,
                **dict(zip(("mean", "standard_deviation", "interval"), significance.spread(own), strict=True)),
            }
            for name, side, own in zip(names, contestants, values, strict=True)
        ],
        "comparisons": [
            {
                "first": names[0],
                "second": name,
                **one,
                "adjusted_p_value": p_value,
                "better": None if p_value >= LEVEL else name if one["difference"] > 0 else names[0],
                "recipe_differences": _differences(contestants[0], side),
            }
            for name, side, one, p_value in zip(names[1:], contestants[1:], tested, adjusted, strict=True)
        ],
        "seconds": round(time.monotonic() - begin, 3),
    }


def _refuse_other_examples(together: Sequence[Loaded], split: str, beam: int | None) -> None:
    """Raise UserError where not all are to answer the same."""
    first, *others = together
    for other in others:
        own, its = first.task.recipe.task, other.task.recipe.task
        if own != its:
            raise UserError(f"`{first.name}` is for {own}, `{other.name}` for {its}", hint="compare runs of one task")
        if first.task.data_name != other.task.data_name:
            raise UserError(
                f"`{first.name}` has the data `{first.task.data_name}`, `{other.name}` has `{other.task.data_name}`",
                hint="`--data SOURCE` puts the same examples to both",
            )
    if beam is not None and isinstance(first.task, Classification):
        raise UserError(f"run `{first.run.folder}` is a classifier: it has no beam", hint="leave the option out")
    wanted = _examples(first.task, split)
    for other in others:
        if _examples(other.task, split) != wanted:
            raise UserError(
                f"the {split} split of `{first.name}` is not that of `{other.name}`",
                hint="their recipes divide or read the data in other ways: see the keys of `data` in `recipe.toml`",
            )


def _refuse_other_recipes(side: Sequence[Loaded]) -> None:
    """Raise UserError where the runs of a side differ in anything but their seeds, or not in those."""
    first, *others = side
    for other in others:
        if not alike(first.task.recipe, other.task.recipe):
            hint = "the runs with commas between them are those of one recipe, which differ in their seeds"
            raise UserError(f"`{first.name}` and `{other.name}` are of different recipes", hint)
    for at, one in enumerate(side):
        for other in side[:at]:
            if one.seed == other.seed:
                raise UserError(
                    f"`{other.name}` and `{one.name}` both have the seed {one.seed}: one says what the other does",
                    hint="`dl7 train RECIPE --seeds 5` trains with different seeds",
                )


def _differences(first: Sequence[Loaded], second: Sequence[Loaded]) -> dict[str, list[Any]]:
    """The keys in which the recipes of two sides differ as they were trained, of several runs but for their seeds."""
    found = differences(*(checkpoint.load(side[0].folder).recipe for side in (first, second)))
    if len(first) > 1:
        found.pop("training.seed", None)
    return found


def _examples(task: Task, split: str) -> object:
    """What tells the examples of a split from others, of the same source. Raises UserError where there is no such."""
    if isinstance(task, Classification):
        return task.assets["classes"], task.labels(split).tolist()
    return task.pairs.split(split)


def _answers(one: Loaded, split: str, beam: int | None, *, cased: bool) -> tuple[Scores, list[Any]]:
    """The scores of a run, and of each example whether it was right or how it was translated. Notes the reading."""
    begin = time.monotonic()
    answers: list[Any]
    record: dict[str, Any] = {}
    if isinstance(one.task, Classification):
        logits = one.task.logits(split)
        answers = among_first(logits, one.task.labels(split), 1).tolist()
        scores = one.task.judge(split, logits)
        record["precision"] = one.task.runtime.precision
    else:
        decoding = one.task.recipe.decoding
        if beam is not None:
            decoding = decoding.updated(method="beam", beam=beam)
            record["beam"] = beam
        record["precision"] = one.task.runtime.search_precision
        answers = one.task.translations(split, decoding)
        scores = one.task.judge(split, answers, cased=cased)
    result = result_of(one.run, one.task, split, scores, time.monotonic() - begin, one.checkpoint)
    note_reading(one.run, {**result, **record})
    return scores, answers


def _by_scores(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    found = significance.welch(first, second)
    return {
        "difference": found.difference,
        "p_value": found.p_value,
        "interval": list(found.interval),
        "degrees_of_freedom": found.freedom,
    }


def _by_correctness(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    only_first = sum(one and not other for one, other in zip(first, second, strict=True))
    only_second = sum(other and not one for one, other in zip(first, second, strict=True))
    return {
        "difference": (only_second - only_first) / len(first),
        "p_value": significance.mcnemar(only_first, only_second),
        "only_first": only_first,
        "only_second": only_second,
    }


def _by_translations(
    first: Sequence[str], others: Sequence[Sequence[str]], references: Sequence[str], *, cased: bool, tokenize: str
) -> list[dict[str, Any]]:
    return [
        {
            "difference": found.difference,
            "p_value": found.randomisation,
            "bootstrap_p_value": found.bootstrap,
            "signatures": dict(zip(("approximate_randomisation", "bootstrap"), found.signatures, strict=True)),
        }
        for found in significance.paired_bleu(first, others, references, cased=cased, tokenize=tokenize)
    ]
