"""What a run is worth: evaluating one of its checkpoints, and averaging the last of them into another."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from dl7cli import checkpoint, runs, tasks
from dl7cli.checkpoint import Checkpoint
from dl7cli.data.sources import Progress, is_file, silent
from dl7cli.device import Runtime
from dl7cli.errors import UserError
from dl7cli.metrics import Scores
from dl7cli.recipe import decoding
from dl7cli.runs import Run
from dl7cli.tasks import Task
from dl7cli.tasks.checking import refuse_other_weights
from dl7cli.tasks.classification import Classification, refuse_other_classes
from dl7cli.tasks.translation import Translation, refuse_disagreement

_TABLES = ("classes", "confusion", "source_lengths", "sample")
"""Details that fill pages."""


class Loaded(NamedTuple):
    """A checkpoint of a run, and the task with its weights."""

    run: Run
    folder: Path
    """The checkpoint."""
    task: Task

    @property
    def name(self) -> str:
        return runs.called(self.run, self.folder)

    @property
    def checkpoint(self) -> str:
        """The name of its folder: `best`, `last` or what else it is called there, wherever a link leads."""
        return os.path.basename(os.path.abspath(self.folder))

    @property
    def seed(self) -> int:
        return self.task.recipe.training.seed


def evaluate(
    run: str | None,
    *,
    others: Sequence[str] = (),
    split: str = "test",
    data: str | None = None,
    beams: Sequence[int] = (),
    length_penalty: float | None = None,
    overrides: Sequence[str] = (),
    rouge: bool = False,
    write: Callable[[list[str]], None] | None = None,
    runtime: Runtime,
    offline: bool = False,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda text: None,
    confusion: bool = False,
) -> dict[str, Any]:
    """Evaluate the epoch that a run kept as `best`, or the checkpoint named; returns what `--json` prints.

    The reading is noted. `note` is called with what was done to the data, and where a score could be chosen. With
    `confusion` the details must hold a confusion matrix. A translator is evaluated with each of `beams`, or as the
    recipe says where there are none, and with `overrides` of keys of `decoding`; `rouge` is scored besides. With
    `others`, which are runs too, it answers as an ensemble: the reading is noted in each, and the result has their
    names as `others`. `write` is called with the translations, where there is one beam, or with the lines of a table of
    a classifier's answers, in the data's order. Raises UserError, before anything is scored, where the run cannot give
    what is asked for or cannot note the reading.

    With several beams the result is that of the first, but for `seconds` and `readings`, which are of all, and has also
    `beams`: of each its width as `beam`, its `scores` and `details`, and the `seconds` that translating took.
    """
    begin = time.monotonic()
    found, folder = runs.find(run)
    runs.refuse_unwritable(found)
    task = tasks.load(folder, runtime=runtime, offline=offline, progress=progress, data=data)
    if isinstance(task, Translation):
        kind, asked = "translator", {"confusion matrix to draw": confusion}
    else:
        kind = "classifier"
        asked = {
            "beam": bool(beams) or length_penalty is not None,
            "decoding": bool(overrides),
            "text for ROUGE": rouge,
        }
    for what, wanted in asked.items():
        if wanted:
            raise UserError(f"run `{found.folder}` is a {kind}: it has no {what}", hint="leave the option out")
    members, decodings = [Loaded(found, folder, task)], []
    members += _partners(others, members[0], runtime, offline=offline, progress=progress)
    names = [one.name for one in members]
    if isinstance(task, Translation):
        partners = [one.task for one in members[1:] if isinstance(one.task, Translation)]
        refuse_disagreement(names, [task, *partners])
        method = "beam" if beams else None
        for beam in beams or (None,):
            changes = {"method": method, "beam": beam, "length_penalty": length_penalty}
            decodings.append(decoding(task.recipe, overrides, **changes))
    task.splits()  # reads the data, so that its notes are there
    for one in members:
        refuse_trained_on(one, task, split, data)
    for text in task.notes:
        note(text)
    if not isinstance(task, Translation):
        classifiers = [one.task for one in members[1:] if isinstance(one.task, Classification)]
        refuse_other_classes(names, [task, *classifiers])
        logits = task.logits(split, others=classifiers)
        scores = task.judge(split, logits, alone=not classifiers)
        result = result_of(found, task, split, scores, time.monotonic() - begin, members[0].checkpoint)
        result = _noted(members, result, {"precision": runtime.precision})
        if write is not None:
            write(_table(task.answers(split, logits)))
        _warn_of_choice(found, result, note)
        return result
    results: list[dict[str, Any]] = []
    sweep: list[dict[str, Any]] = []
    start = begin
    likelihood = task.log_likelihood(split, others=partners)
    for beam, how in zip(beams or (None,), decodings, strict=True):
        settings: dict[str, Any] = {"beam": beam, "length_penalty": length_penalty, "set": list(overrides) or None}
        settings["precision"] = runtime.search_precision
        searching = time.monotonic()
        translations = task.translations(split, how, others=partners)
        searched = time.monotonic() - searching
        scores = task.judge(split, translations, others=partners, rouge=rouge, likelihood=likelihood)
        result = result_of(found, task, split, scores, time.monotonic() - start, members[0].checkpoint)
        given = {name: value for name, value in settings.items() if value is not None}
        results.append(_noted(members, result, given))
        sweep.append({"beam": beam, "scores": scores.values, "details": scores.details, "seconds": round(searched, 3)})
        start = time.monotonic()
    if len(sweep) == 1:
        if write is not None:
            write(translations)
        _warn_of_choice(found, results[0], note)
        return results[0]
    whole = {"seconds": round(time.monotonic() - begin, 3), "readings": results[-1]["readings"], "beams": sweep}
    return {**results[0], **whole}


def _partners(
    names: Sequence[str], first: Loaded, runtime: Runtime, *, offline: bool, progress: Progress
) -> list[Loaded]:
    """The models that are to answer together with `first`, on whose data they are evaluated."""
    kind = first.task.recipe.task
    found = [runs.find(name, task=kind) for name in names]
    refuse_unfit([(first.run, first.folder), *found])
    return [
        Loaded(run, folder, tasks.load(folder, runtime=runtime, offline=offline, progress=progress, task=kind))
        for run, folder in found
    ]


def _noted(members: Sequence[Loaded], result: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Note a reading, and how it was made, in each of the runs that have answered; the result with how often the first
    has read these examples by now as `readings`, and with the others in it.
    """
    names = [one.name for one in members]
    for number, one in enumerate(members):
        own: dict[str, Any] = {"run": str(one.run.folder), "checkpoint": one.checkpoint, "recipe": one.task.recipe.name}
        if len(members) > 1:
            own["others"] = [*names[:number], *names[number + 1 :]]
        note_reading(one.run, {**result, **own, **settings})
    result = {**result, "readings": len(runs.readings(members[0].run, result))}
    return {**result, "others": names[1:]} if len(members) > 1 else result


