"""`dl7 compare`: whether one run is better than another."""

import json
from typing import Annotated, Any, Literal

import typer

from dl7cli.cli import console, options

MOST_KEYS = 5
"""Of those in which two recipes differ, before the rest is only counted."""
LONGEST_VALUE = 60
"""Characters of it that are shown."""


def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="Runs, each against the first: run folders or checkpoints in them. "
            "Several of one recipe with different seeds, with commas between them, are taken together.",
        ),
    ],
    split: Annotated[
        Literal["validation", "test"],
        typer.Option(help="Part of the data to compare by."),
    ] = "test",
    data: options.Data = None,
    beam: options.Beam = None,
    device: options.Device = "auto",
    gpus: options.Gpus = None,
    precision: options.PrecisionOfScores = "auto",
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Say whether a run is better than another, by a test of the difference at the level of 0.05.

    Single runs are compared by their answers to the same examples: of classifiers by McNemar's exact test, of
    translators by sacreBLEU's approximate randomisation, with its paired bootstrap beside it, without case
    where one of them knows none. Of several seeds a side, as in dl7 compare A1,A2,A3 B1,B2,B3, the scores are
    compared by Welch's t-test. Where more than one is compared with the first, the p-values are Holm's.

    The keys in which the recipes differ are named. Every run reads the split anew, which is noted in its
    evaluations.jsonl.
    """
    if len(names) < 2:
        raise typer.BadParameter("give two runs or more, as in dl7 compare A B")
    sides = options.together(names)
    from dl7cli import device as devices
    from dl7cli import runs, training

    scoring = runs.scoring_precision(precision, [name for side in sides for name in side])
    runtime = devices.choose(device, scoring, gpus, searches=True)
    with console.display() as display:
        result = training.compare(
            sides,
            split=split,
            data=data,
            beam=beam,
            runtime=runtime,
            offline=offline,
            progress=display.progress,
            note=lambda text: display.note(f"note: {text}"),
        )
    if as_json:
        console.document(result)
    else:
        print_result(result)
    if result["test"] != "welch":
        console.note("note: this is of these models; of two recipes, several seeds of each tell (dl7 train --seeds)")
    readings = sum(len(side["runs"]) for side in result["sides"])
    console.note(f"note: the {split} split was read {console.count(readings, 'time')}, once by each run")


def print_result(result: dict[str, Any]) -> None:
    """Print a sentence for every comparison, and below it what it rests on."""
    means = {side["name"]: _score(result["primary"], side["mean"]) for side in result["sides"]}
    sizes = [len(side["runs"]) for side in result["sides"]]
    several = len(result["comparisons"]) > 1
    for one, size in zip(result["comparisons"], sizes[1:], strict=True):
        first, second = one["first"], one["second"]
        if one["better"] == second:
            said = f"{second} is better than {first}: {means[second]} against {means[first]}"
        elif one["better"] == first:
            said = f"{second} is worse than {first}: {means[second]} against {means[first]}"
        else:
            said = f"no difference shown between {second} and {first}: {means[second]} against {means[first]}"
        console.write(f"{said}, {probability(one['adjusted_p_value'])}")
        match result["test"]:
            case "mcnemar":
                right = f"right by {second} alone {one['only_second']:,}, by {first} alone {one['only_first']:,}"
                basis = f"{right}: McNemar's exact test"
            case "approximate randomisation":
                basis = f"approximate randomisation; by the paired bootstrap {probability(one['bootstrap_p_value'])}"
            case _:
                low, high = (_points(result["primary"], end) for end in one["interval"])
                welch = f"Welch's t-test of {size} and {sizes[0]} runs"
                basis = f"{welch}, by whose 95 % interval the difference is {low} to {high}"
        raised = f"; by itself {probability(one['p_value'])}, raised by Holm's method" if several else ""
        console.write(f"  {basis}{raised}")
        console.write(f"  {_differing(one['recipe_differences'])}")
    console.write(f"on the {result['split']} split of {result['data']} ({console.extent(result)})")
    if result["signature"] is not None:
        console.write(f"signature {result['signature']}")
    for name, signature in result["comparisons"][0].get("signatures", {}).items():
        console.write(f"signature {signature} ({name.replace('_', ' ')})")


def _differing(keys: dict[str, list[Any]]) -> str:
    """Say in which keys two recipes differ: the first few, with the second's value against the first's."""
    if not keys:
        return "their recipes are alike"
    told = [f"{key} ({_value(second)} against {_value(first)})" for key, (first, second) in keys.items()]
    more = f" and {len(told) - MOST_KEYS} more (--json has all)" if len(told) > MOST_KEYS else ""
    return f"their recipes differ in {', '.join(told[:MOST_KEYS])}{more}"


def _value(value: Any) -> str:
    return console.shortened(json.dumps(value, ensure_ascii=False), LONGEST_VALUE)


def probability(p_value: float) -> str:
    """Return a p-value as it is written: `p = 0.021`."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3g}"


def _score(primary: str, value: float) -> str:
    unit = {"accuracy": "%", "bleu": "BLEU", "bleu_lowercase": "BLEU without case"}[primary]
    return f"{100 * value if primary == 'accuracy' else value:.2f} {unit}"


def _points(primary: str, difference: float) -> str:
    return f"{100 * difference if primary == 'accuracy' else difference:+.2f}"
