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
from dl7cli.runs.listing import listing
from dl7cli.runs.records import (
    amend_environment,
    append_evaluation,
    append_metrics,
    chosen,
    closed,
    environment,
    evaluations,
    metrics,
    readings,
    refuse_unwritable,
    result,
    rewrite_recipe,
    scoring_precision,
    trim_metrics,
    write_environment,
    write_result,
)
