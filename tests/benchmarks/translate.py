"""Seconds that `dl7 translate` takes for the test sentences as a whole process, start-up included, by beam width
and precision.

They take turns after one run that is not counted; BLEU, by sacrebleu, shows that the work was done.

    python tests/benchmarks/translate.py --run RUN --data FOLDER
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sacrebleu

from dl7cli import checkpoint, runs
from dl7cli.data.pairs import read_pairs
from dl7cli.data.vocabulary import Vocabulary
from dl7cli.recipe import TranslationRecipe


def translate(run: str, file: Path, beam: int, precision: str) -> tuple[float, list[str]]:
    """Seconds and lines of one process."""
    command = [sys.executable, "-m", "dl7cli", "translate", "--run", run, "--input", str(file)]
    command += ["--beam", str(beam), "--precision", precision]
    begin = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return time.perf_counter() - begin, done.stdout.decode("utf-8").removesuffix("\n").split("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", required=True)
    parser.add_argument("--data", required=True, metavar="FOLDER")
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--precision", default="fp32", metavar="NAME,NAME", help="fp32, bf16 or both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object; rounds go to standard error")
    options = parser.parse_args()
    saved = checkpoint.load(runs.find(options.run, task="translation")[1])
    if not isinstance(saved.recipe, TranslationRecipe):
        parser.error(f"{options.run} is not a translator")
    data = saved.recipe.data
    read = read_pairs(options.data, source_language=data.source_language, target_language=data.target_language)
    pairs = read.splits["test"]
    vocabulary = Vocabulary.from_json(saved.assets.get("target_vocabulary", saved.assets["vocabulary"]))
    kinds = [(beam, name) for name in options.precision.split(",") for beam in dict.fromkeys([options.beam, 1])]
    seconds: dict[tuple[int, str], list[float]] = {kind: [] for kind in kinds}
    output: dict[tuple[int, str], list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "source.txt")
        file.write_text("".join(source.replace("\n", " ") + "\n" for source, _ in pairs), encoding="utf-8")
        translate(options.run, file, *kinds[-1])
        for number in range(1, options.rounds + 1):
            for kind in kinds:
                once, output[kind] = translate(options.run, file, *kind)
                seconds[kind].append(once)
            seen = ", ".join(f"beam {beam} {name} {every[-1]:.2f} s" for (beam, name), every in seconds.items())
            print(f"round {number}: {seen}", file=sys.stderr if options.json else sys.stdout, flush=True)
    results = []
    for kind, lines in output.items():
        (beam, name), taken = kind, seconds[kind]
        least, median = min(taken), statistics.median(taken)
        bleu = sacrebleu.corpus_bleu(lines, [[target for _, target in pairs]]).score
        tokens = sum(len(ids) + 1 for ids in vocabulary.encode_all(lines))  # and the end of each sentence
        results.append(
            {
                "beam": beam,
                "precision": name,
                "seconds": taken,
                "minimum": least,
                "median": median,
                "sentences": len(lines),
                "tokens": tokens,
                "bleu": bleu,
            }
        )
        if not options.json:
            print(
                f"beam {beam} in {name}: {least:.2f} s at best, {median:.2f} s in the median; "
                f"{len(lines):,} sentences, {tokens:,} tokens, BLEU {bleu:.2f}"
            )
    if options.json:
        print(json.dumps({"run": options.run, "results": results}))


if __name__ == "__main__":
    main()
