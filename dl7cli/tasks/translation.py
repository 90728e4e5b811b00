"""Translation: where a recipe meets sentence pairs, a vocabulary, a sequence-to-sequence model, search and BLEU."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dl7cli.data.pairs import Pairs, read_pairs
from dl7cli.data.sources import Progress, silent
from dl7cli.data.transfer import moved
from dl7cli.data.vocabulary import BOS, EOS, PAD, Vocabulary
from dl7cli.device import Runtime, seed_everything
from dl7cli.errors import UserError
from dl7cli.metrics import Scores, bleu, chrf, translation
from dl7cli.models.seq2seq import Seq2Seq
from dl7cli.models.translator import Translator
from dl7cli.recipe import Decoding, TranslationRecipe
from dl7cli.search import Hypothesis
from dl7cli.tasks.decoding import search, teacher_forced

HYPOTHESES_AT_ONCE = 640
"""Sentences searched at once times the beam."""
SUBWORDS_AT_ONCE = 8192
"""Most subwords of a batch that is scored, padding included."""


class PairBatch(NamedTuple):
    """B sentence pairs of at most S source and T target subwords, padded with PAD."""

    source: Tensor
    """(B, S)"""
    lengths: Tensor
    """(B,) subwords of each source sentence, eos included"""
    previous: Tensor
    """(B, T) target subwords from bos on: what the decoder reads"""
    target: Tensor
    """(B, T) target subwords up to eos: what it should answer"""
    real: Tensor
    """(N,) where `target`, flattened, is not padding"""


class Candidate(NamedTuple):
    """One translation of a line."""

    text: str
    score: float
    """What ranks: the log-probability through the length penalty, and the coverage penalty."""
    log_probability: float
    tokens: list[str]
    """Target subwords, `</s>` included."""
    token_log_probabilities: list[float]
    attention: np.ndarray | None
    """(tokens, source tokens) in float32; None where it was not asked for or the model looks at nothing."""


class TranslatedLine(NamedTuple):
    text: str
    score: float
    source_tokens: list[str]
    """As the model reads them, `</s>` included; none of a blank line."""
    alternatives: list[Candidate]
    """The n best, the first included; none for a blank line."""
    cut: bool
    """Whether the line was longer than the model's limit."""


class ScoredPair(NamedTuple):
    """What the model says of a given translation."""

    log_probability: float
    tokens: list[str]
    """Target subwords, `</s>` included."""
    token_log_probabilities: list[float]

    @property
    def perplexity(self) -> float:
        """Of a subword."""
        return perplexity([self])


def perplexity(scored: Sequence[ScoredPair]) -> float:
    """Of a subword of all these translations together: e to the mean negative log-probability."""
    total = sum(one.log_probability for one in scored)
    return math.exp(-total / sum(len(one.tokens) for one in scored))


