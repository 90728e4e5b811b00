"""`dl7 eval`: the score of a finished run."""

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dl7cli.cli import console, figures, options, sentences

MOST_CLASSES = 20
WORST_CLASSES = 10
MOST_REPEATED = 0.05
"""Of the translations, before it is said that they repeat one another or themselves."""
_CHRF = {"bleu": "chrf", "bleu_lowercase": "chrf_lowercase"}
"""Scored as BLEU is."""
_ROUGE = {"rouge_1": "ROUGE-1", "rouge_2": "ROUGE-2", "rouge_l": "ROUGE-L"}


def evaluate(
    run: options.RunArgument = None,
    others: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="RUN",
            help="Score it together with this one, as an ensemble; may be given several times.",
        ),
    ] = None,
    split: Annotated[
        Literal["train", "validation", "test"],
        typer.Option(help="Part of the data to read."),
    ] = "test",
    data: options.Data = None,
    beam: Annotated[
        str | None,
        typer.Option(metavar="N[,N…]", help="Beam width, or several for a table of all; the recipe's if not given."),
    ] = None,
    length_penalty: options.LengthPenalty = None,
    overrides: options.DecodingSet = None,
    rouge: Annotated[
        bool,
        typer.Option("--rouge", help="Score translations by ROUGE-1, ROUGE-2 and ROUGE-L besides, as for summaries."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the translations to this file, one to a line, or a table (TSV, with a header) of a "
            "classifier's answers: number of the image in its split, from 0, its class, the predicted one and "
            "its probability. In the data's order: of folders by class, then by file.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw a classifier's confusion matrix to a .png or .svg file."),
    ] = None,
    device: options.Device = "auto",
    gpus: options.Gpus = None,
    precision: options.PrecisionOfScores = "auto",
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Print the accuracy or BLEU of a finished run, and what explains it: classes, intervals, lengths.

    Each reading is noted in the run's evaluations.jsonl, and in those of --with, whose data and decoding
    are not used; dl7 runs show counts them. With several beams each is a reading, and --json prints the
    keys of the first one, but for the seconds and readings, which are of all, and the list beams, an object for
    each: beam, scores, details, and the seconds of translating.
    """
    beams = parse_beams(beam)
    if output is not None and len(beams) > 1:
        raise typer.BadParameter("--output takes the translations of one beam; give --beam one width")
    if output is not None and plot is not None and os.path.realpath(output) == os.path.realpath(plot):
        raise typer.BadParameter("name another file for each of --output and --plot")
    from dl7cli import device as devices
    from dl7cli import runs, training

    if plot is not None:
        figures.refuse_unwritable(plot)
    scored = runs.scoring_precision(precision, [run, *(others or ())])
    runtime = devices.choose(device, scored, gpus, searches=True)
    with contextlib.ExitStack() as stack, console.display() as display:
        stream = stack.enter_context(sentences.replacing(output)) if output is not None else None

        def write(lines: list[str]) -> None:
            assert stream is not None
            for line in lines:
                console.pass_on(line, stream)

        result = training.evaluate(
            run,
            others=others or (),
            split=split,
            data=data,
            beams=beams,
            length_penalty=length_penalty,
            overrides=overrides or (),
            rouge=rouge,
            write=write if output is not None else None,
            runtime=runtime,
            offline=offline,
            progress=display.progress,
            note=lambda text: display.note(f"note: {text}"),
            confusion=plot is not None,
        )
    print_result(result, as_json)
    if len(beams) > 1:
        _explain(result["split"], result["primary"], result["beams"])
    if plot is not None:
        _draw(plot, result)


def parse_beams(text: str | None) -> list[int]:
    """Return the beam widths of `--beam`, each once, in the order given."""
    parts = [] if text is None else text.split(",")
    if not all(part.strip().isdecimal() and 1 <= int(part) <= 100 for part in parts):
        seen = console.printable(text or "")
        raise typer.BadParameter(f"{seen} is not widths from 1 to 100 with commas between them", param_hint="'--beam'")
    return list(dict.fromkeys(map(int, parts)))


def _explain(split: str, primary: str, sweep: list[dict[str, Any]]) -> None:
    if split == "test":
        console.note("note: choose a beam with --split validation; the test score of one chosen on test flatters")
    by_width = [entry["scores"][primary] for entry in sorted(sweep, key=lambda entry: int(entry["beam"]))]
    if by_width != sorted(by_width):
        console.note(
            "note: a wider beam finds what the model holds more probable, often something shorter, and BLEU may fall"
            " (Koehn & Knowles 2017, §3.6); a greater --length-penalty counters it"
        )


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """Print the score with the split, the data and the run it came from; BLEU with its signature, and the details."""
    if as_json:
        console.document(result)
        return
    score = console.score(result["primary"], result["scores"][result["primary"]])
    told = "by beam" if "beams" in result else score
    read = f"the {result['split']} split of {result['data']} ({console.extent(result)})"
    console.write(f"{told} on {read}, by {_models(result)}")
    if result["signature"] is not None:
        console.write(f"signature {result['signature']}")
    if cut := result["details"].get("cut_sources"):
        told = f"{console.count(cut, 'source')} of {result['examples']:,}"
        console.note(f"note: {told} had more subwords than `data.max_length` and was cut")
    if unknown := result["details"].get("unknown_sources"):
        told = f"{console.count(unknown, 'source')} of {result['examples']:,}"
        console.note(f"note: {told} had characters or words that the vocabulary has not")
    if "repetition" in result["details"]:
        _warn_of_repetition(result["details"]["repetition"], result["examples"])
    if "beams" in result:
        _print_sweep(result["primary"], result["beams"])
    elif result["task"] == "translation":
        _print_translation(result["primary"], result["scores"], result["details"])
    else:
        _print_classification(result["scores"], result["details"])


def _models(result: dict[str, Any]) -> str:
    """What a score is of: a run, one of its checkpoints, or several together."""
    found: str = result["run"]
    # A checkpoint out of its run is named by its own folder.
    if result["checkpoint"] not in ("best", os.path.basename(os.path.abspath(found))):
        found = os.path.join(found, result["checkpoint"])
    if "others" in result:
        others = result["others"]
        found = f"{', '.join([found, *others[:-1]])} and {others[-1]} together"
    return found


def _warn_of_repetition(found: dict[str, Any], examples: int) -> None:
    if found["times"] > max(MOST_REPEATED * examples, 2):
        console.note(f"note: {found['times']:,} of {examples:,} translations are the same: {found['most_frequent']}")
    if found["looping"] > max(MOST_REPEATED * examples, 2):
        told = f"{found['looping']:,} of {examples:,} translations have three words in a row three times or more"
        console.note(f"note: {told}; --set decoding.no_repeat_ngram=3 forbids that")
    if found["copied"] > max(MOST_REPEATED * examples, 2):
        console.note(f"note: {found['copied']:,} of {examples:,} translations are their source, left as it is")


def _print_sweep(primary: str, sweep: list[dict[str, Any]]) -> None:
    characters = _CHRF[primary]
    console.write(f"chrF ({sweep[0]['details']['signatures'][characters]})")
    console.write("")
    rouge = [name for name in _ROUGE if name in sweep[0]["scores"]]
    console.table(
        ("BEAM", "BLEU", "CHRF", *(_ROUGE[name] for name in rouge), "LENGTH RATIO", "BREVITY PENALTY", "SECONDS"),
        [
            (
                entry["beam"],
                *(f"{entry['scores'][name]:.2f}" for name in (primary, characters, *rouge)),
                *(f"{entry['details'][name]:.3f}" for name in ("length_ratio", "brevity_penalty")),
                f"{entry['seconds']:.1f}",
            )
            for entry in sweep
        ],
    )


def _print_translation(primary: str, scores: dict[str, float], details: dict[str, Any]) -> None:
    low, high = details["bleu_interval"]
    signatures = details["signatures"]
    console.write(f"95 % interval {low:.2f} to {high:.2f} (bootstrap, {signatures['bleu_interval']})")
    console.write(f"length ratio {details['length_ratio']:.3f}, brevity penalty {details['brevity_penalty']:.3f}")
    # Of a model that knows no case, BLEU with case is next to nothing.
    for name in ("bleu_lowercase", "chrf") if primary == "bleu" else ("chrf_lowercase",):
        console.write(f"{console.score(name, scores[name])} ({signatures[name]})")
    if details["ter"] is not None:
        console.write(f"TER {details['ter']:.2f}, lower is better ({signatures['ter']})")
    if details.get("perplexity") is not None:  # earlier versions have noted none
        console.write(f"perplexity {details['perplexity']:.2f} of a subword of the references")
    if "rouge_1" in scores:
        console.write(f"F1 of {', '.join(f'{shown} {scores[name]:.2f}' for name, shown in _ROUGE.items())}")
    console.write("")
    console.table(
        ("SOURCE WORDS", "SENTENCES", "BLEU"),
        [
            (
                f"{entry['from']} and more" if entry["to"] is None else f"{entry['from']} to {entry['to']}",
                entry["sentences"],
                f"{entry['bleu']:.2f}",
            )
            for entry in details["source_lengths"]
        ],
    )


def _print_classification(scores: dict[str, float], details: dict[str, Any]) -> None:
    low, high = details["accuracy_interval"]
    console.write(f"95 % interval {low:.4f} to {high:.4f} (Wilson)")
    views = (2 if details.get("flip") else 1) * (3 if details.get("shift") else 1)
    if views > 1:
        how = "weighted mean" if details["shift"] else "mean"
        console.write(f"scores are the {how} of {views} views of each image (evaluation.flip, evaluation.shift)")
    parts = [f"top-5 accuracy {scores['top_5_accuracy']:.4f}"] if "top_5_accuracy" in scores else []
    parts.append(f"negative log-likelihood {_number(details['negative_log_likelihood'])}")
    parts.append(f"expected calibration error {_number(details['expected_calibration_error'])} (15 bins)")
    console.write(", ".join(parts))
    console.write("")
    rows = [
        (entry["class"], entry["examples"], _number(entry["accuracy"]), _taken_for(number, details))
        for number, entry in enumerate(details["classes"])
    ]
    if len(rows) > MOST_CLASSES:
        seen = [number for number, entry in enumerate(details["classes"]) if entry["examples"]]
        worst = sorted(seen, key=lambda number: float(details["classes"][number]["accuracy"]))[:WORST_CLASSES]
        console.write(f"the worst {len(worst)} of {len(rows)} classes (--json has all):")
        rows = [rows[number] for number in worst]
    console.table(("CLASS", "IMAGES", "ACCURACY", "MOST OFTEN TAKEN FOR"), rows)


def _taken_for(number: int, details: dict[str, Any]) -> str:
    """Return the wrong class that most images of a class were given, with their number; empty where there is none."""
    counts = [0 if other == number else count for other, count in enumerate(details["confusion"][number])]
    most = max(counts)
    return f"{details['classes'][counts.index(most)]['class']} ({most:,})" if most else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _draw(plot: Path, result: dict[str, Any]) -> None:
    details = result["details"]
    names = [entry["class"] for entry in details["classes"]]
    accuracy = result["scores"]["accuracy"]
    title = f"{_models(result)}: accuracy {accuracy:.4f} on the {result['split']} split of {result['data']}"
    figure, notes = figures.confusion_matrix(details["confusion"], names, title, suffix=plot.suffix)
    figures.save(figure, plot, notes)
