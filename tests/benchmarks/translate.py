"""Seconds and memory that `dl7 translate` takes for the test sentences as a whole process, start-up included, by beam
width, precision, and how many times over the sentences are in its input; and how long the search itself takes.

They take turns after one run that is not counted; BLEU, by sacrebleu, shows that the work was done. The search is timed
in this process, once for each beam and precision as it is in the others, and then in as many rounds.

    python tests/benchmarks/translate.py --run RUN --data FOLDER
    python tests/benchmarks/translate.py --run RUN --data FOLDER --beams 1,2,4,8,16,32 --times 1,10
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import sacrebleu

from dl7cli import checkpoint, runs, tasks
from dl7cli.data.pairs import read_pairs
from dl7cli.data.vocabulary import Vocabulary
from dl7cli.device import choose
from dl7cli.recipe import TranslationRecipe
from dl7cli.tasks.translation import Translation


class Kind(NamedTuple):
    """What is timed."""

    beam: int
    precision: str
    times: int

    def __str__(self) -> str:
        return f"beam {self.beam} {self.precision}" + (f" x{self.times}" if self.times > 1 else "")


class Taken(NamedTuple):
    seconds: float
    megabytes: float
    """At most, of main memory; on Linux no less than this process has."""
    lines: list[str]


def translate(run: str, file: Path, kind: Kind) -> Taken:
    """What one process takes and gives."""
    command = [sys.executable, "-m", "dl7cli", "translate", "--run", run, "--input", str(file)]
    command += ["--beam", str(kind.beam), "--precision", kind.precision]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    text = process.stdout.read().decode("utf-8")
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Taken(seconds, usage.ru_maxrss * unit / 1e6, text.removesuffix("\n").split("\n"))


def search(task: Translation, sources: list[str], beam: int) -> tuple[float, int]:
    """Seconds for all sentences, from text to text, and the subwords of the translations with their ends."""
    begin = time.perf_counter()
    found = task.translate(sources, task.recipe.decoding.updated(beam=beam))
    seconds = time.perf_counter() - begin
    return seconds, sum(len(line.alternatives[0].tokens) for line in found if line.alternatives)


def numbers(text: str) -> list[int]:
    return list(dict.fromkeys(map(int, text.split(","))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", required=True)
    parser.add_argument("--data", required=True, metavar="FOLDER")
    parser.add_argument("--beams", type=numbers, default=[5, 1], metavar="N,N")
    parser.add_argument("--precision", default="fp32", metavar="NAME,NAME", help="fp32, bf16 or both")
    parser.add_argument("--times", type=numbers, default=[1], metavar="N,N", help="the sentences so many times over")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object; rounds go to standard error")
    options = parser.parse_args()
    folder_of_run = runs.find(options.run, task="translation")[1]
    saved = checkpoint.load(folder_of_run)
    if not isinstance(saved.recipe, TranslationRecipe):
        parser.error(f"{options.run} is not a translator")
    data = saved.recipe.data
    read = read_pairs(options.data, source_language=data.source_language, target_language=data.target_language)
    pairs = read.splits["test"]
    vocabulary = Vocabulary.from_json(saved.assets.get("target_vocabulary", saved.assets["vocabulary"]))
    kinds = [
        Kind(beam, name, times)
        for times in options.times
        for name in options.precision.split(",")
        for beam in options.beams
    ]
    seconds: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    megabytes: dict[Kind, float] = dict.fromkeys(kinds, 0.0)
    output: dict[Kind, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        text = "".join(source.replace("\n", " ") + "\n" for source, _ in pairs)
        files = {times: Path(folder, f"source-{times}.txt") for times in options.times}
        for times, file in files.items():
            file.write_text(times * text, encoding="utf-8")
        translate(options.run, files[kinds[0].times], kinds[0])
        for number in range(1, options.rounds + 1):
            for kind in kinds:
                taken = translate(options.run, files[kind.times], kind)
                seconds[kind].append(taken.seconds)
                megabytes[kind] = max(megabytes[kind], taken.megabytes)
                output[kind] = taken.lines
            seen = ", ".join(f"{kind} {every[-1]:.2f} s" for kind, every in seconds.items())
            print(f"round {number}: {seen}", file=sys.stderr if options.json else sys.stdout, flush=True)
    sources = [source for source, _ in pairs]
    searched: dict[tuple[int, str], list[float]] = {}
    for name in options.precision.split(","):
        loaded = tasks.load(folder_of_run, runtime=choose("auto", name, searches=True), task="translation")
        assert isinstance(loaded, Translation)
        for beam in options.beams:
            search(loaded, sources, beam)
            rates = []
            for _ in range(options.rounds):
                taken_by_search, tokens = search(loaded, sources, beam)
                rates.append(tokens / taken_by_search)
            searched[beam, name] = rates
    results = []
    for kind, lines in output.items():
        taken = seconds[kind]
        first = lines[: len(pairs)]
        bleu = sacrebleu.corpus_bleu(first, [[target for _, target in pairs]]).score
        tokens = sum(len(ids) + 1 for ids in vocabulary.encode_all(first))  # and the end of each sentence
        results.append(
            {
                **kind._asdict(),
                "seconds": taken,
                "minimum": min(taken),
                "median": statistics.median(taken),
                "megabytes": megabytes[kind],
                "sentences": len(lines),
                "tokens": tokens * kind.times,
                "bleu": bleu,
                "search_tokens_per_second": searched[kind.beam, kind.precision],
            }
        )
        if not options.json:
            print(
                f"{kind}: {min(taken):.2f} s at best, {statistics.median(taken):.2f} s in the median, "
                f"{megabytes[kind]:.0f} MB; {len(lines):,} sentences, {tokens * kind.times:,} tokens, BLEU {bleu:.2f}; "
                f"search alone {statistics.median(searched[kind.beam, kind.precision]):,.0f} tokens/s in the median"
            )
    if options.json:
        print(json.dumps({"run": options.run, "results": results}))


if __name__ == "__main__":
    main()
