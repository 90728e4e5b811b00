"""`dl7 --help` answers at once: nothing slow is imported for it, and it is done long before torch would be."""

import json
import subprocess
import sys
import time

SLOW = ("torch", "datasets", "sacrebleu", "sentencepiece", "matplotlib", "numpy", "pydantic", "rich")

PROBE = """
import contextlib, json, sys
from dl7cli.cli import main
sys.argv = ["dl7", *json.loads(sys.argv[1])]
with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
    main()
print(json.dumps(sorted(sys.modules)))
"""


def imported(*arguments: str) -> set[str]:
    """The modules in memory after `dl7` with these arguments has come to its end."""
    command = [sys.executable, "-c", PROBE, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert "Usage: dl7" in done.stderr
    return set(json.loads(done.stdout))


def seconds(code: str) -> float:
    """The shortest of three times that Python takes to start and run this."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(time.perf_counter() - begin)
    return min(times)


def test_help_imports_nothing_slow() -> None:
    assert imported("--help").isdisjoint(SLOW)
    # Typer itself takes pydantic for the parameters of a command.
    assert imported("train", "--help").isdisjoint(set(SLOW) - {"pydantic"})


def test_help_takes_at_most_a_third_of_importing_torch() -> None:
    # Each is the best of three: what else the machine does meanwhile can only make a time longer.
    help_seconds = seconds("import sys; from dl7cli.cli import main; sys.argv = ['dl7', '--help']; main()")
    assert help_seconds <= seconds("import torch") / 3
