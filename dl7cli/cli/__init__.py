"""The command line: each command parses, calls one function of the layers below, and prints.

Nothing slow is imported before the command that needs it runs.
"""

import errno
import io
import os
import signal
import sys
from typing import Annotated

import typer

from dl7cli import __version__, files
from dl7cli.cli import (
    average,
    bench,
    classify,
    compare,
    console,
    data,
    doctor,
    evaluate,
    models,
    plot,
    recipes,
    runs,
    score,
    train,
    translate,
)
from dl7cli.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    # Plain help is ready in half the time of Rich's, which also shows flags as if they took a value.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: dl7 train resnet",
)
app.command("train", epilog="Example: dl7 train resnet --set training.epochs=30 --seed 2")(train.train)
app.command("eval", epilog="Example: dl7 eval runs/resnet-1 --split test")(evaluate.evaluate)
app.command("compare", epilog="Example: dl7 compare runs/resnet-1 runs/resnet-2")(compare.compare)
app.command("average", epilog="Example: dl7 average runs/seq2seq-1 --last 5")(average.average)
app.command("translate", epilog='Example: dl7 translate --beam 5 "A dog runs."')(translate.translate)
app.command("score", epilog="Example: dl7 score --input pairs.tsv")(score.score)
app.command("classify", epilog="Example: dl7 classify --run runs/resnet-1 cat.png")(classify.classify)
app.add_typer(recipes.app, name="recipes", epilog="Example: dl7 recipes list")
app.add_typer(runs.app, name="runs", epilog="Example: dl7 runs show")
app.add_typer(data.app, name="data", epilog="Example: dl7 data list")
app.command("bench", epilog="Example: dl7 bench resnet --data builtin:shapes --seconds 5")(bench.bench)
app.command("models", epilog="Example: dl7 models")(models.models)
app.add_typer(plot.app, name="plot", epilog="Example: dl7 plot activations")
app.command("doctor", epilog="Example: dl7 doctor")(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.write(f"dl7 {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Train and evaluate residual networks and recurrent translation models.

    A flag says where and how to run; what is trained stands in a recipe.
    """


def _open_closed_streams() -> None:
    """Have what was closed of standard input, output and error lead nowhere, and not into the next file opened."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            os.set_inheritable(nowhere, True)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))


def main() -> None:
    """Run the program: a `UserError` becomes its text and exit code 1; others are bugs and show."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Text is UTF-8 whatever the locale, and nothing in it is an error.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    sys.stderr = console.Patient(sys.stderr)
    # Not at once: what is half written goes away first. Where a hang-up is ignored, `nohup` has done that.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        try:
            app(prog_name="dl7")
        finally:
            sys.stdout.flush()
    except UserError as error:
        console.error(error)
        sys.exit(1)
    except (MemoryError, RuntimeError) as problem:
        if not isinstance(problem, MemoryError):
            from dl7cli.device import out_of_memory

            if not out_of_memory(problem):
                raise
        console.error(console.NO_MEMORY)
        sys.exit(1)
    except OSError as problem:
        full = problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if problem.errno != errno.EPIPE and not full:
            raise
        if full:
            console.error(UserError(f"the output cannot be written: {files.reason(problem)}"))
        # The disk is full, or the reader, such as `head`, has seen enough; what is left must not raise at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