def _warn_of_choice(run: Run, result: dict[str, Any], note: Callable[[str], None]) -> None:
    """Tell where a run, alone or with any others, has several scores on a test split, of which one could be chosen."""
    name, alone = result["primary"], "others" not in result
    read = [record for record in runs.readings(run, result) if ("others" not in record) == alone]
    values = [record.get("scores", {}).get(name) for record in read]
    # As far as they are shown: a fraction, or one of a hundred.
    scores = {round(value, 4 if name == "accuracy" else 2) for value in values if value is not None}
    if result["split"] == "test" and len(scores) > 1:
        note(f"this run has had {len(scores)} different scores on this split; the best of them flatters")


def refuse_unfit(found: Sequence[tuple[Run, Path]]) -> None:
    """Raise UserError where a checkpoint of a run is named twice, or its reading could not be noted."""
    seen = set()
    for run, folder in found:
        if folder.resolve() in seen:
            raise UserError(f"`{runs.called(run, folder)}` is named twice", hint="name each run once")
        seen.add(folder.resolve())
        runs.refuse_unwritable(run)


def _table(answers: Sequence[tuple[str, str, float]]) -> list[str]:
    """Lines of tab-separated values: of each image its number, class, predicted class and the latter's probability."""
    rows = [("image", "label", "predicted", "probability")]
    for number, (label, predicted, probability) in enumerate(answers):
        rows.append((str(number), label, predicted, f"{probability:.6f}"))
    # The name of a class may be that of any folder, with what would end a cell or a line, or is no text.
    return ["\t".join("".join(c if c.isprintable() else " " for c in cell) for cell in row) for row in rows]


