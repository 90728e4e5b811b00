"""Training examples per second of two workers of one thread each, and of one process of two threads, on two cores.

Both are `dl7 train` as it is run, on the same recipe, whole trainings in turns; the rates are those it reports, which
leave out start and evaluation. Two workers should reach 0.95 of the rate of one process.

    python tests/benchmarks/workers.py resnet --data builtin:shapes --set training.epochs=1 --set training.compile=never
    python tests/benchmarks/workers.py seq2seq --data builtin:phrases --set training.epochs=1
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

GOAL = 0.95
WAYS = {"two workers": ("--workers", "2"), "one process": ()}


def rate(way: tuple[str, ...], threads: int, arguments: list[str]) -> float:
    """Of one training."""
    command = [sys.executable, "-m", "dl7cli", "train", *arguments, "--device", "cpu", *way, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        command += ["--out", os.path.join(folder, "run")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    value: float = json.loads(done.stdout)["rate"]
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each (default 3)")
    options, arguments = parser.parse_known_args()
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(1, options.rounds + 1):
        for name, way in WAYS.items():
            rates[name].append(rate(way, 1 if way else 2, arguments))
        seen = ", ".join(f"{name} {of[-1]:,.0f}" for name, of in rates.items())
        print(f"round {number}: {seen} examples/s", flush=True)
    ratios = [both / alone for both, alone in zip(*rates.values(), strict=True)]
    listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"two workers are {statistics.median(ratios):.2f} times as fast (goal {GOAL:.2f}; by round: {listed})")


if __name__ == "__main__":
    main()
