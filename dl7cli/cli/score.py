"""`dl7 score`: how probable a translator finds given translations."""

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from dl7cli.cli import console, options, sentences
from dl7cli.cli.translate import load
from dl7cli.errors import UserError

if TYPE_CHECKING:
    from dl7cli.tasks.translation import ScoredPair


def score(
    run: options.RunsOption = None,
    source: options.Input = None,
    target: options.Output = None,
    device: options.Device = "auto",
    gpus: options.Gpus = None,
    precision: options.PrecisionOfSearch = "auto",
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Print log-probability, tokens and perplexity per token of given translations: one line in, one line out.

    A line is a sentence, a tab and its translation, as paste makes them of two files. Logarithms are natural,
    and the end of a sentence is a token. A blank line stays blank. A sentence longer than the model can read
    is cut, with a warning that gives its line. What all lines come to is printed on standard error.
    """
    with contextlib.ExitStack() as stack:
        # Whatever can be wrong with the files is found before the model is loaded.
        name, batches = stack.enter_context(sentences.opened(source))
        output = sys.stdout if target is None else stack.enter_context(sentences.replacing(target))
        names, task, others = load(run, device, precision, gpus, offline=offline)
        display = sentences.display(source, is_silent=target is not None or as_json)
        stack.enter_context(display)
        languages = task.assets["source_language"], task.assets["target_language"]
        documents: list[dict[str, Any]] = []
        unknown: list[int] = []
        pairs = tokens = 0
        total = 0.0
        for batch in batches:
            split = [as_pair(line, name, languages) for line in batch]
            found = iter(task.score([pair for pair in split if pair is not None], others=others))
            for line, pair in zip(batch, split, strict=True):
                scored = None if pair is None else next(found)
                if scored is not None:
                    sentences.warn_of_cut(line, scored.cut)
                    if scored.unknown:
                        unknown.append(line.number)
                    pairs, tokens, total = pairs + 1, tokens + len(scored.tokens), total + scored.log_probability
                if as_json:
                    documents.append(as_document(pair, scored))
                if target is not None or not as_json:
                    output.write(as_line(scored) + "\n")
            output.flush()
            display.progress("scoring", batch[-1].number, 0)
    from dl7cli.tasks.translation import perplexity

    sentences.note_unknown(unknown)
    if as_json:
        numbers = {"log_probability": total, "tokens": tokens, "perplexity": perplexity(total, tokens)}
        console.document({"run": names[0], "others": names[1:], **numbers, "pairs": documents})
    if pairs:
        console.note(
            f"perplexity {as_number(perplexity(total, tokens))} per token: {console.count(pairs, 'pair')},"
            f" {console.count(tokens, 'token')}, log-probability {total:.4f}"
        )


def as_pair(line: sentences.Line, name: str, languages: tuple[str, str]) -> tuple[str, str] | None:
    """Return the sentence and its translation on a line, None for a blank one; raise UserError for any other.

    Raises it, too, where the first line names the `languages`, as that of data may: a header is no pair.
    """
    if not line.text.strip():
        return None
    parts = line.text.split("\t")
    if len(parts) != 2:
        seen = "no tab" if len(parts) == 1 else f"{len(parts) - 1} tabs"
        raise UserError(
            f"{name}: line {line.number} has {seen}, not one",
            hint="a line is a sentence, a tab and its translation, as `paste a.txt b.txt` makes them",
        )
    if line.number == 1 and {part.strip().lower() for part in parts} == {one.lower() for one in languages}:
        raise UserError(
            f"{name}: line 1 is a header and no pair",
            hint=f"leave it out, as by `tail -n +2`; the first column has to be {languages[0]}",
        )
    return parts[0], parts[1]


def as_line(scored: "ScoredPair | None") -> str:
    """Return the line to print for a pair."""
    if scored is None:
        return ""
    return f"{scored.log_probability:.4f}\t{len(scored.tokens)}\t{as_number(scored.perplexity)}"


def as_number(perplexity: float | None) -> str:
    """Return a perplexity as it is printed, `-` where there is none."""
    return "-" if perplexity is None else f"{perplexity:.4f}"


def as_document(pair: tuple[str, str] | None, scored: "ScoredPair | None") -> dict[str, Any]:
    """Return a pair as `--json` prints it."""
    source, target = pair or ("", "")
    return {
        "source": source,
        "target": target,
        "log_probability": 0.0 if scored is None else scored.log_probability,
        "perplexity": None if scored is None else scored.perplexity,
        "tokens": [] if scored is None else scored.tokens,
        "token_log_probabilities": [] if scored is None else scored.token_log_probabilities,
    }
