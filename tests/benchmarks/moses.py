"""BLEU on lower-cased Moses tokens, the scale on which most scores of Multi30k are published.

    pip install sacremoses
    dl7 eval RUN --output translations.txt
    python tests/benchmarks/moses.py translations.txt --data bentrevett/multi30k

Translations and references are normalised, tokenised and lower-cased by sacremoses, with the settings of Moses' own
scripts, and scored by sacrebleu without any tokenizer. With several files one line for each.
"""

import argparse
from pathlib import Path

from sacrebleu.metrics.bleu import BLEU
from sacremoses import MosesPunctNormalizer, MosesTokenizer

from dl7cli.data.pairs import read_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("translations", nargs="+", type=Path, help="as `dl7 eval --output` writes them")
    parser.add_argument("--data", required=True, help="where the references are")
    parser.add_argument("--source-language", default="en")
    parser.add_argument("--target-language", default="de")
    parser.add_argument("--split", default="test")
    options = parser.parse_args()
    languages = options.source_language, options.target_language
    pairs = read_pairs(options.data, source_language=languages[0], target_language=languages[1])
    normaliser, tokenizer = MosesPunctNormalizer(languages[1]), MosesTokenizer(languages[1])

    def prepared(lines: list[str]) -> list[str]:
        return [tokenizer.tokenize(normaliser.normalize(line), return_str=True).lower() for line in lines]

    references = prepared([target for _, target in pairs.splits[options.split]])
    for file in options.translations:
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        if len(lines) != len(references):
            parser.error(f"{file} has {len(lines)} lines, and there are {len(references)} references")
        metric = BLEU(tokenize="none", force=True)
        score = metric.corpus_score(prepared(lines), [references])
        print(f"{score.score:.2f}  {file}  {metric.get_signature()}")


if __name__ == "__main__":
    main()
