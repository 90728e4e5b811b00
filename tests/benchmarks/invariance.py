"""How many translations of the test sentences depend on what is translated with them.

They are translated as they come, shuffled, in smaller batches and one by one. The search itself is exact whatever the
batch; what the network computes is so within rounding, by which two hypotheses may change places that score alike.

    python tests/benchmarks/invariance.py --run RUN --data FOLDER [--precision fp32,bf16]
"""

import argparse
import random
from collections.abc import Iterator
from contextlib import contextmanager

from dl7cli import runs, tasks
from dl7cli.data.pairs import read_pairs
from dl7cli.device import choose
from dl7cli.tasks import translation
from dl7cli.tasks.translation import TranslatedLine, Translation


@contextmanager
def hypotheses_at_once(number: int) -> Iterator[None]:
    before = translation.HYPOTHESES_AT_ONCE
    translation.HYPOTHESES_AT_ONCE = number
    try:
        yield
    finally:
        translation.HYPOTHESES_AT_ONCE = before


def shuffled(task: Translation, sources: list[str]) -> list[TranslatedLine]:
    order = random.Random(1).sample(range(len(sources)), len(sources))
    found = task.translate([sources[number] for number in order])
    return [line for _, line in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


def compare(name: str, first: list[TranslatedLine], second: list[TranslatedLine]) -> None:
    other = sum(one.text != two.text for one, two in zip(first, second, strict=True))
    same = [abs(one.score - two.score) for one, two in zip(first, second, strict=True) if one.text == two.text]
    most = max(same, default=0.0)
    print(f"{name}: {other} of {len(first)} texts differ; scores of the same text by at most {most:.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", required=True)
    parser.add_argument("--data", required=True, metavar="FOLDER")
    parser.add_argument("--precision", default="fp32", metavar="NAME,NAME", help="fp32, bf16 or both")
    options = parser.parse_args()
    folder = runs.find(options.run, task="translation")[1]
    for precision in options.precision.split(","):
        task = tasks.load(folder, runtime=choose("auto", precision, searches=True), task="translation")
        assert isinstance(task, Translation)
        data = task.recipe.data
        pairs = read_pairs(options.data, source_language=data.source_language, target_language=data.target_language)
        sources = [source for source, _ in pairs.splits["test"]]
        plain = task.translate(sources)
        compare(f"{precision}, again", plain, task.translate(sources))
        compare(f"{precision}, shuffled", plain, shuffled(task, sources))
        with hypotheses_at_once(translation.HYPOTHESES_AT_ONCE // 4):
            compare(f"{precision}, in batches of a quarter", plain, task.translate(sources))
        compare(f"{precision}, one by one", plain, [task.translate([source])[0] for source in sources])


if __name__ == "__main__":
    main()
