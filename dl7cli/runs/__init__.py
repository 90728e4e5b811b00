"""Run folders: made, locked and found, what is recorded in them, and their list."""

from dl7cli.runs.folder import (
    RUNS,
    Run,
    called,
    create,
    epochs,
    find,
    holds,
    lock,
    mark_newest,
    read_recipe,
    refuse_occupied,
)
from dl7cli.runs.listing import Summary, listing
from dl7cli.runs.records import (
    amend_environment,
    append_evaluation,
    append_metrics,
    environment,
    evaluations,
    metrics,
    refuse_unwritable,
    trim_metrics,
    write_environment,
    write_result,
)

__all__ = [
    "RUNS",
    "Run",
    "Summary",
    "amend_environment",
    "append_evaluation",
    "append_metrics",
    "called",
    "create",
    "environment",
    "epochs",
    "evaluations",
    "find",
    "holds",
    "listing",
    "lock",
    "mark_newest",
    "metrics",
    "read_recipe",
    "refuse_occupied",
    "refuse_unwritable",
    "trim_metrics",
    "write_environment",
    "write_result",
]