def average(
    run: str | None,
    *,
    last: int | None = None,
    runtime: Runtime,
    offline: bool = False,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Average the weights of a run's last epochs, all that are kept or `last`, into its checkpoint `average`.

    Returns the result of its validation as `evaluate` does, with the folder as `checkpoint`, the `epochs` in it, and of
    the run's `best` the `checkpoint`, `epoch` and `scores`, of the same sentences or images. Where the model normalises
    batches, the running statistics, which no average gives, are those of one pass over the training data (Izmailov et
    al. 2018, arXiv 1803.05407, §3.2). Raises UserError where there are not as many, or the data has changed.
    """
    begin = time.monotonic()
    found, _ = runs.find(run)
    runs.refuse_unwritable(found)
    kept = runs.epochs(found)
    if not kept:
        raise UserError(
            f"run `{found.folder}` keeps no checkpoints of its epochs",
            hint="`--set training.keep_last=5` at `dl7 train` keeps those of the last five",
        )
    if last is not None and last > len(kept):
        raise UserError(
            f"run `{found.folder}` keeps the checkpoints of {len(kept)} epochs, not of {last}",
            hint=f"`--last {len(kept)}` takes them all; `--set training.keep_last={last}` at `dl7 train` keeps more",
        )
    chosen = list(kept)[-(last or len(kept)) :]
    mean = _mean([kept[epoch] for epoch in chosen])
    task = tasks.build(
        mean.recipe, mean.assets, runtime=runtime, offline=offline, progress=progress, weights=mean.weights
    )
    refuse_other_data(task, mean.assets, "averaging needs the same data; train anew instead")
    for text in task.notes:
        note(text)
    with torch.no_grad(), runtime.autocast():
        update_bn(_batches(task, chosen[-1] - 1, progress), task.model)
    scores = task.validate()
    checkpoint.save(found.average, replace(mean, weights=task.model.state_dict(), scores=scores.values))
    best = checkpoint.load(found.best)
    result = result_of(found, task, "validation", scores, time.monotonic() - begin, found.average.name)
    note_reading(found, {**result, "epochs": chosen})
    return {
        **result,
        "readings": len(runs.readings(found, result)),
        "checkpoint": str(found.average),
        "epochs": chosen,
        "best": {"checkpoint": str(found.best), "epoch": best.progress.epoch, "scores": best.scores},
    }


def _mean(folders: Sequence[Path]) -> Checkpoint:
    """The newest of the checkpoints, which is the last, with the mean of the weights of all; counters are its own."""
    sums: dict[str, Tensor] = {}
    oldest: dict[str, Tensor] = {}
    for folder in folders:
        newest = checkpoint.load(folder)
        oldest = oldest or newest.weights
        refuse_other_weights(oldest, newest.weights)
        for name, value in newest.weights.items():
            sums[name] = sums[name] + value.double() if name in sums else value.double()
    weights = {
        name: (sums[name] / len(folders)).to(value.dtype) if value.is_floating_point() else value
        for name, value in newest.weights.items()
    }
    return replace(newest, weights=weights)


def _batches(task: Task, epoch: int, progress: Progress) -> Iterator[tuple[Any, ...]]:
    """The training batches of an epoch, with progress; of each, `update_bn` takes the first part as the input."""
    steps = task.steps(epoch)
    for number, batch in enumerate(task.batches(epoch), start=1):
        yield batch
        progress("normalising anew", number, steps)


def refuse_trained_on(one: Loaded, task: Task, split: str, data: str | None) -> None:
    """Raise UserError where a split of the data of `task` would hold what `one` was trained on, as far as is known.

    So it may be where the run's own validation was carved out of data that has changed since: another part is carved
    now, unless the data is named as other `data`; and where of several runs another has kept another part. And so it is
    where the single file that is to be a test is the data of the run.
    """
    began = one.task.assets.get("data_digest")
    if data is None and split == "validation" and one.task is task and task.carved and began is not None:
        hint = f"`--data {task.data_name}` reads it as it is now, of which the run may have been trained on any part"
        refuse_other_data(task, task.assets, hint)
    if data is None and split == "validation" and task.carved and began not in (None, task.digest):
        told = f"`{one.name}` was trained on another part of `{task.data_name}` than is kept here for validation"
        raise UserError(told, hint="`--split test` is for all of them")
    if data is not None and split == "test" and is_file(data) and task.digest == began:
        kept = "`--split validation` is" if task.carved else None
        raise UserError(f"`{data}` is what `{one.name}` was trained on: it is no test", kept)


def refuse_other_data(task: Task, assets: dict[str, Any], hint: str) -> None:
    """Raise UserError where the task's data is not what the run began with, as `assets` of a checkpoint say."""
    began = assets.get("training_examples", 0)
    if task.splits()["train"] != began:
        raise UserError(
            f"`{task.data_name}` now has {task.splits()['train']:,} training examples; the run began with {began:,}",
            hint,
        )
    if task.digest != assets.get("data_digest"):
        raise UserError(f"`{task.data_name}` has changed since the run began", hint)


def result_of(run: Run, task: Task, split: str, scores: Scores, seconds: float, checkpoint: str) -> dict[str, Any]:
    """The keys that `--json` prints of every evaluation, here of one of the run's checkpoints."""
    return {
        "run": str(run.folder),
        "checkpoint": checkpoint,
        "task": task.recipe.task,
        "recipe": task.recipe.name,
        "data": task.data_name,
        "split": split,
        "digest": task.digest_of(split),
        "examples": scores.examples,
        "primary": scores.primary,
        "scores": scores.values,
        "signature": scores.signature,
        "details": scores.details,
        "seconds": round(seconds, 3),
    }


def note_reading(run: Run, result: dict[str, Any]) -> None:
    """Append a result to `evaluations.jsonl`, of its details all but the tables."""
    small = {name: value for name, value in result["details"].items() if name not in _TABLES}
    runs.append_evaluation(run, {**result, "details": small})
