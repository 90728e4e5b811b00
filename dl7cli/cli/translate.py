"""`dl7 translate`: one line in, one line out."""

import contextlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dl7cli.cli import console, figures, options, sentences
from dl7cli.errors import UserError

if TYPE_CHECKING:
    from dl7cli.data.sources import Progress
    from dl7cli.tasks.translation import Branch, Candidate, TranslatedLine, Translation


def translate(
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="Sentences; standard input line by line if none is given."),
    ] = None,
    run: options.RunsOption = None,
    source: options.Input = None,
    jsonl: Annotated[
        bool,
        typer.Option(
            "--jsonl",
            help="Read a JSON object on each line, as from a .jsonl file: its field named as the source language, "
            "such as en, or else source or text is translated, and fields translation and score are added, with "
            "--n-best also alternatives.",
        ),
    ] = False,
    target: options.Output = None,
    beam: options.Beam = None,
    length_penalty: options.LengthPenalty = None,
    n_best: Annotated[
        int,
        typer.Option(
            "--n-best",
            metavar="N",
            min=1,
            max=100,
            help="Above 1: print the N best translations of each line (at most as many as the beam is wide), best "
            "first, one to a line: line number, score and text with tabs between them. A blank line gives one such "
            "line. With --sample it is N draws, in their order.",
        ),
    ] = 1,
    sample: Annotated[
        bool,
        typer.Option(
            "--sample", help="Draw words at random by their probabilities; see decoding.temperature, top_k and top_p."
        ),
    ] = False,
    seed: options.SeedOfSample = None,
    prefix: Annotated[
        str | None,
        typer.Option("--prefix", metavar="TEXT", help="Begin every translation with this; its last word may go on."),
    ] = None,
    overrides: options.DecodingSet = None,
    attention: Annotated[
        Path | None,
        typer.Option("--attention", metavar="FILE", help="Draw what one sentence's translation looked at: .png, .svg."),
    ] = None,
    tree: Annotated[
        Path | None,
        typer.Option("--tree", metavar="FILE", help="Draw what the beam tried for one sentence: .png, .svg."),
    ] = None,
    device: options.Device = "auto",
    gpus: options.Gpus = None,
    precision: options.PrecisionOfSearch = "auto",
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Translate sentences: one line in, one line out.

    A blank line stays blank. Input is UTF-8. A line longer than the model can read is cut, with a
    warning that gives its number.
    """
    if texts and source is not None:
        raise typer.BadParameter("give sentences or --input FILE, not both")
    if sample and beam is not None:
        raise typer.BadParameter("--beam searches and --sample draws; give one of them")
    if texts and jsonl:
        raise typer.BadParameter("--jsonl is for files and standard input, not for sentences given as arguments")
    jsonl = jsonl or (source is not None and source.suffix.lower() == ".jsonl")
    if jsonl and as_json:
        raise typer.BadParameter("JSON lines come out as JSON lines; leave --json out")
    drawings = {flag: path for flag, path in {"--attention": attention, "--tree": tree}.items() if path is not None}
    for path in drawings.values():
        figures.refuse_unwritable(path)
    written = [os.path.realpath(path) for path in (*drawings.values(), target) if path is not None]
    if len(set(written)) < len(written):
        raise typer.BadParameter("name another file for each of --output, --attention and --tree")
    from dl7cli import recipe as recipes

    with contextlib.ExitStack() as stack:
        # Whatever can be wrong with the files is found before the model is loaded.
        name, batches = (
            ("arguments", sentences.arguments(texts)) if texts else stack.enter_context(sentences.opened(source))
        )
        begun = None if prefix is None else sentences.argument(prefix, "`--prefix`")
        output = sys.stdout if target is None else stack.enter_context(sentences.replacing(target))
        display = sentences.display(source, is_silent=target is not None or as_json)
        stack.enter_context(display)
        before = 0

        def progress(what: str, done: int, total: int) -> None:
            display.progress(what, before + done, 0)

        names, task, others = load(run, device, precision, gpus, offline=offline, progress=progress)
        looks = {getattr(one.recipe.model, "attention", "") for one in (task, *others)}
        if attention is not None and looks == {"none"}:
            raise UserError(
                f"the model of run `{' + '.join(names)}` has no attention to draw", hint="leave `--attention` out"
            )
        decoding = recipes.decoding(
            task.recipe,
            overrides or (),
            beam=beam,
            length_penalty=length_penalty,
            method="sample" if sample else None if beam is None else "beam",
            seed=seed,
        )
        if seed is not None and decoding.method != "sample":
            raise typer.BadParameter("--seed is of what --sample draws; add --sample")
        if tree is not None and decoding.method != "beam":
            raise typer.BadParameter("--tree is of a beam, and --sample or decoding.method = sample draws")
        if tree is not None and decoding.beam > MOST_DRAWN:
            raise UserError(f"`--tree` draws a beam of at most {MOST_DRAWN}", hint=f"add `--beam {MOST_DRAWN}`")
        fields = (task.assets["source_language"], "source", "text")
        documents: list[dict[str, Any]] = []
        unknown: list[int] = []
        sought = 0
        drawn: TranslatedLine | None = None
        branches: list[Branch] | None = None if tree is None else []
        for batch in batches:
            chosen = [
                sentences.field(line, fields, ADDED if n_best > 1 else ADDED[:2], name) if jsonl else line.text
                for line in batch
            ]
            sought += sum(bool(text.strip()) for text in chosen)
            if drawings and sought > 1:
                raise UserError(f"`{next(iter(drawings))}` draws one sentence, and there are more", "give one sentence")
            answers = task.translate(
                chosen,
                decoding,
                n_best=n_best,
                prefixes=None if begun is None else [begun] * len(chosen),
                others=others,
                attention=as_json or attention is not None,
                tree=branches,
                first_line=batch[0].number,
            )
            for line, translated in zip(batch, answers, strict=True):
                sentences.warn_of_cut(line, translated.cut)
                if translated.score == -math.inf:
                    console.note(f"warning: line {line.number} has no translation that the keys of decoding allow")
                if translated.unknown:
                    unknown.append(line.number)
                drawn = translated if translated.alternatives else drawn
                if as_json:
                    documents.append(as_document(line.text, translated, n_best, matrix=attention is not None))
                if jsonl:
                    console.pass_on(as_record(line.text, translated, n_best), output)
                elif target is not None or not as_json:
                    for answer in as_lines(line.number, translated, n_best):
                        console.pass_on(answer, output)
            output.flush()
            before += len(batch)
        if drawings and drawn is None:
            raise UserError("there is no sentence that could be drawn", hint="give one sentence")
    sentences.note_unknown(unknown)
    if as_json:
        console.document({"run": names[0], "others": names[1:], "translations": documents})
    if attention is not None and drawn is not None:
        draw(attention, drawn, " + ".join(names))
    if tree is not None and branches is not None:
        title = f"{' + '.join(names)}, beam {decoding.beam}: log-probability → score of those that end"
        figure, notes = figures.search_tree(branches, title, suffix=tree.suffix)
        figures.save(figure, tree, notes)


def load(
    names: Sequence[str] | None,
    device: str,
    precision: options.PrecisionName,
    gpus: str | None,
    *,
    offline: bool,
    progress: "Progress" = lambda what, done, total: None,
) -> tuple[list[str], "Translation", list["Translation"]]:
    """Load the newest translator or those named: what they are called, the first, and the rest of an ensemble.

    Which is the newest is told.
    """
    from dl7cli import device as devices
    from dl7cli import runs, tasks
    from dl7cli.tasks.translation import Translation, refuse_disagreement

    found = [runs.find(name, task="translation") for name in names or (None,)]
    runtime = devices.choose(device, precision, gpus, searches=True)
    loaded = [
        tasks.load(folder, runtime=runtime, offline=offline, progress=progress, task="translation")
        for _, folder in found
    ]
    called = [runs.called(run, folder) for run, folder in found]
    first, *others = (task for task in loaded if isinstance(task, Translation))
    refuse_disagreement(called, [first, *others])
    if not names:
        console.note(f"by {called[0]}: {first.assets['source_language']} to {first.assets['target_language']}")
    return called, first, others


MOST_DRAWN = 20
"""Widest beam that is drawn as a tree."""
ADDED = ("translation", "score", "alternatives")
"""Fields that JSON lines get, the last one where several translations are wanted."""


def as_lines(number: int, translated: "TranslatedLine", n_best: int) -> list[str]:
    """Return the lines to print for a line: its translation, or with several their number, score and text."""
    if n_best == 1:
        return [translated.text]
    return [f"{number}\t{one.score:.4f}\t{one.text}" for one in candidates(translated)]


def candidates(translated: "TranslatedLine") -> list["Candidate"]:
    """Return the translations of a line, best first; where it has none, as a blank line, a blank one."""
    from dl7cli.tasks.translation import Candidate

    return translated.alternatives or [Candidate("", translated.score, translated.score, [], [], None)]


def as_record(record: str, translated: "TranslatedLine", n_best: int) -> str:
    """Return a JSON object, as the text it came in, with its translation; a blank line as it is."""
    if not record.strip():
        return record
    several = [{"text": one.text, "score": one.score} for one in translated.alternatives]
    values = (translated.text, console.number(translated.score), several)
    return sentences.extended(record, dict(zip(ADDED, values[: 3 if n_best > 1 else 2], strict=False)))


def as_document(source: str, translated: "TranslatedLine", n_best: int, *, matrix: bool) -> dict[str, Any]:
    """Return a translation as `--json` prints it; `matrix`: with all the attention of the best."""
    best = candidates(translated)[0]
    return {
        "source": source,
        "source_tokens": translated.source_tokens,
        **_as_document(best),
        **({"attention": best.attention.tolist()} if matrix and best.attention is not None else {}),
        **({"alternatives": [_as_document(one) for one in translated.alternatives]} if n_best > 1 else {}),
    }


def _as_document(candidate: "Candidate") -> dict[str, Any]:
    looked = candidate.attention
    return {
        "text": candidate.text,
        "score": console.number(candidate.score),
        "log_probability": console.number(candidate.log_probability),
        "tokens": candidate.tokens,
        "token_log_probabilities": candidate.token_log_probabilities,
        "alignment": None if looked is None else looked.argmax(axis=1).tolist(),
    }


def draw(path: Path, translated: "TranslatedLine", run: str) -> None:
    """Draw what the best translation of a line looked at, by a model that has attention."""
    best = translated.alternatives[0]
    assert best.attention is not None
    figure, notes = figures.attention_map(
        best.attention, translated.source_tokens, best.tokens, run, suffix=path.suffix
    )
    figures.save(figure, path, notes)
