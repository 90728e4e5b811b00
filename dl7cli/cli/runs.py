"""`dl7 runs`: what has been trained."""

import json
from dataclasses import asdict
from typing import Any

import typer

from dl7cli.cli import console, options

MOST_CHANGES = 5
"""Keys in a line of the list."""

app = typer.Typer(no_args_is_help=True, help="List and show runs: what was trained and how well it went.")


@app.command("list", epilog="Example: dl7 runs list")
def list_runs(as_json: options.Json = False) -> None:
    """List the runs under runs/, the oldest first, with the keys in which each differs from the recipe of that name."""
    from dl7cli import runs

    summaries = runs.listing()
    if as_json:
        console.document({"runs": [asdict(summary) for summary in summaries]})
        return
    if not summaries:
        console.note(f"there are no runs under {runs.RUNS}; dl7 train resnet makes one")
        return
    console.table(
        ("RUN", "RECIPE", "DATA", "STATE", "EPOCHS", "VALIDATION", "TEST", "CHANGED"),
        [
            (
                runs.RUNS / summary.name,
                summary.recipe or "-",
                summary.data or "-",
                summary.state,
                summary.epochs,
                _score(summary.primary, summary.best),
                _score(summary.test_primary, summary.test),
                _changes(summary.changed),
            )
            for summary in summaries
        ],
    )


@app.command(epilog="Example: dl7 runs show runs/resnet-1")
def show(run: options.RunArgument = None, as_json: options.Json = False) -> None:
    """Show a run: recipe, data, how far it is, and its scores.

    For each split also how often it was read, and when last; the validation after each epoch is not counted. The
    readings of --json are those of the run's own data.
    """
    from dl7cli import runs

    found, checkpoint = runs.find(run)
    recipe = runs.read_recipe(found)
    closed = runs.closed(runs.metrics(found))
    evaluations = runs.evaluations(found)
    best = runs.chosen(closed, recipe)
    own = recipe.data.source
    of_own = [record for record in evaluations if record.get("data", own) == own and "digest" in record]
    digests = {(record.get("split"), record["digest"]) for record in of_own}
    read: dict[tuple[str, str], list[dict[str, Any]]] = {("test", own): []}
    for record in evaluations:
        data = own if (record.get("split"), record.get("digest")) in digests else str(record.get("data", own))
        read.setdefault((str(record.get("split")), data), []).append(record)
    shown: dict[str, Any] = {
        "run": str(found.folder),
        "recipe": recipe.name,
        "task": recipe.task,
        "data": own,
        "epochs": closed[-1].get("epoch", 0) if closed else 0,
        "epochs_planned": recipe.training.epochs,
        "best": {"epoch": best.get("epoch", 0), "scores": best["scores"]} if best else None,
        "checkpoint": str(checkpoint),
        "readings": {split: len(records) for (split, data), records in read.items() if data == own},
        "evaluations": evaluations,
    }
    if as_json:
        console.document(shown)
        return
    lines = {
        "run": shown["run"],
        "recipe": f"{recipe.name} ({recipe.task})",
        "data": own,
        "epochs": f"{shown['epochs']} of {recipe.training.epochs}",
        "best": f"{_record_score(best)} on validation, epoch {best.get('epoch', 0)}" if best else "-",
        "checkpoint": shown["checkpoint"],
    }
    for name, value in lines.items():
        console.write(f"{name:<12}{value}")
    for (split, data), records in read.items():
        if not records:
            console.write(f"{split:<12}never read")
            continue
        newest = records[-1]
        checkpoint_read = newest.get("checkpoint", "best")
        by = "" if checkpoint_read == "best" else f" by checkpoint {checkpoint_read}"
        if "others" in newest:
            by = f"{by} together with {', '.join(newest['others'])}"
        score = f"{_record_score(newest)} of {data}{by}"
        console.write(f"{split:<12}read {console.count(len(records), 'time')}, last {newest.get('time', '-')}: {score}")


def _changes(changed: dict[str, list[Any]] | None) -> str:
    if changed is None:
        return "-"
    told = [f"{key}={json.dumps(now, ensure_ascii=False)}" for key, (_, now) in changed.items()]
    return " ".join(told[:MOST_CHANGES] + ["…"] * (len(told) > MOST_CHANGES))


def _record_score(record: dict[str, Any]) -> str:
    return _score(record.get("primary"), record.get("scores", {}).get(record.get("primary")))


def _score(primary: str | None, value: float | None) -> str:
    return "-" if primary is None or value is None else console.score(primary, value)