class Translation:
    """A translator with its data; `assets` are the vocabulary and the languages, all that using it needs."""

    unit = "target tokens"

    def __init__(
        self,
        recipe: TranslationRecipe,
        assets: dict[str, Any] | None = None,
        *,
        runtime: Runtime,
        offline: bool = False,
        progress: Progress = silent,
    ) -> None:
        self.recipe = recipe
        self.runtime = runtime
        self.notes: list[str] = []
        self._offline = offline
        self._progress = progress
        self._pairs: dict[str, list[tuple[str, str]]] | None = None
        self._encoded: list[tuple[list[int], list[int]]] | None = None
        self._plan: tuple[int, list[np.ndarray]] | None = None
        self._steps: dict[int, int] = {}
        if assets is None:
            train = self._splits()["train"]
            progress("learning the vocabulary", 0, 1)
            vocabulary = Vocabulary.train((text for pair in train for text in pair), recipe.data.vocabulary_size)
            progress("learning the vocabulary", 1, 1)
            assets = {
                "vocabulary": vocabulary.to_json(),
                "source_language": recipe.data.source_language,
                "target_language": recipe.data.target_language,
            }
        self.assets = assets
        self.vocabulary = Vocabulary.from_json(assets["vocabulary"])
        seed_everything(recipe.training.seed)
        self.model: Translator = Seq2Seq(
            len(self.vocabulary),
            pad=PAD,
            embedding_width=recipe.model.embedding_width,
            encoder_width=recipe.model.encoder_width,
            encoder_layers=recipe.model.encoder_layers,
            decoder_width=recipe.model.decoder_width,
            dropout=recipe.model.dropout,
        ).to(runtime.device)

    @property
    def data_name(self) -> str:
        return self.recipe.data.source

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def splits(self) -> dict[str, int]:
        """Sentence pairs in each split."""
        return {name: len(pairs) for name, pairs in self._splits().items()}

    @cached_property
    def digest(self) -> str:
        """Of what is trained and chosen on: the sentences of the training and validation splits."""
        digest = hashlib.sha256()
        for split in ("train", "validation"):
            for pair in self._splits()[split]:
                digest.update("\t".join((*pair, "\n")).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def steps(self, epoch: int) -> int:
        """Batches of an epoch, counted from 0."""
        if epoch not in self._steps:
            self._steps[epoch] = len(self._batch_plan(epoch))
        return self._steps[epoch]

    def batches(self, epoch: int, start: int = 0) -> Iterator[PairBatch]:
        """The training batches of an epoch from number `start` on, the same for the same seed and epoch."""
        pairs = self._training_pairs()
        for chosen in self._batch_plan(epoch)[start:]:
            yield self._batch([pairs[index] for index in chosen])

    def loss(self, batch: PairBatch) -> tuple[Tensor, int]:
        """Cross-entropy with label smoothing summed over the target subwords, eos included, and how many they are."""
        with self.runtime.autocast():
            decoded, context = self.model(batch.source, batch.lengths, batch.previous)
            logits = self.model.logits(decoded, context, batch.real)
        target = batch.target.flatten().index_select(0, batch.real)
        smoothing = self.recipe.training.label_smoothing
        total = functional.cross_entropy(logits.float(), target, reduction="sum", label_smoothing=smoothing)
        return total, len(target)

    def validate(self) -> Scores:
        """The score by which the best epoch is chosen, as `training.select` has it, and no more.

        Translations are greedy, as a beam would cost five times as much each epoch. The loss is turned round, so that
        higher is better: `log_likelihood`, the mean log-probability of a target subword, eos included.
        """
        select = self.recipe.training.select
        if select == "loss":
            scored = self.score(self._pairs_of("validation"))
            mean = math.fsum(one.log_probability for one in scored) / sum(len(one.tokens) for one in scored)
            if not math.isfinite(mean):
                raise UserError(
                    "the likelihood of the validation split is not a number",
                    hint="lower `--set optim.learning_rate=…` and train again",
                )
            return Scores("log_likelihood", {"log_likelihood": mean}, len(scored))
        texts = self.translations("validation", self.recipe.decoding.updated(method="beam", beam=1))
        references = [target for _, target in self._pairs_of("validation")]
        return bleu(texts, references) if select == "bleu" else chrf(texts, references)

    def evaluate(self, split: str, decoding: Decoding | None = None) -> Scores:
        """What `judge` says of a split's translations. Raises UserError where the data has no such split."""
        return self.judge(split, self.translations(split, decoding))

    def translations(self, split: str, decoding: Decoding | None = None) -> list[str]:
        """A split's sources translated, in their order. Raises as `evaluate`."""
        return [line.text for line in self.translate([source for source, _ in self._pairs_of(split)], decoding)]

    def judge(self, split: str, translations: Sequence[str], *, rouge: bool = False) -> Scores:
        """BLEU of translations against a split's references, with the scores and details of `metrics.translation`."""
        sources, references = zip(*self._pairs_of(split), strict=True)
        return translation(sources, translations, references, with_rouge=rouge)

    def translate(
        self,
        lines: Sequence[str],
        decoding: Decoding | None = None,
        *,
        n_best: int = 1,
        prefixes: Sequence[str] | None = None,
        others: Sequence["Translation"] = (),
        attention: bool = False,
        first_line: int = 1,
    ) -> list[TranslatedLine]:
        """Translate each line; a blank one stays blank. `decoding` is the recipe's where it is not given.

        By the method `sample` the n best are n samples in the order drawn; they depend on `decoding.seed` and on the
        number of the line, counted from `first_line`. `prefixes` are texts that the translations begin with, `others`
        the rest of an ensemble. `attention`: whether candidates have theirs. Lines of like length are searched
        together, which changes no result, only the time. Raises UserError where `n_best` is more than the beam, and
        where the models of an ensemble do not read and write the same.
        """
        decoding = self.recipe.decoding if decoding is None else decoding
        if decoding.method == "beam" and n_best > decoding.beam:
            raise UserError(
                f"a beam of {decoding.beam} cannot give the {n_best} best", hint=f"use `--beam {n_best}` or more"
            )
        models, limit = self._ensemble(others)
        encoded = self.vocabulary.encode_all([line.strip() for line in lines])
        begun = self.vocabulary.encode_all([text.strip() for text in prefixes or [""] * len(lines)])
        answers = [TranslatedLine("", 0.0, [], [], False)] * len(lines)
        order = sorted((at for at, ids in enumerate(encoded) if ids), key=lambda at: len(encoded[at]))
        size = max(1, HYPOTHESES_AT_ONCE // (decoding.beam if decoding.method == "beam" else n_best))
        for begin in range(0, len(order), size):
            chosen = order[begin : begin + size]
            sources = [[*encoded[at][:limit], EOS] for at in chosen]
            found = search(
                models,
                *self._padded(sources),
                decoding,
                subwords=[min(len(encoded[at]), limit) for at in chosen],
                prefixes=[begun[at] for at in chosen],
                numbers=[first_line + at for at in chosen],
                n_best=n_best,
                attention=attention,
            )
            for at, source, hypotheses in zip(chosen, sources, found, strict=True):
                candidates = [self._candidate(one, len(source)) for one in hypotheses]
                text, score = (candidates[0].text, candidates[0].score) if candidates else ("", 0.0)
                tokens = self.vocabulary.pieces(source)
                answers[at] = TranslatedLine(text, score, tokens, candidates, len(encoded[at]) > limit)
            self._progress("translating", begin + len(chosen), len(order))
        return answers

    def score(self, pairs: Sequence[tuple[str, str]], *, others: Sequence["Translation"] = ()) -> list[ScoredPair]:
        """What the model, or an ensemble with `others`, says of each pair's target given its source.

        By teacher forcing. A source too long is cut as `translate` cuts it. Raises UserError as `translate` does for an
        ensemble.
        """
        models, limit = self._ensemble(others)
        sources = self.vocabulary.encode_all([source.strip() for source, _ in pairs])
        targets = self.vocabulary.encode_all([target.strip() for _, target in pairs])
        answers = [ScoredPair(0.0, [], [])] * len(pairs)
        lengths = np.array([max(len(s), len(t)) + 1 for s, t in zip(sources, targets, strict=True)])
        for chosen in _fill(np.argsort(lengths, kind="stable"), lengths, SUBWORDS_AT_ONCE) if pairs else []:
            batch = self._batch([(sources[at][:limit], targets[at]) for at in chosen])
            values = teacher_forced(models, *batch).tolist()
            for at in chosen:
                length = len(targets[at]) + 1
                own, values = values[:length], values[length:]
                answers[at] = ScoredPair(math.fsum(own), self.vocabulary.pieces([*targets[at], EOS]), own)
        return answers

    def _ensemble(self, others: Sequence["Translation"]) -> tuple[list[Translator], int]:
        """The models that answer together, and the most subwords that all of them read."""
        for other in others:
            if other.assets != self.assets:
                raise UserError(
                    f"`{self.recipe.name}` and `{other.recipe.name}` have different vocabularies",
                    hint="train the runs of an ensemble on the same data with the same keys of `data`",
                )
        tasks = [self, *others]
        return [one.model for one in tasks], min(one.recipe.data.max_length for one in tasks)

    def _candidate(self, found: Hypothesis, source_length: int) -> Candidate:
        return Candidate(
            self.vocabulary.decode(found.ids),
            found.score,
            found.log_probability,
            self.vocabulary.pieces([*found.ids, EOS]),
            list(found.token_log_probabilities),
            None if found.attention is None else found.attention[:, :source_length],
        )

    def _splits(self) -> dict[str, list[tuple[str, str]]]:
        if self._pairs is None:
            self._pairs = self._read()
        return self._pairs

    def _pairs_of(self, split: str) -> list[tuple[str, str]]:
        if split not in self._splits():
            raise UserError(f"`{self.data_name}` has no split `{split}`", hint=f"it has {', '.join(self._splits())}")
        return self._splits()[split]

    def _read(self) -> dict[str, list[tuple[str, str]]]:
        data = self.recipe.data
        found: Pairs = read_pairs(
            data.source,
            source_language=data.source_language,
            target_language=data.target_language,
            offline=self._offline,
            progress=self._progress,
        )
        self.notes.extend(found.notes)
        splits = dict(found.splits)
        if "validation" not in splits:
            splits["train"], splits["validation"] = _carve(splits["train"], data.validation_fraction)
            self.notes.append(f"{len(splits['validation']):,} pairs of train are kept for validation")
        return splits

    def _training_pairs(self) -> list[tuple[list[int], list[int]]]:
        """Training pairs as subword ids, without those longer than the recipe's limit."""
        if self._encoded is None:
            pairs = self._splits()["train"]
            limit = self.recipe.data.max_length
            sources = self.vocabulary.encode_all([source for source, _ in pairs])
            targets = self.vocabulary.encode_all([target for _, target in pairs])
            both = zip(sources, targets, strict=True)
            self._encoded = [(source, target) for source, target in both if max(len(source), len(target)) <= limit]
            if not self._encoded:
                raise UserError(
                    f"no training pair of `{self.data_name}` is within {limit} subwords",
                    hint="raise `--set data.max_length=N`",
                )
            if len(self._encoded) < len(pairs):
                left_out = len(pairs) - len(self._encoded)
                self.notes.append(f"{left_out:,} training pairs longer than {limit} subwords are left out")
        return self._encoded

    def _batch_plan(self, epoch: int) -> list[np.ndarray]:
        """The pairs of each batch: of like length, at most `batch_tokens` padded steps a side, in random order."""
        if self._plan is None or self._plan[0] != epoch:
            pairs = self._training_pairs()
            random = np.random.default_rng([self.recipe.training.seed, epoch])
            targets = np.array([len(target) + 1 for _, target in pairs])
            sources = np.array([len(source) + 1 for source, _ in pairs])
            # The noise lets pairs meet other partners in every epoch.
            noise = random.integers(0, 2, len(pairs))
            order = np.lexsort((sources + random.random(len(pairs)), targets + noise))
            batches = _fill(order, np.maximum(sources, targets), self.recipe.training.batch_tokens)
            self._plan = epoch, [batches[index] for index in random.permutation(len(batches))]
        return self._plan[1]

    def _batch(self, pairs: list[tuple[list[int], list[int]]]) -> PairBatch:
        source, lengths = self._padded([[*ids, EOS] for ids, _ in pairs])
        previous, _ = self._padded([[BOS, *ids] for _, ids in pairs])
        target = _rectangle([[*ids, EOS] for _, ids in pairs])
        # Found before it is moved: a device would have to be waited for.
        real = (target != PAD).flatten().nonzero().flatten()
        device = self.runtime.device
        return PairBatch(source, lengths, previous, moved(target, device), moved(real, device))

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Rows of ids as one tensor (B, longest), and their lengths (B,), on the device."""
        device = self.runtime.device
        return moved(_rectangle(rows), device), moved(torch.tensor([len(row) for row in rows]), device)


def _rectangle(rows: list[list[int]]) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


def _fill(order: np.ndarray, lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Cut `order` into runs whose longest member times their number is at most `tokens`; at least one each."""
    batches = []
    begin, longest = 0, 0
    for at, index in enumerate(order):
        grown = max(longest, int(lengths[index]))
        if at > begin and grown * (at + 1 - begin) > tokens:
            batches.append(order[begin:at])
            begin, grown = at, int(lengths[index])
        longest = grown
    return [*batches, order[begin:]]


def _carve(pairs: list[tuple[str, str]], fraction: float) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Split training pairs into two; the choice is the same for every seed, so that runs can be compared."""
    kept = max(1, round(len(pairs) * fraction))
    if kept >= len(pairs):
        raise UserError(f"{len(pairs)} training pairs are too few to keep some for validation", hint="add pairs")
    chosen = set(np.random.default_rng(0).permutation(len(pairs))[:kept].tolist())
    rest = [pair for at, pair in enumerate(pairs) if at not in chosen]
    return rest, [pair for at, pair in enumerate(pairs) if at in chosen]
