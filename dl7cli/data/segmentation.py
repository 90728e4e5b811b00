"""Random segmentations of words into subwords, so that a model in training sees a word in many spellings.

sentencepiece has both methods, but draws from a generator whose numbers differ from process to process whatever its
seed, so that no run could be resumed exactly. No subword reaches beyond a word, so a sentence is its words.
"""

from bisect import bisect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from math import exp, fsum, log
from random import Random

WORDS_KEPT = 1 << 15
"""Of so many words what can become of them is kept: most come again and again."""
LONGEST_KEPT = 30
"""Letters of a word that is; a sentence in a script without spaces is one long word and hardly comes again."""
UNKNOWN_PENALTY = 10.0
"""Nats by which a character that is no subword is less probable than any subword, as in sentencepiece."""


class UnigramSampling:
    """Kudo 2018 (arXiv 1804.10959, §3.3, l = ∞): segmentation x of a word has the probability P(x)^α / Σ P(x')^α.

    P(x) is the product of its subwords' probabilities. The draw is exact, by forward filtering and backward sampling.
    """

    def __init__(self, scores: Mapping[str, float], alpha: float) -> None:
        """`scores` are the natural logarithms of the subwords' probabilities."""
        self._scores = scores
        self._alpha = alpha
        self._longest = max(map(len, scores))
        self._unknown = min(scores.values()) - UNKNOWN_PENALTY
        self._kept_lattice = lru_cache(WORDS_KEPT)(self._lattice)

    def sample(self, word: str, random: Random) -> Sequence[str]:
        lattice = self._kept_lattice(word) if len(word) <= LONGEST_KEPT else self._lattice(word)
        pieces = []
        end = len(word)
        while end:
            starts, shares = lattice[end]
            # Rounding may make the product the whole sum.
            start = starts[bisect(shares, random.random() * shares[-1], hi=len(shares) - 1)]
            pieces.append(word[start:end])
            end = start
        return pieces[::-1]

    def _lattice(self, word: str) -> list[tuple[list[int], list[float]]]:
        """For every end in the word, where the subword that ends there may start, and its shares summed up so far."""
        lattice: list[tuple[list[int], list[float]]] = [([], [])]
        totals = [0.0]  # log Σ P^α over the segmentations of the word's first characters
        for end in range(1, len(word) + 1):
            starts, weights = [], []
            for start in range(max(0, end - self._longest), end):
                score = self._scores.get(word[start:end], self._unknown if start == end - 1 else None)
                if score is not None:
                    starts.append(start)
                    weights.append(totals[start] + self._alpha * score)
            most = max(weights)
            shares = [exp(weight - most) for weight in weights]
            lattice.append((starts, list(accumulate(shares))))
            totals.append(most + log(fsum(shares)))
        return lattice


class BPEDropout:
    """Provilkov et al. 2020 (arXiv 1910.13267, algorithm 1): BPE of which each step leaves out merges by chance.

    A step tries the possible merges from the best on; each is left out with `probability`, and the first that is not is
    made. A word is done when all are left out. (Only the best that is left matters, so the others need not be drawn.)
    """

    def __init__(self, scores: Mapping[str, float], probability: float) -> None:
        """`scores` rank the subwords: of two merges that with the greater score comes first."""
        self._scores = scores
        self._probability = probability
        self._kept_steps = lru_cache(WORDS_KEPT)(self._steps)

    def sample(self, word: str, random: Random) -> Sequence[str]:
        steps = self._kept_steps(word) if len(word) <= LONGEST_KEPT else self._steps(word)
        last = len(steps) - 1
        # Up to the first step that leaves the best merge out, all is as without chance.
        pieces, merges = steps[next((at for at in range(last) if random.random() < self._probability), last)]
        merges = merges[1:]
        while (at := next((at for at in merges if random.random() >= self._probability), None)) is not None:
            pieces = _merged(pieces, at)
            merges = self._merges(pieces)
        return pieces

    def _steps(self, word: str) -> list[tuple[list[str], list[int]]]:
        """Pieces and possible merges before each step of BPE that leaves nothing out, and after the last."""
        pieces = list(word)
        steps = [(pieces, self._merges(pieces))]
        while merges := steps[-1][1]:
            pieces = _merged(pieces, merges[0])
            steps.append((pieces, self._merges(pieces)))
        return steps

    def _merges(self, pieces: list[str]) -> list[int]:
        """The places of two neighbours that make a subword, best first, and of equal ones from the left."""
        scores = [self._scores.get(one + other) for one, other in pairwise(pieces)]
        return [at for _, at in sorted((-score, at) for at, score in enumerate(scores) if score is not None)]


def _merged(pieces: list[str], at: int) -> list[str]:
    return [*pieces[:at], pieces[at] + pieces[at + 1], *pieces[at + 2 :]]
